"""The ``suppressed`` event as other programs read it."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import ValidationError

from stalld import events
from stalld.sinks.emitter import Emitter
from stalld.track.fold import Reason, Suppressed
from stalld.track.model import Blocker
from stalld.track.verdict import Verdict
from tests.unit.make import MS, T0
from tests.unit.schema import SCHEMA, VALIDATOR, parse

WALL = 1_767_323_045_678_901_234

IDENTICAL = Suppressed(
    reason=Reason.IDENTICAL,
    cpus=frozenset({9, 1, 64}),
    stalls=41,
    total_ns=900 * MS,
    since_ns=T0,
    until_ns=T0 + 2000 * MS,
    longest_ns=33 * MS,
    starved_ns=0,
    verdict=Verdict.STUCK_IN_KERNEL,
    blocker=Blocker(100, 101, b"spinner", "kernel", 0, 120, 77),
    kernel_stack=("spin+0x10", "do_syscall_64+0x5"),
    like=(1, 17),
)
RATE = Suppressed(Reason.RATE, frozenset({3}), 700, 9000 * MS, T0, T0 + 1000 * MS)


def fields(suppressed: Suppressed) -> events.Event:
    """The keys of the event."""
    like = "b-1-1-17" if suppressed.like else None
    return events.suppressed(suppressed, boot_wall_ns=WALL - T0, like=like)


def event(suppressed: Suppressed) -> dict[str, Any]:
    """The event, written and read again."""
    stream = io.BytesIO()
    emitter = Emitter(lambda line, _: stream.write(line), lambda: WALL, "host")
    emitter.emit("suppressed", suppressed.level, fields(suppressed))
    return parse(stream.getvalue())


def test_identical_stalls() -> None:
    """Every key, with the values of the sum; CPUs in order."""
    made = fields(IDENTICAL)
    assert "storm.identical_per_minute" in made.pop("hint")
    assert made == {
        "reason": "identical",
        "cpus": [1, 9, 64],
        "count": 41,
        "total_ms": 900.0,
        "longest_ms": 33.0,
        "since": "2026-01-02T03:04:05.678901Z",
        "until": "2026-01-02T03:04:07.678901Z",
        "verdict": "stuck_in_kernel",
        "blocker": {"pid": 100, "comm": "spinner"},
        "stack": ["spin+0x10", "do_syscall_64+0x5"],
        "like": "b-1-1-17",
    }
    assert event(IDENTICAL)["level"] == "info"
    assert event(IDENTICAL._replace(starved_ns=1))["level"] == "warning"


def test_over_the_kernels_limit() -> None:
    """What the kernel did not tell is null; what may have starved is a warning."""
    made = event(RATE)
    assert "storm.stalls_per_second" in made["hint"]
    assert (made["level"], made["cpus"], made["count"]) == ("warning", [3], 700)
    assert (made["total_ms"], made["stack"]) == (9000.0, [])
    assert {made[key] for key in ("longest_ms", "verdict", "blocker", "like")} == {None}


@pytest.mark.parametrize("verdict", [*Verdict, None])
def test_every_verdict_validates(verdict: Verdict | None) -> None:
    """All verdicts and none are in the schema."""
    assert event(IDENTICAL._replace(verdict=verdict))["verdict"] == verdict


def test_nobody_to_blame() -> None:
    """Stalls without a blocker, a stack or an example are told as well."""
    made = event(IDENTICAL._replace(blocker=None, kernel_stack=(), like=None))
    assert (made["blocker"], made["stack"], made["like"]) == (None, [], None)


@pytest.mark.parametrize(
    ("comm", "shown"),
    [
        (b"two\nlines\r", "two\nlines\r"),
        (b"\x1b[2J\x1b]0;t\x07", "\x1b[2J\x1b]0;t\x07"),
        (b'"},{"x":"', '"},{"x":"'),
        (b"\xff\xfe\x80", "\\xff\\xfe\\x80"),
        (b"", ""),
    ],
)
def test_hostile_names(comm: bytes, shown: str) -> None:
    """Whatever a task calls itself, the line is one line of valid JSON with that name."""
    assert IDENTICAL.blocker
    named = IDENTICAL._replace(blocker=IDENTICAL.blocker._replace(comm=comm))
    assert event(named)["blocker"] == {"pid": 100, "comm": shown}


@given(st.binary(max_size=16), st.integers(1, 2**63), st.sets(st.integers(0, 8191), min_size=1))
def test_anything_validates(comm: bytes, number: int, cpus: set[int]) -> None:
    """No name, count, length or set of CPUs makes a line that the schema refuses."""
    assert IDENTICAL.blocker
    made = event(
        IDENTICAL._replace(
            cpus=frozenset(cpus),
            stalls=number,
            total_ns=number,
            longest_ns=number,
            blocker=IDENTICAL.blocker._replace(comm=comm),
        )
    )
    assert (made["count"], made["cpus"]) == (number, sorted(cpus))


def test_the_schema_knows_the_reasons() -> None:
    """Contract and code have the same reasons and verdicts."""
    properties = SCHEMA["$defs"]["suppressed"]["properties"]
    assert properties["reason"]["enum"] == [reason.value for reason in Reason]
    assert properties["verdict"]["enum"] == [*[verdict.value for verdict in Verdict], None]


@pytest.mark.parametrize("suppressed", [IDENTICAL, RATE], ids=["identical", "rate"])
def test_no_other_key_and_none_less(suppressed: Suppressed) -> None:
    """A key too many or too few is refused."""
    made = event(suppressed)
    for key in made:
        with pytest.raises(ValidationError):
            VALIDATOR.validate({k: v for k, v in made.items() if k != key})
    with pytest.raises(ValidationError, match="surplus"):
        VALIDATOR.validate(made | {"surplus": 1})


@pytest.mark.parametrize(
    ("suppressed", "change"),
    [
        (IDENTICAL, {"level": "error"}),
        (IDENTICAL, {"reason": "other"}),
        (IDENTICAL, {"reason": "rate"}),
        (IDENTICAL, {"count": 0}),
        (IDENTICAL, {"cpus": []}),
        (IDENTICAL, {"cpus": [1, 1]}),
        (IDENTICAL, {"cpus": [-1]}),
        (IDENTICAL, {"longest_ms": None}),
        (IDENTICAL, {"total_ms": -1}),
        (IDENTICAL, {"since": "2026-01-02T03:04:05Z"}),
        (IDENTICAL, {"blocker": {"pid": 1}}),
        (IDENTICAL, {"blocker": {"pid": 1, "comm": "c", "surplus": 1}}),
        (IDENTICAL, {"stack": None}),
        (IDENTICAL, {"like": ""}),
        (IDENTICAL, {"hint": None}),
        (RATE, {"level": "info"}),
        (RATE, {"reason": "identical"}),
        (RATE, {"cpus": [1, 2]}),
        (RATE, {"longest_ms": 1.0}),
        (RATE, {"verdict": "unknown"}),
        (RATE, {"blocker": {"pid": 1, "comm": "c"}}),
        (RATE, {"stack": ["spin+0x10"]}),
        (RATE, {"like": "b-1-1-17"}),
    ],
)
def test_wrong_values(suppressed: Suppressed, change: dict[str, Any]) -> None:
    """Values that the contract does not have are refused, for each reason its own."""
    with pytest.raises(ValidationError):
        VALIDATOR.validate(event(suppressed) | change)
