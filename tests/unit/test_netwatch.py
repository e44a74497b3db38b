"""Looks at CPUs and devices: what is told, when, and what happens when nothing can be read."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stalld import events, netwatch
from stalld.config import Config, Nic, Softnet
from stalld.enrich import netlink, softnet
from stalld.enrich.driver_stats import DriverStats, Lost
from stalld.enrich.ethtool import Settings
from stalld.enrich.netlink import LinkStats
from stalld.enrich.nic import Device, Inventory, Queue, Surveyor, Sysctls
from stalld.netwatch import NetWatch

S = 10**9
ROW = "{:08x} {:08x} {:08x} 0 0 0 0 0 0 00000000 00000000 00000000 {:08x}\n"
ETH = Device("nicA0", 2, "ixgbe", Settings(512, 4096), {77: frozenset({1})}, {})
VETH = Device("veth0", 3, None, Settings(), {}, {0: frozenset({1})})
INVENTORY = Inventory(
    {2: ETH, 3: VETH},
    {1: (Queue("nicA0", 0, 77, False), Queue("veth0", 0, None, True))},
    Sysctls(300, 8000, 1000),
)
QUIET = LinkStats(0, 0, 0, 0, 0, 0)


class Machine:
    """What the kernel says; ``told`` is what was said of it."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self.stats = {2: QUIET, 3: QUIET}
        self.lost: dict[Lost, int] = {}
        self.surveys = 0
        self.inventory: Callable[[], Inventory] = lambda: INVENTORY
        self.now_ns = 1000 * S
        self.told: list[tuple[str, str, events.Event]] = []
        self.row(0, 0, 0)
        monkeypatch.setattr(softnet, "PATH", str(path))
        monkeypatch.setattr(netwatch, "online_cpus", lambda: [1])
        monkeypatch.setattr(netlink, "link_stats", lambda _: self.stats)
        monkeypatch.setattr(Surveyor, "survey", lambda _: self._survey())
        monkeypatch.setattr(DriverStats, "read", self._read)
        self.watch = NetWatch(Config(), self.emit, lambda: (self.now_ns, self.now_ns))

    def emit(self, event: str, level: str, fields: events.Event) -> None:
        """Keep what is emitted."""
        self.told.append((event, level, fields))

    def _survey(self) -> Inventory:
        self.surveys += 1
        return self.inventory()

    def _read(self, driver: DriverStats | None = None, _: Any = None) -> dict[Lost, int]:
        if driver is not None:
            driver.lost = tuple(self.lost)
        return self.lost

    def row(self, packets: int, dropped: int, squeezed: int) -> None:
        """What softnet_stat says of CPU 1."""
        self.path.write_text(ROW.format(packets, dropped, squeezed, 1))

    def look(self, survey: bool = False) -> list[tuple[str, str, events.Event]]:
        """Ten seconds later."""
        self.now_ns += 10 * S
        return self.watch._look(survey, True)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Quiet, looked at for the first time."""
    made = Machine(tmp_path / "softnet_stat", monkeypatch)
    # Without the class, a method gets no instance.
    monkeypatch.setattr(DriverStats, "read", lambda driver, ethtool: made._read(driver, ethtool))
    assert made.look(survey=True) == []
    yield made
    made.watch.close()


def test_quiet(machine: Machine) -> None:
    """Nothing is told of counters that grow slowly."""
    machine.row(10**6, 9, 900)
    machine.stats = {2: QUIET._replace(packets=10**6, dropped=90), 3: QUIET}
    assert machine.look() == []


def test_a_cpu_drops(machine: Machine) -> None:
    """What, how fast, whose packets they were, what to do; then that it is over."""
    machine.row(500, 100, 3)
    ((event, level, fields),) = machine.look()
    assert (event, level, fields["phase"], fields["cpu"]) == ("softnet", "warning", "begun", 1)
    assert (fields["packets"], fields["dropped"], fields["time_squeeze"]) == (500, 100, 3)
    assert (fields["dropped_per_s"], fields["time_squeeze_per_s"]) == (10.0, 0.3)
    assert [queue["device"] for queue in fields["queues"]] == ["nicA0", "veth0"]
    assert "netdev_max_backlog (now 1000, try 2000)" in fields["hint"]
    assert (fields["since"], fields["until"]) == (
        events.rfc3339(1010 * S),
        events.rfc3339(1020 * S),
    )
    ((_, level, fields),) = machine.look()
    assert (level, fields["phase"], fields["dropped"]) == ("info", "ended", 100)
    assert machine.look() == []


def test_a_cpu_is_squeezed(machine: Machine) -> None:
    """Nothing is lost by that: it is no warning."""
    machine.row(500, 0, 5000)
    ((_, level, fields),) = machine.look()
    assert level == "info"
    assert "net.core.netdev_budget (now 300, try 600)" in fields["hint"]


def test_a_device_drops(machine: Machine) -> None:
    """What the kernel and the device say, which of its queues, its ring."""
    machine.lost = {Lost("rx5_discards", 5, 0): 0, Lost("rx_out_of_buffer", None, 1): 0}
    machine.look()
    machine.stats = {2: LinkStats(900, 10, 600, 0, 20, 1), 3: QUIET}
    machine.lost = {Lost("rx5_discards", 5, 0): 590, Lost("rx_out_of_buffer", None, 1): 0}
    ((event, level, fields),) = machine.look()
    assert (event, level, fields["device"], fields["driver"]) == (
        "nic",
        "warning",
        "nicA0",
        "ixgbe",
    )
    assert (fields["drops"], fields["missed"], fields["dropped"]) == (630, 600, 10)
    assert fields["queues"] == [{"queue": 5, "drops": 590, "counter": "rx5_discards"}]
    assert (fields["ring"], fields["ring_max"], fields["cpus"]) == (512, 4096, [1])
    assert "ethtool -G nicA0 rx 2048" in fields["hint"]


def test_only_a_queue_drops(machine: Machine) -> None:
    """Some drivers count in their queues what the link's statistics do not have."""
    machine.lost = {Lost("rx5_discards", 5, 0): 0}
    machine.look()
    machine.lost = {Lost("rx5_discards", 5, 0): 500}
    ((_, _, fields),) = machine.look()
    assert (fields["drops"], fields["drops_per_s"]) == (0, 50.0)


def test_a_device_that_is_gone(machine: Machine) -> None:
    """It is forgotten; another one with its number begins anew."""
    machine.inventory = lambda: replace(INVENTORY, devices={2: ETH})
    machine.look(survey=True)
    machine.stats = {2: QUIET}
    assert machine.look() == []
    machine.inventory = lambda: replace(INVENTORY, devices={2: ETH, 3: VETH._replace(name="v")})
    machine.stats = {2: QUIET, 3: QUIET._replace(dropped=10**6)}
    assert machine.look(survey=True) == []


def test_nothing_can_be_read(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """No event, no end of the daemon: a reason with a count."""
    machine.watch.close()
    machine.path.unlink()

    def refuse(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(netlink, "link_stats", refuse)
    assert machine.look() == []
    assert machine.watch.faults == {
        "softnet_stat: No such file or directory": 1,
        "link statistics: Permission denied": 1,
    }
    machine.inventory = refuse
    assert machine.look(survey=True) == []
    assert machine.watch.inventory is None
    assert machine.watch.faults["links: Permission denied"] == 1
    assert machine.watch.lookup() is None
    assert machine.watch.faults["queues of a stall: no inventory"] == 1


def test_a_driver_that_is_busy(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its queues go on to drop is not told as over; the next look has all of it."""
    lost = Lost("rx5_discards", 5, 0)
    machine.lost = {lost: 0}
    machine.look()
    machine.lost = {lost: 500}
    ((_, _, begun),) = machine.look()
    machine.lost = {lost: 1000}
    with monkeypatch.context() as patched:
        patched.setattr(DriverStats, "read", lambda *_: _raise(BlockingIOError(11, "not now")))
        assert machine.look() == []
    machine.lost = {lost: 1500}
    ((_, _, more),) = machine.look()
    assert (begun["phase"], more["phase"]) == ("begun", "ongoing")
    assert more["queues"] == [begun["queues"][0] | {"drops": 1500}]


def _raise(error: Exception) -> Any:
    raise error


def test_a_driver_that_refuses(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The link's own statistics are told all the same."""

    def refuse(*_: Any) -> Any:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(DriverStats, "read", refuse)
    machine.stats = {2: QUIET._replace(missed=5000), 3: QUIET}
    ((_, _, fields),) = machine.look()
    assert (fields["missed"], fields["queues"]) == (5000, [])
    assert machine.watch.faults == {"a driver's counters: Operation not supported": 1}


_AUDITED: list[list[str]] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _AUDITED and event in ("open", "socket.__new__", "os.listdir", "os.scandir"):
        _AUDITED[-1].append(f"{event} {arguments[0]}")


# Python knows no way to remove it.
sys.addaudithook(_audit)


@contextmanager
def audited() -> Iterator[list[str]]:
    """What is opened meanwhile."""
    _AUDITED.append([])
    try:
        yield _AUDITED[-1]
    finally:
        _AUDITED.pop()


def test_audited() -> None:
    """Files, directories and sockets are noticed."""
    with audited() as seen, open(os.devnull), socket.socket():
        os.listdir("/")
    assert [each.split()[0] for each in seen] == ["open", "socket.__new__", "os.listdir"]


def test_looks_open_nothing_anew() -> None:
    """To close a socket or a file of /proc keeps a CPU's tick going: each is opened once."""
    watch = NetWatch(Config(), _raise_event, lambda: (0, 0))

    def opened() -> dict[str, str]:
        found = {}
        for fd in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):
                found[fd] = os.readlink(f"/proc/self/fd/{fd}")
        return found

    before = opened()
    watch._look(True, True)
    after_one = opened()
    with audited() as seen:
        watch._look(False, True)
    # Not for a moment either.
    assert seen == []
    assert opened() == after_one
    assert softnet.PATH.rpartition("/")[2] in " ".join(after_one.values())
    assert watch.faults == {}
    watch.close()
    assert opened() == before


def _raise_event(event: str, level: str, fields: events.Event) -> None:
    raise AssertionError(event, level, fields)


def test_switched_off(machine: Machine) -> None:
    """Then nothing is read, but the inventory for stalls."""
    config = Config(softnet=Softnet(enabled=False), nic=Nic(enabled=False))
    machine.watch.apply(config)
    machine.row(0, 10**6, 0)
    assert machine.look(survey=True) == []
    assert machine.watch._poll_due_s() == float("inf")


def test_other_limits(machine: Machine) -> None:
    """They hold from the next look on."""
    machine.watch.apply(Config(softnet=replace(Softnet(), drops_per_s=1000.0)))
    machine.row(0, 500, 0)
    assert machine.look() == []
    machine.watch.apply(Config())
    machine.row(0, 1000, 0)
    assert len(machine.look()) == 1


def test_it_goes_on_and_on(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A survey, a look each interval; news of links bring another survey, but not too often."""
    monkeypatch.setattr(netwatch, "SETTLE_S", 0.01)
    monkeypatch.setattr(netwatch, "SURVEY_GAP_S", 0.05)
    fast = Config(softnet=replace(Softnet(), interval_s=0.02))
    machine.surveys = 0

    async def whole() -> None:
        watch = NetWatch(fast, machine.emit, lambda: (machine.now_ns, machine.now_ns))
        task = asyncio.create_task(watch.run())
        await asyncio.sleep(0.1)
        assert machine.surveys == 1
        machine.now_ns += 10 * S
        machine.row(0, 1000, 0)
        await asyncio.sleep(0.1)
        assert [event for event, _, _ in machine.told] == ["softnet"]
        watch._links_changed = True
        watch._wanted.set()
        await asyncio.sleep(0.2)
        assert machine.surveys == 2
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(whole())
