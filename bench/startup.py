"""From exec until ready, of the daemon and of others, in turn.

    python -m bench.startup [--rounds N]

Ready is the `started` line of ours, the head line of the others: all say it once everything is
attached. The stock bcc tool is Debian's runqslower-bpfcc; where it does not start (it needs the
kernel's headers, ours does not) bench/bcc_tool.py stands in, which compiles without headers and
so starts faster. Ours starts as its unit has it, with the programs that an earlier start compiled,
and as it does the first time, when it has to compile.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench.bpf import BenchError
from bench.command import run
from bench.processes import Daemon, Piped, Tool, bcc_tool, runqslower, tool
from bench.row import Goal, Row, ratios, row, spread, unmeasured

ROUNDS = 5
GOAL = Goal(0.8, "s")
STOCK = "runqslower-bpfcc"
KEPT = "programs kept"
FIRST = "first start"


def stock_bcc_tool() -> Tool:
    """Debian's own."""
    return Tool(tool(STOCK, "bpfcc-tools"), "10000", ready=b"Tracing")


def measure(rounds: int = ROUNDS) -> list[Row]:
    """Ours with what it kept, and the first time; each against a bcc tool and runqslower."""
    with tempfile.TemporaryDirectory(prefix="stalld-bench-") as directory:
        kept = partial(Daemon, cache=Path(directory))
        with kept():
            pass
        return _measure(rounds, {KEPT: kept, FIRST: Daemon})


def _measure(rounds: int, ours: dict[str, Callable[[], Daemon]]) -> list[Row]:
    start: dict[str, Callable[[], Piped | Tool]] = {
        **ours,
        STOCK: stock_bcc_tool,
        "runqslower": runqslower,
    }
    missing: dict[str, str] = {}
    try:
        with stock_bcc_tool():
            pass
    except BenchError as error:
        missing[STOCK] = str(error)
        start[STOCK] = bcc_tool
    seconds: dict[str, list[float]] = {name: [] for name in start}
    for number in range(rounds):
        for name in reversed(list(start)) if number % 2 else list(start):
            if name in missing and name != STOCK:
                continue
            try:
                with start[name]() as one:
                    seconds[name].append(one.ready_s)
            except BenchError as error:
                if name in ours:
                    raise
                missing[name] = str(error)
    return [
        _row(name, reference, seconds, missing, rounds)
        for name in ours
        for reference in (STOCK, "runqslower")
    ]


def _row(
    name: str, reference: str, seconds: dict[str, list[float]], missing: dict[str, str], rounds: int
) -> Row:
    full = f"exec to ready, {name}, against {reference}"
    goal = GOAL if reference == STOCK else None
    # A stand-in that started each time will do.
    if len(seconds[reference]) != rounds:
        return unmeasured(full, f"it did not start each time: {missing[reference]}", goal)
    why = f"{rounds} rounds"
    if reference in missing:
        why += f"; bench/bcc_tool.py stands in: {missing[reference]}"
    return row(
        full,
        spread(seconds[name], "s"),
        reference=spread(seconds[reference], "s"),
        against=ratios(seconds[name], seconds[reference]),
        goal=goal,
        why=why,
    )


if __name__ == "__main__":
    sys.exit(run(__doc__, measure, ("rounds", ROUNDS, "of all")))
