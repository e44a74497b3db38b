"""``check``'s items about network devices, from what was found."""

from __future__ import annotations

from typing import Any

import pytest

from stalld.check import nics
from stalld.check.report import State
from stalld.enrich import netlink
from stalld.enrich.ethtool import Settings
from stalld.enrich.nic import Device, Inventory, Sysctls

ETH = Device("nicA0", 2, "ixgbe", Settings(512, 4096), {77: frozenset({0, 3})}, {})
LO = Device("lo", 1, None, Settings(), {}, {})


def inventory(*devices: Device) -> Inventory:
    """Of these devices."""
    return Inventory({device.ifindex: device for device in devices}, {}, Sysctls())


@pytest.mark.parametrize(
    ("devices", "faults", "witness", "state", "detail"),
    [
        ((LO,), {}, None, State.OK, "1 links: none has hardware"),
        ((LO, ETH), {}, None, State.OK, "nicA0 (ixgbe, ring 512 of 4096, 1 receive interrupts"),
        ((ETH,), {}, {"nicA0": (512, 4096)}, State.OK, "on CPUs 0, 3); pyroute2 finds the same"),
        ((ETH,), {}, {"nicA0": (1, 4096)}, State.DEGRADED, "rings of nicA0: netlink says"),
        ((ETH._replace(irqs={}),), {}, None, State.DEGRADED, "no interrupt of nicA0 is known"),
        ((ETH,), {"an RPS mask: gone": 3}, None, State.DEGRADED, "an RPS mask: gone (3)"),
    ],
)
def test_queues(devices: Any, faults: Any, witness: Any, state: State, detail: str) -> None:
    """What is known of each device with hardware, and what is not."""
    found = nics.queues(inventory(*devices), faults, witness)
    assert found.state is state
    assert detail in found.detail
    assert (state is State.OK) is (not found.remedy)


def test_no_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that does not know the request."""

    def refuse(_: object) -> Any:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(netlink, "link_stats", refuse)
    found = nics.statistics([])
    assert (found.state, found.detail) == (
        State.DEGRADED,
        "RTM_GETSTATS: Operation not supported",
    )


def test_statistics() -> None:
    """A driver that does not answer is told; so is one that does."""
    found = nics.statistics([ETH, LO])
    assert found.state is State.OK
    assert "nicA0: No such device; lo counts lost packets in 0 ways, 0 by queue" in found.detail


def test_this_machine() -> None:
    """Two items, whatever there is."""
    assert [item.name for item in nics.network()] == [nics.QUEUES, nics.STATISTICS]
