"""Records at will: each that the perf buffer takes becomes one line, each other one is counted."""

from __future__ import annotations

import mmap
import os
import signal
import time

import pytest

from stalld.decode import HEAD
from stalld.reader import PAGES_PER_CPU
from tests.injector import InjectorError
from tests.injector.records import RecordSource, Sent
from tests.kernel.daemon import STALLED_CPU as CPU
from tests.kernel.daemon import Daemon, Event

pytestmark = pytest.mark.kernel

FEW = 50
"""That certainly fit into the perf buffer at once, and so do twice as many."""
OVERFLOW = 2 * PAGES_PER_CPU * mmap.PAGESIZE // HEAD.size
"""More than twice as many as fit."""


def synthetic(daemon: Daemon) -> list[Event]:
    """The lines that are ours."""
    return [e for e in daemon.stalls() if e["blocker"] and e["blocker"]["comm"] == "synthetic"]


def wait_for(daemon: Daemon, count: int, timeout_s: float = 10.0) -> None:
    """Wait until that many lines are there; whether they are stands in what follows."""
    deadline = time.monotonic() + timeout_s
    while len(synthetic(daemon)) < count and time.monotonic() < deadline:
        time.sleep(0.02)


def check(lines: list[Event], count: int) -> None:
    """One resolved line for each of ``count`` records, each of a stall and a task of its own."""
    assert len(lines) == count
    assert {e["phase"] for e in lines} == {"resolved"}
    assert {e["evidence"]["ended"] for e in lines} == {"record"}
    assert {e["cpu"] for e in lines} == {CPU}
    assert {(*e["starved"].items(),) for e in lines} == {(("NET_RX", 20.0),)}
    assert len({e["stall_id"] for e in lines}) == count
    assert len({e["blocker"]["tid"] for e in lines}) == count


def test_each_record_is_one_line(daemon: Daemon) -> None:
    """Of 200 records come 200 lines and no more, told as what a task let through at last."""
    with RecordSource(daemon.pid, CPU) as source:
        # Each time no more than fit: a line takes the test longer than the daemon.
        for so_far in (FEW, 2 * FEW):
            assert source.send(FEW) == Sent(FEW, 0)
            wait_for(daemon, so_far)
        assert source.flow(per_second=200, seconds=0.5, burst=10) == Sent(2 * FEW, 0)
        wait_for(daemon, 4 * FEW)
    assert daemon.stop() == 0
    lines = synthetic(daemon)
    check(lines, 4 * FEW)
    assert {e["verdict"] for e in lines} == {"softirqs_disabled"}
    assert {e["stack"]["kernel"][0].partition("+0x")[0] for e in lines} == {"__dev_queue_xmit"}
    assert daemon.events[-1]["records_lost"] == 0


def test_overflow_is_exact(daemon: Daemon) -> None:
    """What a stopped daemon's buffer has no room for is lost and told, all else is written."""
    with RecordSource(daemon.pid, CPU) as source:
        os.kill(daemon.pid, signal.SIGSTOP)
        try:
            sent, lost = source.send(OVERFLOW)
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
        assert sent + lost == OVERFLOW
        assert sent > FEW
        assert lost > 0
        wait_for(daemon, sent)
        # After it all is as before.
        assert source.send(FEW) == Sent(FEW, 0)
        wait_for(daemon, sent + FEW)
    assert daemon.stop() == 0
    check(synthetic(daemon), sent + FEW)
    assert daemon.events[-1]["records_lost"] == lost


def test_not_a_daemon() -> None:
    """A process without the daemon's maps is refused, by name of the map."""
    with pytest.raises(InjectorError, match=r"no BPF map events"), RecordSource(os.getpid(), CPU):
        pass
