"""Events as the contract tells them (docs/events.md, ``schema.json``): plain dicts.

Pure: whatever a kernel or a process says comes in as arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from stalld.track.stall import Blocker, Update
from stalld.track.verdict import HINTS

SCHEMA = "softirq-stalld/1"

Event = dict[str, Any]

# include/uapi/linux/sched.h
_POLICIES = {0: "other", 1: "fifo", 2: "rr", 3: "batch", 5: "idle", 6: "deadline", 7: "ext"}

ERROR_FACTOR = 10
"""A starved vector is an error from this many times the threshold."""


def rfc3339(wall_ns: int) -> str:
    """UTC with microseconds: ``2026-01-02T03:04:05.678901Z``."""
    seconds, rest = divmod(wall_ns, 1_000_000_000)
    moment = datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest // 1000)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def milliseconds(ns: int) -> float:
    """Nanoseconds as the contract's ``_ms`` numbers: microsecond resolution."""
    return round(ns / 1e6, 3)


def text(raw: bytes) -> str:
    """A name from the kernel as valid Unicode; bytes that are none stand as ``\\xNN``."""
    return raw.decode("utf-8", "backslashreplace")


def stall_level(update: Update, threshold_ns: int) -> str:
    """``info`` when nothing starved, else ``warning``, from 10 times the threshold ``error``."""
    longest = max(update.starved.values(), default=0)
    if not longest:
        return "info"
    return "error" if longest >= ERROR_FACTOR * threshold_ns else "warning"


def stall(update: Update, *, stall_id: str, boot_wall_ns: int, sampler: str) -> Event:
    """The ``stall`` event.

    Args:
        update: from the tracker.
        stall_id: the same in all lines of one stall.
        boot_wall_ns: wall-clock time of CLOCK_MONOTONIC zero.
        sampler: what took the samples: ``tick`` or ``none``.
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
        "blocker": _blocker(update.blocker),
        "stack": {
            "kernel": list(update.kernel_stack),
            "user": [f"{address:#x}" for address in update.user_stack],
            "captured": update.captured,
        },
        "evidence": {
            "sampler": sampler,
            "samples": update.samples,
            "expected": update.expected,
            "lost": update.lost,
            "switches": update.switches,
            "ended": update.ended.value if update.ended else None,
        },
        "lookback": None,
        "net": None,
        "hint": HINTS.get(update.verdict),
    }


def _blocker(blocker: Blocker | None) -> Event | None:
    if blocker is None:
        return None
    return {
        "pid": blocker.tgid,
        "tid": blocker.tid,
        "comm": text(blocker.comm),
        "cmdline": None,
        "mode": blocker.mode,
        "policy": _POLICIES.get(blocker.policy),
        "cgroup": None,
        "unit": None,
        "container_id": None,
        "pod_uid": None,
    }


def missing(abilities: Sequence[Any]) -> list[Event]:
    """What this kernel refused, for ``started``."""
    return [{"ability": m.ability, "reason": m.reason, "effect": m.effect} for m in abilities]
