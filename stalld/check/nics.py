"""What can be found out about network devices: queues, rings, statistics, the drivers' counters."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Mapping
from typing import Any

from stalld.check.report import Item, State
from stalld.enrich import netlink
from stalld.enrich.driver_stats import DriverStats
from stalld.enrich.ethtool import Ethtool
from stalld.enrich.nic import Device, Inventory, Surveyor
from stalld.errors import reason_of

QUEUES = "network queues"
STATISTICS = "network statistics"

Rings = Mapping[str, tuple[int, int]]
"""Device → size of its receive rings now, and at most."""


def network() -> list[Item]:
    """Look at all devices once, as the service does."""
    faults: Counter[str] = Counter()
    try:
        inventory = Surveyor(faults).survey()
    except OSError as error:
        return [
            Item(
                QUEUES,
                State.DEGRADED,
                f"links cannot be listed: {error.strerror}",
                "a stall does not tell which queues its CPU serves, and no nic events come",
                "let the service use AF_NETLINK (RestrictAddressFamilies= of the unit)",
            )
        ]
    hardware = [device for device in inventory.devices.values() if device.hardware]
    return [queues(inventory, faults, ring_witness(hardware)), statistics(hardware)]


def queues(inventory: Inventory, faults: Mapping[str, int], witness: Rings | None) -> Item:
    """Is it known which queues a CPU serves, and how large their rings are?

    Args:
        faults: reason → how often something could not be read.
        witness: what pyroute2 read of rings; None: it is not there.
    """
    hardware = [device for device in inventory.devices.values() if device.hardware]
    shown = "; ".join(map(_shown, hardware[:8])) or "none has hardware of its own"
    detail = f"{len(inventory.devices)} links: {shown}"
    deaf = [device.name for device in hardware if not any(device.irqs.values())]
    own = {d.name: (d.settings.ring, d.settings.ring_max) for d in hardware if d.settings.ring_max}
    wrong = [name for name, rings in (witness or {}).items() if own.get(name) != rings]
    if faults or deaf or wrong:
        reasons = [f"{reason} ({count})" for reason, count in faults.items()]
        reasons += [f"no interrupt of {name} is known" for name in deaf]
        reasons += [f"rings of {name}: netlink says otherwise" for name in wrong]
        return Item(
            QUEUES,
            State.DEGRADED,
            f"{detail}; {'; '.join(reasons)}",
            "the queues that a stalled CPU serves are not all told",
            "mount /proc and /sys; devices whose driver polls, or hides its interrupts, have none",
        )
    agree = "; pyroute2 finds the same rings" if witness else ""
    return Item(QUEUES, State.OK, detail + agree)


def statistics(hardware: list[Device]) -> Item:
    """Are the counters of links there, and what do the drivers count themselves?"""
    try:
        with netlink.route_socket() as sock:
            links = netlink.link_stats(sock)
    except (OSError, struct.error) as error:
        return Item(
            STATISTICS,
            State.DEGRADED,
            f"RTM_GETSTATS: {reason_of(error)}",
            "no nic events come",
            "use Linux 4.7 or newer, and let the service use AF_NETLINK",
        )
    told = []
    for device in hardware:
        try:
            with Ethtool() as ethtool:
                lost = DriverStats(device.name).read(ethtool)
        except (OSError, struct.error) as error:
            told.append(f"{device.name}: {reason_of(error)}")
        else:
            whose = sum(one.queue is not None for one in lost)
            told.append(f"{device.name} counts lost packets in {len(lost)} ways, {whose} by queue")
    return Item(STATISTICS, State.OK, "; ".join([f"of {len(links)} links", *told]))


def ring_witness(hardware: list[Device]) -> Rings | None:
    """The rings once more, by another way: ethtool's netlink, as pyroute2 speaks it.

    The service itself does without pyroute2, for its memory's sake.
    """
    try:
        from pyroute2.netlink.exceptions import NetlinkError
        from pyroute2.netlink.generic.ethtool import NlEthtool

        asked: Any = NlEthtool()
    except (ImportError, OSError):
        return None
    found: dict[str, tuple[int, int]] = {}
    try:
        for device in hardware:
            try:
                (answer,) = asked.get_rings(device.name)
            except (NetlinkError, OSError, ValueError):
                continue
            words = dict(attribute[:2] for attribute in answer["attrs"])
            if words.get("ETHTOOL_A_RINGS_RX_MAX"):
                now = words.get("ETHTOOL_A_RINGS_RX", 0)
                found[device.name] = (now, words["ETHTOOL_A_RINGS_RX_MAX"])
    finally:
        asked.close()
    return found


def _shown(device: Device) -> str:
    settings = device.settings
    ring = f", ring {settings.ring} of {settings.ring_max}" if settings.ring_max else ""
    cpus = sorted(set().union(*device.irqs.values()))
    return (
        f"{device.name} ({device.driver}{ring}, {len(device.irqs)} receive interrupts on CPUs "
        f"{', '.join(map(str, cpus)) or 'unknown'})"
    )
