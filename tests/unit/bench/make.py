"""Makes runs for tests: every field has a plain value unless told. Times in milliseconds."""

from __future__ import annotations

from typing import Any

from bench.fidelity.truth import Event, Injected, Run, Said, Span
from tests.injector.kinds import METHODS, Kind, Truth
from tests.injector.ksoftirqd import Wait

MS = 1_000_000
CPU = 1
TID = 101
THRESHOLD_MS = 10.0


def span(start_ms: float, end_ms: float) -> Span:
    """From one moment to another."""
    return Span(int(start_ms * MS), int(end_ms * MS))


def wait(woken_ms: float, ran_ms: float | None) -> Wait:
    """ksoftirqd's."""
    return Wait(int(woken_ms * MS), None if ran_ms is None else int(ran_ms * MS), TID, "spinner")


def injected(
    kind: Kind = Kind.BH_OFF,
    start_ms: float = 1000,
    end_ms: float = 1050,
    *waits: Wait,
    **changes: Any,
) -> Injected:
    """A stall of 50 ms."""
    truth = Truth(
        kind=kind,
        cpu=CPU,
        pid=TID,
        tid=TID,
        comm=METHODS[kind].comm,
        start_ns=int(start_ms * MS),
        end_ns=int(end_ms * MS),
        symbol=METHODS[kind].symbol,
        others=changes.pop("others", ()),
    )
    fields: dict[str, Any] = {"number": 1, "truth": truth, "waits": waits, "steal_ms": 0.0}
    return Injected(**(fields | changes))


def line(verdict: str = "softirqs_disabled", tid: int | None = TID, **changes: Any) -> Event:
    """As much of a line as is looked at; the injected function is in the stack."""
    frame = "bpf_prog_0123456789abcdef_injected_spin_bh_off+0x38 [bpf]"
    return {
        "cpu": CPU,
        "phase": "resolved",
        "stall_id": "a",
        "started_at": "2026-01-02T03:04:05.678901Z",
        "duration_ms": 50.0,
        "verdict": verdict,
        "starved": {"NET_RX": 50.0},
        "ksoftirqd": None,
        "blocker": None if tid is None else {"comm": "spinner", "tid": tid, "mode": "kernel"},
        "stack": {"kernel": [frame], "captured": "during"},
        "evidence": {"samples": 3, "expected": 3, "switches": 0, "ended": "record"},
    } | changes


def said(
    start_ms: float = 1000,
    end_ms: float = 1050,
    *ongoing: Event,
    **changes: Any,
) -> Said:
    """What is right for the injected stall."""
    resolved = line(**({"duration_ms": float(end_ms - start_ms)} | changes))
    return Said(span(start_ms, end_ms), resolved, ongoing)


def run(stalls: list[Injected], told: list[Said], **changes: Any) -> Run:
    """All of it, from 0.9 s on."""
    fields: dict[str, Any] = {
        "cpu": CPU,
        "threshold_ms": THRESHOLD_MS,
        "span": span(900, 9000),
        "injected": stalls,
        "failed": [],
        "unsupported": {},
        "said": told,
        "waits": [],
        "probes": [],
        "steal": [],
        "started": {"kernel": "6.18", "tick_ms": 4.0},
        "stopped": {"records_lost": 0, "records_undecodable": 0, "suppressed": 0},
        "wanted": len(stalls),
        "seed": 7,
    }
    return Run(**(fields | changes))
