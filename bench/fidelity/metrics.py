"""Judgements as figures. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bench.fidelity.judge import Judgement
from bench.fidelity.truth import Injected
from bench.row import quantile
from tests.injector.kinds import Kind

MISSED = "missed"


class Share(NamedTuple):
    """So many of so many."""

    part: int
    whole: int

    @property
    def percent(self) -> float | None:
        """None of nothing."""
        return 100 * self.part / self.whole if self.whole else None

    def reaches(self, percent: float) -> bool:
        """Whether it is at least that; nothing proves nothing."""
        return self.percent is not None and self.percent >= percent


class Spread(NamedTuple):
    """Median, 99th percentile and greatest of some numbers."""

    p50: float
    p99: float
    max: float


class Figures(NamedTuple):
    """Of one kind, or of all.

    Attributes:
        injected: stalls, with or without effect.
        counted: those that had to be found.
        recall, verdict, blame: shares of the counted.
        function: share of those whose stack can show it.
        split: stalls told as several.
        hasty: stalls of which an ongoing line has a wrong verdict, one that accuses.
        duration_error_ms: absolute; of the found.
        first_line_ms: after the threshold was crossed; of those with an ongoing line.
        during: share of the counted that had a line before they were over.
        steal_ms: what the hypervisor took meanwhile, in all.
    """

    injected: int
    counted: int
    recall: Share
    verdict: Share
    blame: Share
    function: Share
    split: int
    hasty: int
    duration_error_ms: Spread | None
    first_line_ms: Spread | None
    during: Share
    steal_ms: float


def figures(injected: Sequence[Injected], judged: Sequence[Judgement]) -> Figures:
    """Sum up."""
    count = len(judged)
    functions = [one.function_right for one in judged if one.function_right is not None]
    errors = [abs(e) for e in (one.duration_error_ms for one in judged) if e is not None]
    delays = [d for d in (one.first_line_ms for one in judged) if d is not None]
    return Figures(
        injected=len(injected),
        counted=count,
        recall=Share(sum(one.said is not None for one in judged), count),
        verdict=Share(sum(one.verdict_right for one in judged), count),
        blame=Share(sum(one.blame_right for one in judged), count),
        function=Share(sum(functions), len(functions)),
        split=sum(one.parts > 1 for one in judged),
        hasty=sum(one.hasty for one in judged),
        duration_error_ms=spread(errors),
        first_line_ms=spread(delays),
        during=Share(sum(one.told_during for one in judged), count),
        steal_ms=sum(one.steal_ms for one in injected),
    )


def by_kind(
    injected: Sequence[Injected], judged: Sequence[Judgement]
) -> dict[Kind, tuple[Figures, Counter[str]]]:
    """For each kind that was injected its figures and its row of the confusion table."""
    return {
        kind: (
            figures(
                [one for one in injected if one.truth.kind is kind],
                [one for one in judged if one.stall.truth.kind is kind],
            ),
            verdicts(one for one in judged if one.stall.truth.kind is kind),
        )
        for kind in Kind
        if any(one.truth.kind is kind for one in injected)
    }


def verdicts(judged: Iterable[Judgement]) -> Counter[str]:
    """How often each verdict was given; MISSED where none was."""
    return Counter(one.said.verdict.value if one.said else MISSED for one in judged)


def spread(numbers: Sequence[float]) -> Spread | None:
    """None of nothing."""
    if not numbers:
        return None
    return Spread(quantile(numbers, 0.5), quantile(numbers, 0.99), max(numbers))
