"""Events as other programs read them: shape, schema, levels, times, hostile names."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator, ValidationError

from stalld import events
from stalld.errors import DecodeError
from stalld.pipeline import Pipeline
from stalld.probe.protocol import Attached, Description, Missing
from stalld.service import Service, Settings
from stalld.sinks.emitter import Emitter
from stalld.state import CpuState, Maps
from stalld.track.stall import Ended, Phase, Tracker, Update
from stalld.track.verdict import HINTS, Verdict
from tests.unit.make import MS, T0, THRESHOLD, close, encode, record, sample, waits
from tests.unit.schema import SCHEMA, VALIDATOR, parse

WALL = 1_767_323_045_678_901_234


def updates(**changes: Any) -> list[Update]:
    """Both lines of one stall."""
    given = Tracker(THRESHOLD, lambda: True)
    waiting = {"wait_ns": waits(NET_RX=50 * MS), "ksoftirqd_wait_ns": 11 * MS} | changes
    return given.observe(sample(1, 50, **waiting)) + given.observe(close(1, 60, **waiting))


def stall(update: Update) -> events.Event:
    """The event of one update."""
    return events.stall(update, stall_id="b-1-0-1", boot_wall_ns=WALL - T0, sampler="tick")


def line(event: str, level: str, fields: events.Event) -> bytes:
    """The line as written."""
    stream = io.BytesIO()
    Emitter(stream, "json", lambda: WALL, "host").emit(event, level, fields)
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
    (update, _) = updates(ksoftirqd_wait_ns=900 * MS)
    assert events.stall_level(update._replace(starved=starved), THRESHOLD) == level


def test_a_whole_stall() -> None:
    """Every key of the contract, with the values that the records gave."""
    (update, _) = updates(user_stack=(0x7F00,), policy=1, mode="kernel")
    assert stall(update) == {
        "phase": "ongoing",
        "stall_id": "b-1-0-1",
        "cpu": 0,
        "started_at": "2026-01-02T03:04:05.678901Z",
        "duration_ms": 50.0,
        "verdict": "softirqs_disabled",
        "starved": {"NET_RX": 50.0},
        "ksoftirqd": {"pid": 16, "runnable_ms": 11.0},
        "blocker": {
            "pid": 100,
            "tid": 101,
            "comm": "spinner",
            "cmdline": None,
            "mode": "kernel",
            "policy": "fifo",
            "cgroup": None,
            "unit": None,
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
            "ended": None,
        },
        "lookback": None,
        "net": None,
        "hint": HINTS[Verdict.SOFTIRQS_DISABLED],
    }


def test_what_is_not_known_is_null() -> None:
    """No ksoftirqd that waited, no blocker, a policy without a name, no hint."""
    (update, _) = updates(policy=99, ksoftirqd_wait_ns=0, mode=None)
    event = stall(update)
    assert event["ksoftirqd"] is None
    assert event["blocker"]["policy"] is None
    assert event["blocker"]["mode"] is None
    assert event["verdict"] == "unknown"
    assert event["hint"] is None
    nobody = stall(update._replace(blocker=None, kernel_stack=(), captured="none"))
    assert nobody["blocker"] is None
    parse(line("stall", "warning", nobody))


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


@pytest.mark.parametrize(
    ("comm", "shown"),
    [
        (b"two\nlines\r", "two\nlines\r"),
        (b'"},{"x":"', '"},{"x":"'),
        (b"\x1b[2J\x1b]0;t\x07", "\x1b[2J\x1b]0;t\x07"),
        (b"caf\xc3\xa9", "café"),
        (b"cut off \xc3", "cut off \\xc3"),
        (b"\xff\xfe\x80", "\\xff\\xfe\\x80"),
        (b"\xed\xa0\x80", "\\xed\\xa0\\x80"),
        (b"\xe2\x80\xa8\xe2\x80\xae", "\u2028\u202e"),
        (b"", ""),
    ],
)
def test_hostile_names(comm: bytes, shown: str) -> None:
    """Whatever a task calls itself, the line is one line of valid JSON with that name."""
    for update in updates(comm=comm):
        written = line("stall", "warning", stall(update))
        assert parse(written)["blocker"]["comm"] == shown
        assert b"\x1b" not in written


@given(st.binary(max_size=16), st.lists(st.text(st.characters(codec="utf-8")), max_size=3))
def test_any_name(comm: bytes, frames: list[str]) -> None:
    """The same for names and frames that nobody thought of."""
    for update in updates(comm=comm, frames=tuple(frames)):
        assert parse(line("stall", "warning", stall(update)))["stack"]["kernel"] == frames


class Symbols:
    """Stands for a symbol table that names every address the same."""

    def __init__(self, mode: str) -> None:
        self.mode = mode

    def trimmed(self, addresses: tuple[int, ...], kind: str) -> Any:
        """Cuts the first frame; the second one is the interrupted context's own."""
        frames = ("own+0x1", "below+0x1")[: max(0, len(addresses) - 1)]
        return SimpleNamespace(mode=self.mode, frames=frames, cut=1, own=1)

    def format_stack(self, addresses: tuple[int, ...]) -> tuple[str, ...]:
        """One name for all."""
        return ("__local_bh_enable_ip+0x5",) * len(addresses)


def pipeline(
    stream: io.BytesIO,
    bad: Callable[[DecodeError], None] = lambda error: None,
    mode: str = "kernel",
) -> Pipeline:
    """A pipeline without a kernel, 70 ms after the stall began."""
    symbols: Any = Symbols(mode)
    return Pipeline(
        Tracker(THRESHOLD, lambda: True),
        symbols,
        Emitter(stream, "json", lambda: WALL, "host"),
        id_prefix="boot-1",
        sampler="tick",
        clocks_ns=lambda: (T0 + 70 * MS, WALL),
        on_bad_record=bad,
    )


class TestPipeline:
    """From bytes to lines."""

    def test_records_become_lines(self) -> None:
        """Two records of one stall: two valid lines with the same id and start."""
        stream = io.BytesIO()
        given = pipeline(stream)
        given.take(encode(record(kernel_stack=(1, 2), wait_ns=waits(NET_RX=12 * MS))))
        given.take(encode(close(1, 50, wait_ns=waits(NET_RX=50 * MS)).record))
        first, last = map(parse, stream.getvalue().splitlines(keepends=True))
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
        waiting = record(kernel_stack=(1, 2, 3)[:depth], tid=tid, ksoftirqd_wait_ns=12 * MS)
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

    def test_losses_are_told(self) -> None:
        """The kernel's losses are an event and belong to the stall of that CPU."""
        stream = io.BytesIO()
        given = pipeline(stream)
        given.take(encode(record()))
        given.take_lost(0, 3)
        given.finish()
        _, lost, resolved = map(parse, stream.getvalue().splitlines(keepends=True))
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


def service(stream: io.BytesIO) -> Service:
    """A service that believes it is attached."""
    log: Any = None
    made: Any = Service(Settings(), Emitter(stream, "json", lambda: WALL, "host"), log)
    description = Description(
        structs="btf",
        net_rx_action="softirq",
        attached=[Attached("softirq_entry", "raw_tracepoint"), Attached("task", "iterator")],
        missing=[Missing("net_rx_action by kfunc", "not permitted", "softirq stands in")],
        fds=["link:hrtimer_expire_entry"],
        bcc_version="0.26.0",
        compile_ms=200.0,
        attach_ms=2.0,
    )
    made._probes = SimpleNamespace(description=description, fds={"link:hrtimer_expire_entry": 9})
    maps = object.__new__(Maps)
    maps.cpus = (CpuState * 2)()
    maps.cpus[1].net_rx_runs, maps.cpus[1].net_rx_ns, maps.cpus[1].net_rx_max_ns = 3, 9 * MS, 4 * MS
    made._maps = maps
    made._pipeline = pipeline(stream)
    attached: Service = made
    return attached


@pytest.mark.parametrize("hidden", [False, True])
def test_started(hidden: bool) -> None:
    """What is attached and what this kernel refused, also hidden symbols."""
    stream = io.BytesIO()
    service(stream)._emit_started({0: 16, 1: 24}, hidden)
    event = parse(stream.getvalue())
    assert event["attached"] == ["softirq_entry (raw_tracepoint)", "task (iterator)"]
    assert [missing["ability"] for missing in event["missing"]] == [
        "net_rx_action by kfunc",
        *["kernel symbols"] * hidden,
    ]
    assert (event["sampler"], event["cpus"], event["threshold_ms"]) == ("tick", 2, 10.0)


def test_stopped() -> None:
    """The totals."""
    stream = io.BytesIO()
    service(stream)._emit_stopped(0)
    event = parse(stream.getvalue())
    assert (event["net_rx_runs"], event["net_rx_ms"], event["net_rx_max_ms"]) == (3, 9.0, 4.0)


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

    @pytest.mark.parametrize(
        "name", ["softnet", "nic", "cfs_throttled", "task_blocked", "suppressed", "degraded"]
    )
    def test_reserved_names(self, name: str) -> None:
        """A reserved event needs the common keys and may have others."""
        event = parse(line(name, "info", {"anything": 1}))
        del event["host"]
        with pytest.raises(ValidationError, match="'host' is a required property"):
            VALIDATOR.validate(event)

    @pytest.mark.parametrize("name", ["started", "stopped", "stall", "records_lost"])
    def test_no_other_key_and_none_less(self, name: str) -> None:
        """A key too many or too few is refused in each event, and inside of it."""
        event = EXAMPLES[name]()
        for key in event:
            with pytest.raises(ValidationError):
                VALIDATOR.validate({k: v for k, v in event.items() if k != key})
        with pytest.raises(ValidationError, match="surplus"):
            VALIDATOR.validate(event | {"surplus": 1})
        for key, value in event.items():
            if isinstance(value, dict):
                with pytest.raises(ValidationError, match="surplus"):
                    VALIDATOR.validate(event | {key: value | {"surplus": 1}})

    @pytest.mark.parametrize(
        "change",
        [
            {"event": "stalled"},
            {"level": "critical"},
            {"schema": "softirq-stalld/2"},
            {"timestamp": "2026-01-02T03:04:05Z"},
            {"phase": "over"},
            {"phase": "resolved"},  # its evidence says that it goes on
            {"duration_ms": -1},
            {"duration_ms": "50"},
            {"verdict": None},
            {"starved": {"NET": 1.0}},
            {"starved": None},
            {"cpu": -1},
        ],
    )
    def test_wrong_values(self, change: dict[str, Any]) -> None:
        """Values that the contract does not have are refused."""
        with pytest.raises(ValidationError):
            VALIDATOR.validate(EXAMPLES["stall"]() | change)


def _emitted(emit: Callable[[io.BytesIO], None]) -> dict[str, Any]:
    stream = io.BytesIO()
    emit(stream)
    return parse(stream.getvalue())


EXAMPLES: dict[str, Callable[[], dict[str, Any]]] = {
    "started": lambda: _emitted(lambda stream: service(stream)._emit_started({0: 16}, True)),
    "stopped": lambda: _emitted(lambda stream: service(stream)._emit_stopped(0)),
    "stall": lambda: parse(line("stall", "warning", stall(updates()[0]))),
    "records_lost": lambda: _emitted(lambda stream: pipeline(stream).take_lost(0, 1)),
}
