"""What makes a goal reached, missed, or not known, where more than a bound decides."""

from __future__ import annotations

from typing import Any

import pytest

from bench import delivery, idle, onset
from bench.row import Goal, plain, refuted_only, row
from bench.stalls import Told
from tests.unit.bench.make import MS, injected


@pytest.mark.parametrize(("value", "reached"), [(3, None), (5, False)])
def test_short_runs(value: float, reached: bool | None) -> None:
    """They can show that a goal is missed, and nothing else."""
    judged = refuted_only(row("a", plain(value, "ms"), goal=Goal(4, "ms"), why="x"), "too short")
    assert judged.reached is reached
    assert judged.why == "x; too short"
    assert refuted_only(row("a", plain(value, "ms")), "too short").why == ""


@pytest.mark.parametrize(
    ("more", "reached"),
    [
        ((0.1, 0.0, -0.1, 0.0), True),
        ((1.0, 1.1, 0.9, 1.0), False),
        ((0.0, 0.0, 80.0, 80.0), None),
        ((0.0, 0.0, 0.0, 80.0), None),
        ((0.0,), None),
    ],
)
def test_interrupts(more: tuple[float, ...], reached: bool | None) -> None:
    """Noise makes nothing reached."""
    without = [idle.Quiet(40.0, 60.0) for _ in more]
    with_it = [idle.Quiet(40.0 + one, 60.0) for one in more]
    assert idle._interrupts(without, with_it, "rounds").reached is reached


def test_hurried() -> None:
    """A hundredth of what a hundred times the looks cause; judged is the whole, not this part."""
    without = [idle.Quiet(40.0, 60.0) for _ in range(4)]
    hurried = [idle.Quiet(40.0 + one, 60.0, wakeups=10.0) for one in (20.0, 19.0, 21.0, 20.0)]
    made = idle._hurried(without, hurried, "rounds")
    assert (made.ours, made.goal, made.reached) == ("0.200 (0.198 … 0.203) /s", "", None)
    assert "between +0.19 and +0.21 /s" in made.why
    assert "a 100th: 6 a minute" in made.why


def stall_line(ms: float) -> dict[str, Any]:
    """One whose line took so long."""
    return {"started_at": "1970-01-01T00:00:00.000000Z", "duration_ms": 0.0, "read_ns": ms * MS}


@pytest.mark.parametrize(("missing", "verdicts"), [(0, [True, True]), (3, [True, False])])
def test_lines_that_do_not_come(
    monkeypatch: pytest.MonkeyPatch, missing: int, verdicts: list[bool]
) -> None:
    """They count, as the slowest."""
    monkeypatch.setattr(delivery, "monotonic_ns", lambda _: 0)
    lines = [stall_line(0.1)] * 150
    rows = delivery._rows("a", lines, [1.0], missing)
    assert [one.reached for one in rows] == verdicts
    assert [one.reached for one in delivery._rows("a", lines[:20], [1.0], 0)] == [None, None]


@pytest.mark.parametrize(
    ("started_ms", "pinged_ms", "onset_ms"),
    [(1.0, 1.5, 14.0), (-3.0, 1.5, 15.0), (9.0, 1.5, 13.3), (9.0, None, 15.0)],
)
def test_what_the_daemon_says_is_witnessed(
    monkeypatch: pytest.MonkeyPatch, started_ms: float, pinged_ms: float | None, onset_ms: float
) -> None:
    """A stall began no later than the first packet was there, and not before it was injected."""
    monkeypatch.setattr(onset, "monotonic_ns", lambda ms: int(ms) if isinstance(ms, int) else 0)
    line = {"phase": "ongoing", "read_ns": 1025 * MS, "started_at": int((1000 + started_ms) * MS)}
    pinged_ns = None if pinged_ms is None else int((1000 + pinged_ms) * MS)
    told = Told(injected().truth, [line], pinged_ns)
    assert onset.onset_ms(told) == pytest.approx(onset_ms)
