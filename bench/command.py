"""What all modules of the bench have in common as commands."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from bench.bpf import BenchError
from bench.row import Row, table
from stalld.errors import StalldError
from tests.injector import InjectorError

FAILURES = (BenchError, InjectorError, StalldError, OSError)
"""That mean: this cannot be measured here."""


def ready() -> bool:
    """Whether it may begin. From then on a SIGTERM ends what was started, as Ctrl-C does."""
    if os.geteuid() != 0:
        print("the bench loads BPF programs and needs root", file=sys.stderr)
        return False
    signal.signal(signal.SIGTERM, _on_sigterm)
    return True


def _on_sigterm(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def run(
    doc: str | None,
    measure: Callable[..., Sequence[Row]],
    *options: tuple[str, object, str],
    argv: Sequence[str] | None = None,
) -> int:
    """Parse the arguments, measure, print the rows.

    Args:
        options: name of an argument of ``measure``, its default (whose type counts), its help.

    Returns:
        0, or 1 when nothing could be measured.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    for name, default, text in options:
        flag = f"--{name.replace('_', '-')}"
        kind = type(default) if default is not None else str
        parser.add_argument(flag, type=kind, default=default, help=f"{text} ({default})")
    arguments = parser.parse_args(argv)
    if not ready():
        return 1
    try:
        rows = measure(**vars(arguments))
    except FAILURES as error:
        print(error, file=sys.stderr)
        return 1
    print(table(rows))
    return 0
