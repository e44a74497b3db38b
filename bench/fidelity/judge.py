"""Each counted stall against what the daemon said about it. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from bench.fidelity.truth import EXPECTED, STACK_AFTER, TOLERATED, Injected, Run, Said, Span
from stalld.track.verdict import Verdict

EFFECT_THRESHOLDS = 2
"""A stall that needs luck counts when it made ksoftirqd wait for this many thresholds."""


class Judgement(NamedTuple):
    """One counted stall.

    Attributes:
        stall: that was injected.
        reference: what had to be seen: the injected time; or, where that alone harms nothing,
            the wait of ksoftirqd that it caused.
        said: about it; None when it was missed.
        parts: resolved lines that overlap the reference, 1 when all is well.
        threshold_ms: of the daemon.
    """

    stall: Injected
    reference: Span
    said: Said | None
    parts: int
    threshold_ms: float

    @property
    def expected(self) -> Verdict:
        """The right verdict."""
        return EXPECTED[self.stall.truth.kind]

    @property
    def verdict_right(self) -> bool:
        """Whether it was found and given that."""
        return self.said is not None and self.said.verdict is self.expected

    @property
    def blame_right(self) -> bool:
        """Whether it was found and the thread that burned the time, or was on the CPU, blamed."""
        return self.said is not None and self.said.blamed_tid in self.stall.tids

    @property
    def function_right(self) -> bool | None:
        """Whether the injected function is in the stack; None where it cannot be."""
        truth = self.stall.truth
        if truth.symbol is None or truth.kind in STACK_AFTER:
            return None
        if self.said is None:
            return False
        return any(truth.symbol in frame for frame in self.said.resolved["stack"]["kernel"])

    @property
    def hasty(self) -> bool:
        """Whether an ongoing line has a wrong verdict, one that accuses."""
        right = {self.expected, *TOLERATED}
        return self.said is not None and any(
            line["verdict"] not in right for line in self.said.ongoing
        )

    @property
    def duration_error_ms(self) -> float | None:
        """Told minus true length."""
        if self.said is None:
            return None
        told_ms: float = self.said.resolved["duration_ms"]
        return told_ms - self.reference.length_ns / 1e6

    @property
    def first_line_ms(self) -> float | None:
        """From the moment the reference was as old as the threshold to the first ongoing line."""
        if self.said is None or not self.said.ongoing:
            return None
        late_ns: int = self.said.ongoing[0]["read_ns"] - self.reference.start_ns
        return late_ns / 1e6 - self.threshold_ms

    @property
    def told_during(self) -> bool:
        """Whether a line was there before the stall was over."""
        return (
            self.said is not None
            and bool(self.said.ongoing)
            and self.said.ongoing[0]["read_ns"] <= self.reference.end_ns
        )


def judge(run: Run) -> list[Judgement]:
    """All stalls that count, in order."""
    said = [one for one in run.said if one.resolved["cpu"] == run.cpu]
    judged = []
    for stall in run.injected:
        reference = effect(stall, run.threshold_ms)
        if reference is not None:
            best, parts = find(reference, said)
            judged.append(Judgement(stall, reference, best, parts, run.threshold_ms))
    return judged


def effect(stall: Injected, threshold_ms: float) -> Span | None:
    """What the daemon had to see of a stall; None when it had no effect of its own.

    A wait that mostly lies outside the injected time is somebody else's doing.
    """
    if not stall.needs_luck:
        return stall.span
    waits = [Span(wait.woken_ns, wait.ran_ns) for wait in stall.waits if wait.ran_ns is not None]
    longest = max(waits, key=stall.span.overlap, default=None)
    if longest is None:
        return None
    caused_ns = stall.span.overlap(longest)
    enough_ns = max(EFFECT_THRESHOLDS * threshold_ms * 1e6, longest.length_ns / 2)
    return longest if caused_ns >= enough_ns else None


def find(reference: Span, said: Sequence[Said]) -> tuple[Said | None, int]:
    """What was said about it, if that covers half of it; and the number of lines that touch it."""
    near = [one for one in said if one.span.overlap(reference) > 0]
    best = max(near, key=lambda one: one.span.overlap(reference), default=None)
    if best is None or best.span.overlap(reference) < reference.length_ns / 2:
        return None, len(near)
    return best, len(near)


def complaints(judgement: Judgement) -> Iterator[str]:
    """What is wrong with it, one line each, nothing when all is right."""
    said = judgement.said
    if said is None:
        yield "missed" if not judgement.parts else "missed: less than half of it was told"
        return
    if not judgement.verdict_right:
        yield f"verdict {said.verdict} instead of {judgement.expected}"
    if not judgement.blame_right:
        blocker = said.resolved["blocker"]
        who = f"{blocker['comm']} ({blocker['tid']})" if blocker else "nobody"
        yield f"blames {who} instead of {judgement.stall.truth.comm} ({judgement.stall.truth.tid})"
    if judgement.function_right is False:
        yield f"{judgement.stall.truth.symbol} is not in the stack"
    if judgement.parts > 1:
        yield f"told as {judgement.parts} stalls"
