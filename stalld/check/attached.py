"""What was attached, and what this kernel refused."""

from __future__ import annotations

from stalld.check.report import Item, State
from stalld.perf import NMI_HZ, NmiSampler, SamplerError
from stalld.probe.client import Probes
from stalld.probe.protocol import NMI_SAMPLER, NO_NMI, OF_A_TASK, Description, Missing
from stalld.reader import online_cpus

NET_RX_ACTION = "net_rx_action"
TASK_ITERATOR = "task iterator"
LOOKBACK = "raw tracepoint lookback"
"""What the look-back's program is called where it is missing."""

NEEDS_ITERATOR = "use Linux 5.8 or newer with CONFIG_DEBUG_INFO_BTF=y"
_NEEDS_PMU = "none on a virtual machine without a virtual PMU; let the hypervisor provide one"


def described(description: Description) -> list[Item]:
    """The items that the child's answer fills."""
    # It keeps nothing, so it has compiled them.
    took = f"compiled in {description.compile_ms:g} ms, attached in {description.attach_ms:g} ms"
    items = [
        Item(
            "BPF programs",
            State.OK,
            f"{took} (bcc {description.bcc_version}, structs from {description.structs})",
        )
    ]
    for attached in description.attached:
        # Of the look-back an item of its own tells.
        if attached.how == "raw_tracepoint" and not attached.hook.endswith(": lookback"):
            items.append(Item(f"raw tracepoint {attached.hook}", State.OK, "attached"))
        elif attached.how == "iterator":
            items.append(Item("task iterator", State.OK, "attached"))
    refused = [m for m in description.missing if m.ability.startswith(NET_RX_ACTION)]
    items.extend(
        _without(m)
        for m in description.missing
        if m not in refused and m.ability not in (NMI_SAMPLER, LOOKBACK)
    )
    reasons = "; ".join(f"{m.ability.rpartition(' ')[2]}: {m.reason}" for m in refused)
    if description.net_rx_action == "softirq":
        items.append(
            Item(
                NET_RX_ACTION,
                State.DEGRADED,
                reasons or "neither kfunc nor kprobe",
                "softirq_entry and softirq_exit of NET_RX stand in: nothing is missed, the times "
                "are those of the whole NET_RX handler",
                "none needed; a kernel with CONFIG_KPROBES=y can trace it",
            )
        )
    else:
        note = f" ({reasons})" if reasons else ""
        items.append(Item(NET_RX_ACTION, State.OK, f"traced by {description.net_rx_action}{note}"))
    return items


def _without(missing: Missing) -> Item:
    if missing.ability == TASK_ITERATOR:
        detail, remedy = missing.reason, NEEDS_ITERATOR
    elif missing.ability.endswith(OF_A_TASK):
        detail, remedy = missing.reason, "none yet: please report it with the kernel's version"
    else:
        detail, remedy = f"not attached: {missing.reason}", "use a kernel that has this tracepoint"
    return Item(missing.ability, State.DEGRADED, detail, missing.effect, remedy)


def nmi_sampler(probes: Probes) -> Item:
    """Can it be run off a counter of every CPU? Opened, and closed again."""
    program = probes.fds.get("prog:nmi")
    if program is None:
        missing = {m.ability: m.reason for m in probes.description.missing}
        reason = missing.get(NMI_SAMPLER, "its program was not loaded")
        remedy = _NEEDS_PMU if "PMU" in reason else "none yet"
        return Item(NMI_SAMPLER, State.DEGRADED, reason, NO_NMI, remedy)
    try:
        sampler = NmiSampler.open(program, online_cpus(), NMI_HZ)
    except SamplerError as error:
        detail, _, remedy = str(error).partition("; ")
        return Item(NMI_SAMPLER, State.DEGRADED, detail, NO_NMI, remedy or "see the reason")
    count = len(sampler.cpus)
    sampler.close()
    return Item(
        NMI_SAMPLER,
        State.OK,
        f"hardware cycles, {NMI_HZ} times a second of kernel time at most, on {count} CPUs",
        "stacks are taken while interrupts are off too; detect.nmi_sampler = false turns it off",
    )
