"""Injected stalls beside a daemon whose lines are timed; for bench/onset.py, bench/delivery.py."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import NamedTuple

from bench.processes import Daemon, Event, loaded
from stalld.reader import online_cpus
from tests.injector import METHODS, Injector, Kind, Pressure, Truth
from tests.kernel.daemon import STALLED_CPU as CPU
from tests.kernel.daemon import overlap

KINDS = (Kind.BH_OFF, Kind.SOFTIRQ_HOG)
"""That need no luck, and are told while they last."""
LENGTH_MS = (30.0, 60.0)
GAP_MS = (30.0, 70.0)


class Told(NamedTuple):
    """An injected stall, and the lines about it: ongoing ones, and the last.

    ``pinged_ns``: when the first packet was sent that it held up; None: there was none.
    """

    truth: Truth
    lines: list[Event]
    pinged_ns: int | None

    @property
    def resolved(self) -> bool:
        """Whether the last line came."""
        return bool(self.lines) and bool(self.lines[-1]["phase"] == "resolved")

    @property
    def first_ongoing(self) -> Event | None:
        """The first line that came while it was still going on."""
        for line in self.lines:
            if line["phase"] == "ongoing" and line["read_ns"] <= self.truth.end_ns:
                return line
        return None


@contextmanager
def busy(cpus_loaded: bool) -> Iterator[None]:
    """Every CPU has an ordinary task that never sleeps, or none has."""
    with loaded(online_cpus()) if cpus_loaded else nullcontext():
        yield


def inject(daemon: Daemon, stalls: int, seed: int = 1) -> list[Told]:
    """Make that many stalls of one CPU, the kinds in turn, with the truth about each."""
    numbers = random.Random(seed)
    truths = []
    since = daemon.lines.mark()
    with ExitStack() as stack:
        injector = stack.enter_context(Injector(CPU))
        pressures = {
            mode: stack.enter_context(Pressure(CPU, mode))
            for mode in {METHODS[kind].pressure for kind in KINDS}
        }
        for kind in KINDS:
            injector.prepare(kind)
        for number in range(stalls):
            kind = KINDS[number % len(KINDS)]
            pressure = pressures[METHODS[kind].pressure]
            truths.append(injector.inject(kind, numbers.uniform(*LENGTH_MS), pressure=pressure))
            time.sleep(numbers.uniform(*GAP_MS) / 1e3)
        time.sleep(0.3)
        pings = [probe.send_ns for one in pressures.values() for probe in one.probes()]
    events = [e for e in daemon.lines.events(since) if e["event"] == "stall"]
    return [Told(truth, _about(truth, events), _first(truth, pings)) for truth in truths]


def _first(truth: Truth, pings: list[int]) -> int | None:
    return min((ns for ns in pings if truth.start_ns <= ns < truth.end_ns), default=None)


def _about(truth: Truth, events: list[Event]) -> list[Event]:
    resolved = [e for e in events if e["phase"] == "resolved" and overlap(e, truth) > 0]
    if not resolved:
        return []
    number = max(resolved, key=lambda e: overlap(e, truth))["stall_id"]
    return [e for e in events if e["stall_id"] == number]
