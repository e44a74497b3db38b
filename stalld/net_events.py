"""The ``softnet`` and ``nic`` events. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stalld import events
from stalld.enrich import nic_hints
from stalld.enrich.driver_stats import Lost
from stalld.enrich.netlink import LinkStats
from stalld.enrich.nic import Device, Inventory
from stalld.enrich.nic_hints import Facts
from stalld.enrich.softnet import Softnet
from stalld.track.rates import Episode, Phase

Told = tuple[str, events.Event]
"""Level, and the fields of the event."""

MAX_HINTS = 2
"""Sentences of one hint."""
DRIVER = "driver: "
"""Stands before a driver's own name for a counter, in the counts of an episode."""


def softnet_counters(row: Softnet) -> dict[str, int]:
    """What is to be watched of one CPU; what its kernel does not tell is left out."""
    counters: dict[str, int | None] = {
        "packets": row.processed,
        "dropped": row.dropped,
        "time_squeeze": row.squeezed,
        "received_rps": row.received_rps,
        "flow_limit": row.flow_limited,
    }
    return {name: count for name, count in counters.items() if count is not None}


def nic_counters(stats: LinkStats, lost: Mapping[Lost, int]) -> dict[str, int]:
    """What is to be watched of one device.

    ``drops`` is all that was lost on it. Drivers count packets that found no room as ``over`` or
    as ``fifo``, some as both.
    """
    counters = stats._asdict()
    counters["drops"] = stats.dropped + stats.missed + max(stats.over, stats.fifo)
    queues = [count for one, count in lost.items() if one.queue is not None]
    if queues:
        counters["queue_drops"] = sum(queues)
    counters.update({DRIVER + one.name: count for one, count in lost.items()})
    return counters


def softnet(
    cpu: int,
    episode: Episode,
    backlog: int | None,
    inventory: Inventory | None,
    *,
    drops_per_s: float,
    boot_wall_ns: int,
) -> Told:
    """The ``softnet`` event.

    Args:
        backlog: packets that wait there now.
        drops_per_s: what is allowed.
        boot_wall_ns: wall-clock time of CLOCK_MONOTONIC zero.
    """
    counts = episode.counts
    facts = Facts(
        cpu=cpu,
        dropped=counts["dropped"],
        flow_limited=counts.get("flow_limit", 0),
        squeezed=counts["time_squeeze"],
        inventory=inventory,
    )
    drops = episode.per_second.get("dropped", 0.0) > drops_per_s
    return ("warning" if drops else "info"), {
        "phase": episode.phase.value,
        "cpu": cpu,
        **_span(episode, boot_wall_ns),
        "packets": counts["packets"],
        "dropped": counts["dropped"],
        "time_squeeze": counts["time_squeeze"],
        "received_rps": counts.get("received_rps"),
        "flow_limit": counts.get("flow_limit"),
        "backlog": backlog,
        "dropped_per_s": _rate(episode, "dropped"),
        "time_squeeze_per_s": _rate(episode, "time_squeeze"),
        "queues": events.queues(inventory, cpu),
        "hint": nic_hints.joined(*nic_hints.hints(facts, MAX_HINTS)),
    }


def nic(
    name: str,
    ifindex: int,
    episode: Episode,
    counters: Sequence[Lost],
    inventory: Inventory | None,
    *,
    boot_wall_ns: int,
) -> Told:
    """The ``nic`` event.

    Args:
        counters: the driver's own that are lost packets.
        boot_wall_ns: wall-clock time of CLOCK_MONOTONIC zero.
    """
    counts = episode.counts
    device = inventory.devices.get(ifindex) if inventory else None
    if device is not None and device.name != name:
        device = None  # It was looked at before it got this name.
    in_rings = counts["missed"] + max(counts["over"], counts["fifo"])
    facts = Facts(
        device=device,
        lost=max(in_rings, counts.get("queue_drops", 0)),
        refused=counts["dropped"],
        inventory=inventory,
    )
    grown = [(one, counts.get(DRIVER + one.name, 0)) for one in counters]
    return ("info" if episode.phase is Phase.ENDED else "warning"), {
        "phase": episode.phase.value,
        "device": name,
        "ifindex": ifindex,
        "driver": device.driver if device else None,
        **_span(episode, boot_wall_ns),
        "packets": counts["packets"],
        "drops": counts["drops"],
        "dropped": counts["dropped"],
        "missed": counts["missed"],
        "over": counts["over"],
        "fifo": counts["fifo"],
        "nohandler": counts["nohandler"],
        "drops_per_s": max(_rate(episode, "drops"), _rate(episode, "queue_drops")),
        "queues": [
            {"queue": one.queue, "drops": count, "counter": one.name}
            for one, count in grown
            if count
        ],
        "cpus": sorted(_cpus(device)),
        "ring": device.settings.ring if device else None,
        "ring_max": device.settings.ring_max if device else None,
        "hint": nic_hints.joined(*nic_hints.hints(facts, MAX_HINTS)),
    }


def _cpus(device: Device | None) -> frozenset[int]:
    return frozenset().union(*device.irqs.values(), *device.rps.values()) if device else frozenset()


def _rate(episode: Episode, name: str) -> float:
    return round(episode.per_second.get(name, 0.0), 1)


def _span(episode: Episode, boot_wall_ns: int) -> events.Event:
    return {
        "since": events.rfc3339(boot_wall_ns + episode.since_ns),
        "until": events.rfc3339(boot_wall_ns + episode.until_ns),
    }
