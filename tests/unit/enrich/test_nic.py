"""Inventories of machines made of files, and what happens where files are missing."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from stalld.enrich import nic
from stalld.enrich.ethtool import Settings, settings_of
from stalld.enrich.nic import Queue, Surveyor, Sysctls

IXGBE = """\
            CPU0       CPU1       CPU2       CPU3
  77:          9          0          0          0  IR-PCI-MSI 524288-edge      nicA0-TxRx-0
  78:          0          9          0          0  IR-PCI-MSI 524289-edge      nicA0-TxRx-1
  79:          3          0          0          0  IR-PCI-MSI 524290-edge      nicA0
"""


class Machine:
    """Its /proc and /sys."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.faults: Counter[str] = Counter()
        self.surveyor = Surveyor(self.faults, str(root / "proc"), str(root / "sys"))
        self.links: list[tuple[int, str]] = []
        for name in ("proc", "sys/class/net"):
            (root / name).mkdir(parents=True)

    def write(self, path: str, text: str) -> None:
        """One file."""
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def link(
        self,
        name: str,
        *,
        irqs: tuple[int, ...] = (),
        driver: str | None = None,
        subsystem: str = "pci",
        queues: tuple[str, ...] = ("0",),
    ) -> None:
        """A device with its hardware, if it has a driver, and the RPS mask of each queue."""
        self.links.append((len(self.links) + 1, name))
        net = self.root / "sys/class/net" / name
        net.mkdir()
        if driver is not None:
            carrier = self.root / "sys/devices" / f"carrier-{name}"
            device = carrier / "virtio9" if subsystem == "virtio" else carrier
            device.mkdir(parents=True)
            os.symlink(device, net / "device")
            os.symlink(f"/bus/drivers/{driver}", device / "driver")
            os.symlink(f"/bus/{subsystem}", device / "subsystem")
            if irqs:
                (carrier / "msi_irqs").mkdir()
            for irq in irqs:
                (carrier / "msi_irqs" / str(irq)).write_text("msix\n")
        for number, mask in enumerate(queues):
            self.write(f"sys/class/net/{name}/queues/rx-{number}/rps_cpus", f"{mask}\n")

    def survey(self) -> nic.Inventory:
        """Read it all."""
        return self.surveyor.survey(self.links)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Without any device."""
    return Machine(tmp_path)


def test_queues_by_interrupt(machine: Machine) -> None:
    """Each CPU has the queues whose interrupts really come to it, none for the link's own."""
    machine.write("proc/interrupts", IXGBE.replace("nicA0\n", "nicA0-lsc\n"))
    machine.link("nicA0", irqs=(77, 78, 79), driver="ixgbe")
    for irq, cpu in ((77, "0"), (78, "1"), (79, "0")):
        machine.write(f"proc/irq/{irq}/effective_affinity_list", f"{cpu}\n")
        machine.write(f"proc/irq/{irq}/smp_affinity_list", "0-3\n")
    found = machine.survey()
    assert found.queues == {
        0: (Queue("nicA0", 0, 77, False),),
        1: (Queue("nicA0", 1, 78, False),),
    }
    device = found.named("nicA0")
    assert device is not None
    assert device.driver == "ixgbe"
    assert device.irqs == {77: frozenset({0}), 78: frozenset({1})}
    # There is no such device here for ethtool to ask.
    assert device.settings == Settings()
    assert found.named("nicA1") is None


def test_where_it_may_come(machine: Machine) -> None:
    """Architectures without an effective affinity tell where an interrupt may come."""
    machine.write("proc/interrupts", IXGBE)
    machine.link("nicA0", irqs=(77,), driver="ixgbe")
    machine.write("proc/irq/77/smp_affinity_list", "2-3\n")
    assert {cpu: [q.irq for q in queues] for cpu, queues in machine.survey().queues.items()} == {
        2: [77],
        3: [77],
    }


def test_virtio(machine: Machine) -> None:
    """The interrupts are those of the PCI device that carries the virtio device."""
    machine.write("proc/interrupts", "  CPU0\n 38: 5 PCI-MSIX 1-edge virtio2-input.0\n")
    machine.link("nicA0", irqs=(38,), driver="virtio_net", subsystem="virtio")
    machine.write("proc/irq/38/effective_affinity_list", "0\n")
    assert machine.survey().queues == {0: (Queue("nicA0", 0, 38, False),)}


def test_by_name_alone(machine: Machine) -> None:
    """Buses without a list of interrupts: the device's name is in the interrupt's."""
    machine.write("proc/interrupts", "  CPU0\n 9: 5 xen-dyn -event nicA0-q1-rx\n 8: 5 x y disk0\n")
    machine.link("nicA0", driver="vif", subsystem="xen")
    machine.write("proc/irq/9/effective_affinity_list", "0\n")
    assert machine.survey().queues == {0: (Queue("nicA0", 1, 9, False),)}


def test_one_interrupt_for_all(machine: Machine) -> None:
    """A device with a single interrupt has a single queue."""
    machine.write("proc/interrupts", "  CPU0\n 16: 5 IO-APIC 16-fasteoi ehci_hcd:usb1, enp2s0\n")
    machine.link("enp2s0", driver="r8169")
    machine.write("sys/devices/carrier-enp2s0/irq", "16\n")
    machine.write("proc/irq/16/effective_affinity_list", "0\n")
    assert machine.survey().queues == {0: (Queue("enp2s0", 0, 16, False),)}


def test_ports_of_one_function(machine: Machine) -> None:
    """Two links share the hardware: each has the interrupts that name it."""
    table = "  CPU0\n 77: 5 PCI 1-edge p0-TxRx-0\n 78: 5 PCI 2-edge p1-TxRx-0\n"
    machine.write("proc/interrupts", table)
    for name in ("p0", "p1"):
        machine.link(name, irqs=(77, 78), driver="twoports")
    for irq in (77, 78):
        machine.write(f"proc/irq/{irq}/effective_affinity_list", "0\n")
    assert machine.survey().queues == {
        0: (Queue("p0", 0, 77, False), Queue("p1", 0, 78, False)),
    }


def test_rps(machine: Machine) -> None:
    """RPS leads a queue to CPUs, with no hardware at all."""
    machine.link("veth1", queues=("0", "3", "2"))
    found = machine.survey()
    assert found.queues == {
        0: (Queue("veth1", 1, None, True),),
        1: (Queue("veth1", 1, None, True), Queue("veth1", 2, None, True)),
    }
    assert found.devices[1].rps == {1: {0, 1}, 2: {1}}
    assert not found.devices[1].hardware


def test_sysctls(machine: Machine) -> None:
    """What is not there is unknown: a network namespace has not all of them."""
    machine.write("proc/sys/net/core/netdev_budget", "300\n")
    assert machine.survey().sysctls == Sysctls(300, None, None)


def test_nothing_can_be_read(machine: Machine) -> None:
    """An inventory with holes, each of them counted with its reason."""
    machine.link("nicA0", irqs=(77,), driver="ixgbe")
    found = machine.survey()
    assert found.queues == {}
    assert found.devices[1].driver == "ixgbe"
    assert machine.faults["/proc/interrupts: No such file or directory"] == 1


def test_an_affinity_that_cannot_be_read(machine: Machine) -> None:
    """The interrupt comes to no CPU that we know."""
    machine.write("proc/interrupts", IXGBE)
    machine.link("nicA0", irqs=(77,), driver="ixgbe")
    assert machine.survey().queues == {}
    assert machine.faults["an interrupt's affinity: No such file or directory"] == 1


def test_a_mask_that_cannot_be_read(machine: Machine) -> None:
    """The others are read all the same."""
    machine.link("nicA0", queues=("zz", "1"))
    assert machine.survey().queues == {0: (Queue("nicA0", 1, None, True),)}
    assert machine.faults == {"an RPS mask: not understood": 1}


def test_bounds(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many links and queues there are, only so many are read and told."""
    monkeypatch.setattr(nic, "MAX_DEVICES", 2)
    monkeypatch.setattr(nic, "MAX_QUEUES", 5)
    monkeypatch.setattr(nic, "MAX_PER_CPU", 4)
    for name in ("a", "b", "c"):
        machine.link(name, queues=("1", "1", "1"))
    found = machine.survey()
    assert [device.name for device in found.devices.values()] == ["a", "b"]
    assert len(found.queues[0]) == 4
    assert machine.faults == {
        "more than 2 links": 1,
        "more than 5 queues": 1,
        "a CPU serves more than 4 queues": 1,
    }


def test_names_are_read_once(machine: Machine) -> None:
    """The table is large on large machines: again only when interrupts or devices changed."""
    machine.write("proc/interrupts", IXGBE)
    machine.link("nicA0", irqs=(77,), driver="ixgbe")
    machine.write("proc/irq/77/effective_affinity_list", "0\n")
    first = machine.survey()
    machine.write("proc/interrupts", "")
    machine.write("proc/irq/77/effective_affinity_list", "3\n")
    assert list(first.queues) == [0]
    assert list(machine.survey().queues) == [3]
    machine.link("veth0")
    assert list(machine.survey().queues) == [3]
    machine.link("nicA1", driver="ixgbe")
    assert list(machine.survey().queues) == []


def test_settings() -> None:
    """Words of the kernel's structs; what the driver refused is unknown."""
    rings = (0x10, 4096, 0, 0, 4096, 512, 0, 0, 512)
    channels = (0x3C, 0, 0, 1, 63, 0, 0, 1, 8)
    coalesce = (0x0E, 50, 64, *[0] * 7, 1, *[0] * 12)
    assert settings_of(rings, channels, coalesce) == Settings(512, 4096, 8, 63, 50, 64, True)
    assert settings_of(None, None, None) == Settings()
    assert settings_of((0x10, *[0] * 8), None, None) == Settings()
