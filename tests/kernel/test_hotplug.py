"""A CPU that is taken offline and comes back is watched again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.injector import Injector, Kind, Mode, Pressure
from tests.kernel.daemon import STALLED_CPU as CPU
from tests.kernel.daemon import Daemon

pytestmark = pytest.mark.kernel

ONLINE = Path(f"/sys/devices/system/cpu/cpu{CPU}/online")
SETTLED_S = 2.0

SetOnline = Callable[[bool], None]


@pytest.fixture
def set_online() -> Iterator[SetOnline]:
    """Takes ``CPU`` down and up; it is up at the end, whatever happens."""
    if not ONLINE.exists():
        pytest.skip(f"CPU {CPU} cannot be taken offline: CONFIG_HOTPLUG_CPU or the firmware lacks")

    def switch(on: bool) -> None:
        ONLINE.write_text("1" if on else "0")

    try:
        yield switch
    finally:
        if ONLINE.read_text().strip() != "1":
            switch(True)


def check_stalls(daemon: Daemon) -> None:
    """Stalls of ``CPU`` are seen while they last, and blamed."""
    with Injector(CPU) as injector, Pressure(CPU, Mode.PING) as pressure:
        for _ in range(3):
            truth = injector.inject(Kind.BH_OFF, 60, pressure=pressure)
            lines = daemon.of(truth)
            assert lines[0]["phase"] == "ongoing"
            assert lines[-1]["verdict"] == "softirqs_disabled"
            assert lines[-1]["blocker"]["tid"] == truth.tid
            assert lines[-1]["evidence"]["ended"] == "record"
            time.sleep(0.05)


def explained(event: dict[str, Any]) -> bool:
    """Whether a stall accuses nobody, or somebody who really had a CPU.

    While one CPU is away all work is on the others, this machine's other work too; and the
    kernel itself stops all of them with interrupts off until the slowest has come
    (multi_cpu_stop()), and has them off while it wakes the one that comes (native_kick_ap()),
    which a hypervisor may take its time for.
    """
    if event["verdict"] == "irqs_disabled":
        comm = event["blocker"]["comm"] if event["blocker"] else ""
        kicks = any("kick_ap+" in frame for frame in event["stack"]["kernel"])
        return comm.startswith("migration/") or kicks
    crowded = event["verdict"] == "cpu_contention" and event["cpu"] != CPU
    return crowded or event["verdict"] in ("unknown", "vcpu_preempted")


def test_off_and_on(set_online: SetOnline) -> None:
    """Stalls are seen before and after, and taking the CPU down and up is none."""
    with Daemon() as daemon:
        check_stalls(daemon)
        for _ in range(2):
            seen = len(daemon.stalls())
            set_online(False)
            time.sleep(0.3)
            set_online(True)
            time.sleep(SETTLED_S)
            hotplug = daemon.stalls()[seen:]
            accused = [e for e in hotplug if not explained(e)]
            assert accused == [], json.dumps(accused)
            check_stalls(daemon)
        assert daemon.started["kthreads"] >= 2
    assert daemon.events[-1]["event"] == "stopped"
    assert daemon.events[-1]["records_lost"] == 0


def test_off_and_on_twice_in_a_second(set_online: SetOnline) -> None:
    """The second time is noticed as soon as the first one, whose looks go on."""
    with Daemon() as daemon:
        for _ in range(2):
            set_online(False)
            time.sleep(0.3)
            set_online(True)
            time.sleep(0.4)
        check_stalls(daemon)
    assert daemon.events[-1]["records_lost"] == 0


def test_online_after_start(set_online: SetOnline) -> None:
    """A CPU that was offline when the daemon started is watched once it is there."""
    set_online(False)
    with Daemon() as daemon:
        set_online(True)
        time.sleep(SETTLED_S)
        check_stalls(daemon)
    assert daemon.events[-1]["records_lost"] == 0
