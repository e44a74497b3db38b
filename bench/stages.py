"""Where the time goes from a record to its line, function by function.

    python -m bench.stages [--stalls N] [--top N]

No kernel, no sinks: the records of stalls none of which is like another, each with a look-back
(tests/unit/whole_path.py), go through decoder, symbols, tracker, folder and emitter. First without
the profiler, for the true time; then with it, for the shares: it makes small functions look dear.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
import tempfile
import time
from pathlib import Path

from tests.unit.whole_path import WholePath

STALLS, TOP = 300, 25
WARM = 20


def main() -> int:
    """Print both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--stalls", type=int, default=STALLS)
    parser.add_argument("--top", type=int, default=TOP, help="functions, by their own time")
    options = parser.parse_args()
    profile = cProfile.Profile()
    spent_ns = [0, 0]
    with tempfile.TemporaryDirectory() as work:
        path = WholePath(Path(work))
        for number in range(1, WARM + 2 * options.stalls + 1):
            # Made only now: its ticks are to be the last ones in the ring.
            stall = path.stall(number)
            if number > WARM + options.stalls:
                with profile:
                    for record in stall:
                        path.pipeline.take(record)
                continue
            for phase, record in enumerate(stall):
                began = time.perf_counter_ns()
                path.pipeline.take(record)
                spent_ns[phase] += (number > WARM) * (time.perf_counter_ns() - began)
    for name, ns in zip(("first sample", "end, with look-back"), spent_ns, strict=True):
        us = ns / 1e3 / options.stalls
        print(f"{name}: {us:.0f} us to the line, {1e6 / us:.0f}/s")
    pstats.Stats(profile).strip_dirs().sort_stats("tottime").print_stats(options.top)
    return 0


if __name__ == "__main__":
    sys.exit(main())
