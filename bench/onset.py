"""From the moment a stall is as old as the threshold until its line is written, while it lasts.

    python -m bench.onset [--stalls N]

Real stalls, on an idle machine and with a task that never sleeps on every CPU. Of a long handler
the injector itself knows when it began (the program in the handler reads the clock first); of a
task with bottom halves off that moment is when the first softirq was raised in vain: `started_at`,
as the daemon says, but not later than the first packet that was sent to that CPU meanwhile (one is
every 2 ms) was there. The line's end is read from
a pipe by a real-time thread on another CPU. A stall that had no line while it went on counts with
the time for which there was none.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench.command import run
from bench.processes import Daemon
from bench.row import Goal, Row, latency, plain, row
from bench.stalls import Told, busy, inject
from stalld.detector import tick_ns
from tests.injector import Kind
from tests.kernel.daemon import THRESHOLD_MS, monotonic_ns

STALLS = 150
ON_THE_WAY_NS = 200_000
"""From a packet's sending until it has raised the softirq."""


def measure(stalls: int = STALLS) -> list[Row]:
    """Idle, then loaded."""
    rows = []
    for what, load in (("idle", False), ("all CPUs busy", True)):
        with Daemon() as daemon, busy(load):
            told = inject(daemon, stalls)
        rows.append(_row(f"threshold crossed to line written, {what}", told))
    return rows


def onset_ms(told: Told) -> float:
    """Of a stall without a line while it went on: how long there was none."""
    line, began_ns = told.first_ongoing, told.truth.start_ns
    if line is None:
        return (told.truth.end_ns - began_ns) / 1e6 - THRESHOLD_MS
    if told.truth.kind is Kind.BH_OFF:
        latest_ns = began_ns if told.pinged_ns is None else told.pinged_ns + ON_THE_WAY_NS
        began_ns = max(began_ns, min(monotonic_ns(line["started_at"]), latest_ns))
    return float(line["read_ns"] - began_ns) / 1e6 - THRESHOLD_MS


def _row(name: str, told: Sequence[Told]) -> Row:
    tick_ms = tick_ns() / 1e6
    missed = sum(not one.lines for one in told)
    late = sum(one.first_ongoing is None for one in told) - missed
    return row(
        name,
        latency([onset_ms(one) for one in told], "ms", 0.99),
        reference=plain(tick_ms, "ms: the tick"),
        goal=Goal(tick_ms + 1, "ms"),
        why=f"p99 counts; {late} had no line before their end, {missed} none at all: that counts",
    )


if __name__ == "__main__":
    sys.exit(run(__doc__, measure, ("stalls", STALLS, "idle, and as many loaded")))
