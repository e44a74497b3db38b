"""Events for people at a terminal: what is said, and what can never be."""

from __future__ import annotations

import re
from datetime import timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stalld.tail.client import Lines
from stalld.tail.view import (
    Line,
    Span,
    clean,
    columns,
    duration,
    event_lines,
    fit,
    paint,
    short_id,
)

ZONE = timezone(timedelta(hours=2))
BLOCKER = {
    "pid": 10,
    "tid": 11,
    "comm": "cadvisor",
    "cmdline": None,
    "mode": "kernel",
    "policy": "other",
    "rt_priority": None,
    "nice": 0,
    "cgroup": None,
    "unit": None,
    "container_id": None,
    "pod_uid": None,
}
STALL: dict[str, Any] = {
    "timestamp": "2026-01-02T03:04:05.700000Z",
    "level": "warning",
    "event": "stall",
    "schema": "softirq-stalld/1",
    "host": "web-1",
    "phase": "resolved",
    "stall_id": "d7c427c6-11a16ceb3c7d-3-12",
    "cpu": 3,
    "started_at": "2026-01-02T03:04:05.648901Z",
    "duration_ms": 51.26,
    "verdict": "stuck_in_kernel",
    "starved": {"NET_RX": 50.0, "TIMER": 20.0},
    "ksoftirqd": {"pid": 16, "runnable_ms": 49.5},
    "waiting": [{"pid": 17, "comm": None, "runnable_ms": 12.0}],
    "handler": None,
    "blocker": BLOCKER,
    "stack": {"kernel": ["memcg_stat_show+0x10", "seq_read+0x5"], "captured": "during"},
    "evidence": {"late_ms": 0.0, "stolen_ms": 0.4},
    "net": {"dropped": 0, "time_squeeze": 0, "queues": None},
    "hint": "look at what its stack's system call does",
}


def text(event: dict[str, Any], width: int = 200, **more: Any) -> str:
    """What stands on a terminal without colours."""
    return "\n".join(plain(event_lines(event, width=width, zone=ZONE, **more)))


def plain(lines: list[Line]) -> list[str]:
    """Without colours."""
    return [paint(line, colour=False) for line in lines]


def test_a_whole_stall() -> None:
    """Time, CPU, length, verdict, who starved, who is to blame, who waited, where, what to do."""
    assert text(STALL) == (
        "05:04:05.648  cpu 3  51.3 ms  a task stayed in the kernel  #3-12\n"
        "  starved    NET_RX 50.0 ms, TIMER 20.0 ms\n"
        "  blocker    cadvisor, pid 10 tid 11, in the kernel, policy other\n"
        "  waited     ksoftirqd, pid 16, 49.5 ms for the CPU\n"
        "  waited     a thread, pid 17, 12.0 ms for the CPU\n"
        "  stack      memcg_stat_show+0x10\n"
        "             seq_read+0x5\n"
        "  hint       look at what its stack's system call does"
    )


def test_an_ongoing_stall_says_so() -> None:
    """Its length is what it is by now, and marked as not final."""
    ongoing = STALL | {"phase": "ongoing"}
    assert "  51.3 ms so far  " in text(ongoing)
    assert "  1234.0 ms so far  " in text(ongoing, so_far_ms=1234.0)


def test_who_the_blocker_belongs_to() -> None:
    """The container and its pod, or the unit; the command line when it is known."""
    blocker = BLOCKER | {"unit": "nginx.service", "cmdline": "nginx: worker"}
    assert "  unit       nginx.service\n  command    nginx: worker\n" in text(
        STALL | {"blocker": blocker}
    )
    blocker |= {"syscall": "read", "file": "proc:/1/stat"}
    assert "  command    nginx: worker\n  call       read() on proc:/1/stat\n" in text(
        STALL | {"blocker": blocker}
    )
    assert "  call       read()\n" in text(STALL | {"blocker": blocker | {"file": None}})
    blocker |= {"container_id": "0123456789abcdef", "pod_uid": "aa-bb"}
    told = text(STALL | {"blocker": blocker})
    assert "  container  0123456789ab, pod aa-bb\n" in told
    assert "nginx.service" not in told


@pytest.mark.parametrize(
    ("net", "told"),
    [
        (None, ""),
        ({}, ""),
        ({"dropped": None, "time_squeeze": 0, "queues": None}, ""),
        ({"dropped": 14, "time_squeeze": 3}, "14 packets dropped; budget used up 3 times"),
        (
            {
                "queues": [
                    {"device": "eth3", "queue": 5, "rps": False},
                    {"device": "eth3", "queue": 5, "rps": False},
                    {"device": "veth1", "queue": 0, "rps": True},
                    {"device": "wlan0", "queue": None, "rps": False},
                ]
            },
            "serves eth3 rx queue 5, veth1 rx queue 0 (RPS), wlan0",
        ),
        (
            {"dropped": 1, "queues": [{"device": f"eth{n}", "queue": 0} for n in range(6)]},
            "1 packets dropped; serves eth0 rx queue 0, eth1 rx queue 0, eth2 rx queue 0, "
            "eth3 rx queue 0, 2 more",
        ),
        ({"queues": 7, "dropped": "many"}, ""),
    ],
)
def test_network(net: Any, told: str) -> None:
    """What was dropped and which queues the CPU serves, in one row, if any is known."""
    rows = [row for row in text(STALL | {"net": net}).split("\n") if row.startswith("  net ")]
    assert rows == ([f"  net        {told}"] if told else [])


def test_priorities() -> None:
    """A real-time priority, or a nice value that is not the usual one."""
    fifo = BLOCKER | {"policy": "fifo", "rt_priority": 50, "nice": None, "mode": "softirq"}
    assert "in a softirq, policy fifo 50\n" in text(STALL | {"blocker": fifo})
    assert "policy other nice -5\n" in text(STALL | {"blocker": BLOCKER | {"nice": -5}})


def test_what_else_happened() -> None:
    """A handler that ran long, a late timer interrupt, a hypervisor; a stack of afterwards."""
    handler = {"vector": "NET_RX", "service_ms": 40.0, "device": "eth0"}
    event = STALL | {
        "handler": handler,
        "evidence": {"late_ms": 44.0, "stolen_ms": 12.0},
        "blocker": None,
        "starved": {},
        "stack": {"kernel": ["a+0x1"], "captured": "after"},
    }
    told = text(event)
    assert "  starved    nothing\n" in told
    assert "  blocker    no task\n" in told
    assert "  also       the NET_RX handler ran 40.0 ms, polling eth0\n" in told
    assert "  also       the timer interrupt came 44.0 ms late\n" in told
    assert "  also       the hypervisor took 12.0 ms\n" in told
    assert "a+0x1  (when it was over)" in told


def test_only_the_top_frames() -> None:
    """Six of them, and how many more there are."""
    stack = {"kernel": [f"f{n}+0x0" for n in range(20)], "captured": "during"}
    told = text(STALL | {"stack": stack})
    assert "f5+0x0" in told
    assert "f6+0x0" not in told
    assert "… 14 more" in told


@pytest.mark.parametrize(
    ("event", "told"),
    [
        (
            {
                "event": "started",
                "version": "0.1.0",
                "host": "web-1",
                "kernel": "6.1.0",
                "threshold_ms": 10.0,
                "missing": [{"ability": "NMI sampler"}],
            },
            "started  softirq-stalld 0.1.0 on web-1, Linux 6.1.0, threshold 10 ms; "
            "does without: NMI sampler",
        ),
        (
            {"event": "stopped", "uptime_ms": 12_345.0, "stalls": 3, "records_lost": 0},
            "stopped  after 12.3 s, 3 stalls, 0 records lost",
        ),
        (
            {
                "event": "suppressed",
                "cpus": [1, 3],
                "count": 12,
                "total_ms": 340.25,
                "reason": "identical",
                "blocker": {"pid": 10, "comm": "cadvisor"},
                "like": "a-b-3-12",
            },
            "suppressed  cpu 1, 3: 12 more stalls of cadvisor like #3-12, 340.2 ms in all "
            "(identical)",
        ),
        (
            {"event": "records_lost", "cpu": 1, "count": 7},
            "records_lost  cpu 1: the kernel had no room for 7",
        ),
        (
            {
                "event": "degraded",
                "name": "live pid 9",
                "state": "gap",
                "reason": "too slow",
                "dropped": 3,
            },
            "degraded  3 events are missing here: live pid 9: too slow",
        ),
        (
            {"event": "degraded", "name": "tcp x:1", "state": "begun", "reason": "refused"},
            "degraded  tcp x:1: refused",
        ),
        (
            {"event": "degraded", "name": "tcp x:1", "state": "ended", "reason": "connected"},
            "degraded  over: tcp x:1: connected",
        ),
        (
            {
                "event": "softnet",
                "cpu": 11,
                "phase": "begun",
                "dropped": 14,
                "time_squeeze": 3,
                "packets": 500,
                "hint": "not here",
            },
            "softnet  cpu 11: 14 packets dropped, budget used up 3 times (begun; 500 received)",
        ),
        (
            {
                "event": "nic",
                "device": "eth3",
                "phase": "ended",
                "drops": 14,
                "packets": 500,
                "queues": [{"queue": 5, "drops": 13, "counter": "rx5_discards"}],
            },
            "nic  eth3: 14 packets dropped, rx5_discards 13 (ended; 500 received)",
        ),
        ({"event": "nic", "queues": 7}, "nic  :  packets dropped (;  received)"),
        ({"event": "task_blocked", "pid": 7, "host": "h"}, "task_blocked  pid=7"),
    ],
)
def test_other_events_are_one_line(event: dict[str, Any], told: str) -> None:
    """What a person needs of them."""
    event = {"timestamp": "2026-01-02T03:04:05.700000Z"} | event
    assert text(event) == f"05:04:05.700  {told}"


def test_long_reasons_are_folded() -> None:
    """What is to be done must be read, so it is folded and not cut."""
    event = {"event": "degraded", "name": "tcp x:1", "state": "begun", "reason": "word " * 20}
    told = text(event, width=60).split("\n")
    assert len(told) == 3
    assert told[0].startswith("--:--:--.---  degraded  tcp x:1: word")
    assert all(line.startswith("             word") for line in told[1:])
    assert max(map(len, told)) <= 60
    assert text(event | {"reason": "word " * 2000}, width=60).endswith(" …")


def test_durations() -> None:
    """Long ones in seconds."""
    assert duration(9_999.94) == "9999.9 ms"
    assert duration(12_345.6) == "12.3 s"


def test_short_ids_tell_stalls_of_a_run_apart() -> None:
    """CPU and number; nothing of nothing."""
    assert short_id("d7c427c6-11a16ceb3c7d-3-12") == "#3-12"
    assert short_id("x") == "#x"
    assert short_id(None) == ""


@pytest.mark.parametrize("width", [1, 5, 20, 40, 80])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    """Cut, and marked as cut: who draws anew must know how many lines there are."""
    blocker = BLOCKER | {"cmdline": "漢字" * 100}
    for line in event_lines(STALL | {"blocker": blocker}, width=width):
        assert columns(paint(line, colour=False)) <= width


def test_wide_and_combining_characters() -> None:
    """A Chinese character takes two columns, an accent none."""
    assert columns("漢e\u0301") == 3
    assert plain([fit((Span("漢漢漢"),), 5)]) == ["漢漢…"]
    assert plain([fit((Span("ab"), Span("cd")), 3)]) == ["ab…"]


def test_long_hints_are_folded() -> None:
    """A hint is for reading: at most three lines of it."""
    told = text(STALL | {"hint": "word " * 100}, width=80)
    assert told.count("\n             word") == 2
    assert told.endswith("…")


def test_colours_are_closed() -> None:
    """Each coloured part ends its colour; without colours there is no escape at all."""
    line = (Span("a", "red"), Span("b"), Span("", "dim"))
    assert paint(line, colour=True) == "\x1b[1;31ma\x1b[0mb"
    assert paint(line, colour=False) == "ab"


HOSTILE = [
    "\x1b[2J\x1b]0;owned\x07",
    "a\nb\rc",
    "\x9b31m",
    "\u202eevil\u2066",
    "\u2028\u2029\x85\x00\x7f",
    "\ufeff\u200b\U000e0001",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_of_outside_controls_the_terminal(name: str) -> None:
    """In whatever string it stands, keys included, only printable characters come out."""

    def everywhere(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: everywhere(item) for key, item in value.items()} | {name: name}
        if isinstance(value, list):
            return [everywhere(item) for item in value]
        return name if isinstance(value, str) or value is None else value

    for event in (everywhere(STALL) | {"event": "stall"}, everywhere(STALL)):
        for line in event_lines(clean(event), width=300):
            assert paint(line, colour=False).isprintable()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(st.sampled_from(sorted(STALL)), JSON, st.sampled_from(["stall", "suppressed", "started"]))
def test_any_value_is_bearable(key: str, value: Any, kind: str) -> None:
    """A key with a value of whatever type is shown or left out, and never more."""
    for changed in (STALL | {key: value}, STALL | {"blocker": {key: value}}):
        lines = event_lines(clean(changed | {"event": kind}), width=80)
        assert all(paint(line, colour=False).isprintable() for line in lines)


@given(st.text(max_size=50))
def test_cleaning_twice_changes_nothing(name: str) -> None:
    """What is clean stays as it is, so it may be cleaned at every door."""
    assert clean(clean(name)) == clean(name)
    assert re.fullmatch(r"[^\x00-\x1f\x7f-\x9f]*", clean(name))


@given(st.lists(st.binary(max_size=20)), st.integers(1, 30))
def test_lines_however_they_are_cut(pieces: list[bytes], size: int) -> None:
    """A stream gives the same lines in whatever pieces it comes; long ones are counted."""
    stream = b"\n".join(pieces) + b"\n"
    lines = Lines(most=10)
    got = [
        line for at in range(0, len(stream), size) for line in lines.feed(stream[at : at + size])
    ]
    whole = stream.split(b"\n")[:-1]
    assert got == [part + b"\n" for part in whole if len(part) <= 10]
    assert lines.skipped == sum(len(part) > 10 for part in whole)
