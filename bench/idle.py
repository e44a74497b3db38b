"""What an idle machine pays: interrupts, context switches, and the daemon's own CPU time.

    python -m bench.idle [--rounds N] [--seconds S]

Takes turns without and with a daemon that has nothing to tell. All interrupts of all CPUs are
counted (/proc/interrupts), so whatever else the machine does is in both; the daemon's own
wake-ups are counted exactly. A third in turn is a daemon that looks a hundred times as often
(bench/hurried.py), whose interrupts do not drown in the machine's.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

from bench.command import run
from bench.hurried import FACTOR
from bench.processes import Daemon, cpu_s
from bench.row import Figure, Goal, Row, differences, plain, row, spread
from tests.kernel.daemon import wakeups

ROUNDS, SECONDS, HURRIED_S = 3, 33.0, 10.0
LONG_ROUNDS = 9
"""Twenty minutes."""
STARTED_S, ENDED_S, HURRIED_STARTED_S = 40.0, 15.0, 3.0
"""After so long what a start or an end leaves to the kernel is done."""
CPU_GOAL = Goal(0.05, "% of a core")
INTERRUPTS_GOAL = "0 /s"
NONE_PER_S = 0.5
"""So many more are none."""
# Student's t: 95 % of the differences' mean lie within so many standard errors, by degrees of
# freedom.
_T95 = (12.7, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


class Counts(NamedTuple):
    """Of the whole machine, ever."""

    interrupts: int
    switches: int


class Quiet(NamedTuple):
    """A second of the machine, and of the daemon where one runs."""

    interrupts: float
    switches: float
    cpu_percent: float = 0.0
    wakeups: float = 0.0


def counts(proc: str = "/proc") -> Counts:
    """Now."""
    lines = Path(f"{proc}/interrupts").read_text().splitlines()
    cpus = len(lines[0].split())
    total = 0
    for line in lines[1:]:
        _, _, numbers = line.partition(":")
        total += sum(int(n) for n in numbers.split()[:cpus] if n.isdigit())
    for line in Path(f"{proc}/stat").read_text().splitlines():
        if line.startswith("ctxt "):
            return Counts(total, int(line.split()[1]))
    raise OSError(f"{proc}/stat has no ctxt")


def watch(seconds: float, settle_s: float, pid: int | None = None) -> Quiet:
    """Sleep, and tell what happened once all had settled."""
    time.sleep(settle_s)
    used, woken = (cpu_s(pid), wakeups(pid)) if pid else (0.0, 0)
    before, began = counts(), time.monotonic()
    time.sleep(seconds)
    took, after = time.monotonic() - began, counts()
    interrupts = (after.interrupts - before.interrupts) / took
    changes = (after.switches - before.switches) / took
    if not pid:
        return Quiet(interrupts, changes)
    cpu_percent = (cpu_s(pid) - used) / took * 100
    return Quiet(interrupts, changes, cpu_percent, (wakeups(pid) - woken) / took)


def measure(
    rounds: int = ROUNDS, seconds: float = SECONDS, hurried_seconds: float = HURRIED_S
) -> list[Row]:
    """CPU time, wake-ups, interrupts and context switches."""
    without: list[Quiet] = []
    with_it: list[Quiet] = []
    hurried: list[Quiet] = []

    def alone() -> None:
        without.append(watch(seconds, ENDED_S))

    def beside() -> None:
        with Daemon() as daemon:
            with_it.append(watch(seconds, STARTED_S, daemon.pid))

    def beside_hurried() -> None:
        with Daemon(module="bench.hurried") as daemon:
            hurried.append(watch(hurried_seconds, HURRIED_STARTED_S, daemon.pid))

    for number in range(rounds):
        for side in (alone, beside, beside_hurried)[:: -1 if number % 2 else 1]:
            side()
    told = f"{rounds} rounds of {seconds:g} s each way"
    return [
        row(
            "CPU time of the quiet daemon",
            spread([one.cpu_percent for one in with_it], "% of a core"),
            goal=CPU_GOAL,
            why=told,
        ),
        row(
            "wake-ups of the quiet daemon's threads",
            _per_minute(with_it),
            why="counted exactly (/proc/PID/task/*/status)",
        ),
        _interrupts(without, with_it, told),
        _hurried(without, hurried, f"{rounds} rounds of {hurried_seconds:g} s"),
        _compared("context switches on an idle machine", "switches", without, with_it),
    ]


def _per_minute(quiet: list[Quiet], parts: int = 1) -> Figure:
    return plain(sum(one.wakeups for one in quiet) / len(quiet) * 60 / parts, "a minute")


def _interrupts(without: list[Quiet], with_it: list[Quiet], told: str) -> Row:
    made = _compared("interrupts on an idle machine", "interrupts", without, with_it)
    low, high = _certain(_more(without, with_it))
    why = f"{told}; with 95 % certainty between {low:+.2f} and {high:+.2f} /s"
    if high <= NONE_PER_S:
        return made._replace(goal=INTERRUPTS_GOAL, reached=True, why=why)
    if low > 0:
        return made._replace(goal=INTERRUPTS_GOAL, reached=False, why=why)
    why += f", so it cannot be told from none, nor from more than {NONE_PER_S:g} /s"
    return made._replace(goal=INTERRUPTS_GOAL, reached=None, why=why)


def _hurried(without: list[Quiet], hurried: list[Quiet], told: str) -> Row:
    more = [one / FACTOR for one in _more(without, hurried)]
    low, high = _certain(more)
    return row(
        f"of them by its looks: a {FACTOR}th of what a daemon causes that looks {FACTOR} times as "
        "often",
        spread(more, "/s"),
        why=f"{told}; with 95 % certainty between {low:+.2f} and {high:+.2f} /s; "
        f"wake-ups of that one, a {FACTOR}th: {_per_minute(hurried, FACTOR).text}",
    )


def _more(without: list[Quiet], with_it: list[Quiet]) -> list[float]:
    """Interrupts a second, round by round."""
    return [a.interrupts - b.interrupts for a, b in zip(with_it, without, strict=True)]


def _certain(more: list[float]) -> tuple[float, float]:
    """Between what their mean lies, with 95 % certainty."""
    mean, error = statistics.mean(more), math.inf
    if len(more) > 1:
        degrees = min(len(more) - 1, len(_T95))
        error = _T95[degrees - 1] * statistics.stdev(more) / math.sqrt(len(more))
    return mean - error, mean + error


def _compared(name: str, what: str, without: list[Quiet], with_it: list[Quiet]) -> Row:
    ours, theirs = ([getattr(one, what) for one in side] for side in (with_it, without))
    return row(
        name,
        spread(ours, "/s"),
        reference=spread(theirs, "/s"),
        against=differences(ours, theirs, "/s"),
    )


if __name__ == "__main__":
    options = (
        ("rounds", ROUNDS, "of all three"),
        ("seconds", SECONDS, "of each; the daemon looks for new kernel threads every 30 s"),
        ("hurried_seconds", HURRIED_S, "of the daemon that looks more often"),
    )
    sys.exit(run(__doc__, measure, *options))
