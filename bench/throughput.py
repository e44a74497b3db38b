"""Records a second, from the perf buffer to a JSON line, on one core.

    python -m bench.throughput [--rounds N] [--seconds S]

Real records, made by a BPF program faster than they can be read (tests/injector/records.py), go
through the perf buffer of the real daemon, its decoder, tracker, symbols and standard output.
What it reads is divided by the CPU time it takes for it (all its threads, to the nanosecond): so
many a core can do. Made, told and lost must add up, on all sides. The reference does `event()` and
`json.dumps` with the very same records (bench/bcc_tool.py), and once more with names for the
addresses, which our lines have too. Sides take turns.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from bench.bpf import BenchError
from bench.command import run
from bench.processes import Daemon, Piped, bcc_tool, cpu_s
from bench.row import Goal, Row, ratios, row, spread, unmeasured
from tests.injector import InjectorError
from tests.injector.records import RecordSource, Sent
from tests.kernel.daemon import STALLED_CPU as CPU

ROUNDS, SECONDS = 3, 1.5
RATES = (10_000, 40_000, 160_000, 320_000)
"""Records a second that are tried in turn, until some are lost."""
BURST = 100
PLAIN, NAMED = "bcc", "bcc with names"
OF_A_CORE = "records to JSON lines, of one core"
AGAINST_BCC = "records to JSON lines, against event() + json.dumps in bcc"
RATE_GOAL = Goal(100_000, "records/s", at_least=True)
AGAINST_GOAL = Goal(5, "×", "against", at_least=True)


class Result(NamedTuple):
    """Of one side in one round.

    Attributes:
        made: records that found room, and others.
        lines: that came of them.
        told: lost ones, as the side itself said.
        per_core_s: records that a second of CPU time is enough for.
    """

    made: Sent
    lines: int
    told: int
    per_core_s: float


def saturated(side: Piped, ours: bool, seconds: float) -> Result:
    """Send ever faster until it cannot follow."""
    made, per_core_s = Sent(0, 0), 0.0
    with RecordSource(side.pid, CPU) as source:
        for rate in RATES:
            used = cpu_s(side.pid)
            try:
                sent = source.flow(rate, seconds, BURST)
            except InjectorError as error:
                raise BenchError(f"{rate} records/s cannot be made: {error}") from error
            _until_read(side)
            made = Sent(made.sent + sent.sent, made.lost + sent.lost)
            per_core_s = sent.sent / (cpu_s(side.pid) - used)
            if sent.lost:
                break
    if ours:
        time.sleep(0.5)
    events = side.stop(signal.SIGTERM if ours else signal.SIGINT)
    if ours:
        made_of = [e for e in events if e["event"] == "stall" and e["blocker"]]
        lines = sum(e["blocker"]["comm"] == "synthetic" for e in made_of)
        told = sum(e["count"] for e in events if e["event"] == "records_lost")
    else:
        lines = sum(e.get("comm") == "synthetic" for e in events)
        told = sum(e.get("lost", 0) for e in events)
    return Result(made, lines, told, per_core_s)


def _until_read(side: Piped) -> None:
    """Wait until it has nothing to do any more."""
    used = -1.0
    while used != (used := cpu_s(side.pid)):
        time.sleep(0.1)


def measure(rounds: int = ROUNDS, seconds: float = SECONDS) -> list[Row]:
    """Ours against both."""
    start: Mapping[str, Callable[[], Piped]] = {
        "ours": Daemon,
        PLAIN: bcc_tool,
        NAMED: lambda: bcc_tool("--names"),
    }
    found: dict[str, list[Result]] = {name: [] for name in start}
    for number in range(rounds):
        for name in reversed(list(start)) if number % 2 else list(start):
            with start[name]() as side:
                found[name].append(saturated(side, name == "ours", seconds))
    wrong = [
        f"{name}: {_adds_up(results)}"
        for name, results in found.items()
        if any(one.lines != one.made.sent for one in results)
        or (name == "ours" and any(one.told != one.made.lost for one in results))
    ]
    if wrong:
        why = "; ".join(wrong)
        return [unmeasured(OF_A_CORE, why, RATE_GOAL), unmeasured(AGAINST_BCC, why, AGAINST_GOAL)]
    rates = {name: [one.per_core_s for one in results] for name, results in found.items()}
    ours = spread(rates["ours"], "records/s")
    why = f"{rounds} rounds; {_adds_up(found['ours'])}"
    plain, named = (spread(rates[name], "records/s") for name in (PLAIN, NAMED))
    against = ratios(rates["ours"], rates[PLAIN])
    return [
        row(OF_A_CORE, ours, goal=RATE_GOAL, why=why),
        row(
            AGAINST_BCC,
            ours,
            reference=plain,
            against=against,
            goal=AGAINST_GOAL,
            why="the reference names no function, judges nothing; it was told of "
            f"{_told(found[PLAIN])} lost records",
        ),
        row(
            "records to JSON lines, against the same with ksym() for each address",
            ours,
            reference=named,
            against=ratios(rates["ours"], rates[NAMED]),
        ),
    ]


def _adds_up(results: list[Result]) -> str:
    sent, lost = (sum(numbers) for numbers in zip(*(one.made for one in results), strict=True))
    lines, told = sum(one.lines for one in results), sum(one.told for one in results)
    right = "all adds up" if (lines, told) == (sent, lost) else "IT DOES NOT ADD UP"
    return f"taken {sent}, lines {lines}; lost {lost}, told {told}: {right}"


def _told(results: list[Result]) -> str:
    return f"{sum(one.told for one in results)} of {sum(one.made.lost for one in results)}"


if __name__ == "__main__":
    options = ("rounds", ROUNDS, "of all sides"), ("seconds", SECONDS, "at each rate")
    sys.exit(run(__doc__, measure, *options))
