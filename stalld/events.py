"""Events as the contract tells them (docs/events.md, ``schema.json``): plain dicts.

Pure: whatever a kernel or a process says comes in as arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from stalld.enrich.identity import Identity
from stalld.enrich.nic import Inventory
from stalld.enrich.nic_hints import Facts, hints, joined
from stalld.records import VECTORS
from stalld.rings import Napi
from stalld.track.evidence import path
from stalld.track.fold import Reason, Suppressed
from stalld.track.hints import hint
from stalld.track.model import SERIOUS_FACTOR, Blocker, Handler, Net, Tick, Update

SCHEMA = "softirq-stalld/1"

Event = dict[str, Any]

# include/uapi/linux/sched.h
_POLICIES = {0: "other", 1: "fifo", 2: "rr", 3: "batch", 5: "idle", 6: "deadline", 7: "ext"}

MAX_NET_HINTS = 1
"""Sentences of a stall's hint that are about packets, besides the one about its cause."""

LOOKBACK_FRAMES = 10
"""Innermost frames of a look-back stack: journald cuts lines at 48 KiB."""


def rfc3339(wall_ns: int) -> str:
    """UTC with microseconds: ``2026-01-02T03:04:05.678901Z``."""
    seconds, rest = divmod(wall_ns, 1_000_000_000)
    return f"{_second(seconds)}.{rest // 1000:06}Z"


@lru_cache(maxsize=8)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().removesuffix("+00:00")


def milliseconds(ns: int) -> float:
    """Nanoseconds as the contract's ``_ms`` numbers: microsecond resolution."""
    return round(ns / 1e6, 3)


def text(raw: bytes) -> str:
    """A name from the kernel as valid Unicode; bytes that are none stand as ``\\xNN``."""
    return raw.decode("utf-8", "backslashreplace")


def stall_level(update: Update, threshold_ns: int) -> str:
    """``info`` when nothing starved, else ``warning``, from 10 times the threshold ``error``.

    Vectors starve, and so do interrupts while none can come.
    """
    starved = [*update.starved.values(), *([update.late_ns] if update.late_ns else [])]
    longest = max(starved, default=0)
    if not longest:
        return "info"
    return "error" if longest >= SERIOUS_FACTOR * threshold_ns else "warning"


def stall(
    update: Update,
    *,
    stall_id: str,
    boot_wall_ns: int,
    sampler: str,
    names: Mapping[int, bytes],
    identity: Identity,
    inventory: Inventory | None = None,
) -> Event:
    """The ``stall`` event.

    Args:
        update: from the tracker.
        stall_id: the same in all lines of one stall.
        boot_wall_ns: wall-clock time of CLOCK_MONOTONIC zero.
        sampler: what takes the samples: ``tick`` or ``none``.
        names: pid → name of the watched threads.
        identity: of the blocker.
        inventory: which queues the CPUs serve; None: not known.
    """
    return {
        "phase": update.phase.value,
        "stall_id": stall_id,
        "cpu": update.cpu,
        "started_at": rfc3339(boot_wall_ns + update.started_ns),
        "duration_ms": milliseconds(update.duration_ns),
        "verdict": update.verdict.value,
        "starved": {vec: milliseconds(wait) for vec, wait in update.starved.items()},
        "ksoftirqd": {
            "pid": update.ksoftirqd_pid,
            "runnable_ms": milliseconds(update.ksoftirqd_wait_ns),
        }
        if update.ksoftirqd_wait_ns
        else None,
        "waiting": [
            {"pid": pid, "comm": _name(names.get(pid)), "runnable_ms": milliseconds(wait)}
            for pid, wait in update.waiting.items()
        ],
        "handler": _handler(update.handler),
        "blocker": _blocker(update.blocker, identity),
        "stack": {
            "kernel": list(update.kernel_stack),
            "user": [f"{address:#x}" for address in update.user_stack],
            "captured": update.captured,
        },
        "evidence": {
            "sampler": "nmi" if update.nmi else sampler,
            "samples": update.samples,
            "expected": update.expected,
            "lost": update.lost,
            "switches": update.switches,
            "late_ms": milliseconds(update.late_ns),
            "stolen_ms": None if update.stolen_ns is None else milliseconds(update.stolen_ns),
            "serves_inline": update.serves_inline,
            "ended": update.ended.value if update.ended else None,
        },
        "lookback": None
        if update.lookback is None
        else lookback(update.lookback, update.started_ns),
        "net": _net(update.net, queues(inventory, update.cpu)),
        "hint": joined(hint(update), *hints(_facts(update, inventory), MAX_NET_HINTS)),
    }


def _name(comm: bytes | None) -> str | None:
    return None if comm is None else text(comm)


def _handler(handler: Handler | None) -> Event | None:
    if handler is None:
        return None
    return {
        "vector": VECTORS[handler.vec],
        "service_ms": milliseconds(handler.service_ns),
        "device": _name(handler.device),
        "work": handler.work,
        "budget": handler.budget,
    }


@lru_cache(maxsize=8)
def lookback(ticks: Sequence[Tick], started_ns: int) -> list[Event]:
    """Ticks that follow each other and show the same are one entry, the first of them.

    All lines of a stall have the same list: not to be changed.
    """
    entries: list[Event] = []
    last = None
    for tick in ticks:
        key = (tick.sample.tid, tick.mode, path(tick.frames))
        if key == last:
            entries[-1]["ticks"] += 1
            continue
        last = key
        entries.append(
            {
                "ago_ms": milliseconds(started_ns - tick.sample.time_ns),
                "comm": text(tick.sample.comm),
                "pid": tick.sample.tgid,
                "mode": tick.mode,
                "stack": list(tick.frames[:LOOKBACK_FRAMES]),
                "ticks": 1,
            }
        )
    return entries


def queues(inventory: Inventory | None, cpu: int) -> list[Event] | None:
    """The queues that ``cpu`` serves; None: it is not known."""
    if inventory is None:
        return None
    return [
        {
            "device": queue.device,
            "queue": queue.number,
            "irq": queue.irq,
            "rps": queue.rps,
            **inventory.by_name[queue.device].settings._asdict(),
        }
        for queue in inventory.queues.get(cpu, ())
    ]


def _facts(update: Update, inventory: Inventory | None) -> Facts:
    net = update.net
    return Facts(
        cpu=update.cpu,
        dropped=net.dropped or 0,
        flow_limited=net.flow_limited or 0,
        squeezed=net.squeezed or 0,
        inventory=inventory,
    )


def _net(net: Net, served: list[Event] | None) -> Event:
    return {
        "net_rx_runs": net.runs,
        "net_rx_ms": milliseconds(net.service_ns),
        "packets": net.packets,
        "time_squeeze": net.squeezed,
        "dropped": net.dropped,
        "received_rps": net.received_rps,
        "flow_limit": net.flow_limited,
        "backlog": net.backlog,
        "queues": served,
        "napi": None if net.napi is None else napi(net.napi),
    }


def napi(polled: Napi) -> list[Event]:
    """What was polled, by device; those that could not be told apart have no name."""
    return [
        {
            "device": text(name) if name else None,
            "ifindex": ifindex or None,
            "polls": counts.polls,
            "packets": counts.packets,
            "exhausted": counts.exhausted,
        }
        for (ifindex, name), counts in polled.items()
    ]


def _blocker(blocker: Blocker | None, identity: Identity) -> Event | None:
    if blocker is None:
        return None
    # The kernel's scale: a deadline task has -1, real time 0 to 98, the rest 100 + nice + 20.
    prio = blocker.prio if blocker.prio < 1 << 31 else -1
    parent, place = identity.parent, identity.place
    return {
        "pid": blocker.tgid,
        "tid": blocker.tid,
        "comm": text(blocker.comm),
        "cmdline": identity.cmdline,
        "exe": identity.exe,
        "uid": identity.uid,
        "parent": {"pid": parent[0], "comm": parent[1]} if parent else None,
        "ns_pid": identity.ns_pid,
        "mode": blocker.mode,
        "policy": _POLICIES.get(blocker.policy),
        "rt_priority": 99 - prio if 0 <= prio < 99 else None,
        "nice": prio - 120 if 100 <= prio < 140 else None,
        "syscall": identity.syscall,
        "file": identity.file,
        "cgroup": place.path,
        "unit": place.unit,
        "runtime": place.runtime,
        "container_id": place.container_id,
        "pod_uid": place.pod_uid,
    }


def suppressed(given: Suppressed, *, boot_wall_ns: int, like: str | None) -> Event:
    """The ``suppressed`` event; its level is ``given.level``.

    Args:
        given: from the folder, or what the kernel counted.
        boot_wall_ns: wall-clock time of CLOCK_MONOTONIC zero.
        like: stall id of ``given.like``.
    """
    by_rate = given.reason is Reason.RATE
    blocker = given.blocker
    return {
        "reason": given.reason.value,
        "cpus": sorted(given.cpus),
        "count": given.stalls,
        "total_ms": milliseconds(given.total_ns),
        "longest_ms": None if by_rate else milliseconds(given.longest_ns),
        "since": rfc3339(boot_wall_ns + given.since_ns),
        "until": rfc3339(boot_wall_ns + given.until_ns),
        "verdict": given.verdict.value if given.verdict else None,
        "blocker": {"pid": blocker.tgid, "comm": text(blocker.comm)} if blocker else None,
        "stack": list(given.kernel_stack),
        "like": like,
        "hint": "the CPU had more stalls than storm.stalls_per_second lets through: "
        "the kernel only counted these"
        if by_rate
        else "one blocker and stack had more stalls than storm.identical_per_minute lets through: "
        "`like` is one of those written",
    }


def missing(abilities: Sequence[Any]) -> list[Event]:
    """What this kernel refused, for ``started``."""
    return [{"ability": m.ability, "reason": m.reason, "effect": m.effect} for m in abilities]
