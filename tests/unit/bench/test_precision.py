"""Which stalls are believed, and who has to be looked at."""

from __future__ import annotations

from typing import Any

import pytest

from bench.fidelity.judge import judge
from bench.fidelity.precision import Reason, Standing, stand, stolen_ms, to_read
from bench.fidelity.truth import Steal
from tests.injector.kinds import Kind
from tests.injector.pressure import Probe
from tests.unit.bench.make import MS, injected, run, said, span, wait


def only(*arguments: Any, **changes: Any) -> Standing:
    """The standing of the only stall that was told."""
    given = run(*arguments, **changes)
    [standing] = stand(given, judge(given))
    return standing


def test_counted() -> None:
    """What was said of a stall that counts is judged elsewhere, however wrong."""
    standing = only([injected()], [said(verdict="cpu_contention", tid=7)])
    assert standing.reason is Reason.COUNTED
    assert to_read([standing]) == []


@pytest.mark.parametrize(
    ("changes", "accused"),
    [
        ({"verdict": "stuck_in_kernel"}, False),
        ({"verdict": "unknown", "tid": 7}, False),
        ({"verdict": "vcpu_preempted", "tid": None}, False),
        ({"verdict": "stuck_in_kernel", "tid": 7}, True),
        ({"verdict": "softirqs_disabled"}, True),
    ],
)
def test_injected_without_effect(changes: dict[str, Any], accused: bool) -> None:
    """Half of it lies in an injected stall: believed, but nobody else may be accused."""
    standing = only([injected(Kind.PREEMPT_OFF)], [said(1040, 1060, **changes)])
    assert standing.reason is Reason.INJECTED
    assert standing.accused is accused
    assert to_read([standing]) == [standing] * accused


@pytest.mark.parametrize(
    ("verdict", "waited", "accused"),
    [
        ("cpu_contention", wait(1038, 1060), False),
        ("cpu_contention", wait(1051, 1060), True),
        ("stuck_in_kernel", wait(1038, 1060), True),
    ],
)
def test_contention_beside_an_injected_stall(verdict: str, waited: Any, accused: bool) -> None:
    """ksoftirqd was seen to wait then: told as contention that stands; kernel code is no answer."""
    tellings = [said(1040, 1060, verdict=verdict, tid=7)]
    standing = only([injected(Kind.PREEMPT_OFF)], tellings, waits=[waited])
    assert standing.accused is accused


@pytest.mark.parametrize(
    ("witness", "reason"),
    [
        ({"waits": [wait(2009, 2020)]}, Reason.KSOFTIRQD),
        ({"waits": [wait(2011, 2020)]}, Reason.NONE),
        ({"waits": [wait(2000, None)]}, Reason.NONE),
        ({"probes": [Probe(1990 * MS, 20 * MS)]}, Reason.PING),
        ({"probes": [Probe(1990 * MS, None), Probe(1990 * MS, 19 * MS)]}, Reason.NONE),
        ({"steal": [Steal(1900 * MS, 30.0), Steal(2100 * MS, 40.0)]}, Reason.STEAL),
        ({"steal": [Steal(1900 * MS, 30.0), Steal(2100 * MS, 30.0)]}, Reason.NONE),
        ({}, Reason.NONE),
    ],
)
def test_witnesses(witness: dict[str, Any], reason: Reason) -> None:
    """Away from all injected stalls a witness must have seen half of it."""
    standing = only([injected()], [said(2000, 2020)], **witness)
    assert standing.reason is reason
    assert standing.stall is None
    assert to_read([standing]) == [standing] * (reason is Reason.NONE)


def test_what_is_not_looked_at() -> None:
    """Other CPUs, and what began before all was set up."""
    given = run([], [said(2000, 2020, cpu=0), said(880, 950)])
    assert stand(given, []) == []


def test_stolen() -> None:
    """The readings around a time tell what was taken meanwhile; nothing where there are none."""
    readings = [Steal(100 * MS, 0.0), Steal(200 * MS, 10.0), Steal(300 * MS, 40.0)]
    assert stolen_ms(readings, span(110, 150)) == 10
    assert stolen_ms(readings, span(150, 250)) == 40
    assert stolen_ms(readings, span(50, 150)) == 0
    assert stolen_ms(readings, span(250, 350)) == 0
