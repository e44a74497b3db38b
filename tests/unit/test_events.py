"""Events as other programs read them: shape, schema, levels, times, hostile names."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator, ValidationError

from stalld import bookends, degraded, events, net_events
from stalld.config import Settings
from stalld.enrich.asking import Answer, Unknown
from stalld.enrich.cgroup import Place
from stalld.enrich.driver_stats import Lost
from stalld.enrich.ethtool import Settings as NicSettings
from stalld.enrich.identity import Asked, Identity
from stalld.enrich.netlink import LinkStats
from stalld.enrich.nic import Device, Inventory, Queue, Sysctls
from stalld.enrich.nic_hints import Facts, hints, joined
from stalld.errors import DecodeError
from stalld.pipeline import Pipeline
from stalld.probe.protocol import Attached, Description, Missing
from stalld.records import RecordType, Source
from stalld.rings import Polled
from stalld.sinks.emitter import Emitter
from stalld.sinks.outbox import Gap
from stalld.sinks.sink import Trouble
from stalld.track.fold import Folder
from stalld.track.hints import hint
from stalld.track.model import Ended, Handler, Net, Phase, Tick, Update
from stalld.track.rates import Episode
from stalld.track.rates import Phase as EpisodePhase
from stalld.track.stall import Tracker
from stalld.track.verdict import Verdict
from tests.unit import make
from tests.unit.make import (
    MS,
    T0,
    THRESHOLD,
    TICK_NS,
    MadeHost,
    close,
    encode,
    encode_task,
    record,
    sample,
    tick,
    waiters,
    waits,
)
from tests.unit.schema import SCHEMA, VALIDATOR, parse

NOBODY = Identity()
GONE = Answer(Asked(), Unknown.GONE)
WALL = 1_767_323_045_678_901_234
HOSTILE = [
    (b"two\nlines\r", "two\nlines\r"),
    (b'"},{"x":"', '"},{"x":"'),
    (b"\x1b[2J\x1b]0;t\x07", "\x1b[2J\x1b]0;t\x07"),
    (b"caf\xc3\xa9", "café"),
    (b"cut off \xc3", "cut off \\xc3"),
    (b"\xff\xfe\x80", "\\xff\\xfe\\x80"),
    (b"\xed\xa0\x80", "\\xed\\xa0\\x80"),
    (b"\xe2\x80\xa8\xe2\x80\xae", "\u2028\u202e"),
    (b"", ""),
]
"""Names that a task or device may have, and how an event shows them."""


def updates(host: MadeHost | None = None, **changes: Any) -> list[Update]:
    """Both lines of one stall."""
    given = Tracker(THRESHOLD, TICK_NS, host or MadeHost())
    waiting = {"wait_ns": waits(NET_RX=50 * MS), "waiter_ns": waiters(11 * MS)} | changes
    return given.observe(sample(1, 50, **waiting)) + given.observe(close(1, 60, **waiting))


def stall(
    update: Update,
    names: dict[int, bytes] | None = None,
    inventory: Inventory | None = None,
    identity: Identity = NOBODY,
) -> events.Event:
    """The event of one update."""
    return events.stall(
        update,
        stall_id="b-1-0-1",
        boot_wall_ns=WALL - T0,
        sampler="tick",
        names={} if names is None else names,
        inventory=inventory,
        identity=identity,
    )


def told(update: Update, inventory: Inventory | None = None) -> dict[str, Any]:
    """The event, written and read again."""
    return parse(line("stall", "warning", stall(update, inventory=inventory)))


def line(event: str, level: str, fields: events.Event) -> bytes:
    """The line as written."""
    stream = io.BytesIO()
    Emitter(lambda line, _: stream.write(line), lambda: WALL, "host").emit(event, level, fields)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("wall_ns", "text"),
    [
        (0, "1970-01-01T00:00:00.000000Z"),
        (999, "1970-01-01T00:00:00.000000Z"),
        (1_000, "1970-01-01T00:00:00.000001Z"),
        (999_999_999, "1970-01-01T00:00:00.999999Z"),
        (WALL, "2026-01-02T03:04:05.678901Z"),
        (2**63, "2262-04-11T23:47:16.854775Z"),
    ],
)
def test_times(wall_ns: int, text: str) -> None:
    """RFC 3339 UTC, always six digits, never rounded up into the future."""
    assert events.rfc3339(wall_ns) == text


@given(st.integers(0, 2**64))
def test_every_time_has_the_same_form(wall_ns: int) -> None:
    """No clock makes a time that does not follow the schema."""
    assert re.fullmatch(SCHEMA["$defs"]["time"]["pattern"], events.rfc3339(wall_ns))


@pytest.mark.parametrize(
    ("ns", "ms"), [(0, 0.0), (499, 0.0), (12_345_678, 12.346), (10 * MS, 10.0)]
)
def test_milliseconds(ns: int, ms: float) -> None:
    """Numbers to the microsecond."""
    assert events.milliseconds(ns) == ms


@pytest.mark.parametrize(
    ("longest_ms", "level"),
    [(0, "info"), (10, "warning"), (99, "warning"), (100, "error"), (60_000, "error")],
)
def test_levels(longest_ms: int, level: str) -> None:
    """The longest starved vector decides; what ksoftirqd alone waited is info."""
    starved = {"TIMER": THRESHOLD, "NET_RX": longest_ms * MS} if longest_ms else {}
    (update, _) = updates(waiter_ns=waiters(900 * MS, 900 * MS))
    assert events.stall_level(update._replace(starved=starved), THRESHOLD) == level


@pytest.mark.parametrize(
    ("late_ms", "starved_ms", "level"),
    [(10, 0, "warning"), (99, 0, "warning"), (100, 0, "error"), (10, 100, "error")],
)
def test_levels_of_late_ticks(late_ms: int, starved_ms: int, level: str) -> None:
    """Interrupts starve while none can come: a late tick counts like a vector's wait."""
    starved = {"NET_RX": starved_ms * MS} if starved_ms else {}
    (update, _) = updates()
    late = update._replace(late_ns=late_ms * MS, starved=starved)
    assert events.stall_level(late, THRESHOLD) == level


def test_a_whole_stall() -> None:
    """Every key of the contract, with the values that the records gave."""
    before = tick(-4, net_rx_runs=3, net_rx_ns=MS, processed=7, squeezed=1, steal_ns=2 * MS)
    before = before._replace(dropped=1, received_rps=2)
    polls = {(2, b"eth0"): Polled(2, 64, 1), (0, b"backlog"): Polled(1, 1, 0)}
    *_, update = updates(
        MadeHost([before], polls=polls),
        user_stack=(0x7F00,),
        policy=1,
        prio=49,
        mode="kernel",
        waiter_ns=waiters(11 * MS, 12 * MS, 9 * MS, 40 * MS),
        waiter_pid=waiters(16, 40, 50, 60),
        late_ns=12_345_678,
        steal_ns=3 * MS,
        served_ns=11 * MS,
        served_vec=3,
        napi_ifindex=2,
        napi_name=b"eth0",
        napi_work=64,
        napi_budget=64,
        net_rx_runs=5,
        net_rx_ns=4 * MS,
        processed=71,
        squeezed=2,
        dropped=5,
        received_rps=9,
        flow_limit=1,
        backlog=5,
    )
    event = stall(update, {40: b"napi/eth0-8193", 50: b"irq/30-nvme"})
    assert event == {
        "phase": "resolved",
        "stall_id": "b-1-0-1",
        "cpu": 0,
        "started_at": "2026-01-02T03:04:05.678901Z",
        "duration_ms": 60.0,
        "verdict": "softirqs_disabled",
        "starved": {"NET_RX": 50.0},
        "ksoftirqd": {"pid": 16, "runnable_ms": 11.0},
        "waiting": [
            {"pid": 40, "comm": "napi/eth0-8193", "runnable_ms": 12.0},
            {"pid": 60, "comm": None, "runnable_ms": 40.0},
        ],
        "handler": {
            "vector": "NET_RX",
            "service_ms": 11.0,
            "device": "eth0",
            "work": 64,
            "budget": 64,
        },
        "blocker": {
            "pid": 100,
            "tid": 101,
            "comm": "spinner",
            "cmdline": None,
            "exe": None,
            "uid": None,
            "parent": None,
            "ns_pid": None,
            "mode": "kernel",
            "policy": "fifo",
            "rt_priority": 50,
            "nice": None,
            "syscall": None,
            "file": None,
            "cgroup": None,
            "unit": None,
            "runtime": None,
            "container_id": None,
            "pod_uid": None,
        },
        "stack": {
            "kernel": ["spin+0x10", "do_syscall_64+0x5"],
            "user": ["0x7f00"],
            "captured": "during",
        },
        "evidence": {
            "sampler": "tick",
            "samples": 1,
            "expected": 1,
            "lost": 0,
            "switches": 0,
            "late_ms": 12.346,
            "stolen_ms": 1.0,
            "serves_inline": True,
            "ended": "record",
        },
        "lookback": [
            {
                "ago_ms": 4.0,
                "comm": "spinner",
                "pid": 100,
                "mode": "kernel",
                "stack": ["f10+0x1", "f20+0x1"],
                "ticks": 1,
            }
        ],
        "net": {
            "net_rx_runs": 2,
            "net_rx_ms": 3.0,
            "packets": 64,
            "time_squeeze": 1,
            "dropped": 4,
            "received_rps": 7,
            "flow_limit": 1,
            "backlog": 5,
            "queues": None,
            "napi": [
                {"device": "eth0", "ifindex": 2, "polls": 2, "packets": 64, "exhausted": 1},
                {"device": "backlog", "ifindex": None, "polls": 1, "packets": 1, "exhausted": 0},
            ],
        },
        "hint": joined(hint(update), hints(Facts(dropped=4, flow_limited=1, squeezed=1), 1)[0]),
    }
    parse(line("stall", "warning", event))


def test_the_first_line() -> None:
    """It has the same keys; what ran before is not looked up for it."""
    first, last = map(stall, updates(MadeHost([tick(-4)])))
    assert first.keys() == last.keys()
    assert (first["lookback"], first["evidence"]["ended"]) == (None, None)
    assert len(last["lookback"]) == 1


def test_what_is_not_known_is_null() -> None:
    """Nobody that waited, no blocker, a policy without a name, no steal clock, no hint."""
    (update, _) = updates(policy=99, waiter_ns=waiters(), mode=None)
    event = told(update)
    assert (event["ksoftirqd"], event["waiting"], event["handler"]) == (None, [], None)
    assert event["blocker"]["policy"] is None
    assert event["blocker"]["mode"] is None
    assert event["verdict"] == "unknown"
    assert event["hint"] is None
    assert event["evidence"]["stolen_ms"] is None
    assert (event["net"]["packets"], event["net"]["time_squeeze"]) == (None, None)
    assert event["net"]["napi"] == []
    assert told(update._replace(net=Net(0, 0, 0, 0, None)))["net"]["napi"] is None
    nobody = told(update._replace(blocker=None, kernel_stack=(), captured="none"))
    assert nobody["blocker"] is None


def test_who() -> None:
    """All that is known of the blocker has its key."""
    place = Place("/docker/a", "x.service", "system.slice", "docker", "a", "p")
    identity = Identity("spinner -v", "/spinner", 0, (1, "init"), "read", "proc:/x", 7, place)
    (update, _) = updates()
    blocker = parse(line("stall", "warning", stall(update, identity=identity)))["blocker"]
    expected = {
        "cmdline": "spinner -v",
        "exe": "/spinner",
        "uid": 0,
        "parent": {"pid": 1, "comm": "init"},
        "ns_pid": 7,
        "syscall": "read",
        "file": "proc:/x",
        "cgroup": "/docker/a",
        "unit": "x.service",
        "runtime": "docker",
        "container_id": "a",
        "pod_uid": "p",
    }
    assert {key: blocker[key] for key in expected} == expected


@pytest.mark.parametrize("nmi", [False, True])
@pytest.mark.parametrize("sampler", ["tick", "none"])
def test_samplers(nmi: bool, sampler: str) -> None:
    """The sampler is the one that took the stack, which is not always the usual one."""
    (update, _) = updates()
    fields = events.stall(
        update._replace(nmi=nmi),
        stall_id="i",
        boot_wall_ns=0,
        sampler=sampler,
        names={},
        identity=NOBODY,
    )
    event = parse(line("stall", "warning", fields))
    assert event["evidence"]["sampler"] == ("nmi" if nmi else sampler)


PRIORITIES = [
    (1, 49, 50, None),  # SCHED_FIFO 50
    (1, 0, 99, None),
    (2, 98, 1, None),
    (6, 0xFFFFFFFF, None, None),  # a deadline task has -1
    (0, 100, None, -20),
    (0, 120, None, 0),
    (3, 139, None, 19),
    (0, 88, 11, None),  # inherited from a waiter
    (0, 99, None, None),  # no task has these
    (0, 140, None, None),
]


@pytest.mark.parametrize(("policy", "prio", "rt_priority", "nice"), PRIORITIES)
def test_priorities(policy: int, prio: int, rt_priority: int | None, nice: int | None) -> None:
    """The kernel's one scale as the two that people know."""
    (update, _) = updates(policy=policy, prio=prio)
    blocker = told(update)["blocker"]
    assert (blocker["rt_priority"], blocker["nice"]) == (rt_priority, nice)


@given(st.integers(0, 0xFFFFFFFF))
def test_any_priority(prio: int) -> None:
    """Whatever a record holds stays within the schema, and is one of the two or neither."""
    (update, _) = updates(prio=prio)
    blocker = told(update)["blocker"]
    assert None in (blocker["rt_priority"], blocker["nice"])


class TestLookback:
    """What ran before, as few entries as tell it."""

    def entries(self, *ticks: Tick) -> list[dict[str, Any]]:
        """Of these ticks."""
        (_, update) = updates()
        found: list[dict[str, Any]] = told(update._replace(lookback=ticks))["lookback"]
        return found

    def seen(self, at_ms: float, *frames: str, mode: str = "kernel", **changes: Any) -> Tick:
        """One tick."""
        return Tick(tick(at_ms, **changes), mode, frames)

    def test_ticks_that_show_the_same(self) -> None:
        """In a row they are one entry, that of the first; offsets make no difference."""
        entries = self.entries(
            self.seen(-20, "a+0x1", "b+0x1"),
            self.seen(-16, "a+0x2", "b+0x3"),
            self.seen(-12, "a+0x1", "b+0x1"),
            self.seen(-8, "b+0x1"),
            self.seen(-4.5, "a+0x1", "b+0x1"),
        )
        assert [(entry["ago_ms"], entry["ticks"]) for entry in entries] == [
            (20.0, 3),
            (8.0, 1),
            (4.5, 1),
        ]
        assert entries[0]["stack"] == ["a+0x1", "b+0x1"]

    @pytest.mark.parametrize(
        "changes", [{"tid": 7}, {"mode": "softirq"}, {"frames": ("other+0x1",)}]
    )
    def test_ticks_that_differ(self, changes: dict[str, Any]) -> None:
        """Another thread, context or path is another entry."""
        frames = changes.pop("frames", ("a+0x1",))
        entries = self.entries(self.seen(-8, "a+0x1"), self.seen(-4, *frames, **changes))
        assert [entry["ticks"] for entry in entries] == [1, 1]

    def test_no_tick_is_lost(self) -> None:
        """The entries' counts are those of all ticks."""
        ticks = [self.seen(n - 64, f"f{n // 7 % 3}+{n:#x}", tid=n // 20) for n in range(64)]
        assert sum(entry["ticks"] for entry in self.entries(*ticks)) == 64

    def test_deep_stacks(self) -> None:
        """Of a deep stack the innermost frames are shown, yet all of them tell ticks apart."""
        deep = [f"f{n}+0x1" for n in range(48)]
        entries = self.entries(self.seen(-8, *deep, "x+0x1"), self.seen(-4, *deep, "y+0x1"))
        assert [entry["stack"] for entry in entries] == [deep[:10], deep[:10]]

    def test_user_mode(self) -> None:
        """It has no stack."""
        (entry,) = self.entries(self.seen(-4, mode="user"))
        assert (entry["mode"], entry["stack"], entry["pid"]) == ("user", [], 100)

    def test_nothing(self) -> None:
        """Nothing kept is an empty list."""
        assert self.entries() == []

    def test_the_longest_line(self) -> None:
        """64 ticks that all differ fit into a line of journald, 48 KiB, with deep stacks."""
        frames = [f"entry_SYSCALL_64_after_hwframe{n}+0x76" for n in range(20)]
        ticks = [self.seen(n - 64, *frames, tid=n, comm=b"0123456789abcdef") for n in range(64)]
        (_, update) = updates(frames=tuple(frames * 6), user_stack=(2**64 - 1,) * 27)
        written = line("stall", "warning", stall(update._replace(lookback=tuple(ticks))))
        assert len(written) < 48 * 1024


@pytest.mark.parametrize("vec", range(10))
@pytest.mark.parametrize("polled", [(None, None, None), (b"eth0", 0, 64), (b"backlog", 64, 64)])
def test_every_handler_validates(vec: int, polled: Any) -> None:
    """All vectors are in the schema, with a device and without."""
    (_, update) = updates()
    handler = told(update._replace(handler=Handler(vec, 12 * MS, *polled)))["handler"]
    assert handler["vector"] == list(SCHEMA["$defs"]["vector"]["enum"])[vec]
    assert (handler["device"], handler["work"]) == (polled[0] and polled[0].decode(), polled[1])


def test_devices() -> None:
    """The CPU's own queue has a name and no number, what could not be told apart has neither."""
    polled = {
        (2, b"eth0"): Polled(1, 2, 0),
        (0, b"backlog"): Polled(3, 4, 1),
        (0, b""): Polled(5, 6, 0),
    }
    shown = [(each["device"], each["ifindex"]) for each in events.napi(polled)]
    assert shown == [("eth0", 2), ("backlog", None), (None, None)]


@pytest.mark.parametrize("mode", ["kernel", "user", "softirq", "hardirq", "idle", None])
@pytest.mark.parametrize("policy", range(9))
def test_every_blocker_validates(mode: str | None, policy: int) -> None:
    """All modes and policies that the kernel has are in the schema."""
    for update in updates(mode=mode, policy=policy):
        parse(line("stall", "warning", stall(update)))


@pytest.mark.parametrize("verdict", Verdict)
@pytest.mark.parametrize("ended", Ended)
def test_every_end_validates(verdict: Verdict, ended: Ended) -> None:
    """All verdicts and ends are in the schema."""
    (_, update) = updates()
    parse(line("stall", "error", stall(update._replace(verdict=verdict, ended=ended))))


@pytest.mark.parametrize(("name", "shown"), HOSTILE)
def test_hostile_names(name: bytes, shown: str) -> None:
    """Whatever tasks, threads and devices are called, the line is one line with those names."""
    (_, update) = updates(comm=name, waiter_ns=waiters(0, 12 * MS), waiter_pid=waiters(16, 40))
    update = update._replace(
        handler=Handler(3, 12 * MS, name, 1, 64),
        lookback=(Tick(tick(-4, comm=name), "user", ()),),
        net=Net(1, MS, 1, 0, {(2, name): Polled(1, 1, 0)}),
    )
    written = line("stall", "warning", stall(update, {40: name}))
    event = parse(written)
    assert b"\x1b" not in written
    assert event["blocker"]["comm"] == event["waiting"][0]["comm"] == shown
    assert event["handler"]["device"] == event["lookback"][0]["comm"] == shown
    assert event["net"]["napi"][0]["device"] == (shown or None)


@given(
    st.binary(max_size=16),
    st.binary(max_size=16),
    st.lists(st.text(st.characters(codec="utf-8")), max_size=3),
)
def test_any_name(comm: bytes, device: bytes, frames: list[str]) -> None:
    """The same for names and frames that nobody thought of."""
    for update in updates(comm=comm, frames=tuple(frames)):
        named = update._replace(
            handler=Handler(3, 12 * MS, device, 1, 64),
            lookback=(Tick(tick(-4, comm=comm), "kernel", tuple(frames)),),
        )
        event = told(named)
        assert event["stack"]["kernel"] == event["lookback"][0]["stack"] == frames


class Symbols:
    """Stands for a symbol table that names every address the same."""

    def __init__(self, mode: str) -> None:
        self.mode = mode

    def trimmed(self, addresses: tuple[int, ...], kind: str) -> Any:
        """Cuts the first frame; the second one is the interrupted context's own."""
        frames = ("own+0x1", "below+0x1")[: max(0, len(addresses) - 1)]
        return SimpleNamespace(mode=self.mode, frames=frames, cut=1, own=1)

    def cut(self, addresses: tuple[int, ...], kind: str) -> tuple[str, ...]:
        """One frame, of the function that ends the stall."""
        return ("__local_bh_enable_ip+0x5",) * min(1, len(addresses))


def pipeline(
    stream: io.BytesIO,
    bad: Callable[[DecodeError], None] = lambda error: None,
    mode: str = "kernel",
    hotplug: Callable[[int], None] = lambda cpu: None,
    per_minute: int = 5,
    known: Answer = GONE,
) -> Pipeline:
    """A pipeline without a kernel, 70 ms after the stall began."""
    asking: Any = SimpleNamespace(answer=lambda question: known)
    symbols: Any = Symbols(mode)
    return Pipeline(
        Tracker(THRESHOLD, TICK_NS, MadeHost()),
        Folder(per_minute, THRESHOLD),
        symbols,
        Emitter(lambda line, _: stream.write(line), lambda: WALL, "host"),
        asking,
        names={40: b"napi/eth0-8193"},
        id_prefix="boot-1",
        sampler="tick",
        clocks_ns=lambda: (T0 + 70 * MS, WALL),
        on_bad_record=bad,
        on_hotplug=hotplug,
    )


def lines(stream: io.BytesIO) -> list[dict[str, Any]]:
    """All that was written."""
    return [parse(each) for each in stream.getvalue().splitlines(keepends=True)]


class TestPipeline:
    """From bytes to lines."""

    def test_records_become_lines(self) -> None:
        """Two records of one stall: two valid lines with the same id and start."""
        stream = io.BytesIO()
        given = pipeline(stream)
        given.take(encode(record(kernel_stack=(1, 2), wait_ns=waits(NET_RX=12 * MS))))
        given.take(encode(close(1, 50, wait_ns=waits(NET_RX=50 * MS)).record))
        first, last = lines(stream)
        assert (first["phase"], last["phase"]) == ("ongoing", "resolved")
        assert first["stall_id"] == last["stall_id"] == "boot-1-0-1"
        assert first["started_at"] == last["started_at"] == events.rfc3339(WALL - 70 * MS)
        assert (first["level"], last["level"]) == ("warning", "warning")
        assert (given.records, given.stalls) == (2, 1)

    def test_bottom_halves_enabled_late(self) -> None:
        """A closing record out of local_bh_enable() alone tells who held them off."""
        stream = io.BytesIO()
        late = close(0, 12, wait_ns=waits(NET_RX=12 * MS), kernel_stack=(1, 2)).record
        pipeline(stream).take(encode(late))
        event = parse(stream.getvalue())
        assert event["verdict"] == "softirqs_disabled"
        assert event["stack"]["captured"] == "after"

    @pytest.mark.parametrize("mode", ["softirq", "hardirq"])
    @pytest.mark.parametrize(
        ("depth", "tid", "verdict"),
        [
            (3, 101, "stuck_in_kernel"),  # it came over the task in the kernel
            (2, 101, "cpu_contention"),  # over user mode
            (2, 0, "unknown"),  # over the idle task
        ],
    )
    def test_what_an_interrupt_came_over(
        self, mode: str, depth: int, tid: int, verdict: str
    ) -> None:
        """A sample that met another interrupt still tells where the task itself was."""
        stream = io.BytesIO()
        waiting = record(kernel_stack=(1, 2, 3)[:depth], tid=tid, waiter_ns=waiters(12 * MS))
        pipeline(stream, mode=mode).take(encode(waiting))
        event = parse(stream.getvalue())
        assert (event["blocker"]["mode"], event["verdict"]) == (mode, verdict)

    def test_what_cannot_be_decoded_is_counted_and_told(self) -> None:
        """A bad record is no line and no end of the service."""
        stream = io.BytesIO()
        told: list[DecodeError] = []
        given = pipeline(stream, told.append)
        given.take(b"short")
        assert (given.undecodable, given.records, len(told)) == (1, 0, 1)
        assert stream.getvalue() == b""

    def test_tasks(self) -> None:
        """A record of a task names the blocker in all lines; it is no line itself."""
        stream = io.BytesIO()
        made = pipeline(stream)
        made.take(encode_task(make.task()))
        assert stream.getvalue() == b""
        waiting = {"wait_ns": waits(NET_RX=50 * MS)}
        made.take(encode(sample(1, 50, **waiting).record))
        made.take(encode(close(1, 60, **waiting).record))
        told = [e["blocker"]["cmdline"] for e in lines(stream)]
        assert told == ["spinner -v", "spinner -v"]

    @pytest.mark.parametrize("changes", [{"seq": 2}, {"tid": 102}, {"cpu": 1}])
    def test_other_tasks(self, changes: dict[str, int]) -> None:
        """Of another stall, thread or CPU: it is not the blocker, and /proc is asked."""
        stream = io.BytesIO()
        made = pipeline(stream, known=Answer(Asked(args=b"asked"), None))
        made.take(encode_task(make.task(**changes)))
        made.take(encode(sample(1, 50, wait_ns=waits(NET_RX=50 * MS)).record))
        (event,) = lines(stream)
        assert event["blocker"]["cmdline"] == "asked"

    def test_idle(self) -> None:
        """The idle task is nobody: nothing is asked."""
        stream = io.BytesIO()
        made = pipeline(stream, known=Answer(Asked(args=b"asked"), None))
        waiting = {"wait_ns": waits(NET_RX=50 * MS), "tid": 0, "tgid": 0}
        made.take(encode(sample(1, 50, **waiting).record))
        (event,) = lines(stream)
        assert event["blocker"]["cmdline"] is None

    def test_losses_are_told(self) -> None:
        """The kernel's losses are an event and belong to the stall of that CPU."""
        stream = io.BytesIO()
        given = pipeline(stream)
        given.take(encode(record()))
        given.take_lost(0, 3)
        given.finish()
        _, lost, resolved = lines(stream)
        assert (lost["event"], lost["level"], lost["count"]) == ("records_lost", "warning", 3)
        assert (resolved["evidence"]["lost"], given.lost) == (3, 3)
        assert (resolved["evidence"]["ended"], resolved["duration_ms"]) == ("shutdown", 70.0)

    def test_expire_asks_the_state(self) -> None:
        """A stall that the kernel still has active stays open."""
        stream = io.BytesIO()
        given = pipeline(stream)
        given.take(encode(record()))
        active: Any = SimpleNamespace(seq=1, active=True)
        given.expire(lambda cpu: active)
        assert given.tracker.open

    def test_hotplug(self) -> None:
        """A CPU that comes or goes is told to the service, and is no record of a stall."""
        stream = io.BytesIO()
        told: list[int] = []
        given = pipeline(stream, hotplug=told.append)
        given.take(encode(record(type=RecordType.HOTPLUG, source=Source.HOTPLUG, cpu=3)))
        assert (told, given.records, stream.getvalue()) == ([3], 0, b"")

    @pytest.mark.parametrize("source", list(Source)[:5])
    def test_every_source(self, source: Source) -> None:
        """Each hook's record has a stack that is understood."""
        stream = io.BytesIO()
        pipeline(stream).take(encode(record(source=source, kernel_stack=(1, 2), late_ns=12 * MS)))
        (event,) = lines(stream)
        assert event["stack"]["kernel"] == ["own+0x1"]
        during = source in (Source.TICK, Source.NMI) and event["verdict"] != "irqs_disabled"
        assert (event["stack"]["captured"] == "during") is (during or source is Source.NMI)

    def test_names_of_waiters(self) -> None:
        """Threads that wait have the names that the service knows."""
        stream = io.BytesIO()
        waiting = {"waiter_ns": waiters(0, 12 * MS), "waiter_pid": waiters(16, 40)}
        pipeline(stream).take(encode(record(**waiting)))
        assert lines(stream)[0]["waiting"][0]["comm"] == "napi/eth0-8193"

    def test_a_storm_is_folded(self) -> None:
        """Identical stalls beyond the limit are counted and told in one sum."""
        stream = io.BytesIO()
        given = pipeline(stream, per_minute=2)
        for seq in range(1, 6):
            given.take(encode(close(0, 12, seq=seq).record))
        given.finish()
        *shown, folded = lines(stream)
        assert [event["stall_id"] for event in shown] == ["boot-1-0-1", "boot-1-0-2"]
        assert (folded["event"], folded["count"]) == ("suppressed", 3)
        assert folded["like"] == "boot-1-0-2"
        assert (given.stalls, given.suppressed) == (5, 3)

    def test_what_the_kernel_kept_to_itself(self) -> None:
        """Stalls over the kernel's limit are told as a sum."""
        stream = io.BytesIO()
        given = pipeline(stream)
        given.take_suppressed(3, 700, 9000 * MS, T0, T0 + 60 * MS)
        (event,) = lines(stream)
        assert (event["reason"], event["count"], event["cpus"]) == ("rate", 700, [3])
        assert event["until"] == events.rfc3339(WALL - 10 * MS)
        assert given.suppressed == 700


def description(*hooks: str) -> Description:
    """What the probe child says."""
    attached = [Attached(hook, "raw_tracepoint") for hook in hooks]
    return Description(
        structs="btf",
        net_rx_action="softirq",
        attached=[*attached, Attached("task", "iterator")],
        missing=[Missing("net_rx_action by kfunc", "not permitted", "softirq stands in")],
        fds=[],
        bcc_version="0.26.0",
        compile_ms=200.0,
        attach_ms=2.0,
    )


def started(*hooks: str, hidden: bool = False, **settings: Any) -> dict[str, Any]:
    """The first event, written and read again."""
    maps = make.maps(2)
    maps.watch(THRESHOLD, **settings)
    fields = bookends.started(
        Settings(),
        description(*hooks),
        maps,
        cpus=2,
        kthreads=9,
        tick_ns=TICK_NS,
        hidden=hidden,
        missing=[{"ability": "a", "reason": "r", "effect": "e"}],
        sinks=["stdout", "tcp [::1]:6000"],
    )
    return parse(line("started", "info", fields))


def stopped() -> dict[str, Any]:
    """The last event, written and read again."""
    maps = make.maps(2)
    maps.cpus[1].net_rx_runs, maps.cpus[1].net_rx_ns, maps.cpus[1].net_rx_max_ns = 3, 9 * MS, 4 * MS
    maps.cpus[0].unwatched, maps.cpus[1].missed = 5, 6
    rings: Any = SimpleNamespace(napi_totals=lambda: {(2, b"eth0"): Polled(7, 70, 1)})
    sinks = [{"name": "stdout", "delivered": 3, "queued": 1, "dropped": 2}]
    asking: Any = SimpleNamespace(counts=Counter({Unknown.GONE: 2}), longest_wait_s=0.0015)
    fields = bookends.stopped(
        pipeline(io.BytesIO()), asking, maps, rings, 60_000 * MS, sinks, {"b": 2, "a": 1}
    )
    return parse(line("stopped", "info", fields))


@pytest.mark.parametrize("hidden", [False, True])
def test_started(hidden: bool) -> None:
    """What is attached and what this kernel refused, also hidden symbols."""
    event = started("softirq_entry", "hrtimer_expire_entry", hidden=hidden)
    assert event["attached"] == [
        "softirq_entry (raw_tracepoint)",
        "hrtimer_expire_entry (raw_tracepoint)",
        "task (iterator)",
    ]
    assert [missing["ability"] for missing in event["missing"]] == [
        "net_rx_action by kfunc",
        "a",
        "kernel symbols" if hidden else "tick function",
    ]
    assert (event["sampler"], event["cpus"], event["threshold_ms"]) == ("tick", 2, 10.0)
    assert (event["kthreads"], event["tick_ms"], event["lookback"]) == (9, 4.0, False)
    assert event["sinks"] == ["stdout", "tcp [::1]:6000"]


@pytest.mark.parametrize(
    ("hooks", "settings", "looks_back"),
    [
        (("hrtimer_expire_entry: lookback",), {"lookback": 1, "tick_function": [5, 0]}, True),
        (("hrtimer_expire_entry: lookback",), {"lookback": 1, "tick_function": [0, 5]}, True),
        (("hrtimer_expire_entry: lookback",), {"lookback": 0, "tick_function": [5, 0]}, False),
        (("hrtimer_expire_entry: lookback",), {"lookback": 1}, False),
        (("hrtimer_expire_entry",), {"lookback": 1, "tick_function": [5, 0]}, False),
    ],
)
def test_started_with_lookback(
    hooks: tuple[str, ...], settings: dict[str, Any], looks_back: bool
) -> None:
    """It needs its program, the tick's function and the wish."""
    event = started(*hooks, **settings)
    assert event["lookback"] is looks_back
    told_why = any(missing["ability"] == "tick function" for missing in event["missing"])
    assert told_why is ("tick_function" not in settings)


def test_started_without_a_sampler() -> None:
    """Where the tick cannot be traced nothing samples."""
    assert started("softirq_entry")["sampler"] == "none"


def test_stopped() -> None:
    """The totals."""
    event = stopped()
    assert (event["net_rx_runs"], event["net_rx_ms"], event["net_rx_max_ms"]) == (3, 9.0, 4.0)
    assert (event["unwatched_wakeups"], event["missed_services"]) == (5, 6)
    assert (event["uptime_ms"], event["suppressed"]) == (60_000.0, 0)
    assert [(each["device"], each["polls"]) for each in event["napi"]] == [("eth0", 7)]
    assert event["sinks"] == [{"name": "stdout", "delivered": 3, "queued": 1, "dropped": 2}]
    assert event["faults"] == [{"reason": "a", "count": 1}, {"reason": "b", "count": 2}]


def gap() -> dict[str, Any]:
    """An event that stands where others are missing."""
    level, fields = degraded.gap("live client 3", Gap(7, WALL, WALL + 5 * MS))
    return parse(line("degraded", level, fields))


@pytest.mark.parametrize(
    ("told", "level", "state"),
    [
        (degraded.sink(Trouble("tcp h:1", "refused")), "warning", "begun"),
        (degraded.sink(Trouble("stdout", "gone")), "warning", "begun"),
        (degraded.sink(Trouble("tcp h:1", "back", over=True)), "info", "ended"),
        (degraded.configuration("F", ("F: a: unknown", "F: b: wrong")), "warning", "begun"),
        (degraded.configuration("F", ()), "info", "ended"),
    ],
)
def test_degraded(told: degraded.Told, level: str, state: str) -> None:
    """What begins is a warning, what ends is none; each says what it means."""
    event = parse(line("degraded", *told))
    assert (event["level"], event["state"]) == (level, state)
    assert event["reason"]
    assert event["effect"]


def test_all_errors_are_told() -> None:
    """A file's errors stand in one event, as far as people will read them."""
    _, fields = degraded.configuration("F", ("F: a: unknown", "F: b: wrong"))
    assert fields["reason"] == "F: a: unknown; F: b: wrong"
    _, fields = degraded.configuration("F", ("F: a: unknown",) * 12)
    assert fields["reason"].endswith("; F: a: unknown; and 2 more")


def test_gap() -> None:
    """How many are missing, and from when to when."""
    event = gap()
    assert (event["state"], event["level"], event["dropped"]) == ("gap", "warning", 7)
    assert event["since"] == "2026-01-02T03:04:05.678901Z"
    assert event["until"] == "2026-01-02T03:04:05.683901Z"


class TestSchema:
    """The schema itself: sound, and as strict as the contract."""

    def test_it_is_a_schema(self) -> None:
        """The schema follows its own standard, and every reference leads somewhere."""
        Draft202012Validator.check_schema(SCHEMA)
        references = set(re.findall(r'"#/\$defs/(\w+)"', orjson.dumps(SCHEMA).decode()))
        assert references == set(SCHEMA["$defs"])

    def test_it_knows_the_verdicts(self) -> None:
        """Contract and code have the same verdicts, phases and ends."""
        properties = SCHEMA["$defs"]["stall"]["properties"]
        assert properties["verdict"]["enum"] == [v.value for v in Verdict]
        assert properties["phase"]["enum"] == [p.value for p in Phase]
        ends = properties["evidence"]["properties"]["ended"]["enum"]
        assert ends == [*[e.value for e in Ended], None]

    @pytest.mark.parametrize("name", ["cfs_throttled", "task_blocked"])
    def test_reserved_names(self, name: str) -> None:
        """A reserved event needs the common keys and may have others."""
        event = parse(line(name, "info", {"anything": 1}))
        del event["host"]
        with pytest.raises(ValidationError, match="'host' is a required property"):
            VALIDATOR.validate(event)

    @pytest.mark.parametrize(
        "name", ["started", "stopped", "stall", "records_lost", "degraded", "softnet", "nic"]
    )
    def test_no_other_key_and_none_less(self, name: str) -> None:
        """A key too many or too few is refused in each event, and everywhere inside of it."""
        event = EXAMPLES[name]()
        VALIDATOR.validate(event)
        for place, inner in inside(event):
            if place == ("starved",):
                continue
            for key in list(inner):
                value = inner.pop(key)
                with pytest.raises(ValidationError):
                    VALIDATOR.validate(event)
                inner[key] = value
            inner["surplus"] = 1
            with pytest.raises(ValidationError, match="surplus"):
                VALIDATOR.validate(event)
            del inner["surplus"]
        VALIDATOR.validate(event)

    def test_every_key_of_a_stall_is_tried(self) -> None:
        """The example has all that is inside of a stall."""
        places = {place[0] for place, _ in inside(EXAMPLES["stall"]()) if place}
        assert places == {
            "starved",
            "ksoftirqd",
            "waiting",
            "handler",
            "blocker",
            "stack",
            "evidence",
            "lookback",
            "net",
        }

    @pytest.mark.parametrize(
        "change",
        [
            {"event": "stalled"},
            {"level": "critical"},
            {"schema": "softirq-stalld/2"},
            {"timestamp": "2026-01-02T03:04:05Z"},
            {"phase": "over"},
            {"phase": "ongoing"},  # its evidence says that it is over
            {"duration_ms": -1},
            {"duration_ms": "50"},
            {"verdict": None},
            {"starved": {"NET": 1.0}},
            {"starved": None},
            {"cpu": -1},
            {"waiting": None},
            {"handler": {}},
            {"net": None},
            {"lookback": {}},
            {"hint": 1},
        ],
    )
    def test_wrong_values(self, change: dict[str, Any]) -> None:
        """Values that the contract does not have are refused."""
        with pytest.raises(ValidationError):
            VALIDATOR.validate(EXAMPLES["stall"]() | change)


def inside(value: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each object in an event, itself included, and where it is."""
    if isinstance(value, dict):
        yield place, value
        for key, inner in value.items():
            yield from inside(inner, (*place, key))
    elif isinstance(value, list):
        for inner in value:
            yield from inside(inner, place)


def _lost() -> dict[str, Any]:
    stream = io.BytesIO()
    pipeline(stream).take_lost(0, 1)
    return parse(stream.getvalue())


def _stall() -> dict[str, Any]:
    (_, update) = updates(MadeHost([tick(-4)]))
    polled = {(2, b"eth0"): Polled(1, 1, 1)}
    return told(
        update._replace(
            waiting={40: 12 * MS},
            handler=Handler(3, 12 * MS, b"eth0", 64, 64),
            net=Net(1, MS, 1, 0, polled, 2, 3, 4, 5),
        ),
        inventory=INVENTORY,
    )


def _softnet() -> dict[str, Any]:
    counts = {"packets": 9, "dropped": 8, "time_squeeze": 7, "received_rps": 6, "flow_limit": 5}
    episode = Episode(EpisodePhase.BEGUN, MS, 2 * MS, counts, {"dropped": 4.0})
    return parse(
        line(
            "softnet",
            *net_events.softnet(0, episode, 3, INVENTORY, drops_per_s=1.0, boot_wall_ns=WALL),
        )
    )


def _nic() -> dict[str, Any]:
    stats = LinkStats(90, 80, 70, 60, 50, 40)
    lost = {Lost("rx3_drops", 3, 0): 5}
    counts = net_events.nic_counters(stats, lost)
    episode = Episode(EpisodePhase.ONGOING, MS, 2 * MS, counts, {"drops": 4.0})
    told = net_events.nic("eth0", 2, episode, list(lost), INVENTORY, boot_wall_ns=WALL)
    return parse(line("nic", *told))


INVENTORY = Inventory(
    {
        2: Device(
            "eth0",
            2,
            "ixgbe",
            NicSettings(512, 4096, 8, 63, 1, 0, True),
            {77: frozenset({0})},
            {1: frozenset({0, 1})},
        )
    },
    {0: (Queue("eth0", 0, 77, False), Queue("eth0", 1, None, True))},
    Sysctls(300, 8000, 1000),
)
"""One device with both kinds of queues on CPU 0."""
EXAMPLES: dict[str, Callable[[], dict[str, Any]]] = {
    "started": lambda: started("softirq_entry", hidden=True),
    "stopped": stopped,
    "stall": _stall,
    "records_lost": _lost,
    "degraded": gap,
    "softnet": _softnet,
    "nic": _nic,
}
