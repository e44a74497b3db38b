"""What ran before a stall, and the kernel's own counters that each tick reads."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest

from stalld.detector import TICK_FUNCTIONS, tick_ns
from stalld.enrich import softnet
from stalld.enrich.kallsyms import Kallsyms
from stalld.enrich.softnet import Softnet
from stalld.probe.client import load_probes, possible_cpus
from stalld.records import TickSample
from stalld.rings import Rings
from stalld.state import Maps, offsets
from tests.injector import Injector, Kind, Mode, Pressure, system
from tests.kernel.daemon import STALLED_CPU as CPU
from tests.kernel.daemon import Daemon

pytestmark = pytest.mark.kernel

BUSY_S = 0.3
USER_HZ = 100


def spin() -> None:
    """User code, until killed."""
    while True:
        pass


def test_what_ran_before(daemon: Daemon) -> None:
    """The look-back of a stall names the tasks that ran before it, oldest first."""
    with Injector(CPU) as injector, Pressure(CPU, Mode.PING) as pressure:
        injector.inject(Kind.BH_OFF, 1, pressure=pressure)
        pid = system.fork_task("ran-before", CPU, spin)
        time.sleep(BUSY_S)
        system.end_task(pid)
        truth = injector.inject(Kind.BH_OFF, 60, pressure=pressure)
        lines = daemon.of(truth)
    assert lines[0]["lookback"] is None
    entries = lines[-1]["lookback"]
    ago = [entry["ago_ms"] for entry in entries]
    assert ago == sorted(ago, reverse=True)
    assert sum(entry["ticks"] for entry in entries) <= 64
    before = [entry for entry in entries if entry["pid"] == pid]
    assert {entry["comm"] for entry in before} == {"ran-before"}
    # It shares its CPU with the pinging process and whatever else is there.
    assert sum(entry["ticks"] for entry in before) >= 64 / 4
    assert any(entry["mode"] == "user" and not entry["stack"] for entry in before)


@pytest.fixture
def ticking() -> Iterator[Rings]:
    """The real programs, nobody reading their records; ``CPU`` busy, so that it ticks."""
    with ExitStack() as stack:
        probes = load_probes().result()
        stack.callback(probes.close)
        fds, places = probes.fds, probes.description.percpu
        maps = Maps(fds["map:cpus"], fds["map:config"], possible_cpus())
        kallsyms = Kallsyms.load()
        maps.watch(
            60 * 10**9,
            tick_ns=tick_ns(),
            lookback=1,
            tick_function=[kallsyms.address(name) for name in TICK_FUNCTIONS],
            **offsets(places),
        )
        pid = system.fork_task("ticking", CPU, spin)
        stack.callback(system.end_task, pid)
        time.sleep(10 * tick_ns() / 1e9)
        yield Rings(fds["map:rings"], fds["map:napis"], maps)


def newest(rings: Rings) -> TickSample:
    """The last tick of ``CPU``."""
    return rings.ticks(CPU)[-1]


def test_every_tick_is_kept(ticking: Rings) -> None:
    """A busy CPU's ring holds its last ticks, one after the other."""
    time.sleep(64 * tick_ns() / 1e9)
    ticks = ticking.ticks(CPU)
    assert len(ticks) == 64
    gaps = [b.time_ns - a.time_ns for a, b in pairwise(ticks)]
    assert sorted(gaps)[len(gaps) // 2] == pytest.approx(max(tick_ns(), 4e6), rel=0.1)


def softnet_row() -> Softnet:
    """What /proc says of ``CPU``."""
    text = Path("/proc/net/softnet_stat").read_text()
    return softnet.parse(text, lambda: sorted(system.online_cpus()))[CPU]


def test_softnet_counters(ticking: Rings) -> None:
    """Packets, squeezes, drops and the like are those of /proc/net/softnet_stat."""
    for _ in range(20):
        row = softnet_row()
        time.sleep(2 * tick_ns() / 1e9)
        tick = newest(ticking)
        again = softnet_row()
        assert tick.processed in range(row.processed, again.processed + 1)
        assert tick.squeezed in range(row.squeezed, again.squeezed + 1)
        assert tick.dropped in range(row.dropped, again.dropped + 1)
        assert tick.received_rps in range(row.received_rps or 0, (again.received_rps or 0) + 1)
        assert tick.flow_limit == row.flow_limited


def test_steal_clock(ticking: Rings) -> None:
    """The steal clock is the one that /proc/stat shows, to a tick."""

    def stolen_ns() -> int:
        row = next(r for r in Path("/proc/stat").read_text().splitlines() if r[:4] == f"cpu{CPU}")
        return int(row.split()[8]) * 10**9 // USER_HZ

    before = stolen_ns()
    time.sleep(2 * tick_ns() / 1e9)
    told = newest(ticking).steal_ns
    time.sleep(2 * tick_ns() / 1e9)
    # What /proc/stat shows is rounded down, and accounted at the next tick.
    assert before <= told + 10**9 // USER_HZ
    assert told <= stolen_ns() + 2 * 10**9 // USER_HZ
