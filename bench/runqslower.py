"""The same stalls as libbpf-tools' runqslower sees them, and as we do.

    python -m bench.runqslower [--stalls N] [--seed S]

runqslower watches the waits of all tasks for the CPU, at our threshold. Of each kind of stall:
how often it said anything, how often of ksoftirqd, how often the task that it calls previous
had the CPU, and what the daemon said. docs/comparison.md holds a run of it.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from tests.injector import METHODS, Injector, Kind, Pressure, Truth
from tests.kernel.daemon import STALLED_CPU as CPU
from tests.kernel.daemon import THRESHOLD_MS, Daemon, Event, overlap

KINDS = (
    Kind.BH_OFF,
    Kind.IRQS_OFF_TIMER,
    Kind.SOFTIRQ_HOG,
    Kind.PREEMPT_OFF,
    Kind.CPU_CONTENTION,
)


class Line(NamedTuple):
    """A wait that runqslower told of, and when it came (CLOCK_MONOTONIC)."""

    read_ns: int
    comm: str
    tid: int
    waited_us: int
    previous_tid: int


# Names may hold spaces, so: time, name, tid, microseconds, name, tid.
_LINE = re.compile(r"\S+ (.+?) +(\d+) +(\d+) (.+?) +(\d+) *$")


class RunqSlower:
    """A running runqslower and its lines so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.lines: list[Line] = []
        self._process = process
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            found = _LINE.match(line)
            if found:
                comm, tid, waited_us, _, previous = found.groups()
                self.lines.append(
                    Line(time.monotonic_ns(), comm, int(tid), int(waited_us), int(previous))
                )

    def of(self, truth: Truth, slack_ns: int = 100_000_000) -> list[Line]:
        """Waits that overlapped a stall."""
        return [
            line
            for line in self.lines
            if truth.start_ns < line.read_ns < truth.end_ns + slack_ns
            and line.read_ns - line.waited_us * 1000 < truth.end_ns
        ]


@contextmanager
def runqslower() -> Iterator[RunqSlower]:
    """Started and ready."""
    command = shutil.which("runqslower") or "/usr/sbin/runqslower"
    process = subprocess.Popen(
        ["stdbuf", "-oL", command, "-P", str(int(THRESHOLD_MS * 1000))],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        time.sleep(1.5)
        if process.poll() is not None:
            raise RuntimeError("runqslower did not start: install libbpf-tools, run as root")
        yield RunqSlower(process)
    finally:
        process.terminate()
        process.wait(10)


class Row(NamedTuple):
    """One stall as both saw it."""

    truth: Truth
    theirs: list[Line]
    ours: list[Event]


def run(stalls: int, rng: random.Random) -> list[Row]:
    """Inject ``stalls`` of each kind."""
    truths: list[Truth] = []
    with Daemon() as daemon, runqslower() as slower:
        for kind in KINDS:
            with Injector(CPU) as injector, Pressure(CPU, METHODS[kind].pressure) as pressure:
                for _ in range(stalls):
                    length_ms = rng.uniform(30, 120)
                    truths.append(injector.inject(kind, length_ms, pressure=pressure))
                    time.sleep(rng.uniform(0.15, 0.25))
        time.sleep(0.5)
        resolved = daemon.stalls("resolved")
        return [
            Row(t, slower.of(t), [e for e in resolved if overlap(e, t) > t.duration_ms * 2e5])
            for t in truths
        ]


def table(rows: list[Row]) -> str:
    """Markdown, one line a kind."""
    lines = [
        "| stall | injected | runqslower: any line | of ksoftirqd | names who had the CPU "
        "| softirq-stalld: found | blamed right | verdicts |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind in KINDS:
        own = [row for row in rows if row.truth.kind is kind]
        any_line = sum(bool(row.theirs) for row in own)
        ksoftirqd = sum(any(x.comm.startswith("ksoftirqd") for x in row.theirs) for row in own)
        named = sum(any(x.previous_tid == row.truth.tid for x in row.theirs) for row in own)
        found = [row for row in own if row.ours]
        blamed = sum(
            any(e["blocker"] and e["blocker"]["tid"] == row.truth.tid for e in row.ours)
            for row in found
        )
        verdicts = Counter(max(row.ours, key=_length)["verdict"] for row in found)
        told = ", ".join(f"{verdict} {count}" for verdict, count in verdicts.most_common())
        lines.append(
            f"| {kind} | {len(own)} | {any_line} | {ksoftirqd} | {named} | {len(found)} | {blamed} "
            f"| {told} |"
        )
    return "\n".join(lines)


def waits(rows: list[Row]) -> str:
    """Where both saw ksoftirqd wait: how far their figures are apart."""
    apart = []
    for row in rows:
        theirs = [x for x in row.theirs if x.comm.startswith("ksoftirqd")]
        ours = [e["ksoftirqd"]["runnable_ms"] for e in row.ours if e["ksoftirqd"]]
        if theirs and ours:
            apart.append(abs(max(ours) - max(x.waited_us for x in theirs) / 1000))
    if not apart:
        return "ksoftirqd's wait was not seen by both in any stall."
    return (
        f"In {len(apart)} stalls both saw ksoftirqd wait; their figures differ by "
        f"{statistics.median(apart):.3f} ms in the median, {max(apart):.3f} ms at most."
    )


def _length(event: Event) -> float:
    return float(event["duration_ms"])


def main() -> int:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stalls", type=int, default=20, help="of each kind")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    rows = run(arguments.stalls, random.Random(arguments.seed))
    print(table(rows))
    print()
    print(waits(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
