"""From exec until ready, of the daemon and of others, in turn.

    python -m bench.startup [--rounds N]

Ready is the `started` line of ours, the head line of the others: all say it once everything is
attached. The stock bcc tool is Debian's runqslower-bpfcc; where it does not start (it needs the
kernel's headers, ours does not) bench/bcc_tool.py stands in, which compiles without headers and
so starts faster.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from bench.bpf import BenchError
from bench.command import run
from bench.processes import Daemon, Piped, Tool, bcc_tool, runqslower, tool
from bench.row import Goal, Row, ratios, row, spread, unmeasured

ROUNDS = 5
GOAL = Goal(0.8, "s")
STOCK = "runqslower-bpfcc"


def stock_bcc_tool() -> Tool:
    """Debian's own."""
    return Tool(tool(STOCK, "bpfcc-tools"), "10000", ready=b"Tracing")


def measure(rounds: int = ROUNDS) -> list[Row]:
    """Ours; then against a bcc tool and runqslower."""
    start: dict[str, Callable[[], Piped | Tool]] = {
        "ours": Daemon,
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
                if name == "ours":
                    raise
                missing[name] = str(error)
    ours = spread(seconds["ours"], "s")
    rows = []
    for name in (STOCK, "runqslower"):
        full = f"exec to ready, against {name}"
        goal = GOAL if name == STOCK else None
        if not seconds[name]:
            rows.append(unmeasured(full, missing[name], goal))
            continue
        if len(seconds[name]) != rounds:
            rows.append(unmeasured(full, f"it did not start each time: {missing[name]}", goal))
            continue
        why = f"{rounds} rounds"
        if name in missing:
            why += f"; bench/bcc_tool.py stands in: {missing[name]}"
        rows.append(
            row(
                full,
                ours,
                reference=spread(seconds[name], "s"),
                against=ratios(seconds["ours"], seconds[name]),
                goal=goal,
                why=why,
            )
        )
    return rows


if __name__ == "__main__":
    sys.exit(run(__doc__, measure, ("rounds", ROUNDS, "of all")))
