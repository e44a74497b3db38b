"""What to change where packets are dropped or left over: rules over counters and settings. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from stalld.enrich.ethtool import Settings
from stalld.enrich.nic import Device, Inventory, Queue, Sysctls
from stalld.track.hints import see

# What the kernel takes for these settings, see net/core/sysctl_net_core.c; more helps nobody.
_MOST_BACKLOG = 1 << 18
_MOST_BUDGET = 4800
_MOST_USECS = 64_000


class Facts(NamedTuple):
    """What happened, and how things are set.

    Attributes:
        cpu: where; None: on no CPU in particular, a device lost packets.
        dropped: packets by this CPU's backlog, those by the flow limit included.
        flow_limited: those alone.
        squeezed: runs of net_rx_action that left work over.
        device: that lost packets, ``lost`` of them in its rings, and others (``refused``) when the
            kernel had taken them from there.
    """

    cpu: int | None = None
    dropped: int = 0
    flow_limited: int = 0
    squeezed: int = 0
    device: Device | None = None
    lost: int = 0
    refused: int = 0
    inventory: Inventory | None = None

    @property
    def sysctls(self) -> Sysctls:
        """As they were when last looked at."""
        return self.inventory.sysctls if self.inventory else Sysctls()

    @property
    def queues(self) -> tuple[Queue, ...]:
        """That the CPU serves."""
        if self.inventory is None or self.cpu is None:
            return ()
        return self.inventory.queues.get(self.cpu, ())

    @property
    def devices(self) -> list[Device]:
        """That lost packets, or have queues on this CPU."""
        if self.device is not None:
            return [self.device]
        names = dict.fromkeys(queue.device for queue in self.queues)
        found = (self.inventory.named(name) for name in names) if self.inventory else ()
        return [device for device in found if device is not None]


class Rule(NamedTuple):
    """``says`` a sentence where the rule applies, else None."""

    section: str
    says: Callable[[Facts], str | None]


def hints(facts: Facts, most: int) -> list[str]:
    """The sentences of the first ``most`` rules that apply, each with its pointer."""
    found: list[str] = []
    for rule in RULES:
        sentence = rule.says(facts)
        if sentence is not None and len(found) < most:
            found.append(see(sentence, rule.section))
    return found


def joined(*sentences: str | None) -> str | None:
    """Those that there are as one; None: there are none."""
    told = [sentence for sentence in sentences if sentence]
    return "; besides, ".join(told) or None


def _ring(facts: Facts) -> str | None:
    settings = facts.device.settings if facts.device else Settings()
    if not facts.lost or facts.device is None or settings.ring is None:
        return None
    name = facts.device.name
    lost = f"{name} lost packets, {facts.lost} of them in its rings"
    if settings.ring_max is not None and settings.ring < settings.ring_max:
        suggested = min(settings.ring_max, 4 * settings.ring)
        return (
            f"{lost}, which have room for {settings.ring} and could have {settings.ring_max}: "
            f"ethtool -G {name} rx {suggested} (careful: the link is reset, for seconds perhaps)"
        )
    return (
        f"{lost}, which cannot be larger than their {settings.ring}: receive on more CPUs "
        f"(ethtool -L {name}, irqbalance), or find out what keeps these from serving them"
    )


def _refused(facts: Facts) -> str | None:
    if not facts.refused or facts.device is None:
        return None
    return (
        f"the kernel dropped {facts.refused} packets that {facts.device.name} had received: look "
        "for softnet events of that time (a full backlog), else for protocols that nobody here "
        "speaks"
    )


def _backlog(facts: Facts) -> str | None:
    dropped = facts.dropped - facts.flow_limited
    if dropped <= 0:
        return None
    return (
        f"{dropped} packets found the CPU's backlog full: raise net.core.netdev_max_backlog "
        f"({_suggestion(facts.sysctls.netdev_max_backlog, _MOST_BACKLOG)}) if they came in a "
        "burst, else spread them over more CPUs"
    )


def _flow_limit(facts: Facts) -> str | None:
    if not facts.flow_limited:
        return None
    return (
        f"{facts.flow_limited} packets of flows that took most of the CPU's backlog were dropped "
        "by the flow limit: find the sender, or take the CPU out of "
        "net.core.flow_limit_cpu_bitmap"
    )


def _rps(facts: Facts) -> str | None:
    if not (facts.dropped or facts.squeezed or facts.lost):
        return None
    for device in facts.devices:
        cpus = frozenset().union(*device.rps.values())
        if len(cpus) == 1 and facts.cpu in (None, *cpus):
            (cpu,) = cpus
            return (
                f"RPS leads all packets of {device.name} to CPU {cpu}: name more CPUs in "
                f"/sys/class/net/{device.name}/queues/rx-*/rps_cpus"
            )
    return None


def _interrupts(facts: Facts) -> str | None:
    if not (facts.dropped or facts.squeezed or facts.lost):
        return None
    for device in facts.devices:
        cpus = frozenset().union(*device.irqs.values())
        if len(device.irqs) > 1 and len(cpus) == 1 and facts.cpu in (None, *cpus):
            (cpu,) = cpus
            return (
                f"all {len(device.irqs)} receive interrupts of {device.name} come to CPU {cpu}: "
                "spread them with irqbalance, or in /proc/irq/N/smp_affinity_list"
            )
    return None


def _squeeze(facts: Facts) -> str | None:
    if not facts.squeezed:
        return None
    sysctls = facts.sysctls
    return (
        f"the network's softirq had to leave off {facts.squeezed} times with packets left: raise "
        f"net.core.netdev_budget ({_suggestion(sysctls.netdev_budget, _MOST_BUDGET)}) and "
        f"netdev_budget_usecs ({_suggestion(sysctls.netdev_budget_usecs, _MOST_USECS)})"
    )


def _suggestion(now: int | None, most: int) -> str:
    if now is None:
        return "its value is not known here"
    return f"now {now}, try {2 * now}" if 2 * now <= most else f"now {now}, which is much"


RULES: tuple[Rule, ...] = (
    Rule("ring-drops", _ring),
    Rule("dropped-by-the-kernel", _refused),
    Rule("backlog-drops", _backlog),
    Rule("flow-limit", _flow_limit),
    Rule("rps-to-one-cpu", _rps),
    Rule("interrupts-on-one-cpu", _interrupts),
    Rule("time-squeeze", _squeeze),
)
"""In this order: what lost packets first, then how things are set, then what only takes longer."""
