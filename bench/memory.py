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
from bench.row import Figure, Goal, Row, ratio, refuted_only, row, unmeasured
from tests.injector.records import RecordSource
from tests.kernel.daemon import STALLED_CPU as CPU

SECONDS, PER_SECOND = 30.0, 1000
STEPS, PIECE_S, SETTLE_S = 6, 5.0, 1.0
HOUR_S = 3600.0
"""Both goals are about."""
LOST = 0.001
"""This part of the records may find no room, where something else had the CPUs for a moment."""
GOAL = Goal(40, "MB")
FLAT_GOAL = Goal(1, "MB")
RESIDENT, GROWTH = "resident memory after a storm", "growth in the second half of the storm"


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
    # The short one first: should it fail, no hour is lost.
    with bcc_tool() as tool:
        theirs = storm(tool, seconds / STEPS, per_second).mib
    with Daemon() as daemon:
        ours, sent, lost, told = storm(daemon, seconds, per_second)
    why = (
        f"after {seconds:g} s: {told} of {sent} records told, {lost} lost; before "
        f"{_mb(ours[0][0]).text}; the reference's storm is a {STEPS}th as long"
    )
    if told != sent or lost > sent * LOST or not sent:
        why = f"not all was told: {why}"
        return [unmeasured(RESIDENT, why, GOAL), unmeasured(GROWTH, why, FLAT_GOAL)]
    rss, pss = map(_mb, ours[-1])
    bcc_rss, bcc_pss = map(_mb, theirs[-1])
    resident = row(
        f"{RESIDENT}, against in-process bcc",
        rss,
        reference=bcc_rss,
        against=ratio(rss, bcc_rss),
        goal=GOAL,
        why=why,
    )
    shared = row(
        "its proportional share (Pss)", pss, reference=bcc_pss, against=ratio(pss, bcc_pss)
    )
    # Buffers and caches fill at first.
    growth = row(GROWTH, _mb(ours[-1][0] - ours[STEPS // 2][0]), goal=FLAT_GOAL)
    if seconds < HOUR_S:
        short = "the goal is about an hour: RESULTS-memory.md"
        resident = refuted_only(resident, short)
        growth = growth._replace(reached=None, why=short)
    return [resident, shared, growth, _against_runqslower(rss)]


def _against_runqslower(rss: Figure) -> Row:
    name = "resident memory, against runqslower"
    try:
        with runqslower() as slower:
            small = _mb(memory_mib(slower.pid)[0])
    except BenchError as error:
        return unmeasured(name, str(error))
    return row(name, rss, reference=small, against=ratio(rss, small))


def _mb(mib: float) -> Figure:
    """In millions of bytes, as the goal is."""
    value = mib * (1 << 20) / 1e6
    return Figure(value, f"{value:.1f} MB")


if __name__ == "__main__":
    options = ("seconds", SECONDS, "of the storm"), ("per_second", PER_SECOND, "records")
    sys.exit(run(__doc__, measure, *options))
