"""Load the real probes, read what they deliver, see how this kernel serves softirqs."""

from __future__ import annotations

import os
from typing import NamedTuple

from stalld.check.report import Item, State
from stalld.check.stimulus import LIMIT_S, stimulate
from stalld.errors import DecodeError, ProbeError, StalldError
from stalld.kthreads import Watched, iterate_tasks, ksoftirqd_pids
from stalld.probe.client import ProbeChild, Probes, load_probes, possible_cpus
from stalld.probe.protocol import Description
from stalld.reader import PerfReader
from stalld.records import VECTORS
from stalld.state import Maps

_NEVER_NS = 60 * 10**9
"""A threshold that nothing reaches: the programs watch, yet record no stall."""
_ENOUGH = 3

NET_RX_ACTION = "net_rx_action"


class Trial(NamedTuple):
    """What the probes showed."""

    items: list[Item]
    serves_inline: bool | None


def try_probes(tick_ns: int, defers: bool, child: ProbeChild | None = None) -> Trial:
    """Attach everything, load one CPU for at most 0.3 s, detach everything.

    Args:
        tick_ns: period of the scheduler tick.
        defers: the kernel has a function ksoftirqd_running.
        child: a started child; None for one with everything.
    """
    try:
        probes = (child or load_probes()).result()
    except ProbeError as error:
        return Trial([_refused("BPF programs", str(error), "nothing can be detected")], None)
    try:
        items = described(probes.description)
        try:
            maps, more = _start(probes, tick_ns)
        except (StalldError, OSError) as error:
            return Trial([*items, _refused("perf buffers", str(error), "no event arrives")], None)
        item, inline = _behaviour(maps, defers)
        return Trial([*items, *more, item], inline)
    finally:
        probes.close()


def _refused(name: str, detail: str, effect: str) -> Item:
    return Item(name, State.MISSING, detail, effect, required=True)


def described(description: Description) -> list[Item]:
    """The items that the child's answer fills."""
    took = f"compiled in {description.compile_ms:g} ms, attached in {description.attach_ms:g} ms"
    items = [
        Item(
            "BPF programs",
            State.OK,
            f"{took} (bcc {description.bcc_version}, structs from {description.structs})",
        )
    ]
    for attached in description.attached:
        if attached.how == "raw_tracepoint":
            items.append(Item(f"raw tracepoint {attached.hook}", State.OK, "attached"))
        elif attached.how == "iterator":
            items.append(Item("task iterator", State.OK, "attached"))
    refused = [m for m in description.missing if m.ability.startswith(NET_RX_ACTION)]
    items.extend(
        Item(m.ability, State.DEGRADED, m.reason, m.effect)
        for m in description.missing
        if m not in refused
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


def _start(probes: Probes, tick_ns: int) -> tuple[Maps, list[Item]]:
    """Open what the service opens, then watch with a threshold that nothing reaches."""
    fds = probes.fds
    PerfReader(fds["map:events"], lambda _: None).close()
    items = [Item("perf buffers", State.OK, "opened on every CPU")]
    maps = Maps(fds["map:cpus"], fds["map:config"], possible_cpus())
    watched = Watched(fds["map:watched"], maps, ())
    try:
        link = fds.get("iter:task")
        if link is None:
            pids = ksoftirqd_pids()
            watched.learn_pids(pids)
        else:
            pids = watched.learn(iterate_tasks(link))
    except (StalldError, DecodeError) as error:
        items.append(_refused("ksoftirqd", str(error), "the waits of ksoftirqd cannot be seen"))
    else:
        items.append(_ksoftirqd(len(pids)))
    maps.watch(_NEVER_NS, tick_ns=tick_ns, vec_mask=(1 << len(VECTORS)) - 1)
    return maps, items


def _ksoftirqd(found: int) -> Item:
    if found:
        return Item("ksoftirqd", State.OK, f"found on {found} CPUs")
    return Item(
        "ksoftirqd",
        State.DEGRADED,
        "no ksoftirqd/N among the tasks seen",
        "the waits of ksoftirqd cannot be seen, those of the vectors can",
        "run in the host's pid namespace (container: hostPID)",
    )


def _behaviour(maps: Maps, defers: bool) -> tuple[Item, bool | None]:
    cpu = max(os.sched_getaffinity(0))

    def seen() -> bool:
        return maps.total("deferred") >= _ENOUGH or maps.serves_inline() is not None

    try:
        took_s = stimulate(cpu, seen)
    except OSError as error:
        return behaviour_item(None, f"could not load CPU {cpu}: {error}", defers), None
    inline = maps.serves_inline()
    counts = (
        f"while ksoftirqd waited, {maps.total('inline_served')} softirqs ran, in "
        f"{maps.total('deferred')} cases they were left to it (CPU {cpu} loaded for "
        f"{took_s * 1e3:.0f} ms)"
    )
    return behaviour_item(inline, counts, defers), inline


def behaviour_item(inline: bool | None, counts: str, defers: bool) -> Item:
    """Whether softirqs run while ksoftirqd is runnable.

    Args:
        inline: what was seen; None: nothing that tells.
        counts: what was seen, in words.
        defers: the kernel has a function ksoftirqd_running, which made it defer
            before commit d15121be7485 (6.5). Compilers may inline it, so that
            its absence proves nothing.
    """
    symbol = f"kallsyms has {'a' if defers else 'no'} ksoftirqd_running()"
    name = "softirqs while ksoftirqd waits"
    if inline is None:
        return Item(
            name,
            State.DEGRADED,
            f"not observed: {counts}; {symbol}",
            "until the service has seen it, the verdict of a stall in which ksoftirqd waits may "
            "name the wrong kind",
            f"repeat the check on a busier CPU or with CAP_SYS_NICE; it loads one CPU for at most "
            f"{LIMIT_S * 1e3:.0f} ms",
        )
    if inline:
        effect = "a waiting ksoftirqd alone does no harm: level info, starved is empty"
        return Item(name, State.OK, f"inline: {counts}; {symbol}", effect)
    effect = "every stall of ksoftirqd delays the network as long"
    return Item(name, State.OK, f"deferred: {counts}; {symbol}", effect)
