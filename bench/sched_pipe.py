"""What a pinned ``perf bench sched pipe`` takes more because of us, and because of others.

    python -m bench.sched_pipe [--rounds N] [--steps N]

The limit are two programs that return at once, on sched_switch and sched_wakeup: whoever
watches these two with BPF costs no less. All sides are loaded before; in each round each is
attached once, for a fraction of a second.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack

from bench.command import run
from bench.loads import pipe_us
from bench.processes import runqslower
from bench.row import Goal, Row, ratio, row, spread, unmeasured
from bench.sides import OURS, Sides, added_ns, against_limit

AGAINST_LIMIT = Goal(1.25, "×", "against")
AGAINST_RUNQSLOWER = Goal(0.35, "×", "against")
NAME = "added to a step of pinned sched pipe"
ROUNDS, STEPS = 40, 20_000


def measure(rounds: int = ROUNDS, steps: int = STEPS) -> list[Row]:
    """Against the limit and against runqslower."""
    with ExitStack() as stack:
        sides = Sides(stack, ["sched_switch", "sched_wakeup"], {"runqslower": runqslower})
        us = sides.interleave(lambda: pipe_us(steps), rounds)
    added = added_ns(us)
    ours = spread(added[OURS], "ns")
    rows = [against_limit(NAME, us, f"{steps} steps", "step", AGAINST_LIMIT)]
    name = f"{NAME}, against runqslower"
    for missing in sides.missing.values():
        return [*rows, unmeasured(name, missing, AGAINST_RUNQSLOWER)]
    slower = spread(added["runqslower"], "ns")
    against = ratio(ours, slower)
    return [*rows, row(name, ours, reference=slower, against=against, goal=AGAINST_RUNQSLOWER)]


if __name__ == "__main__":
    options = ("rounds", ROUNDS, "of all sides"), ("steps", STEPS, "of the pipe in each run")
    sys.exit(run(__doc__, measure, *options))
