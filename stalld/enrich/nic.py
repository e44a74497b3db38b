"""Which network queues each CPU serves: read at leisure, looked up when a stall asks.

An inventory is plain data, made whole and then exchanged: whoever looks something up neither waits
nor locks. What cannot be read is None, and counted with its reason.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from stalld.enrich import interrupts
from stalld.enrich.cpus import parse_list, parse_mask
from stalld.enrich.ethtool import Ethtool, Settings
from stalld.errors import reason_of

MAX_DEVICES = 4096
MAX_QUEUES = 16_384
"""Queues whose RPS masks are read; no host has so many, but for a fault."""
MAX_PER_CPU = 64
"""Queues of one CPU that are told; RPS may lead hundreds to each."""
_MAX_BYTES = 1 << 24
_SYSCTLS = ("netdev_budget", "netdev_budget_usecs", "netdev_max_backlog")


class Queue(NamedTuple):
    """A queue that a CPU serves: the device's interrupt comes there, or RPS sends there.

    ``number`` None: the interrupt's name does not tell.
    """

    device: str
    number: int | None
    irq: int | None
    rps: bool


class Device(NamedTuple):
    """A link, as far as its receiving side goes.

    ``irqs``: interrupt → CPUs that it comes to. ``rps``: queue → CPUs that its packets are sent
    to, those with any. ``hardware``: it has a driver.
    """

    name: str
    ifindex: int
    driver: str | None
    settings: Settings
    irqs: Mapping[int, frozenset[int]]
    rps: Mapping[int, frozenset[int]]

    @property
    def hardware(self) -> bool:
        """Whether a driver of some hardware, real or virtual, stands behind it."""
        return self.driver is not None


class Sysctls(NamedTuple):
    """Of /proc/sys/net/core; None: not there."""

    netdev_budget: int | None = None
    netdev_budget_usecs: int | None = None
    netdev_max_backlog: int | None = None


@dataclass(frozen=True)
class Inventory:
    """All links of our network namespace, by index, and what each CPU serves of them."""

    devices: Mapping[int, Device]
    queues: Mapping[int, tuple[Queue, ...]]
    sysctls: Sysctls
    by_name: Mapping[str, Device] = field(init=False, repr=False, compare=False)
    """The devices once more: a stall must not look through thousands of them."""

    def __post_init__(self) -> None:
        by_name = {device.name: device for device in self.devices.values()}
        object.__setattr__(self, "by_name", by_name)

    def named(self, name: str) -> Device | None:
        """The device of that name."""
        return self.by_name.get(name)


class Surveyor:
    """Makes inventories. Belongs to one thread at a time.

    Args:
        faults: reason → how often something could not be read.
    """

    def __init__(self, faults: Counter[str], proc: str = "/proc", sys: str = "/sys") -> None:
        self._faults = faults
        self._proc = Path(proc)
        self._net = Path(sys, "class/net")
        self._names: Mapping[int, tuple[str, ...]] = {}
        self._named: tuple[frozenset[int], frozenset[str]] | None = None
        self._hardware: frozenset[tuple[int, str]] = frozenset()

    def survey(self, links: list[tuple[int, str]] | None = None) -> Inventory:
        """Read everything anew.

        Args:
            links: index and name of each; None: ask the kernel.
        """
        links = socket.if_nameindex() if links is None else links
        if len(links) > MAX_DEVICES:
            self._faults[f"more than {MAX_DEVICES} links"] += 1
        found: dict[int, Device] = {}
        drivers = {name: self._driver(name) for _, name in links[:MAX_DEVICES]}
        numbers = {name: self._interrupts_of(name) for name, driver in drivers.items() if driver}
        hardware = frozenset((index, name) for index, name in links if drivers.get(name))
        if hardware != self._hardware:
            # An interrupt's number may be another's now.
            self._hardware, self._named = hardware, None
        self._read_names(
            frozenset(irq for irqs in numbers.values() for irq in irqs),
            frozenset(name for name, irqs in numbers.items() if not irqs),
        )
        # On some buses only the interrupt's name tells.
        numbers |= {
            name: self._interrupts_by_name(name) for name, irqs in numbers.items() if not irqs
        }
        shared = Counter(irq for irqs in numbers.values() for irq in irqs)
        room = [MAX_QUEUES]
        for index, name in links[:MAX_DEVICES]:
            affinities = {
                irq: self._affinity(irq)
                for irq in numbers.get(name, ())
                if self._vector(irq, name, shared[irq] > 1) is not None
            }
            driver = drivers[name]
            found[index] = Device(
                name=name,
                ifindex=index,
                driver=driver,
                settings=self._settings(name) if driver is not None else Settings(),
                irqs=affinities,
                rps=dict(self._rps(name, room)),
            )
        return Inventory(found, self._by_cpu(found, shared), self._sysctls())

    def _by_cpu(
        self, devices: Mapping[int, Device], shared: Counter[int]
    ) -> dict[int, tuple[Queue, ...]]:
        found: dict[int, list[Queue]] = {}
        for device in devices.values():
            for irq, cpus in device.irqs.items():
                vector = self._vector(irq, device.name, shared[irq] > 1)
                queue = Queue(device.name, vector.queue if vector else None, irq, False)
                if queue.number is None and len(device.irqs) == 1:
                    queue = queue._replace(number=0)
                for cpu in cpus:
                    found.setdefault(cpu, []).append(queue)
            for number, cpus in device.rps.items():
                for cpu in cpus:
                    found.setdefault(cpu, []).append(Queue(device.name, number, None, True))
        if any(len(queues) > MAX_PER_CPU for queues in found.values()):
            self._faults[f"a CPU serves more than {MAX_PER_CPU} queues"] += 1
        return {cpu: tuple(queues[:MAX_PER_CPU]) for cpu, queues in found.items()}

    def _vector(self, irq: int, device: str, shared: bool) -> interrupts.Vector | None:
        """What an interrupt of the device's hardware brings it; None: no received packets."""
        names = self._names.get(irq, ())
        if shared:
            # Several links of one function: whom it names, else any.
            own = [name for name in names if interrupts.names_device(name, device)]
            others = [n for n in names if n not in own and "@" not in n and "-" in n]
            names = tuple(own) if own or others else names
        told = [interrupts.vector(name, device) for name in names]
        known = [vector for vector in told if vector is not None]
        return max(known, key=lambda vector: vector.queue is not None, default=None)

    def _interrupts_of(self, device: str) -> tuple[int, ...]:
        """Of its hardware: of the device itself, or, for virtio, of what carries it."""
        place = self._net / device / "device"
        if _basename(place / "subsystem") == "virtio":
            place = place / ".."
        try:
            return tuple(sorted(int(name) for name in os.listdir(place / "msi_irqs")))
        except (OSError, ValueError):
            pass
        try:
            line = int((place / "irq").read_text())
        except (OSError, ValueError):
            return ()
        return (line,) if line > 0 else ()

    def _interrupts_by_name(self, device: str) -> tuple[int, ...]:
        return tuple(
            irq
            for irq, names in self._names.items()
            if any(interrupts.names_device(name, device) for name in names)
        )

    def _read_names(self, irqs: frozenset[int], devices: frozenset[str]) -> None:
        # The table has a column for each CPU: megabytes on large machines, and names stay.
        if self._named == (irqs, devices):
            return
        self._named = irqs, devices
        self._names = {}
        if not irqs and not devices:
            return
        try:
            with (self._proc / "interrupts").open("rb") as file:
                text = file.read(_MAX_BYTES).decode("utf-8", "replace")
        except OSError as error:
            self._count("/proc/interrupts", error)
            return
        self._names = {
            irq: names
            for irq, names in interrupts.parse(text).items()
            if irq in irqs
            or any(interrupts.names_device(name, device) for name in names for device in devices)
        }

    def _affinity(self, irq: int) -> frozenset[int]:
        directory = self._proc / "irq" / str(irq)
        fault: Exception | None = None
        # Architectures without the first one tell only where it may come.
        for name in ("effective_affinity_list", "smp_affinity_list"):
            try:
                cpus = parse_list((directory / name).read_text())
            except (OSError, ValueError) as error:
                fault = error
                continue
            if cpus:
                return cpus
        if fault is not None:
            self._count("an interrupt's affinity", fault)
        return frozenset()

    def _rps(self, device: str, room: list[int]) -> Iterator[tuple[int, frozenset[int]]]:
        directory = self._net / device / "queues"
        try:
            names = [name for name in os.listdir(directory) if name.startswith("rx-")]
        except OSError:
            return  # It went, or has none.
        for name in sorted(names, key=lambda name: (len(name), name)):
            if not room[0]:
                self._faults[f"more than {MAX_QUEUES} queues"] += 1
                return
            room[0] -= 1
            try:
                cpus = parse_mask((directory / name / "rps_cpus").read_text())
                number = int(name.removeprefix("rx-"))
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                self._count("an RPS mask", error)
                continue
            if cpus:
                yield number, cpus

    def _driver(self, device: str) -> str | None:
        return _basename(self._net / device / "device" / "driver")

    def _settings(self, device: str) -> Settings:
        try:
            with Ethtool() as ethtool:
                return ethtool.settings(device)
        except OSError as error:
            self._count("ethtool", error)
            return Settings()

    def _sysctls(self) -> Sysctls:
        return Sysctls(*map(self._sysctl, _SYSCTLS))

    def _sysctl(self, name: str) -> int | None:
        try:
            return int((self._proc / "sys/net/core" / name).read_text())
        except (OSError, ValueError):
            # Of the first network namespace only, some of them.
            return None

    def _count(self, what: str, error: Exception) -> None:
        self._faults[f"{what}: {reason_of(error)}"] += 1


def _basename(link: Path) -> str | None:
    """The last part of what a symbolic link points to."""
    try:
        return os.path.basename(os.readlink(link))
    except OSError:
        return None
