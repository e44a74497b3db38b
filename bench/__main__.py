"""The whole table: every figure, ours, the reference, the goal; writes bench/RESULTS.md.

    python -m bench [--only MODULE ...] [--results FILE]
    python -m bench --long [RUN ...]

``make bench`` runs it. Some fifteen minutes on a machine that does nothing else. A part of the
modules is written nowhere unless ``--results`` names a file. The long runs, which some of the goals
are about, take an hour each, idle twenty minutes, fidelity some; each has its own file,
bench/RESULTS-RUN.md.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bench import (
    delivery,
    flood,
    found,
    growth,
    hot_path,
    idle,
    memory,
    onset,
    sched_pipe,
    security,
    startup,
    throughput,
)
from bench.command import FAILURES, ready
from bench.machine import describe, loop_ms, steal_s
from bench.row import Row, table, unmeasured

MODULES: Mapping[str, Callable[[], Sequence[Row]]] = {
    "hot_path": hot_path.measure,
    "sched_pipe": sched_pipe.measure,
    "flood": flood.measure,
    "idle": idle.measure,
    "onset": onset.measure,
    "delivery": delivery.measure,
    "throughput": throughput.measure,
    "startup": startup.measure,
    "memory": memory.measure,
    "growth": growth.measure,
    "security": security.measure,
    "found": found.measure,
}
LONG: Mapping[str, Callable[[], Sequence[Row]]] = {
    "idle": partial(idle.measure, idle.LONG_ROUNDS),
    "memory": partial(memory.measure, memory.HOUR_S),
    "fidelity": found.fidelity,
    "soak": found.soaked,
}
RESULTS = Path(__file__).with_name("RESULTS.md")


class Part(NamedTuple):
    """What one module found, and what that took; ``failed``: it found nothing at all."""

    name: str
    rows: Sequence[Row]
    seconds: float
    failed: bool = False


def part(name: str, measure: Callable[[], Sequence[Row]]) -> Part:
    """Run one; what cannot be measured is a row too."""
    began, failed = time.monotonic(), False
    try:
        rows = measure()
    except Exception as error:  # noqa: BLE001 - the others' figures must not be lost for it
        if not isinstance(error, FAILURES):
            traceback.print_exc()
        failed = True
        why = f"{type(error).__name__}: {error}"
        rows = [unmeasured(f"all of bench.{name}", " ".join(why.split())[:300])]
    return Part(name, rows, time.monotonic() - began, failed)


def text(parts: Sequence[Part], machine: Sequence[str], command: str) -> str:
    """The file, and which command writes it."""
    rows = [row for one in parts for row in one.rows]
    reached = sum(row.reached is True for row in rows)
    unknown = sum(bool(row.goal) and row.reached is None for row in rows)
    failed = sum(one.failed for one in parts)
    took = ", ".join(f"{one.name} {one.seconds:.0f} s" for one in parts)
    lines = [
        "# Results",
        "",
        f"Written by `{command}`, no figure by hand; [README.md](README.md) tells how they are "
        "measured. In brackets stand the quartiles of the rounds.",
        "",
        *(f"- {fact}" for fact in machine),
        f"- goals reached: {reached} of {sum(bool(row.goal) for row in rows)}"
        + (f"; {unknown} could not be judged" if unknown else "")
        + (f"; {failed} modules failed, with all their goals" if failed else ""),
    ]
    for one in parts:
        lines += ["", f"## {one.name}", "", table(one.rows)]
    lines += ["", f"It took {took}.", ""]
    return "\n".join(lines)


def main() -> int:
    """Measure everything. Whether the goals are reached is told by the table, not the status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=MODULES, default=list(MODULES))
    parser.add_argument("--results", type=Path, help="default: bench/RESULTS.md, of all modules")
    parser.add_argument("--long", nargs="*", choices=LONG, help="these long runs; all without")
    options = parser.parse_args()
    if not ready():
        return 1
    if options.long is not None:
        runs = options.long or list(LONG)
        results = {name: RESULTS.with_name(f"RESULTS-{name}.md") for name in runs}
        return max(run({name: LONG[name]}, results[name], "make bench-long") for name in runs)
    whole = set(options.only) == set(MODULES)
    return run(
        {name: MODULES[name] for name in options.only},
        options.results or (RESULTS if whole else None),
        "make bench",
    )


def run(
    modules: Mapping[str, Callable[[], Sequence[Row]]], results: Path | None, command: str
) -> int:
    """Measure, print, write; 1 where a module failed."""
    machine, stolen_s, loops_ms, parts = describe(), steal_s(), [loop_ms()], []
    for name, measure in modules.items():
        print(f"{name} …", file=sys.stderr, flush=True)
        parts.append(part(name, measure))
        loops_ms.append(loop_ms())
        print(table(parts[-1].rows), flush=True)
    machine.append(f"the hypervisor took {steal_s() - stolen_s:.1f} s of CPU time meanwhile")
    loops = " ".join(f"{took:.1f}" for took in loops_ms)
    machine.append(f"a fixed loop of Python, before each part and at the end: {loops} ms")
    if results is not None:
        results.write_text(text(parts, machine, command))
        print(f"written to {results}", file=sys.stderr)
    return 1 if any(one.failed for one in parts) else 0


if __name__ == "__main__":
    sys.exit(main())
