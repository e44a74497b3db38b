"""Which queues a stalled CPU serves, and what CPUs and devices drop, on a veth pair of our own."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from stalld.enrich import netlink, softnet
from stalld.enrich.netlink import LinkStats
from stalld.enrich.softnet import Softnet
from tests.injector import Injector, Kind, Mode, Pressure, system
from tests.kernel.daemon import STALLED_CPU as CPU
from tests.kernel.daemon import Daemon, Event, monotonic_ns

pytestmark = pytest.mark.kernel

BACKLOG = Path("/proc/sys/net/core/netdev_max_backlog")
SMALL_BACKLOG = 16
ATTEMPTS = 8
MARGIN_NS = 20_000_000
CONFIG = """\
[storm]
stalls_per_second = 1000
identical_per_minute = 10000
[softnet]
interval_s = 1
drops_per_s = 0
squeezes_per_s = 1000000
[nic]
drops_per_s = 0
[live]
enabled = false
"""


@pytest.fixture
def watching(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon that looks at CPUs and devices each second and tells of every drop."""
    config = tmp_path / "config.toml"
    config.write_text(CONFIG)
    with Daemon("--config", str(config)) as running:
        yield running


@contextmanager
def small_backlog() -> Iterator[None]:
    """A CPU's queue that holds few packets, for as long as this lasts."""
    before = BACKLOG.read_text()
    BACKLOG.write_text(str(SMALL_BACKLOG))
    try:
        yield
    finally:
        BACKLOG.write_text(before)


def rows() -> dict[int, Softnet]:
    """/proc/net/softnet_stat."""
    return softnet.parse(Path(softnet.PATH).read_text(), lambda: sorted(system.online_cpus()))


def link_of(interface: str) -> LinkStats:
    """The kernel's statistics of a device."""
    index = int(Path(f"/sys/class/net/{interface}/ifindex").read_text())
    with netlink.route_socket() as sock:
        return netlink.link_stats(sock)[index]


def eventually(holds: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Wait until it does."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def flood(pressure: Pressure, seconds: float) -> None:
    """Send more than the backlog takes."""
    with pressure.active():
        time.sleep(seconds)
    # What is queued yet is received.
    eventually(lambda: rows()[CPU].backlog in (0, None))


def episode(daemon: Daemon, event: str, since_ns: int, **wanted: Any) -> list[Event]:
    """The events of one source from begun to ended."""

    def ours(e: Event) -> bool:
        return (
            e["event"] == event
            and all(e[key] == value for key, value in wanted.items())
            and monotonic_ns(e["until"]) > since_ns
        )

    daemon.wait_for(lambda e: ours(e) and e["phase"] == "ended", 10.0)
    return [e for e in daemon.events if ours(e)]


def test_queues_of_a_stall(watching: Daemon) -> None:
    """RPS leads a device's packets to one CPU: a stall of it names device and queue."""
    with Injector(CPU) as injector, Pressure(CPU, Mode.PING) as pressure:
        injector.prepare(Kind.BH_OFF)

        def served() -> list[Event]:
            truth = injector.inject(Kind.BH_OFF, 30, pressure=pressure)
            queues: list[Event] = watching.of(truth)[-1]["net"]["queues"]
            return [queue for queue in queues if queue["device"] == pressure.interface]

        # The link's news are followed within some tenths of a second.
        eventually(lambda: bool(served()), 10.0)
        (queue,) = served()
    assert (queue["queue"], queue["irq"], queue["rps"]) == (0, None, True)
    assert (queue["ring"], queue["ring_max"]) == (None, None)


def test_it_says_at_once_what_it_knows(watching: Daemon) -> None:
    """Also the first line of a stall has its CPU's queues, from memory."""
    with Injector(CPU) as injector, Pressure(CPU, Mode.PING) as pressure:
        injector.prepare(Kind.BH_OFF)
        time.sleep(3)
        interface = pressure.interface
        first = watching.of(injector.inject(Kind.BH_OFF, 60, pressure=pressure))[0]
    assert first["phase"] == "ongoing"
    assert interface in [queue["device"] for queue in first["net"]["queues"]]


def test_drops_of_a_cpu(watching: Daemon) -> None:
    """A flood that overflows the backlog: the counts are those of softnet_stat, to the packet."""
    with Pressure(CPU, Mode.FLOOD, competitor=False) as pressure:
        interface = pressure.interface
        time.sleep(1.2)
        before, begun_ns = rows()[CPU], time.monotonic_ns()
        with small_backlog():
            flood(pressure, 2.5)
        after = rows()[CPU]
        told = episode(watching, "softnet", begun_ns, cpu=CPU)
    assert [e["phase"] for e in told] == ["begun", *["ongoing"] * (len(told) - 2), "ended"]
    assert len(told) >= 3
    last = told[-1]
    dropped = (after.dropped - before.dropped) % (1 << 32)
    assert dropped > 0
    assert last["dropped"] == dropped
    assert told[0]["level"] == "warning"
    assert [e["dropped"] for e in told] == sorted(e["dropped"] for e in told)
    assert last["packets"] >= (after.processed - before.processed) % (1 << 32)
    assert last["received_rps"] is not None
    # At most one an interval.
    moments = [monotonic_ns(e["timestamp"]) for e in told]
    assert all(b - a > 0.8e9 for a, b in pairwise(moments))
    assert "net.core.netdev_max_backlog" in told[0]["hint"]
    assert [q["device"] for q in told[0]["queues"] if q["rps"]] == [interface]


def test_quiet_again(watching: Daemon) -> None:
    """Nothing is told of what does not drop. (A host's own NIC may: strange protocols.)"""
    time.sleep(3.5)
    told = [e for e in watching.events if e["event"] in ("softnet", "nic")]
    assert [e for e in told if e.get("driver") is None] == []


def test_drops_of_a_device(watching: Daemon) -> None:
    """The packets that a flood loses are the device's too: exact again."""
    with Pressure(CPU, Mode.FLOOD, competitor=False) as pressure:
        # It has to be known before: the first look at a device tells nothing.
        time.sleep(4)
        before, begun_ns = link_of(pressure.interface), time.monotonic_ns()
        with small_backlog():
            flood(pressure, 1.5)
        after = link_of(pressure.interface)
        told = episode(watching, "nic", begun_ns, device=pressure.interface)
    last = told[-1]
    assert last["dropped"] == last["drops"] == after.dropped - before.dropped > 0
    assert last["packets"] == after.packets - before.packets
    assert (last["driver"], last["ring"], last["queues"]) == (None, None, [])
    assert last["cpus"] == [CPU]
    assert "the kernel dropped" in told[0]["hint"]


def test_drops_in_a_stall(watching: Daemon) -> None:
    """A flood in the middle of a stall: what it says was dropped is softnet_stat's difference."""
    with Injector(CPU) as injector, Pressure(CPU, Mode.FLOOD, competitor=False) as pressure:
        injector.prepare(Kind.BH_OFF)
        flooded: list[int] = []

        def flood_meanwhile() -> None:
            time.sleep(0.06)
            flooded.append(time.monotonic_ns())
            with pressure.active():
                time.sleep(0.03)
            flooded.append(time.monotonic_ns())

        with small_backlog():
            for _ in range(ATTEMPTS):
                flooded.clear()
                before = rows()[CPU]
                sender = threading.Thread(target=flood_meanwhile)
                sender.start()
                truth = injector.inject(Kind.BH_OFF, 400)
                sender.join()
                eventually(lambda: rows()[CPU].backlog in (0, None))
                after = rows()[CPU]
                # On a busy machine the flood may come late: then it is not the stall's alone.
                if truth.start_ns < flooded[0] and flooded[1] < truth.end_ns - MARGIN_NS:
                    break
            else:
                pytest.fail("no flood fell into its stall: this machine is too busy")
        lines = watching.of(truth)
    net = lines[-1]["net"]
    assert net["dropped"] == (after.dropped - before.dropped) % (1 << 32) > 0
    assert net["flow_limit"] == 0
    assert "net.core.netdev_max_backlog" in lines[-1]["hint"]
    # While it lasted the backlog was as full as it may be.
    assert max(line["net"]["backlog"] for line in lines) > SMALL_BACKLOG / 2


def test_nothing_is_left() -> None:
    """The sysctl is as before, and no link of ours is there."""
    assert int(BACKLOG.read_text()) > SMALL_BACKLOG
    links = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True)
    assert not re.findall(r"^inj\d+", links.stdout, re.MULTILINE)
