"""A row of the table: a figure, what it is held against, the goal. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple


class Figure(NamedTuple):
    """Something measured: what is judged, how it is told, and the lower quartile if known."""

    value: float
    text: str
    low: float = math.nan


class Goal(NamedTuple):
    """A bound.

    Attributes:
        bound: that is to be reached.
        unit: of it; "×" is a ratio.
        of: what is judged: our figure, or what it is against the reference.
        at_least: else at most.
    """

    bound: float
    unit: str
    of: Literal["ours", "against"] = "ours"
    at_least: bool = False

    def __str__(self) -> str:
        sign = "≥" if self.at_least else "≤"
        if self.unit == "×":
            return f"{sign} {self.bound:g} ×"
        plus = "+" if self.of == "against" and not self.at_least and self.bound else ""
        return f"{sign} {plus}{_number(self.bound)} {self.unit}"

    def reached(self, value: float) -> bool:
        """Whether a value is within."""
        return value >= self.bound if self.at_least else value <= self.bound


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        name: of the figure.
        ours, reference, ratio: as text; the last may be a difference.
        goal: as text, "" where there is none.
        reached: None where there is no goal, or nothing could be measured.
        why: nothing could be measured, or what to know about it.
    """

    name: str
    ours: str
    reference: str
    ratio: str
    goal: str
    reached: bool | None
    why: str = ""

    @property
    def verdict(self) -> str:
        """In a word."""
        if self.reached is None:
            return "not measured" if not self.ours else "not known" if self.goal else ""
        return "reached" if self.reached else "NOT REACHED"


def row(
    name: str,
    ours: Figure,
    *,
    reference: Figure | None = None,
    against: Figure | None = None,
    goal: Goal | None = None,
    why: str = "",
) -> Row:
    """What was measured.

    Args:
        against: our figure over or less the reference.
    """
    judged = ours if goal is None or goal.of == "ours" else against
    return Row(
        name,
        ours.text,
        reference.text if reference else "",
        against.text if against else "",
        str(goal) if goal else "",
        goal.reached(judged.value) if goal and judged else None,
        why,
    )


def refuted_only(judged: Row, why: str) -> Row:
    """Of a run too short for its goal, which can only show that it is missed."""
    notes = "; ".join(filter(None, (judged.why, why if judged.goal else "")))
    return judged._replace(reached=None if judged.reached else judged.reached, why=notes)


def unmeasured(name: str, why: str, goal: Goal | None = None) -> Row:
    """What could not be measured here."""
    return Row(name, "", "", "", str(goal) if goal else "", None, why)


def spread(values: Sequence[float], unit: str, plus: bool = False) -> Figure:
    """Median, and in brackets the quartiles."""
    if not values:
        return Figure(math.nan, "nothing")
    median = statistics.median(values)
    sign = "+" if plus else ""
    text = f"{median:{sign}.{_places(median)}f}"
    low = math.nan
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        places = _places(max(abs(low), abs(high)))
        text += f" ({low:.{places}f} … {high:.{places}f})"
    return Figure(median, f"{text} {unit}", low)


def latency(values: Sequence[float], unit: str, judged: float) -> Figure:
    """Median, 99th percentile and greatest; the quantile ``judged`` counts."""
    if not values:
        return Figure(math.nan, "nothing")
    picked = [quantile(values, part) for part in (0.5, 0.99, 1.0)]
    p50, p99, most = (f"{value:.{_places(value)}f}" for value in picked)
    return Figure(
        quantile(values, judged), f"p50 {p50}, p99 {p99}, max {most} {unit} of {len(values)}"
    )


def plain(value: float, unit: str) -> Figure:
    """One number."""
    return Figure(value, f"{_number(value)} {unit}".strip())


def quantile(values: Iterable[float], part: float) -> float:
    """The smallest value that at least ``part`` of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)]


def differences(ours: Sequence[float], theirs: Sequence[float], unit: str) -> Figure:
    """Round by round."""
    return spread([a - b for a, b in zip(ours, theirs, strict=True)], unit, plus=True)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Figure:
    """Round by round."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True) if b], "×")


def ratio(ours: Figure, theirs: Figure) -> Figure:
    """Of the medians, where single rounds are too noisy to divide."""
    if not theirs.value > 0 or theirs.low <= 0:
        return Figure(math.nan, "not known: the reference is lost in the noise")
    return plain(ours.value / theirs.value, "×")


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    head = ("figure", "ours", "reference", "ratio or difference", "goal", "reached", "note")
    cells = [head, ("---",) * len(head)]
    cells += [(r.name, r.ours, r.reference, r.ratio, r.goal, r.verdict, r.why) for r in rows]
    return "\n".join(f"| {' | '.join(c.replace('|', '/') for c in line)} |" for line in cells)


def _places(value: float) -> int:
    """Three digits."""
    size = abs(value)
    return 0 if size >= 100 or not size else 1 if size >= 10 else 2 if size >= 1 else 3


def _number(value: float) -> str:
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:.{_places(value)}f}"
