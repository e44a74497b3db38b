"""Events at a terminal: what a person needs, and nothing that controls the terminal."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stalld.sinks.text import TOP_FRAMES, render, safe

HEAD = {"timestamp": "T", "level": "warning", "schema": "s", "host": "h"}


def stall(**changes: Any) -> dict[str, Any]:
    """A stall as events.py makes it."""
    event: dict[str, Any] = HEAD | {
        "event": "stall",
        "phase": "resolved",
        "cpu": 3,
        "duration_ms": 51.26,
        "verdict": "stuck_in_kernel",
        "starved": {"NET_RX": 50.0, "TIMER": 20.0},
        "ksoftirqd": {"pid": 16, "runnable_ms": 49.5},
        "waiting": [],
        "handler": None,
        "blocker": blocker(),
        "stack": stack("memcg_stat_show+0x10", "seq_read+0x5"),
        "evidence": {"late_ms": 0.0, "stolen_ms": 0.4},
        "net": net(),
        "hint": None,
    }
    return event | changes


def net(**changes: Any) -> dict[str, Any]:
    """What the CPU did for the network, as far as it is shown."""
    return {"dropped": 0, "time_squeeze": 0, "queues": []} | changes


def queue(device: str, number: int | None = None, rps: bool = False) -> dict[str, Any]:
    """A receive queue, as far as it is shown."""
    return {"device": device, "queue": number, "rps": rps}


def blocker(**changes: Any) -> dict[str, Any]:
    """Who had the CPU, as far as it is shown."""
    known = {"comm": "cadvisor", "pid": 10, "tid": 11, "mode": "kernel", "policy": "other"}
    return known | {"rt_priority": None} | changes


def stack(*frames: str, captured: str = "during") -> dict[str, Any]:
    """The stack of a stall."""
    return {"kernel": list(frames), "user": [], "captured": captured}


def suppressed(**changes: Any) -> dict[str, Any]:
    """Stalls that were not written one by one."""
    event = {
        "event": "suppressed",
        "reason": "identical",
        "cpus": [1, 3],
        "count": 12,
        "total_ms": 340.25,
        "blocker": {"pid": 10, "comm": "cadvisor"},
        "stack": ["memcg_stat_show+0x10"],
    }
    return HEAD | event | changes


def test_a_whole_stall() -> None:
    """CPU, length, verdict, who starved, who is to blame, and where."""
    assert render(stall()) == (
        "T warning stall cpu 3: 51.3 ms, stuck_in_kernel; starved: NET_RX 50.0 ms, TIMER 20.0 ms\n"
        "    cadvisor pid 10 tid 11 in kernel mode, policy other\n"
        "    ksoftirqd pid 16 waited 49.5 ms\n"
        "      memcg_stat_show+0x10\n"
        "      seq_read+0x5"
    )


WHO = {
    "unit": "containerd.service",
    "runtime": "cri-o",
    "container_id": "ab" * 32,
    "pod_uid": "aa-bb",
    "cmdline": "cadvisor -port 8080",
    "syscall": "read",
    "file": "cgroup2:/kubepods/memory.stat",
}


def test_who() -> None:
    """Unit, container and pod, the command line, and the file it works on."""
    told = render(stall(blocker=blocker(**WHO)))
    assert (
        f"    unit containerd.service, container cri-o {'ab' * 32}, pod aa-bb\n"
        "    command: cadvisor -port 8080\n"
        "    in read() on cgroup2:/kubepods/memory.stat\n"
    ) in told
    unknown = dict.fromkeys(WHO) | {"container_id": "web", "syscall": "getppid"}
    told = render(stall(blocker=blocker(**unknown)))
    assert "policy other\n    container web\n    in getppid()\n    ksoftirqd" in told
    assert "\x1b" not in render(stall(blocker=blocker(cmdline="\x1b[2J")))


def test_brief() -> None:
    """Unknown things take no line, and a line that goes on says so."""
    bare = stall(
        phase="ongoing", starved={}, ksoftirqd=None, blocker=None, stack=stack(captured="none")
    )
    assert (
        render(bare) == "T warning stall cpu 3: 51.3 ms so far, stuck_in_kernel; starved: nothing"
    )


@pytest.mark.parametrize("more", [0, 1, 100])
def test_long_stacks_are_cut(more: int) -> None:
    """The innermost frames are shown, the others counted."""
    frames = [f"f{n}+0x0" for n in range(TOP_FRAMES + more)]
    lines = render(stall(stack=stack(*frames))).splitlines()[3:]
    assert lines[:TOP_FRAMES] == [f"      {frame}" for frame in frames[:TOP_FRAMES]]
    assert lines[TOP_FRAMES:] == ([f"      … {more} more"] if more else [])


def test_unknown_mode() -> None:
    """A mode that is not known is called that."""
    shown = render(stall(blocker=blocker(comm="c", mode=None, policy=None)))
    assert "c pid 10 tid 11 in unknown mode" in shown


def test_all_that_can_be_said() -> None:
    """Priority, other threads that waited, the handler, late ticks, stolen time and the hint."""
    whole = stall(
        ksoftirqd=None,
        blocker=blocker(mode="softirq", policy="fifo", rt_priority=50),
        waiting=[{"pid": 30, "comm": "napi/eth0-3", "runnable_ms": 20.0}],
        handler={"vector": "NET_RX", "service_ms": 50.0, "device": "eth0"},
        stack=stack("net_rx_action+0x5", captured="after"),
        evidence={"late_ms": 12.0, "stolen_ms": 3.25},
        hint="look there",
    )
    assert render(whole).splitlines()[1:] == [
        "    cadvisor pid 10 tid 11 in softirq mode, policy fifo 50",
        "    napi/eth0-3 pid 30 waited 20.0 ms",
        "    the NET_RX handler ran 50.0 ms, polling eth0",
        "    the timer interrupt came 12.0 ms late",
        "    the hypervisor took 3.2 ms",
        "      net_rx_action+0x5 (after)",
        "    hint: look there",
    ]


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({}, None),
        ({"dropped": None, "time_squeeze": None, "queues": None}, None),
        ({"dropped": 14, "time_squeeze": 3}, "14 packets dropped; budget used up 3 times"),
        (
            {"queues": [queue("eth3", 5), queue("veth1", 0, rps=True), queue("wl\x1b0")]},
            "it serves eth3 rx queue 5, veth1 rx queue 0 (RPS), wl\\x1b0",
        ),
        (
            {"dropped": 1, "queues": [queue("eth0", number) for number in range(6)]},
            "1 packets dropped; it serves eth0 rx queue 0, eth0 rx queue 1, eth0 rx queue 2, "
            "eth0 rx queue 3, 2 more",
        ),
    ],
)
def test_network(changes: dict[str, Any], shown: str | None) -> None:
    """What was dropped and which queues the CPU serves, where there is anything to say."""
    lines = render(stall(net=net(**changes))).splitlines()
    told = [line.strip() for line in lines if line.startswith("    network: ")]
    assert told == ([f"network: {shown}"] if shown else [])


def test_softnet() -> None:
    """Where, how many, since when, what to do."""
    event = HEAD | {
        "event": "softnet",
        "phase": "begun",
        "cpu": 11,
        "packets": 5000,
        "dropped": 14,
        "time_squeeze": 3,
        "since": "S",
        "hint": "do this",
    }
    assert render(event) == (
        "T warning softnet cpu 11: 14 packets dropped, budget used up 3 times (begun; 5000 packets "
        "since S)\n    hint: do this"
    )
    assert "hint" not in render(event | {"hint": None})


def test_nic() -> None:
    """Which device, how many, which of its queues."""
    event = HEAD | {
        "event": "nic",
        "phase": "ended",
        "device": "eth3",
        "packets": 5000,
        "drops": 14,
        "since": "S",
        "queues": [{"queue": 5, "drops": 14, "counter": "rx5_discards"}],
        "hint": None,
    }
    told = "T warning nic eth3: 14 packets dropped"
    end = " (ended; 5000 packets since S)"
    assert render(event) == f"{told} (rx5_discards 14){end}"
    assert render(event | {"queues": []}) == told + end


def test_suppressed() -> None:
    """How many, of whom, how long in all, and the stack they share."""
    assert render(suppressed()) == (
        "T warning suppressed cpu 1, 3: 12 more stalls of cadvisor, 340.2 ms in all (identical)\n"
        "      memcg_stat_show+0x10"
    )
    by_rate = suppressed(reason="rate", cpus=[1], blocker=None, stack=[])
    assert render(by_rate).endswith("cpu 1: 12 more stalls, 340.2 ms in all (rate)")


@pytest.mark.parametrize(
    ("given_text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("a\nb\r\t\0\x7f", "a\\nb\\r\\t\\x00\\x7f"),
        ("\x9b2J", "\\x9b2J"),
        ("\u202eevil\u2066\u200b\u2028", "\\u202eevil\\u2066\\u200b\\u2028"),
        ("\ud800", "\\ud800"),
        ('it\'s "fine" café 日本', 'it\'s "fine" café 日本'),
    ],
)
def test_control_characters_are_escaped(given_text: str, shown: str) -> None:
    """Sequences that move the cursor, colour or reorder text stand as escapes."""
    assert safe(given_text) == shown


@given(st.text(), st.text())
def test_no_name_controls_the_terminal(comm: str, frame: str) -> None:
    """Whatever task, thread, device and frame are called: lines of ours, printable, encodable."""
    waiting = [{"pid": 30, "comm": comm, "runnable_ms": 20.0}]
    handler = {"vector": "NET_RX", "service_ms": 50.0, "device": comm or "d"}
    whole = stall(blocker=blocker(comm=comm), waiting=waiting, handler=handler, stack=stack(frame))
    folded = suppressed(blocker={"pid": 10, "comm": comm}, stack=[frame])
    text = f"{render(whole)}\n{render(folded)}"
    lines = text.split("\n")
    assert len(lines) == 6 + 2
    assert all(each.isprintable() for each in lines)
    assert text.encode()


@given(st.dictionaries(st.sampled_from(["cpu", "count"]), st.text() | st.lists(st.text())))
def test_other_events_are_one_line(fields: dict[str, Any]) -> None:
    """Any other event is one printable line without the common keys."""
    text = render(HEAD | {"event": "records_lost"} | fields)
    assert text.startswith("T warning records_lost")
    assert "schema=" not in text
    assert text.isprintable()
