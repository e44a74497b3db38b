"""Each stall the daemon told of on the stalled CPU: is there a reason to believe it? Pure.

Witnesses other than the injector: the tracer of ksoftirqd, the pings, the hypervisor's steal
time. A stall stands when one of them saw at least half of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from enum import StrEnum
from typing import NamedTuple

from bench.fidelity.judge import Judgement
from bench.fidelity.truth import EXPECTED, TOLERATED, Injected, Run, Said, Span, Steal
from stalld.track.verdict import Verdict


class Reason(StrEnum):
    """Why a stall is believed, the best reason first."""

    COUNTED = "counted"
    INJECTED = "injected"
    KSOFTIRQD = "ksoftirqd"
    PING = "ping"
    STEAL = "steal"
    NONE = "unexplained"


class Standing(NamedTuple):
    """One stall that the daemon told of.

    Attributes:
        said: by the daemon.
        reason: to believe it; COUNTED is judged elsewhere, INJECTED overlaps any injected stall.
        stall: the injected one it overlaps most, if any.
        accused: an innocent one: it overlaps an injected stall that does not count, and has a
            verdict or blames a task that does not fit.
    """

    said: Said
    reason: Reason
    stall: Injected | None
    accused: bool


def stand(run: Run, judged: Sequence[Judgement]) -> list[Standing]:
    """All stalls told on the stalled CPU that began after the set-up, in order."""
    counted = {id(one.said) for one in judged if one.said is not None}
    return [
        _stand(run, said, id(said) in counted)
        for said in run.said
        if said.resolved["cpu"] == run.cpu and said.span.start_ns >= run.span.start_ns
    ]


def _stand(run: Run, said: Said, counted: bool) -> Standing:
    stall = max(
        (one for one in run.injected if one.span.overlap(said.span)),
        key=lambda one: one.span.overlap(said.span),
        default=None,
    )
    if counted:
        return Standing(said, Reason.COUNTED, stall, False)
    half_ns = said.span.length_ns / 2
    waits = [Span(w.woken_ns, w.ran_ns) for w in run.waits if w.ran_ns is not None]
    if stall and stall.span.overlap(said.span) >= half_ns:
        # ksoftirqd may wait behind others before, and so into, a stall that does not count.
        contended = said.verdict is Verdict.CPU_CONTENTION and _covered(said.span, waits, half_ns)
        if contended and not fits(said, stall):
            return Standing(said, Reason.KSOFTIRQD, stall, False)
        return Standing(said, Reason.INJECTED, stall, not fits(said, stall))
    pings = (Span(p.send_ns, p.send_ns + p.rtt_ns) for p in run.probes if p.rtt_ns is not None)
    reason = Reason.NONE
    if _covered(said.span, waits, half_ns):
        reason = Reason.KSOFTIRQD
    elif _covered(said.span, pings, half_ns):
        reason = Reason.PING
    elif stolen_ms(run.steal, said.span) >= half_ns / 1e6:
        reason = Reason.STEAL
    return Standing(said, reason, stall, False)


def fits(said: Said, stall: Injected) -> bool:
    """Whether what was said accuses nobody, or whom and of what the injected stall shows."""
    if said.verdict in TOLERATED:
        return True
    return said.verdict is EXPECTED[stall.truth.kind] and said.blamed_tid in stall.tids


def _covered(span: Span, by: Iterable[Span], enough_ns: float) -> bool:
    return any(other.overlap(span) >= enough_ns for other in by)


def stolen_ms(readings: Sequence[Steal], span: Span) -> float:
    """What the hypervisor took between the last reading before and the first one after."""
    before = max((r.total_ms for r in readings if r.time_ns <= span.start_ns), default=None)
    after = min((r.total_ms for r in readings if r.time_ns >= span.end_ns), default=None)
    return 0.0 if before is None or after is None else after - before


def to_read(standings: Collection[Standing]) -> list[Standing]:
    """Possible false accusations: a person has to look at them."""
    return [one for one in standings if one.reason is Reason.NONE or one.accused]
