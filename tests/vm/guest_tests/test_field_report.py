"""The field report's stall: a slow system call, softirqs left to a ksoftirqd that cannot run.

A test module (``tests/vm/module``) spins in a /proc read as memcg_stat_show() did.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from stalld.enrich.stack import reaches_base
from tests.injector import Mode, Pressure, Probe, system
from tests.kernel.daemon import STALLED_CPU as CPU
from tests.kernel.daemon import Daemon, Event, monotonic_ns
from tests.kernel.test_stalls import check_life, functions
from tests.slowness import slow

PROC = Path("/proc/stalld_slow")

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(not PROC.exists(), reason="the test module is not built for this kernel"),
]

READS = 12
WANTED = 3
DURATION_MS = 450


class Read(NamedTuple):
    """One slow read, from the module's own clock, and what was said about it."""

    start_ns: int
    end_ns: int
    pid: int
    lines: list[Event]
    probes: list[Probe]

    @property
    def resolved(self) -> Event:
        return self.lines[-1]

    @property
    def ping_ms(self) -> float:
        """The longest round trip of the pings that this CPU had to answer meanwhile."""
        return max((probe.rtt_ns or 0) / 1e6 for probe in self.probes)


def read_when_asked(name: str, asked: int, report: int) -> None:
    """What cadvisor does: read a file of statistics every now and then."""
    while os.read(asked, 1):
        with open(PROC / name, "rb", buffering=0) as file:
            os.write(report, file.read(100))


@contextmanager
def reader(name: str) -> Iterator[tuple[int, Callable[[], str]]]:
    """The reading process, pinned to ``CPU``: its pid, and a function that has it read once."""
    Path("/sys/module/stalld_slow/parameters/duration_ms").write_text(str(DURATION_MS))
    asked, ask = os.pipe()
    told, tell = os.pipe()
    pid = system.fork_task("slow-reader", CPU, lambda: read_when_asked(name, asked, tell))
    # So that reading ends if it does.
    os.close(tell)

    def read_once() -> str:
        os.write(ask, b".")
        return os.read(told, 100).decode()

    try:
        yield pid, read_once
    finally:
        system.end_task(pid)
        for fd in (asked, ask, told):
            os.close(fd)


def reads(daemon: Daemon, name: str, mode: Mode, right: Callable[[Read], bool]) -> list[Read]:
    """Slow reads under packets until enough of them were as they should be."""
    found: list[Read] = []
    with (
        Pressure(CPU, mode) as pressure,
        Pressure(CPU, Mode.PING) as ping,
        reader(name) as (pid, read_once),
        pressure.active(),
    ):
        for _ in range(READS):
            start_ns, end_ns, cpu = map(int, read_once().split())
            assert cpu == CPU
            lines = lines_within(daemon, start_ns, end_ns)
            if not lines:
                continue
            check_life(lines)
            probes = [
                probe
                for probe in ping.probes()
                if start_ns - 5_000_000 <= probe.send_ns <= end_ns and probe.rtt_ns
            ]
            if probes:
                found.append(Read(start_ns, end_ns, pid, lines, probes))
            if sum(map(right, found)) == WANTED:
                break
    return found


def lines_within(daemon: Daemon, start_ns: int, end_ns: int) -> list[Event]:
    """The lines of the longest stall that began in this time or shortly before."""

    def inside(event: Event) -> bool:
        began = monotonic_ns(event["started_at"])
        return event["cpu"] == CPU and start_ns - 20_000_000 <= began <= end_ns

    give_up = time.monotonic() + slow(0.3)
    while not (resolved := [e for e in daemon.stalls("resolved") if inside(e)]):
        if time.monotonic() > give_up:
            return []
        time.sleep(0.05)
    time.sleep(0.1)
    resolved = [e for e in daemon.stalls("resolved") if inside(e)]
    longest = max(resolved, key=lambda e: e["duration_ms"])
    return [e for e in daemon.stalls() if e["stall_id"] == longest["stall_id"]]


def evidence(found: list[Read]) -> list[dict[str, Any]]:
    """What is kept for the case study."""
    return [
        {
            "read_ms": round((one.end_ns - one.start_ns) / 1e6, 3),
            "ping": [
                [round((p.send_ns - one.start_ns) / 1e6, 3), round((p.rtt_ns or 0) / 1e6, 3)]
                for p in one.probes
            ],
            "lines": [
                {key: value for key, value in line.items() if key != "read_ns"}
                for line in one.lines
            ],
            "first_line_after_ms": round((one.lines[0]["read_ns"] - one.start_ns) / 1e6, 3),
        }
        for one in found
    ]


def test_slow_system_call(daemon: Daemon, tick_ms: float, keep: Callable[[str, Any], None]) -> None:
    """A task stuck in a /proc read: blamed while it lasts, by its function.

    Where the kernel defers to a runnable ksoftirqd, NET_RX starves as long as ping is late;
    where it serves inline, ksoftirqd waits and ping is not late.
    """

    def right(one: Read) -> bool:
        event = one.resolved
        return (
            event["verdict"] == "stuck_in_kernel"
            and event["blocker"]["pid"] == one.pid
            and event["ksoftirqd"] is not None
        )

    found = reads(daemon, "slow_stat", Mode.BURSTS, right)
    keep("field-report.json", evidence([one for one in found if right(one)]))
    good = [one for one in found if right(one)]
    assert len(good) >= WANTED, [(one.resolved["verdict"], one.ping_ms) for one in found]
    errors_ms = []
    for one in good:
        # The kernel cannot walk on from within a retpoline; then the next line has the stack.
        first, second = one.lines[:2]
        shown = first if reaches_base(functions(first)) else second
        assert (first["phase"], shown["phase"]) == ("ongoing", "ongoing")
        assert "stalld_slow_stat_show" in functions(shown)
        assert "vfs_read" in functions(shown)
        if one.resolved["evidence"]["serves_inline"] is False:
            errors_ms.append(abs(one.resolved["starved"].get("NET_RX", 0) - one.ping_ms))
        elif one.resolved["evidence"]["serves_inline"] is True:
            assert one.resolved["starved"] == {}
    # Usually long before; the first of all has its names looked up.
    assert any(one.lines[0]["read_ns"] < one.end_ns for one in good)
    if errors_ms:
        # The pinging process has an emulated CPU as well, which the host may take away.
        assert sorted(errors_ms)[len(errors_ms) // 2] <= DURATION_MS / 5, errors_ms


@pytest.mark.parametrize(
    ("name", "verdicts", "function"),
    [
        ("slow_bh", {"softirqs_disabled"}, "stalld_slow_bh_show"),
        # Without a steal clock a theft is not ruled out, unless the stack does.
        ("slow_irqs", {"irqs_disabled", "unknown"}, "stalld_slow_irqs_show"),
    ],
)
def test_variants(
    daemon: Daemon,
    keep: Callable[[str, Any], None],
    name: str,
    verdicts: set[str],
    function: str,
) -> None:
    """The same read with bottom halves or interrupts off is told as that, with its function."""

    def right(one: Read) -> bool:
        event = one.resolved
        return (
            event["verdict"] in verdicts
            and event["blocker"]["pid"] == one.pid
            and function in functions(event)
        )

    found = reads(daemon, name, Mode.PING, right)
    keep(f"{name}.json", evidence([one for one in found if right(one)]))
    assert sum(map(right, found)) >= WANTED, [
        (one.resolved["verdict"], functions(one.resolved)[:4]) for one in found
    ]
