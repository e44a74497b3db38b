"""Stalls from a shell, next to a running daemon: one JSON line of truth per stall."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from types import FrameType
from typing import NoReturn

from tests.injector.injector import Injector
from tests.injector.kinds import METHODS, InjectorError, Kind, Mode, Truth, UnsupportedError
from tests.injector.ksoftirqd import KsoftirqdTruth, Wait
from tests.injector.pressure import Pressure

_PROBE_MS = 1.0
_SETTLE_S = 0.05
"""A wait that a stall caused ends this soon after it."""


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def _milliseconds(text: str) -> float:
    number = float(text)
    if not 0 <= number < 3_600_000:
        raise ValueError(text)
    return number


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.injector",
        description="Make real, bounded stalls of one CPU. One JSON line of truth per stall.",
    )
    parser.add_argument(
        "kind", choices=[*map(str, Kind), "list"], help="of stall; or list them all"
    )
    parser.add_argument("--cpu", type=int, default=0, help="to stall (default 0)")
    parser.add_argument("--duration-ms", type=float, default=50.0, help="default 50, at most 500")
    parser.add_argument("--count", type=_count, default=1, help="of stalls (default 1)")
    gap = parser.add_mutually_exclusive_group()
    gap.add_argument(
        "--gap-ms", type=_milliseconds, default=200.0, help="between stalls (default 200)"
    )
    gap.add_argument("--random-gap", action="store_true", help="0 to 500 ms instead")
    parser.add_argument(
        "--pressure", choices=[*map(str, Mode)], help="on that CPU (default: what the kind needs)"
    )
    parser.add_argument("--idle", action="store_true", help="irqs_off: hit an idle CPU")
    return parser.parse_args(argv)


def _line(truth: Truth, waits: Sequence[Wait]) -> str:
    longest = max((wait.waited_ms or 0.0 for wait in waits), default=None)
    return json.dumps(
        {
            **truth._asdict(),
            "duration_ms": round(truth.duration_ms, 3),
            "ksoftirqd_waited_ms": None if longest is None else round(longest, 3),
        }
    )


def _inject(options: argparse.Namespace) -> None:
    kind = Kind(options.kind)
    mode = Mode(options.pressure or METHODS[kind].pressure)
    with ExitStack() as stack:
        watch = stack.enter_context(KsoftirqdTruth(options.cpu))
        injector = stack.enter_context(Injector(options.cpu, busy=not options.idle))
        injector.prepare(kind)
        pressure = stack.enter_context(Pressure(options.cpu, mode))
        for number in range(options.count):
            if number:
                gap_ms = random.uniform(0, 500) if options.random_gap else options.gap_ms
                time.sleep(gap_ms / 1e3)
            truth = injector.inject(kind, options.duration_ms, pressure=pressure)
            time.sleep(_SETTLE_S)
            waits = watch.waits(truth.start_ns, truth.end_ns)
            print(_line(truth, waits), flush=True)


def _list(cpu: int) -> None:
    for kind, method in METHODS.items():
        try:
            with Injector(cpu) as injector:
                injector.inject(kind, _PROBE_MS)
            verdict = "yes"
        except UnsupportedError as error:
            verdict = f"no: {error}"
        print(f"{kind:15} {verdict}\n{'':15} {method.means}")


def _on_sigterm(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0 done, 1 not possible, 2 bad usage."""
    options = _arguments(argv)
    signal.signal(signal.SIGTERM, _on_sigterm)
    if os.geteuid() != 0:
        print("the injector loads BPF programs and needs root", file=sys.stderr)
        return 1
    try:
        if options.kind == "list":
            _list(options.cpu)
        else:
            _inject(options)
    except InjectorError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
