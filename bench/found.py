"""Are stalls found, and told rightly? A short run of bench.fidelity and of bench.soak.

    python -m bench.found [--stalls N] [--soak S] [--seed N]

Each row says how much it rests on. The goals are about 1,000 stalls and an hour, so this run can
only show that one is missed; `make bench-long` has both runs in their full length.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from bench.bpf import BenchError
from bench.command import run
from bench.fidelity.metrics import Share, Spread
from bench.fidelity.precision import to_read
from bench.fidelity.report import GOALS, Report, report
from bench.fidelity.run import RunError
from bench.fidelity.run import measure as inject
from bench.row import Figure, Goal, Row, plain, refuted_only, row, unmeasured
from bench.soak import false_stalls
from bench.soak import run as soak
from tests.kernel.daemon import THRESHOLD_MS

STALLS, SOAK_S, SEED = 60, 60.0, 1
ALL_STALLS, HOUR_S = 1000, 3600.0
"""That the goals are about."""
NONE_FALSE = Goal(0, "stalls")
MEDIAN_ERROR = Goal(1, "ms")


def measure(stalls: int = STALLS, soak_s: float = SOAK_S, seed: int = SEED) -> list[Row]:
    """Both."""
    return [*fidelity(stalls, seed), *soaked(soak_s)]


def fidelity(stalls: int = ALL_STALLS, seed: int = SEED) -> list[Row]:
    """Are injected stalls found, and told rightly?"""
    try:
        judged = report(inject(stalls, seed))
    except RunError as error:
        raise BenchError(str(error)) from error
    rows = _fidelity(judged)
    wanting = [f"{kind} cannot be made here" for kind in judged.run.unsupported]
    if judged.figures.counted < ALL_STALLS:
        wanting.insert(0, f"{ALL_STALLS:,} in RESULTS-fidelity.md")
    if not wanting:
        return list(rows)
    return [refuted_only(one, "; ".join(wanting)) for one in rows]


def soaked(seconds: float = HOUR_S) -> list[Row]:
    """Is anything told under real load that no evidence supports?"""
    rows = _soak(seconds)
    if seconds >= HOUR_S:
        return list(rows)
    return [refuted_only(one, "an hour in RESULTS-soak.md") for one in rows]


def _fidelity(judged: Report) -> Iterator[Row]:
    figures = judged.figures
    steal = f", {figures.steal_ms:g} ms taken by the hypervisor" if figures.steal_ms else ""
    why = f"{figures.counted} stalls that count, of {figures.injected}; seed {judged.run.seed}"
    shares = (
        ("stalls found", figures.recall, "recall"),
        ("blocker's thread right", figures.blame, "blame"),
        ("injector's function in the stack", figures.function, "function"),
        ("verdict right", figures.verdict, "verdict"),
    )
    for name, share, goal in shares:
        yield _share(name, share, Goal(GOALS[goal], "%", at_least=True), why + steal)
    yield from _errors(judged)
    name = "possible false accusations among these"
    yield row(name, plain(len(to_read(judged.standings)), "stalls"), goal=NONE_FALSE)
    name = "stalls told that somebody else saw too"
    yield _share(name, judged.precision, None, "of those told on the stalled CPU")


def _share(name: str, share: Share, goal: Goal | None, why: str) -> Row:
    if share.percent is None:
        return unmeasured(name, "none counted", goal)
    text = f"{share.part} of {share.whole}: {share.percent:.1f} %"
    return row(name, Figure(share.percent, text), goal=goal, why=why)


def _errors(judged: Report) -> Iterator[Row]:
    spread, tick_ms = judged.figures.duration_error_ms, judged.run.started["tick_ms"]
    name, worst = "error of the duration, median", Goal(tick_ms, "ms")
    if spread is None:
        yield unmeasured(name, "no stall was found", MEDIAN_ERROR)
        yield unmeasured("error of the duration, greatest", "no stall was found", worst)
        return
    yield row(name, _error(spread, spread.p50), goal=MEDIAN_ERROR, why="without sign")
    tick = plain(tick_ms, "ms: the tick")
    yield row(
        "error of the duration, greatest", _error(spread, spread.max), reference=tick, goal=worst
    )


def _error(spread: Spread, judged: float) -> Figure:
    text = f"p50 {spread.p50:.2f}, p99 {spread.p99:.2f}, max {spread.max:.2f} ms"
    return Figure(judged, text)


def _soak(seconds: float) -> Iterator[Row]:
    events, _ = soak(seconds, THRESHOLD_MS)
    wrong = false_stalls(events, THRESHOLD_MS)
    told = sum(e["event"] == "stall" and e["phase"] == "resolved" for e in events)
    name = "stalls that no evidence supports, under real load"
    if not told:
        yield unmeasured(name, f"no stall was told in {seconds:g} s", NONE_FALSE)
        return
    yield row(
        name,
        plain(len(wrong), "stalls"),
        goal=NONE_FALSE,
        why=f"{seconds:g} s of hackbench, dd, packets and stress-ng, threshold {THRESHOLD_MS:g} "
        f"ms: {told} stalls told; {'; '.join(why for _, why in wrong[:3])}".rstrip("; "),
    )


if __name__ == "__main__":
    options = ("stalls", STALLS, "injected that count"), ("soak_s", SOAK_S, "seconds of load")
    sys.exit(run(__doc__, measure, *options, ("seed", SEED, "of the injected stalls")))
