"""The ``softirq-stalld`` command: the only place that parses arguments and exits."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from stalld import __version__
from stalld.config import DEFAULT_PATH, DEFAULT_SOCKET, MAX_THRESHOLD_MS, Settings, load, printable
from stalld.errors import ConfigError, StalldError, UsageError
from stalld.live_filter import EVENTS, MAX_CPU, MAX_PATTERN, VERDICTS, Filter
from stalld.live_request import MAX_HISTORY


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done, 1 cannot run, 2 bad usage, 130 interrupted where nothing has to be ended in order.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.command(arguments))
    except ConfigError as error:
        _complain(*error.args)
        return error.exit_code
    except StalldError as error:
        _complain(error)
        return error.exit_code
    except KeyboardInterrupt:  # The kernel takes down whatever `check` has attached.
        return 130


def _complain(*lines: object) -> None:
    if sys.stderr is not None:  # It is closed: print() would take standard output instead.
        print(*(f"softirq-stalld: {line}" for line in lines), sep="\n", file=sys.stderr)


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
    _add_tail(commands.add_parser("tail", help="live events of the running service"))
    return parser


def _add_tail(tail: argparse.ArgumentParser) -> None:
    tail.add_argument(
        "--socket",
        type=_path,
        default=Path(DEFAULT_SOCKET),
        metavar="P",
        help="the live socket of the service (default: %(default)s)",
    )
    tail.add_argument("--json", action="store_true", help="events as JSON lines, for programs")
    first = tail.add_mutually_exclusive_group()
    first.add_argument(
        "-n", type=_history, metavar="N", default=0, help="show the last N events first, up to 100"
    )
    first.add_argument(
        "--since-start",
        action="store_true",
        help="show first what there was since the service started, the last 100 events of it",
    )
    first.add_argument(
        "--stats", action="store_true", help="tell what the service says of itself, and exit"
    )
    wanted = tail.add_argument_group(
        "filters",
        "Only events that satisfy all kinds given. Each but --min-ms may be given many times: "
        "then one of its values is enough.",
    )
    wanted.add_argument(
        "--min-ms", type=_min_ms, metavar="N", help="of stalls of N milliseconds or longer"
    )
    wanted.add_argument("--cpu", type=_cpu, action="append", metavar="N", help="of this CPU")
    wanted.add_argument(
        "--comm", type=_glob, action="append", metavar="GLOB", help="whose blocker is called so"
    )
    wanted.add_argument(
        "--verdict", choices=VERDICTS, action="append", metavar="V", help=", ".join(VERDICTS)
    )
    wanted.add_argument(
        "--event", choices=EVENTS, action="append", metavar="E", help=", ".join(EVENTS)
    )
    tail.set_defaults(command=_tail)


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


def _min_ms(text: str) -> float:
    value = _number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} ms is no duration: give 0 or more")
    return value


def _whole(text: str, most: int, what: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) <= most):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what} from 0 to {most}")
    return int(text)


def _history(text: str) -> int:
    return _whole(text, MAX_HISTORY, "a number of events")


def _cpu(text: str) -> int:
    return _whole(text, MAX_CPU, "the number of a CPU,")


def _glob(text: str) -> str:
    if not 1 <= len(text) <= MAX_PATTERN:
        raise argparse.ArgumentTypeError(f"a pattern has 1 to {MAX_PATTERN} characters")
    if any("\udc80" <= character <= "\udcff" for character in text):
        raise argparse.ArgumentTypeError("the pattern is not UTF-8; such bytes are told as \\xNN")
    return text


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("'' is not the name of a file")
    return Path(text)


def _settings(arguments: argparse.Namespace) -> Settings:
    """Command line over file over default."""
    config = load(arguments.config)
    if arguments.threshold_ms is not None:
        config = replace(config, detect=replace(config.detect, threshold_ms=arguments.threshold_ms))
    source = printable(str(arguments.config or DEFAULT_PATH))
    if config.sinks.stdout.enabled and sys.stdout is None:
        raise ConfigError(
            f"{source}: sinks.stdout.enabled: standard output is closed, so events have nowhere "
            "to go; open it, or set this to false and name another sink"
        )
    return Settings(config, arguments.duration, arguments.format, source)


def _run(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    # Imported here: `check` and usage errors need none of it.
    from stalld.memory import no_openssl
    from stalld.probe.client import cache_directory, load_probes

    # It compiles while the rest is imported.
    nmi = "auto" if settings.config.detect.nmi_sampler else "never"
    child = load_probes(nmi, cache_directory(os.environ))
    with no_openssl():
        import uvloop

    from stalld.log import open_log
    from stalld.service import Service

    stdout_fd = -1 if sys.stdout is None else sys.stdout.fileno()

    log = open_log(sys.stderr)

    async def detect() -> None:
        await Service(child, settings, lambda: _settings(arguments), stdout_fd, log).run()

    uvloop.run(detect())
    return 0


def _tail(arguments: argparse.Namespace) -> int:
    filters = {
        "min_ms": arguments.min_ms,
        "cpu": arguments.cpu,
        "comm": arguments.comm,
        "verdict": arguments.verdict,
        "event": arguments.event,
    }
    wanted = {name: value for name, value in filters.items() if value is not None}
    try:
        Filter.from_request(wanted)
    except ValueError as error:
        raise UsageError(str(error)) from None
    history = None if arguments.since_start else arguments.n
    try:
        from stalld.tail.command import Options, run

        return run(Options(str(arguments.socket), arguments.json, wanted, history, arguments.stats))
    except KeyboardInterrupt:
        return 0


def _check(arguments: argparse.Namespace) -> int:
    if arguments.config is not None:
        load(arguments.config)
        print(f"{printable(str(arguments.config))}: valid")
        return 0
    from stalld.check import check, render

    report = check()
    print(report.to_json() if arguments.json else render(report))
    return 0 if report.can_run else 1


if __name__ == "__main__":
    sys.exit(main())
