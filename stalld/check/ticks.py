"""What each tick is to tell: what runs, the steal clock, the softnet counters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stalld.check.report import Item, State
from stalld.enrich import softnet
from stalld.enrich.softnet import Softnet
from stalld.records import TickSample

LOOKBACK = "look-back"
STEAL = "steal clock"
SOFTNET = "softnet counters"

_BLIND = "nothing is known of what ran before a stall, and times with interrupts off are not seen"
_SEE_LOOKBACK = f"see {LOOKBACK}"


@dataclass(frozen=True)
class Look:
    """What came of one CPU's ticks under the load.

    Attributes:
        took_ms: from before the load until after it.
        refused: why the kernel refused the program; "" where it did not.
        hidden: kallsyms shows no address at all.
        known: it has the tick's function.
        arrived: how many ticks were kept since the load began.
        ticks: those of them that the ring still has.
        before: the softnet counters at that moment, and ``after`` the load; None:
            they cannot be read.
        places: see ``Description.percpu``.
        steal_version: of KVM's steal clock; 0: it keeps none.
    """

    cpu: int
    took_ms: int
    refused: str
    hidden: bool
    known: bool
    arrived: int
    ticks: Sequence[TickSample]
    before: Softnet | None
    after: Softnet | None
    places: Mapping[str, int]
    steal_version: int


def look_back(look: Look, price: str) -> Item:
    """Is what ran at each tick kept?"""
    if look.refused:
        detail = f"not attached to hrtimer_expire_entry: {look.refused}"
        remedy = "use a kernel that has this tracepoint"
    elif look.hidden:
        detail = (
            "the kernel hides the addresses of its symbols, so that the tick's timer cannot be "
            "told from others"
        )
        remedy = "see kernel symbols"
    elif not look.known:
        detail = "the kernel's symbols do not name the function of the tick's timer"
        remedy = (
            "use a kernel with CONFIG_KALLSYMS=y and CONFIG_HIGH_RES_TIMERS=y; if it has them, "
            "report its version: the function may have a new name"
        )
    elif not look.ticks:
        detail = (
            f"no tick came to the ring of CPU {look.cpu} in {look.took_ms} ms, though it was busy"
        )
        remedy = (
            "see high resolution timers; a CPU of nohz_full= has no tick; else repeat the check on "
            "a less busy host"
        )
    else:
        return Item(
            LOOKBACK,
            State.OK,
            f"{look.arrived} ticks of CPU {look.cpu} arrived in {look.took_ms} ms; {price}",
            "a stall tells what ran before it; detect.lookback = false turns it off",
        )
    return Item(LOOKBACK, State.DEGRADED, detail, _BLIND, remedy)


def steal_clock(look: Look, virtual: bool) -> Item:
    """Can interrupts that were off be told from a CPU that was taken away?"""
    if not virtual:
        return Item(STEAL, State.OK, "not needed: no hypervisor takes CPUs away")
    if look.steal_version:
        stolen_ms = look.ticks[-1].steal_ns / 1e6 if look.ticks else 0.0
        return Item(
            STEAL,
            State.OK,
            f"a virtual machine with KVM's steal clock ({stolen_ms:.0f} ms of CPU {look.cpu} "
            "stolen so far)",
        )
    if "steal" not in look.places:
        detail = "the kernel's type information does not tell where its steal clock is"
        remedy = "use a kernel with CONFIG_DEBUG_INFO_BTF=y, CONFIG_PARAVIRT=y, CONFIG_KVM_GUEST=y"
    elif not look.ticks:
        detail, remedy = "its steal clock was not observed: no tick was seen", _SEE_LOOKBACK
    else:
        detail = "the hypervisor keeps no steal clock as KVM does"
        remedy = (
            "have the hypervisor provide KVM's steal clock; no no-steal-acc on the command line"
        )
    return Item(
        STEAL,
        State.DEGRADED,
        f"a virtual machine; {detail}",
        "interrupts that were off are told from a CPU that was taken away only where the stack "
        "shows it, else the verdict is unknown",
        remedy,
    )


def softnet_counters(look: Look) -> Item:
    """Does a tick read the counters that /proc shows?"""
    effect = "packets and time_squeeze of a stall are not known"
    if "softnet" not in look.places:
        return Item(
            SOFTNET,
            State.DEGRADED,
            "the kernel's type information does not tell where softnet_data is",
            effect,
            "use a kernel with CONFIG_DEBUG_INFO_BTF=y",
        )
    if not look.ticks:
        return Item(
            SOFTNET, State.DEGRADED, "not observed: no tick was seen", effect, _SEE_LOOKBACK
        )
    if look.before is None or look.after is None:
        return Item(SOFTNET, State.OK, "read at each tick; /proc/net/softnet_stat not readable")
    tick = look.ticks[-1]
    wrong = [name for name, told in _told(look.places, tick).items() if not _fits(look, name, told)]
    if not wrong:
        packets = (look.after.processed - look.before.processed) % (1 << 32)
        return Item(
            SOFTNET,
            State.OK,
            f"the tick's agree with /proc/net/softnet_stat (CPU {look.cpu}: {packets} packets "
            "under the load)",
        )
    return Item(
        SOFTNET,
        State.DEGRADED,
        "; ".join(
            f"CPU {look.cpu}: a tick read {name} {_told(look.places, tick)[name]}, "
            f"/proc/net/softnet_stat told {getattr(look.before, name)} before and "
            f"{getattr(look.after, name)} after"
            for name in wrong
        ),
        "what a stall tells of the network is wrong",
        "report the kernel's version; the rest of an event does not depend on them",
    )


def _told(places: Mapping[str, int], tick: TickSample) -> dict[str, int]:
    """The counters that a tick can read, by their names in :class:`Softnet`."""
    told = {"processed": tick.processed, "squeezed": tick.squeezed}
    if "dropped" in places:
        told["dropped"] = tick.dropped
    if "received_rps" in places:
        told["received_rps"] = tick.received_rps
    if "flow_limit" in places:
        told["flow_limited"] = tick.flow_limit
    return told


def _fits(look: Look, name: str, told: int) -> bool:
    low, high = getattr(look.before, name), getattr(look.after, name)
    return low is None or high is None or _between(low, told, high)


def _between(low: int, value: int, high: int) -> bool:
    # They count in 32 bits.
    return (value - low) % (1 << 32) <= (high - low) % (1 << 32)


def softnet_stat(cpu: int, online: Sequence[int], path: str = softnet.PATH) -> Softnet | None:
    """The counters of ``cpu`` as /proc shows them; None where it does not.

    Args:
        online: the CPUs that have a row. Linux before 5.10 does not name them.
    """
    try:
        return softnet.parse(Path(path).read_text(), lambda: online).get(cpu)
    except (OSError, ValueError):
        return None
