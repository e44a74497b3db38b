"""From the moment a stall is as old as the threshold until its line is written, while it lasts.

    python -m bench.onset [--stalls N]

Real stalls, on an idle machine and with a task that never sleeps on every CPU. Of a long handler
the injector itself knows when it began (the program in the handler reads the clock first); of a
task with bottom halves off that moment is when the first softirq was raised in vain, which only
the daemon saw: `started_at`, held against the injector's truth (it must lie in the stall). The
line's end is read from a pipe by a real-time thread on another CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench.command import run
from bench.processes import Daemon
from bench.row import Goal, Row, latency, plain, row, unmeasured
from bench.stalls import Told, busy, inject
from stalld.detector import tick_ns
from tests.injector import Kind
from tests.kernel.daemon import THRESHOLD_MS, monotonic_ns

STALLS = 60


def measure(stalls: int = STALLS) -> list[Row]:
    """Idle, then loaded."""
    rows = []
    for what, load in (("idle", False), ("all CPUs busy", True)):
        with Daemon() as daemon, busy(load):
            told = inject(daemon, stalls)
        rows.append(_row(f"threshold crossed to line written, {what}", told))
    return rows


def onset_ms(told: Told) -> float | None:
    """None where no line came while the stall went on."""
    line = told.first_ongoing
    if line is None:
        return None
    began_ns = told.truth.start_ns
    if told.truth.kind is Kind.BH_OFF:
        began_ns = max(began_ns, monotonic_ns(line["started_at"]))
    return float(line["read_ns"] - began_ns) / 1e6 - THRESHOLD_MS


def _row(name: str, told: Sequence[Told]) -> Row:
    tick_ms = tick_ns() / 1e6
    goal = Goal(tick_ms + 1, "ms")
    found = [one for one in map(onset_ms, told) if one is not None]
    if not found:
        return unmeasured(name, "no line came during any stall", goal)
    late = len(told) - len(found)
    return row(
        name,
        latency(found, "ms", 0.99),
        reference=plain(tick_ms, "ms: the tick"),
        goal=goal,
        why=f"p99 counts; of {len(told)} stalls {late} had no line while they went on",
    )


if __name__ == "__main__":
    sys.exit(run(__doc__, measure, ("stalls", STALLS, "idle, and as many loaded")))
