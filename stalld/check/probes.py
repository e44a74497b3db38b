"""Load the real probes, read what they deliver, see how this kernel serves softirqs."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from stalld.check import price
from stalld.check.attached import LOOKBACK, NEEDS_ITERATOR, described, nmi_sampler
from stalld.check.kernel import Symbols
from stalld.check.report import Item, State
from stalld.check.stimulus import LIMIT_S, stimulate
from stalld.check.ticks import Look, look_back, softnet_counters, softnet_stat, steal_clock
from stalld.config import Detect
from stalld.errors import DecodeError, ProbeError, StalldError
from stalld.host import is_virtual, nohz_full, threads_softirqs
from stalld.kthreads import Watched, iterate_tasks, ksoftirqd_pids
from stalld.probe.client import ProbeChild, Probes, load_probes, possible_cpus
from stalld.reader import PerfReader, online_cpus
from stalld.records import VECTORS
from stalld.rings import Rings
from stalld.state import Maps, offsets

_NEVER_NS = 60 * 10**9
"""A threshold that nothing reaches: the programs watch, yet record no stall."""
_ENOUGH = 3
"""Softirqs that show how they are served."""
_ENOUGH_TICKS = 40
"""The look-back's price is their mean: one that the hypervisor interrupts must not make it."""

WATCHED = "watched threads"


class Trial(NamedTuple):
    """What the probes showed."""

    items: list[Item]
    serves_inline: bool | None


def try_probes(tick_ns: int, symbols: Symbols, child: ProbeChild | None = None) -> Trial:
    """Attach everything, load one CPU for at most 0.3 s, detach everything.

    Args:
        tick_ns: period of the scheduler tick.
        symbols: what kallsyms tells.
        child: a started child; None for one with everything.
    """
    try:
        probes = (child or load_probes()).result()
    except ProbeError as error:
        return Trial([_refused("BPF programs", str(error), "nothing can be detected")], None)
    try:
        items = described(probes.description)
        try:
            maps, more = _start(probes, tick_ns, symbols)
        except (StalldError, OSError) as error:
            return Trial([*items, _refused("perf buffers", str(error), "no event arrives")], None)
        found, inline = _observe(probes, maps, tick_ns, symbols)
        return Trial([*items, *more, *found], inline)
    finally:
        probes.close()


def _refused(name: str, detail: str, effect: str) -> Item:
    return Item(name, State.MISSING, detail, effect, required=True)


def _start(probes: Probes, tick_ns: int, symbols: Symbols) -> tuple[Maps, list[Item]]:
    """Open what the service opens, then watch with a threshold that nothing reaches."""
    fds, places = probes.fds, probes.description.percpu
    PerfReader(fds["map:events"], lambda _: None).close()
    items = [Item("perf buffers", State.OK, "opened on every CPU")]
    maps = Maps(fds["map:cpus"], fds["map:config"], possible_cpus())
    watched = Watched(fds["map:watched"], maps, Detect().kthreads)
    link = fds.get("iter:task")
    try:
        if link is None:
            pids = ksoftirqd_pids()
            watched.learn_pids(pids)
        else:
            pids = watched.learn(iterate_tasks(link))
    except (StalldError, DecodeError) as error:
        items.append(_refused("ksoftirqd", str(error), "the waits of ksoftirqd cannot be seen"))
    else:
        names = list(watched.names.values())
        items += [_ksoftirqd(len(pids)), watched_threads(names, watched.left_out, link is not None)]
    maps.watch(
        _NEVER_NS,
        tick_ns=tick_ns,
        vec_mask=(1 << len(VECTORS)) - 1,
        lookback=1,
        tick_function=symbols.tick_functions,
        **offsets(places),
    )
    return maps, items


def watched_threads(names: Sequence[bytes], left_out: int, iterated: bool) -> Item:
    """Whose waits for a CPU are watched by default.

    Args:
        names: of the threads.
        left_out: how many more found no place.
        iterated: the kernel listed its threads.
    """
    kinds = [pattern.partition("/")[0] for pattern in Detect().kthreads]
    found = Counter(name.decode("ascii", "replace").partition("/")[0] for name in names)
    counts = ", ".join(f"{kind} {found[kind]}" for kind in kinds if found[kind])
    detail = f"{len(names)}: {counts}" if names else "none"
    if left_out:
        return Item(
            WATCHED,
            State.DEGRADED,
            f"{detail}; {left_out} more found no place",
            "the waits of those are not seen",
            "name fewer threads in detect.kthreads",
        )
    if not iterated:
        return Item(
            WATCHED,
            State.DEGRADED,
            f"{detail}; without the task iterator only ksoftirqd, once it has worked",
            "waits of other kernel threads are not seen, nor the first ones of each ksoftirqd",
            NEEDS_ITERATOR,
        )
    return Item(WATCHED, State.OK, f"{detail} (detect.kthreads)")


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


def _observe(
    probes: Probes, maps: Maps, tick_ns: int, symbols: Symbols
) -> tuple[list[Item], bool | None]:
    """Load one CPU; see how softirqs are served, what its ticks tell, what all that costs."""
    # One that keeps its tick, and is nobody's alone.
    mine = os.sched_getaffinity(0)
    cpu, online = max(mine - nohz_full() or mine), online_cpus()
    links = {**price.HOT_PATH, price.LOOKBACK: price.LOOKBACK}
    fds = {name: probes.fds.get(f"link:{hook}", -1) for name, hook in links.items()}
    missing = {m.ability: m.reason for m in probes.description.missing}
    known = any(symbols.tick_functions)
    enough = _ENOUGH_TICKS if known and fds[price.LOOKBACK] >= 0 else 0
    ticks = _kept(maps)

    def seen() -> bool:
        if _kept(maps)[cpu] - ticks[cpu] < enough:
            return False
        return maps.total("deferred") >= _ENOUGH or maps.serves_inline() is not None

    counts, took_s = "", 0.0
    before, begun_ns = softnet_stat(cpu, online), time.monotonic_ns()
    with price.Meter({name: fd for name, fd in fds.items() if fd >= 0}) as meter:
        try:
            took_s = stimulate(cpu, seen)
        except OSError as error:
            counts = f"could not load CPU {cpu}: {error}"
    arrived = [now - then for now, then in zip(_kept(maps), ticks, strict=True)]
    looked_ns = time.monotonic_ns() - begun_ns
    rings = Rings(probes.fds["map:rings"], probes.fds["map:napis"], maps)
    look = Look(
        cpu=cpu,
        took_ms=round(looked_ns / 1e6),
        refused=missing.get(LOOKBACK, ""),
        hidden=symbols.item.state is not State.OK,
        known=known,
        arrived=arrived[cpu],
        ticks=[tick for tick in rings.ticks(cpu) if tick.time_ns >= begun_ns],
        before=before,
        after=softnet_stat(cpu, online),
        places=probes.description.percpu,
        steal_version=maps.cpus[cpu].steal_version,
    )
    inline = None if counts else maps.serves_inline()
    counts = counts or (
        f"while ksoftirqd waited, {maps.total('inline_served')} softirqs ran, in "
        f"{maps.total('deferred')} cases they were left to it (CPU {cpu} loaded for "
        f"{took_s * 1e3:.0f} ms)"
    )
    costs = price.lookback_price(meter.costs, sum(arrived), tick_ns, meter.reason)
    items = [
        behaviour_item(inline, counts, symbols.defers),
        look_back(look, costs),
        steal_clock(look, is_virtual()),
        softnet_counters(look),
        nmi_sampler(probes),
        price.price(meter.costs, meter.reason),
    ]
    return items, inline


def _kept(maps: Maps) -> list[int]:
    """How many ticks each CPU has kept, ever."""
    return [sum(state.ticks) for state in maps.cpus]


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
    if threads_softirqs():
        effect = "only threads serve softirqs: what keeps them from the CPU delays the network"
        return Item(name, State.OK, f"threaded: {counts}; {symbol}", effect)
    if inline:
        effect = "a waiting ksoftirqd alone does no harm: level info, starved is empty"
        return Item(name, State.OK, f"inline: {counts}; {symbol}", effect)
    effect = "every stall of ksoftirqd delays the network as long"
    return Item(name, State.OK, f"deferred: {counts}; {symbol}", effect)
