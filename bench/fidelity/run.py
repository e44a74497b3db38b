"""Injects the stalls beside a running daemon and collects what both sides say."""

from __future__ import annotations

import os
import random
import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.fidelity.judge import effect
from bench.fidelity.truth import EXPECTED, Injected, Run, Said, Span, Steal
from tests.injector import (
    METHODS,
    Injector,
    InjectorError,
    Kind,
    KsoftirqdTruth,
    Mode,
    Pressure,
    UnsupportedError,
    Wait,
)
from tests.injector.ksoftirqd import waits as join_waits
from tests.kernel.daemon import STALLED_CPU, THRESHOLD_MS, Daemon, Event, monotonic_ns

KINDS = tuple(kind for kind in EXPECTED if kind is not Kind.IRQS_OFF)
"""Injected unless told: irqs_off holds up a second CPU, all of a small machine."""
CONFIG = f"""
[detect]
threshold_ms = {THRESHOLD_MS}
[storm]
identical_per_minute = 10000
stalls_per_second = 1000
"""
LENGTH_MS = (2 * THRESHOLD_MS, 150.0)
GAP_MS = (30.0, 120.0)
SETTLE_S = 0.5
"""After the set-up and after the last stall."""
ATTEMPTS = 10
"""Stalls of a kind that needs luck are tried this many times as often as wanted, at most."""
_CLOSE_WAIT_S = 1.0
_LOOK_BACK_NS = 1_000_000_000
_STEAL_COLUMN = 8

Progress = Callable[[int, int], None]


class RunError(Exception):
    """The daemon did not do its part; the message says what it did."""


def estimate_s(stalls: int) -> float:
    """About how long a run takes when every stall counts."""
    each_ms = (sum(LENGTH_MS) + sum(GAP_MS)) / 2
    return stalls * each_ms / 1e3 + 2 * SETTLE_S


def measure(
    stalls: int,
    seed: int,
    kinds: Sequence[Kind] = KINDS,
    progress: Progress = lambda counted, injected: None,
) -> Run:
    """Run a daemon and inject until ``stalls`` stalls count, in equal shares of the kinds.

    Args:
        stalls: wanted; fewer count where luck is bad for too long.
        seed: of kinds, lengths and gaps; not of what the kernel makes of them.
        kinds: those this machine cannot make are left out and named in the result.
        progress: told the stalls counted and injected so far, after each.

    Raises:
        InjectorError: nothing can be injected.
        RunError: the daemon failed.
    """
    cpu = STALLED_CPU
    with ExitStack() as stack:
        daemon = _start_daemon(stack)
        watch = stack.enter_context(KsoftirqdTruth(cpu))
        injector = stack.enter_context(Injector(cpu))
        able, unsupported = _prepare(injector, kinds)
        pings = stack.enter_context(Pressure(cpu, Mode.PING))
        pressures = {Mode.PING: pings}
        for mode in {METHODS[kind].pressure for kind in able} - {Mode.PING}:
            pressures[mode] = stack.enter_context(Pressure(cpu, mode))
        stack.enter_context(_off(cpu))
        time.sleep(SETTLE_S)

        campaign = _Campaign(injector, watch, pressures, random.Random(seed))
        start_ns = time.monotonic_ns()
        campaign.inject(dict(zip(able, shares(stalls, len(able)), strict=True)), progress)
        time.sleep(SETTLE_S)
        campaign.read_steal()
        span = Span(start_ns, time.monotonic_ns())
        status = daemon.stop()
        if status != 0 or daemon.events[-1]["event"] != "stopped":
            raise RunError(f"the daemon ended with status {status}: {daemon.said}")
        return Run(
            cpu=cpu,
            threshold_ms=THRESHOLD_MS,
            span=span,
            injected=campaign.injected,
            failed=campaign.failed,
            unsupported=unsupported,
            said=list(gather(daemon.stalls())),
            waits=watch.waits(),
            probes=pings.probes(),
            steal=campaign.steal,
            started=daemon.started,
            stopped=daemon.events[-1],
            wanted=stalls,
            seed=seed,
        )


def _start_daemon(stack: ExitStack) -> Daemon:
    """One that tells every stall: here, stalls of one kind in a row are no storm."""
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    config = directory / "config.toml"
    config.write_text(CONFIG)
    daemon = Daemon("--config", str(config))
    try:
        return stack.enter_context(daemon)
    except AssertionError as error:
        raise RunError(f"the daemon did not start: {daemon.said or error}") from error


def _prepare(injector: Injector, kinds: Sequence[Kind]) -> tuple[list[Kind], dict[Kind, str]]:
    able: list[Kind] = []
    unsupported: dict[Kind, str] = {}
    for kind in kinds:
        try:
            injector.prepare(kind)
            able.append(kind)
        except UnsupportedError as error:
            unsupported[kind] = str(error)
    if not able:
        raise InjectorError(f"nothing can be injected here: {unsupported}")
    return able, unsupported


def shares(stalls: int, kinds: int) -> list[int]:
    """As equal as can be."""
    return [stalls // kinds + (number < stalls % kinds) for number in range(kinds)]


@contextmanager
def _off(cpu: int) -> Iterator[None]:
    """Keep the calling thread off a CPU meanwhile."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, before - {cpu} or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class _Campaign:
    """Injects one stall after the other.

    Attributes:
        injected: so far.
        failed: why others could not be made.
        steal: readings, one before and one after each stall.
    """

    def __init__(
        self,
        injector: Injector,
        watch: KsoftirqdTruth,
        pressures: dict[Mode, Pressure],
        numbers: random.Random,
    ) -> None:
        self.injected: list[Injected] = []
        self.failed: list[str] = []
        self.steal: list[Steal] = []
        self._injector = injector
        self._watch = watch
        self._pressures = pressures
        self._random = numbers

    def inject(self, wanted: dict[Kind, int], progress: Progress) -> None:
        """Go on until that many of each kind count, or luck was bad for too long."""
        left = dict(wanted)
        tries = dict.fromkeys(wanted, 0)
        while True:
            open_kinds = [k for k, n in left.items() if n and tries[k] < ATTEMPTS * wanted[k]]
            if not open_kinds:
                return
            # Kinds that count seldom come more often: so all go on until the end.
            weights = [left[k] * (tries[k] + 1) / (wanted[k] - left[k] + 1) for k in open_kinds]
            kind = self._random.choices(open_kinds, weights)[0]
            tries[kind] += 1
            stall = self._one(kind)
            if stall and effect(stall, THRESHOLD_MS):
                left[kind] -= 1
            progress(sum(wanted.values()) - sum(left.values()), sum(tries.values()))

    def _one(self, kind: Kind) -> Injected | None:
        before = self.read_steal()
        pressure = self._pressures[METHODS[kind].pressure]
        try:
            truth = self._injector.inject(kind, self._random.uniform(*LENGTH_MS), pressure=pressure)
        except InjectorError as error:
            self.failed.append(f"{kind}: {error}")
            return None
        time.sleep(self._random.uniform(*GAP_MS) / 1e3)
        stall = Injected(
            number=len(self.injected) + 1,
            truth=truth,
            waits=self._waits(Span(truth.start_ns, truth.end_ns)),
            steal_ms=self.read_steal().total_ms - before.total_ms,
        )
        self.injected.append(stall)
        return stall

    def _waits(self, span: Span) -> tuple[Wait, ...]:
        """Of ksoftirqd, those that overlap; the last one is given time to end."""
        give_up = time.monotonic() + _CLOSE_WAIT_S
        while True:
            entries = self._watch.entries()
            first = bisect_left(entries, span.start_ns - _LOOK_BACK_NS, key=lambda e: e.time_ns)
            waits = [
                wait
                for wait in join_waits(entries[first:])
                if wait.woken_ns <= span.end_ns
                and (wait.ran_ns is None or wait.ran_ns >= span.start_ns)
            ]
            if all(wait.ran_ns for wait in waits) or time.monotonic() > give_up:
                return tuple(waits)
            time.sleep(0.005)

    def read_steal(self) -> Steal:
        """Take a reading."""
        with open("/proc/stat", encoding="ascii") as file:
            reading = Steal(time.monotonic_ns(), steal_ms(file.read(), self._watch.cpu))
        self.steal.append(reading)
        return reading


def steal_ms(stat: str, cpu: int) -> float:
    """The steal column of a CPU in /proc/stat (``fs/proc/stat.c``)."""
    for line in stat.splitlines():
        fields = line.split()
        if fields and fields[0] == f"cpu{cpu}":
            return int(fields[_STEAL_COLUMN]) * 1e3 / os.sysconf("SC_CLK_TCK")
    raise ValueError(f"no cpu{cpu} in /proc/stat")


def gather(lines: Sequence[Event]) -> Iterator[Said]:
    """All lines of each stall together, in the order of their ends."""
    ongoing: dict[str, list[Event]] = {}
    for line in lines:
        if line["phase"] == "ongoing":
            ongoing.setdefault(line["stall_id"], []).append(line)
            continue
        start_ns = monotonic_ns(line["started_at"])
        span = Span(start_ns, start_ns + int(line["duration_ms"] * 1e6))
        yield Said(span, line, tuple(ongoing.pop(line["stall_id"], ())))
