"""Rows of the results: medians, spread, goals, and what could not be measured."""

from __future__ import annotations

import math

import pytest

from bench.row import (
    Figure,
    Goal,
    differences,
    latency,
    plain,
    quantile,
    ratio,
    ratios,
    row,
    spread,
    table,
    unmeasured,
)


def test_spread() -> None:
    """The median counts; the quartiles stand beside it."""
    figure = spread([3.0, 1.0, 2.0, 5.0, 4.0], "ns")
    assert figure == Figure(3.0, "3.00 (2.00 … 4.00) ns", 2.0)
    assert spread([7.0], "ns").text == "7.00 ns"
    assert math.isnan(spread([], "ns").value)


def test_differences_and_ratios_are_of_rounds() -> None:
    """A round's two sides belong together, whatever the machine did from round to round."""
    ours, theirs = [11.0, 101.0, 1001.0], [10.0, 100.0, 1000.0]
    assert differences(ours, theirs, "ns").text == "+1.00 (1.00 … 1.00) ns"
    assert ratios([2.0, 40.0], [1.0, 20.0]).value == 2.0


def test_ratio_to_nothing() -> None:
    """A reference that is lost in the noise gives no ratio, and no goal is reached by it."""
    against = ratio(plain(5, "ns"), plain(-1, "ns"))
    assert "noise" in against.text
    assert "noise" in ratio(plain(5, "ns"), spread([-2.0, 1.0, 3.0], "ns")).text
    goal = Goal(1.25, "×", "against")
    assert row("a", plain(5, "ns"), against=against, goal=goal).reached is False


def test_latency_judges_the_quantile_asked_for() -> None:
    """All three are told, one counts."""
    values = [float(n) for n in range(1, 101)]
    assert latency(values, "ms", 0.99) == Figure(99.0, "p50 50.0, p99 99.0, max 100 ms of 100")
    assert latency(values, "ms", 0.5).value == 50.0
    assert quantile([4.0, 1.0], 0.5) == 1.0


@pytest.mark.parametrize(
    ("goal", "text", "value", "reached"),
    [
        (Goal(5, "ns", "against"), "≤ +5 ns", 5.0, True),
        (Goal(5, "ns", "against"), "≤ +5 ns", 5.1, False),
        (Goal(0.35, "×", "against"), "≤ 0.35 ×", 0.4, False),
        (Goal(100_000, "records/s", at_least=True), "≥ 100,000 records/s", 1e5, True),
        (Goal(0, "stalls"), "≤ 0 stalls", 1.0, False),
        (Goal(0.05, "% of a core"), "≤ 0.050 % of a core", 0.01, True),
    ],
)
def test_goals(goal: Goal, text: str, value: float, reached: bool) -> None:
    """As GOALS state them: at most or at least, of ours or of what it is against the reference."""
    assert str(goal) == text
    figure, other = Figure(value, "x"), Figure(-1e9 if goal.at_least else 1e9, "y")
    ours, against = (figure, other) if goal.of == "ours" else (other, figure)
    assert row("a", ours, against=against, goal=goal).reached is reached


def test_table() -> None:
    """Every row says whether its goal is reached, or why it is not known."""
    goal = Goal(1, "ms")
    rows = [
        row("fast", plain(0.5, "ms"), reference=plain(4, "ms"), goal=goal),
        row("slow", plain(2, "ms"), goal=goal),
        row("as it is", plain(2, "ms")),
        unmeasured("absent", "no such | tool", goal),
    ]
    lines = table(rows).splitlines()
    assert lines[0].count("|") == 8
    assert lines[2:] == [
        "| fast | 0.500 ms | 4 ms |  | ≤ 1 ms | reached |  |",
        "| slow | 2 ms |  |  | ≤ 1 ms | NOT REACHED |  |",
        "| as it is | 2 ms |  |  |  |  |  |",
        "| absent |  |  |  | ≤ 1 ms | not measured | no such / tool |",
    ]
