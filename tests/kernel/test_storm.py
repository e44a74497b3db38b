"""Storms: no stall is lost, and none floods the log."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.injector import Injector, Kind, Mode, Pressure
from tests.kernel.daemon import STALLED_CPU as CPU
from tests.kernel.daemon import Daemon

pytestmark = pytest.mark.kernel

STALLS = 40
SHOWN = 5
"""Of identical stalls in a minute; the default of storm.identical_per_minute."""


@pytest.fixture
def config(tmp_path: Path) -> str:
    """The default limits, and no socket outside of the test."""
    path = tmp_path / "config.toml"
    path.write_text("live.enabled = false\n")
    return str(path)


def test_identical_stalls_are_folded(config: str) -> None:
    """After the first few, identical stalls become one line with their number and time."""
    with Daemon("--threshold-ms", "10", "--config", config) as daemon:
        with Injector(CPU) as injector, Pressure(CPU, Mode.PING) as pressure:
            truths = []
            for _ in range(STALLS):
                truths.append(injector.inject(Kind.BH_OFF, 30, pressure=pressure))
                time.sleep(0.04)
            tid = truths[0].tid
        time.sleep(0.3)
    shown = [e for e in daemon.stalls("resolved") if (e["blocker"] or {}).get("tid") == tid]
    folded = [e for e in daemon.events if e["event"] == "suppressed" and e["reason"] == "identical"]
    ours = [e for e in folded if e["blocker"]["pid"] == truths[0].pid]
    assert len(shown) >= SHOWN
    # One function, a few depths of it: each stack has its own first few.
    assert len(shown) <= STALLS / 2, [e["stack"]["kernel"][0] for e in shown]
    assert len(shown) + sum(e["count"] for e in ours) == STALLS
    total_ms = sum(e["duration_ms"] for e in shown) + sum(e["total_ms"] for e in ours)
    assert total_ms == pytest.approx(sum(t.duration_ms for t in truths), rel=0.1)
    ids = {e["stall_id"] for e in daemon.stalls()}
    for event in ours:
        assert event["cpus"] == [CPU]
        assert event["verdict"] == "softirqs_disabled"
        assert event["longest_ms"] >= 25
        assert event["like"] in ids
    stopped = daemon.events[-1]
    assert stopped["stalls"] == len(daemon.stalls("resolved")) + sum(e["count"] for e in folded)
    assert stopped["suppressed"] == sum(
        e["count"] for e in daemon.events if e["event"] == "suppressed"
    )


def test_the_kernel_limits_what_it_sends(config: str) -> None:
    """Beyond the limit of a second stalls are counted in the kernel, and told in time."""
    with Daemon("--threshold-ms", "5", "--config", config) as daemon:
        with Injector(CPU) as injector, Pressure(CPU, Mode.PING) as pressure:
            truths = [injector.inject(Kind.BH_OFF, 14, pressure=pressure) for _ in range(120)]
        told = daemon.wait_for(
            lambda e: e["event"] == "suppressed" and e["reason"] == "rate", timeout_s=3
        )
        assert told["cpus"] == [CPU]
        assert told["level"] == "warning"
        # One that is serious is told whatever the limit.
        with Injector(CPU) as injector, Pressure(CPU, Mode.PING) as pressure:
            for _ in range(25):
                injector.inject(Kind.BH_OFF, 14, pressure=pressure)
            long = injector.inject(Kind.BH_OFF, 120, pressure=pressure)
            serious = daemon.of(long)[-1]
    assert serious["level"] == "error"
    suppressed = [e for e in daemon.events if e["event"] == "suppressed"]
    counted = sum(e["count"] for e in suppressed if e["reason"] == "rate")
    sent = daemon.events[-1]["stalls"]
    assert counted > 0
    assert counted + sent >= len(truths) + 26
    seconds = (truths[-1].end_ns - truths[0].start_ns) / 1e9
    assert sent <= 20 * (seconds + 4)
    assert daemon.events[-1]["records_lost"] == 0
