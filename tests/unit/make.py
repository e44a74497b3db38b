"""Makes records and observations for tests: every field has a plain value unless told."""

from __future__ import annotations

from typing import Any

from stalld.decode import HEAD
from stalld.records import (
    USER_STACK_DEPTH,
    VEC_NONE,
    VECTORS,
    RecordType,
    Source,
    StallRecord,
)
from stalld.track.stall import Observation

MS = 1_000_000
T0 = 1_000_000 * MS
"""When stalls begin, unless told."""
THRESHOLD = 10 * MS


def waits(**by_name: int) -> tuple[int, ...]:
    """One wait per vector, those named."""
    return tuple(by_name.get(name, 0) for name in VECTORS)


def record(**changes: Any) -> StallRecord:
    """The first sample of a stall, 12 ms after it began."""
    fields: dict[str, Any] = {
        "type": RecordType.SAMPLE,
        "source": Source.TICK,
        "cpu": 0,
        "seq": 1,
        "time_ns": T0 + 12 * MS,
        "started_ns": T0,
        "ksoftirqd_wait_ns": 0,
        "serving_ns": 0,
        "cgroup_id": 77,
        "wait_ns": waits(),
        "tgid": 100,
        "tid": 101,
        "task_flags": 0,
        "policy": 0,
        "prio": 120,
        "serving_vec": VEC_NONE,
        "ksoftirqd_pid": 16,
        "switches": 0,
        "sample_nr": 1,
        "lost": 0,
        "comm": b"spinner",
        "kernel_stack": (),
        "user_stack": (),
    }
    return StallRecord(**(fields | changes))


def observation(
    mode: str | None = "kernel",
    frames: tuple[str, ...] = ("spin+0x10", "do_syscall_64+0x5"),
    enabled: bool = False,
    below: str | None = None,
    **changes: Any,
) -> Observation:
    """A record with what its stack says."""
    return Observation(record(**changes), mode, frames, enabled, below)


def sample(nr: int, at_ms: int, **changes: Any) -> Observation:
    """The ``nr``-th sample, ``at_ms`` after the stall began."""
    return observation(**{"sample_nr": nr, "time_ns": T0 + at_ms * MS, **changes})


def close(samples: int, at_ms: int, **changes: Any) -> Observation:
    """The closing record after ``samples`` samples."""
    how = {
        "type": RecordType.CLOSE,
        "source": Source.ENTRY,
        "sample_nr": samples,
        "time_ns": T0 + at_ms * MS,
    }
    return observation(**(how | changes))


def encode(given: StallRecord, padding: int = 0) -> bytes:
    """The bytes that the kernel would write, and what the perf buffer adds."""
    user = given.user_stack + (0,) * (USER_STACK_DEPTH - len(given.user_stack))
    head = HEAD.pack(
        *given[:9],
        *given.wait_ns,
        *given[10:20],
        len(given.kernel_stack) * 8,
        len(given.user_stack) * 8,
        given.comm,
        *user,
    )
    stack = b"".join(address.to_bytes(8, "little") for address in given.kernel_stack)
    return head + stack + bytes(padding)
