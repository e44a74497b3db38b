"""From a record's making in the kernel until its line is written.

    python -m bench.delivery [--stalls N] [--records N]

Twice: of real stalls, whose records carry the time they were made (`started_at` plus
`duration_ms`, exact to a microsecond); and of records made at will in the daemon's own perf
buffer (tests/injector/records.py), one at a time, at a steady pace. Idle, and with a task that
never sleeps on every CPU. The line's end is read from a pipe by a real-time thread; the reference
is what that alone takes, of a program that writes the time at the same pace: it is in our figure.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence

from bench.command import run
from bench.processes import Daemon, Event, Piped
from bench.row import Goal, Row, latency, row, unmeasured
from bench.stalls import busy, inject
from tests.injector.records import RecordSource
from tests.kernel.daemon import STALLED_CPU as CPU
from tests.kernel.daemon import monotonic_ns

STALLS, RECORDS, PER_SECOND = 100, 1000, 250
FEWEST = 100
"""For a 99th percentile."""
_WRITER = f"""
import os, sys, time
os.sched_setaffinity(0, os.sched_getaffinity(0) - {{{CPU}}} or {{{CPU}}})
while True:
    print('{{"ns":%d}}' % time.monotonic_ns(), flush=True)
    time.sleep(float(sys.argv[1]))
"""
MEDIAN_GOAL, P99_GOAL = Goal(150, "us"), Goal(1000, "us")


def measure(stalls: int = STALLS, records: int = RECORDS) -> list[Row]:
    """Stalls and made records, idle and loaded."""
    rows: list[Row] = []
    for what, load in (("idle", False), ("all CPUs busy", True)):
        with Daemon() as daemon, busy(load):
            told = inject(daemon, stalls)
            lines = [line for one in told for line in one.lines]
            unresolved = sum(not one.resolved for one in told)
            since = daemon.lines.mark()
            with RecordSource(daemon.pid, CPU) as source:
                sent = source.flow(PER_SECOND, records / PER_SECOND, burst=1)
            time.sleep(0.5)
            made = [e for e in daemon.lines.events(since) if _is_made(e)]
        with busy(load):
            alone = pipe_us()
        missing = sent.sent + sent.lost - len(made)
        name = f"record made to line written, {what}"
        rows += _rows(f"{name}: injected stalls", lines, alone, unresolved)
        rows += _rows(f"{name}: {PER_SECOND} records/s", made, alone, missing)
    return rows


def pipe_us() -> list[float]:
    """From a write into a pipe until the real-time thread has read it."""
    with Piped(sys.executable, "-c", _WRITER, str(1 / PER_SECOND)) as writer:
        time.sleep(1)
        events = writer.lines.events()
    return [(event["read_ns"] - event["ns"]) / 1e3 for event in events]


def latency_us(event: Event) -> float:
    """Of a line of a stall, of whichever phase."""
    made_ns = monotonic_ns(event["started_at"]) + round(event["duration_ms"] * 1e6)
    return float(event["read_ns"] - made_ns) / 1e3


def _is_made(event: Event) -> bool:
    blocker = event["blocker"] if event["event"] == "stall" else None
    return blocker is not None and bool(blocker["comm"] == "synthetic")


def _rows(name: str, lines: Sequence[Event], alone: list[float], missing: int) -> list[Row]:
    """A line that did not come has taken for ever."""
    found = [latency_us(line) for line in lines] + [math.inf] * missing
    goals = (("p50", 0.5, MEDIAN_GOAL), ("p99", 0.99, P99_GOAL))
    if len(found) < FEWEST:
        why = f"only {len(lines)} lines came"
        return [unmeasured(f"{name}, {part}", why, goal) for part, _, goal in goals]
    why = f"{missing} lines did not come" if missing else ""
    return [
        row(
            f"{name}, {part}",
            latency(found, "us", judged),
            reference=latency(alone, "us", judged),
            goal=goal,
            why=why,
        )
        for part, judged, goal in goals
    ]


if __name__ == "__main__":
    options = ("stalls", STALLS, "each way"), ("records", RECORDS, "each way")
    sys.exit(run(__doc__, measure, *options))
