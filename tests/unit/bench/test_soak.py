"""Which stalls of a soak stand on evidence of their own."""

from __future__ import annotations

from typing import Any

import pytest

from bench.soak import unsupported


def event(verdict: str, **changes: Any) -> dict[str, Any]:
    """A resolved stall of 20 ms, in which NET_RX starved."""
    evidence = {"late_ms": 0.0, "stolen_ms": 0.0} | changes.pop("evidence", {})
    return {
        "verdict": verdict,
        "duration_ms": 20.0,
        "starved": {"NET_RX": 20.0},
        "ksoftirqd": None,
        "waiting": [],
        "handler": None,
        "blocker": {"tid": 1},
        "stack": {"kernel": ["spin+0x1"]},
        "evidence": evidence,
        **changes,
    }


WAITED = {"pid": 16, "runnable_ms": 15.0}


@pytest.mark.parametrize(
    "told",
    [
        event("softirqs_disabled"),
        event("stuck_in_kernel"),
        event("cpu_contention", starved={}, ksoftirqd=WAITED),
        event("cpu_contention", starved={}, waiting=[WAITED]),
        event("irqs_disabled", evidence={"late_ms": 19.0, "stolen_ms": None}),
        event("softirq_hog", handler={"service_ms": 18.0}),
        event("vcpu_preempted", blocker=None, evidence={"stolen_ms": 12.0}),
        event("unknown", starved={}, evidence={"late_ms": 12.0}),
    ],
    ids=lambda told: told["verdict"],
)
def test_supported(told: dict[str, Any]) -> None:
    """What each verdict asks for is there."""
    assert unsupported(told, 10.0) == ""


@pytest.mark.parametrize(
    "told",
    [
        event("softirqs_disabled", blocker=None),
        event("stuck_in_kernel", stack={"kernel": []}),
        event("cpu_contention"),
        event("irqs_disabled", evidence={"late_ms": 19.0, "stolen_ms": 15.0}),
        event("softirq_hog", handler={"service_ms": 8.0}),
        event("vcpu_preempted", evidence={"stolen_ms": 12.0}),
        event("unknown", starved={}),
        event("cpu_contention", starved={}, duration_ms=3.0),
    ],
    ids=lambda told: told["verdict"],
)
def test_unsupported(told: dict[str, Any]) -> None:
    """Something of that is missing, and it is said what."""
    assert unsupported(told, 10.0) != ""
