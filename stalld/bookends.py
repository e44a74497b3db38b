"""The first and the last event of a run: what is attached, and what came of it."""

from __future__ import annotations

import platform
from collections.abc import Mapping

from stalld import __version__, events
from stalld.config import Settings
from stalld.enrich.asking import Asking, Unknown
from stalld.pipeline import Pipeline
from stalld.probe.protocol import Description
from stalld.rings import Rings
from stalld.state import Maps

_HIDDEN = {
    "ability": "kernel symbols",
    "reason": "the kernel hides its addresses (CAP_SYSLOG is missing, or "
    "kernel.kptr_restrict is 2)",
    "effect": "stacks are bare addresses, modes and verdicts are unknown, what ran before a "
    "stall is not known, and times with interrupts off are not seen",
}
_NO_TICK = {
    "ability": "tick function",
    "reason": "the kernel's symbols do not name what the timer of the tick calls",
    "effect": "what ran before a stall is not known, and times with interrupts off are not seen",
}


def started(
    settings: Settings,
    description: Description,
    maps: Maps,
    *,
    cpus: int,
    kthreads: int,
    tick_ns: int,
    hidden: bool,
    missing: list[events.Event],
    sinks: list[str],
) -> events.Event:
    """The ``started`` event.

    Args:
        cpus: whose ksoftirqd is watched.
        kthreads: how many threads are.
        hidden: the kernel hides its addresses.
        missing: what the daemon itself had to do without.
        sinks: where events go.
    """
    attached = {item.hook for item in description.attached}
    ticks = any(maps.config.tick_function)
    lacks = events.missing(description.missing) + missing
    if hidden:
        lacks.append(_HIDDEN)
    elif not ticks:
        lacks.append(_NO_TICK)
    return {
        "version": __version__,
        "kernel": platform.release(),
        "threshold_ms": settings.threshold_ms,
        "tick_ms": events.milliseconds(tick_ns),
        "vectors": list(settings.config.detect.vectors),
        "cpus": cpus,
        "kthreads": kthreads,
        "sampler": "tick" if "hrtimer_expire_entry" in attached else "none",
        "lookback": bool(
            ticks and maps.config.lookback and any(h.endswith("lookback") for h in attached)
        ),
        "net_rx_action": description.net_rx_action,
        "structs": description.structs,
        "attached": [f"{item.hook} ({item.how})" for item in description.attached],
        "missing": lacks,
        "serves_inline": maps.serves_inline(),
        "sinks": sinks,
    }


def stopped(
    pipeline: Pipeline,
    asking: Asking,
    maps: Maps,
    rings: Rings,
    uptime_ns: int,
    sinks: list[events.Event],
    faults: Mapping[str, int],
) -> events.Event:
    """The ``stopped`` event: totals of the run.

    Args:
        sinks: what became of all events.
        faults: why something was left out of events, and how often.
    """
    return {
        "uptime_ms": events.milliseconds(uptime_ns),
        "stalls": pipeline.stalls,
        "records": pipeline.records,
        "records_lost": pipeline.lost,
        "records_undecodable": pipeline.undecodable,
        "stale_tasks": maps.total("stale"),
        "missed_services": maps.total("missed"),
        "unwatched_wakeups": maps.total("unwatched"),
        "suppressed": pipeline.suppressed,
        "net_rx_runs": maps.total("net_rx_runs"),
        "net_rx_ms": events.milliseconds(maps.total("net_rx_ns")),
        "net_rx_max_ms": events.milliseconds(max(s.net_rx_max_ns for s in maps.cpus)),
        "napi": events.napi(rings.napi_totals()),
        "serves_inline": maps.serves_inline(),
        "faults": [{"reason": reason, "count": count} for reason, count in sorted(faults.items())],
        "enrichment": {
            **{reason.value: asking.counts[reason] for reason in Unknown},
            "longest_wait_ms": events.milliseconds(round(asking.longest_wait_s * 1e9)),
        },
        "sinks": sinks,
    }
