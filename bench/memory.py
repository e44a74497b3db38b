"""Resident memory after a storm, and whether it grows.

    python -m bench.memory [--seconds S] [--per-second N]

A storm of records, each of a stall and a task of its own, so that nothing is folded and nothing
was seen before. The same storm for a tool that keeps bcc in its own process
(bench/bcc_tool.py); runqslower, which does nothing meanwhile, beside them. Rss is all that is
resident, Pss counts what is shared with others in parts.
"""

from __future__ import annotations

import math
import sys
import time
from typing import NamedTuple

from bench.bpf import BenchError
from bench.command import run
from bench.processes import Daemon, Piped, bcc_tool, memory_mib, runqslower
from bench.row import Figure, Goal, Row, plain, ratio, refuted_only, row, unmeasured
from tests.injector.records import RecordSource
from tests.kernel.daemon import STALLED_CPU as CPU

SECONDS, PER_SECOND = 30.0, 1000
STEPS, PIECE_S, SETTLE_S = 6, 5.0, 1.0
HOUR_S = 3600.0
"""Both goals are about."""
GOAL = Goal(40, "MiB")
FLAT_GOAL = Goal(1, "MiB")


class Storm(NamedTuple):
    """Rss and Pss in MiB: before, and after each of the storm's parts.

    ``sent`` records went into the perf buffer, for ``lost`` there was no room; ``told`` is what
    lines came of the former.
    """

    mib: list[tuple[float, float]]
    sent: int
    lost: int
    told: int


def storm(side: Piped, seconds: float, per_second: int) -> Storm:
    """Have one."""
    found, sent, lost, told = [memory_mib(side.pid)], 0, 0, 0
    with RecordSource(side.pid, CPU) as source:
        for _ in range(STEPS):
            pieces = math.ceil(seconds / STEPS / PIECE_S)
            for _ in range(pieces):
                part = source.flow(per_second, seconds / STEPS / pieces)
                sent, lost = sent + part.sent, lost + part.lost
                told += side.lines.forget().count(b'"synthetic"')
            found.append(memory_mib(side.pid))
        time.sleep(SETTLE_S)
        told += side.lines.forget().count(b'"synthetic"')
    return Storm(found, sent, lost, told)


def measure(seconds: float = SECONDS, per_second: int = PER_SECOND) -> list[Row]:
    """Rss, Pss, growth."""
    with Daemon() as daemon:
        ours, sent, lost, told = storm(daemon, seconds, per_second)
    with bcc_tool() as tool:
        theirs = storm(tool, seconds / STEPS, per_second).mib
    why = (
        f"after {seconds:g} s: {told} of {sent} records told, {lost} lost; before "
        f"{ours[0][0]:.1f} MiB; the reference's storm is a {STEPS}th as long"
    )
    if told != sent or lost:
        return [unmeasured("resident memory after a storm", f"not all was told: {why}", GOAL)]
    rss, bcc = _mib(ours[-1][0]), _mib(theirs[-1][0])
    rows = [
        row(
            "resident memory after a storm, against in-process bcc",
            rss,
            reference=bcc,
            against=ratio(rss, bcc),
            goal=GOAL,
            why=why,
        ),
        row(
            "its proportional share (Pss)",
            _mib(ours[-1][1]),
            reference=_mib(theirs[-1][1]),
            against=ratio(_mib(ours[-1][1]), _mib(theirs[-1][1])),
        ),
        # Buffers and caches fill at first.
        row(
            "growth in the second half of the storm",
            _mib(ours[-1][0] - ours[STEPS // 2][0]),
            goal=FLAT_GOAL,
            why="the goal's word is flat",
        ),
    ]
    if seconds < HOUR_S:
        rows = [refuted_only(one, "the goal is about an hour: RESULTS-memory.md") for one in rows]
    name = "resident memory, against runqslower"
    try:
        with runqslower() as slower:
            small = _mib(memory_mib(slower.pid)[0])
    except BenchError as error:
        return [*rows, unmeasured(name, str(error))]
    return [*rows, row(name, rss, reference=small, against=ratio(rss, small))]


def _mib(value: float) -> Figure:
    return plain(round(value, 1), "MiB")


if __name__ == "__main__":
    options = ("seconds", SECONDS, "of the storm"), ("per_second", PER_SECOND, "records")
    sys.exit(run(__doc__, measure, *options))
