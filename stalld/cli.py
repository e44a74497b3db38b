"""The ``softirq-stalld`` command: the only place that parses arguments and exits."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from stalld import __version__
from stalld.config import DEFAULT_PATH, MAX_THRESHOLD_MS, Settings, load
from stalld.errors import ConfigError, StalldError, UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done, 1 cannot run, 2 bad usage.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.command(arguments))
    except ConfigError as error:
        print(*(f"softirq-stalld: {line}" for line in error.args), sep="\n", file=sys.stderr)
        return error.exit_code
    except StalldError as error:
        print(f"softirq-stalld: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="softirq-stalld",
        description="Sees the moment softirq work is overdue on a CPU and says who is to blame.",
    )
    parser.add_argument("--version", action="version", version=f"softirq-stalld {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="detect until stopped; events on standard output")
    run.add_argument(
        "--config",
        type=_path,
        metavar="F",
        help=f"the configuration file (default: {DEFAULT_PATH}, if there is one)",
    )
    run.add_argument(
        "--threshold-ms",
        type=_threshold_ms,
        metavar="N",
        help="how long softirq work may wait (default: what the configuration says, else 10)",
    )
    run.add_argument(
        "--duration", type=_seconds, metavar="S", help="stop after S seconds (default: never)"
    )
    run.add_argument(
        "--format", choices=("json", "text"), default="json", help="how events are written"
    )
    run.set_defaults(command=_run)

    check = commands.add_parser("check", help="what this host supports and what degrades")
    what = check.add_mutually_exclusive_group()
    what.add_argument("--json", action="store_true", help="one JSON object, for programs")
    what.add_argument(
        "--config", type=_path, metavar="F", help="check this configuration file, and nothing else"
    )
    check.set_defaults(command=_check)
    return parser


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def _threshold_ms(text: str) -> float:
    value = _number(text)
    if not 1 <= value <= MAX_THRESHOLD_MS:
        raise argparse.ArgumentTypeError(
            f"{text} ms is out of range: 1 to {MAX_THRESHOLD_MS} ms make sense"
        )
    return value


def _seconds(text: str) -> float:
    value = _number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} s is not a time to run: give more than 0")
    return value


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("'' is not the name of a file")
    return Path(text)


def _settings(arguments: argparse.Namespace) -> Settings:
    """Command line over file over default."""
    config = load(arguments.config)
    if arguments.threshold_ms is not None:
        config = replace(config, detect=replace(config.detect, threshold_ms=arguments.threshold_ms))
    return Settings(config, arguments.duration)


def _run(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    # Imported here: `check` and usage errors need none of it.
    import structlog
    import uvloop

    from stalld.service import Service
    from stalld.sinks.emitter import Emitter

    try:
        stream = sys.stdout.buffer
        emitter = Emitter(stream, arguments.format, time.time_ns)
    except AttributeError:
        raise UsageError("standard output is closed: events have nowhere to go") from None
    log = structlog.wrap_logger(
        structlog.PrintLogger(sys.stderr),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.KeyValueRenderer(key_order=["timestamp", "level", "event"]),
        ],
    )

    async def detect() -> None:
        await Service(settings, emitter, log).run()

    try:
        uvloop.run(detect())
    finally:
        _let_go_of(sys.stdout)
    return 0


def _let_go_of(stream: TextIO) -> None:
    """Nothing is left to write: what a broken pipe refused must not be tried again at exit."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _check(arguments: argparse.Namespace) -> int:
    if arguments.config is not None:
        load(arguments.config)
        name = os.fsencode(arguments.config).decode(errors="backslashreplace")
        print(f"{name}: valid")
        return 0
    from stalld.check import check, render

    report = check()
    print(report.to_json() if arguments.json else render(report))
    return 0 if report.can_run else 1


if __name__ == "__main__":
    sys.exit(main())
