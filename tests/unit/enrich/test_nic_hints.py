"""Which sentence follows from which counters and settings."""

from __future__ import annotations

from typing import Any

import pytest

from stalld.enrich.ethtool import Settings
from stalld.enrich.nic import Device, Inventory, Queue, Sysctls
from stalld.enrich.nic_hints import RULES, Facts, hints, joined

SYSCTLS = Sysctls(300, 8000, 1000)


def device(
    settings: Settings | None = None,
    irqs: dict[int, set[int]] | None = None,
    rps: dict[int, set[int]] | None = None,
) -> Device:
    """eth0, its interrupts and RPS as told."""
    return Device(
        "eth0",
        2,
        "ixgbe",
        settings or Settings(),
        {irq: frozenset(cpus) for irq, cpus in (irqs or {}).items()},
        {queue: frozenset(cpus) for queue, cpus in (rps or {}).items()},
    )


def inventory(known: Device, sysctls: Sysctls = SYSCTLS) -> Inventory:
    """With this one device, that has a queue on CPU 1."""
    return Inventory({2: known}, {1: (Queue("eth0", 0, 77, False),)}, sysctls)


ONE_CPU = inventory(device(irqs={77: {1}, 78: {1}}))
TWO_CPUS = inventory(device(irqs={77: {1}, 78: {2}}))
RPS_ONE = inventory(device(rps={0: {1}, 1: {1}}))
RPS_TWO = inventory(device(rps={0: {1}, 1: {2}}))
SMALL = device(Settings(ring=256, ring_max=4096))
FULL = device(Settings(ring=4096, ring_max=4096))
NO_RING = device()

CASES: list[tuple[dict[str, Any], list[str]]] = [
    ({}, []),
    ({"inventory": ONE_CPU}, []),
    ({"squeezed": 3, "inventory": TWO_CPUS}, ["time-squeeze"]),
    ({"squeezed": 3}, ["time-squeeze"]),
    ({"dropped": 3, "inventory": TWO_CPUS}, ["backlog-drops"]),
    ({"dropped": 3, "flow_limited": 3}, ["flow-limit"]),
    ({"dropped": 4, "flow_limited": 3}, ["backlog-drops", "flow-limit"]),
    ({"dropped": 4, "squeezed": 1}, ["backlog-drops", "time-squeeze"]),
    ({"dropped": 1, "inventory": RPS_ONE}, ["backlog-drops", "rps-to-one-cpu"]),
    ({"dropped": 1, "inventory": RPS_TWO}, ["backlog-drops"]),
    ({"squeezed": 1, "inventory": ONE_CPU}, ["interrupts-on-one-cpu", "time-squeeze"]),
    ({"cpu": 3, "squeezed": 1, "inventory": ONE_CPU}, ["time-squeeze"]),
    ({"cpu": None, "lost": 5, "device": SMALL}, ["ring-drops"]),
    ({"cpu": None, "lost": 5, "device": FULL}, ["ring-drops"]),
    ({"cpu": None, "lost": 5, "device": NO_RING}, []),
    ({"cpu": None, "lost": 0, "device": SMALL}, []),
    ({"cpu": None, "refused": 5, "device": SMALL}, ["dropped-by-the-kernel"]),
    (
        {"cpu": None, "lost": 5, "refused": 5, "device": SMALL},
        ["ring-drops", "dropped-by-the-kernel"],
    ),
    (
        {"cpu": None, "lost": 5, "device": device(irqs={77: {4}, 78: {4}})},
        ["interrupts-on-one-cpu"],
    ),
    ({"cpu": None, "lost": 5, "device": device(irqs={77: {4}})}, []),
]


@pytest.mark.parametrize(("given", "sections"), CASES)
def test_rules(given: dict[str, Any], sections: list[str]) -> None:
    """Each case has exactly these, each with its pointer, in this order."""
    told = hints(Facts(**({"cpu": 1} | given)), 10)
    assert [text.rpartition("; see docs/runbook.md#")[2] for text in told] == sections
    for text in told:
        assert "\n" not in text
        assert not text.endswith(".")


def test_every_rule_is_tried() -> None:
    """No rule without its case."""
    assert {rule.section for rule in RULES} == {name for _, names in CASES for name in names}


def test_at_most() -> None:
    """The first ones; together they are one sentence."""
    told = hints(Facts(cpu=1, dropped=4, flow_limited=3, squeezed=1), 2)
    assert len(told) == 2
    assert joined("first", *told, None) == f"first; besides, {told[0]}; besides, {told[1]}"
    assert joined(None) is None
    assert joined() is None


def test_values_now_and_suggested() -> None:
    """What is set, and what to try: twice as much, as long as that is sensible."""
    (text,) = hints(Facts(cpu=1, squeezed=9, inventory=TWO_CPUS), 5)
    assert "had to leave off 9 times" in text
    assert "net.core.netdev_budget (now 300, try 600)" in text
    assert "netdev_budget_usecs (now 8000, try 16000)" in text
    (text,) = hints(Facts(cpu=1, dropped=9, inventory=TWO_CPUS), 5)
    assert "netdev_max_backlog (now 1000, try 2000)" in text
    much = inventory(device(), Sysctls(4000, 8000, 250_000))
    assert "(now 250000, which is much)" in hints(Facts(cpu=1, dropped=9, inventory=much), 5)[0]
    assert "not known here" in hints(Facts(cpu=1, dropped=9), 5)[0]


def test_rings() -> None:
    """A small one may grow, with a warning; a full-sized one may not."""
    (text,) = hints(Facts(lost=5, device=SMALL), 5)
    assert "ethtool -G eth0 rx 1024" in text
    assert "the link is reset" in text
    (text,) = hints(Facts(lost=5, device=FULL), 5)
    assert "ethtool -G" not in text
    assert "ethtool -L eth0" in text
