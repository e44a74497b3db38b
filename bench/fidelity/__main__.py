"""The command line; see bench/README.md."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from bench.fidelity.report import report, text, to_json
from bench.fidelity.run import KINDS, RunError, estimate_s, measure
from tests.injector import InjectorError, Kind

_PROGRESS_S = 15.0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fidelity",
        description="Inject stalls beside a running daemon and compare. Root only.",
    )
    parser.add_argument("--stalls", type=int, default=60, help="that count (default 60)")
    parser.add_argument("--seed", type=int, help="of kinds, lengths and gaps (default: random)")
    parser.add_argument(
        "--kinds",
        nargs="+",
        type=Kind,
        choices=list(Kind),
        default=list(KINDS),
        metavar="KIND",
        help=f"default: {' '.join(KINDS)}; irqs_off holds up a second CPU as well",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    options = parser.parse_args(argv)
    options.kinds = list(dict.fromkeys(options.kinds))
    if options.stalls < len(options.kinds):
        parser.error(f"at least one stall a kind: {len(options.kinds)}")
    return options


class _Progress:
    """Says now and then how far it is and how long it will take."""

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self._began = self._told = time.monotonic()

    def __call__(self, counted: int, injected: int) -> None:
        now = time.monotonic()
        if now - self._told < _PROGRESS_S or not counted:
            return
        self._told = now
        left_s = (now - self._began) / counted * (self._wanted - counted)
        print(
            f"{counted} of {self._wanted} counted, {injected} injected, {left_s:.0f} s left",
            file=sys.stderr,
        )


def _on_sigterm(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; the exit status is 0 when all goals are reached, 1 when not."""
    options = _arguments(argv)
    signal.signal(signal.SIGTERM, _on_sigterm)
    if os.geteuid() != 0:
        print("the fidelity suite loads BPF programs and needs root", file=sys.stderr)
        return 1
    seed = random.randrange(1 << 32) if options.seed is None else options.seed
    print(f"{options.stalls} stalls, about {estimate_s(options.stalls):.0f} s", file=sys.stderr)
    try:
        run = measure(options.stalls, seed, options.kinds, _Progress(options.stalls))
    except (InjectorError, RunError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    judged = report(run)
    print(text(judged))
    if options.json:
        options.json.write_text(json.dumps(to_json(judged), indent=1) + "\n")
    return 1 if judged.missed_goals else 0


if __name__ == "__main__":
    sys.exit(main())
