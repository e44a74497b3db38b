"""What an idle machine pays: interrupts, context switches, and the daemon's own CPU time.

    python -m bench.idle [--rounds N] [--seconds S]

Takes turns without and with a daemon that has nothing to tell. All interrupts of all CPUs are
counted (/proc/interrupts), so whatever else the machine does is in both; the daemon's own
wake-ups are counted exactly.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

from bench.command import run
from bench.processes import Daemon, cpu_s, switches
from bench.row import Figure, Goal, Row, differences, plain, row, spread

ROUNDS, SECONDS = 4, 33.0
SETTLE_S = 3.0
"""After a start and after an end."""
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


def watch(seconds: float, pid: int | None = None) -> Quiet:
    """Sleep, and tell what happened meanwhile."""
    time.sleep(SETTLE_S)
    used, woken = (cpu_s(pid), switches(pid)) if pid else (0.0, 0)
    before, began = counts(), time.monotonic()
    time.sleep(seconds)
    took, after = time.monotonic() - began, counts()
    interrupts = (after.interrupts - before.interrupts) / took
    changes = (after.switches - before.switches) / took
    if not pid:
        return Quiet(interrupts, changes)
    cpu_percent = (cpu_s(pid) - used) / took * 100
    return Quiet(interrupts, changes, cpu_percent, (switches(pid) - woken) / took)


def measure(rounds: int = ROUNDS, seconds: float = SECONDS) -> list[Row]:
    """CPU time, wake-ups, interrupts and context switches."""
    without: list[Quiet] = []
    with_it: list[Quiet] = []
    for number in range(rounds):
        for running in (number % 2 == 1, number % 2 == 0):
            if running:
                with Daemon() as daemon:
                    with_it.append(watch(seconds, daemon.pid))
            else:
                without.append(watch(seconds))
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
        _compared("context switches on an idle machine", "switches", without, with_it),
    ]


def _per_minute(quiet: list[Quiet]) -> Figure:
    return plain(sum(one.wakeups for one in quiet) / len(quiet) * 60, "a minute")


def _interrupts(without: list[Quiet], with_it: list[Quiet], told: str) -> Row:
    made = _compared("interrupts on an idle machine", "interrupts", without, with_it)
    more = [a.interrupts - b.interrupts for a, b in zip(with_it, without, strict=True)]
    mean, error = statistics.mean(more), math.inf
    if len(more) > 1:
        degrees = min(len(more) - 1, len(_T95))
        error = _T95[degrees - 1] * statistics.stdev(more) / math.sqrt(len(more))
    why = f"{told}; with 95 % certainty between {mean - error:+.2f} and {mean + error:+.2f} /s"
    if mean + error <= NONE_PER_S:
        return made._replace(goal=INTERRUPTS_GOAL, reached=True, why=why)
    if mean - error > 0:
        return made._replace(goal=INTERRUPTS_GOAL, reached=False, why=why)
    why += f", so it cannot be told from none, nor from more than {NONE_PER_S:g} /s"
    return made._replace(goal=INTERRUPTS_GOAL, reached=None, why=why)


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
        ("rounds", ROUNDS, "of both"),
        ("seconds", SECONDS, "of each; the daemon looks for new kernel threads every 30 s"),
    )
    sys.exit(run(__doc__, measure, *options))
