"""Makes records, observations and hosts for tests: every field has a plain value unless told."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from stalld import records
from stalld.decode import HEAD, TICK, WHO
from stalld.records import (
    LOOKBACK_DEPTH,
    LOOKBACK_RINGS,
    LOOKBACK_SAMPLES,
    NAPI_SLOTS,
    USER_STACK_DEPTH,
    VEC_NONE,
    VECTORS,
    WAITERS,
    Known,
    NamePath,
    RecordType,
    Source,
    StallRecord,
    TaskRecord,
    TickKind,
    TickSample,
)
from stalld.rings import Napi, NapiSlot, Rings
from stalld.state import CpuState, Maps, WatchConfig
from stalld.track.model import Observation, Tick

MS = 1_000_000
T0 = 1_000_000 * MS
"""When stalls begin, unless told."""
THRESHOLD = 10 * MS
TICK_NS = 4 * MS
SOFTNET = frozenset(("softnet", "dropped", "received_rps", "flow_limit", "backlog"))
"""All of softnet_data that may be read."""


def waits(**by_name: int) -> tuple[int, ...]:
    """One wait per vector, those named."""
    return tuple(by_name.get(name, 0) for name in VECTORS)


def waiters(ksoftirqd: int = 0, *others: int) -> tuple[int, ...]:
    """One wait, or one pid, per watched thread."""
    return (ksoftirqd, *others, *[0] * (WAITERS - 1 - len(others)))


def record(**changes: Any) -> StallRecord:
    """The first sample of a stall, 12 ms after it began."""
    fields: dict[str, Any] = {
        "type": RecordType.SAMPLE,
        "source": Source.TICK,
        "cpu": 0,
        "seq": 1,
        "time_ns": T0 + 12 * MS,
        "started_ns": T0,
        "late_ns": 0,
        "served_ns": 0,
        "steal_ns": 0,
        "net_rx_ns": 0,
        "switched_ns": 0,
        "cgroup_id": 77,
        "wait_ns": waits(),
        "waiter_ns": waiters(),
        "waiter_pid": waiters(16),
        "tgid": 100,
        "tid": 101,
        "task_flags": 0,
        "policy": 0,
        "prio": 120,
        "serving_vec": VEC_NONE,
        "served_vec": VEC_NONE,
        "switches": 0,
        "sample_nr": 1,
        "lost": 0,
        "net_rx_runs": 0,
        "processed": 0,
        "squeezed": 0,
        "dropped": 0,
        "received_rps": 0,
        "flow_limit": 0,
        "backlog": 0,
        "napi_ifindex": 0,
        "napi_work": 0,
        "napi_budget": 0,
        "napi_name": b"",
        "comm": b"spinner",
        "kernel_stack": (),
        "user_stack": (),
    }
    fields |= changes
    if fields["switches"] and "switched_ns" not in changes:
        # It got the CPU just now, for all that is told.
        fields["switched_ns"] = fields["time_ns"]
    return StallRecord(**fields)


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


def tick(at_ms: float, **changes: Any) -> TickSample:
    """What the ring says of the tick ``at_ms`` after a stall began, before it if negative."""
    fields: dict[str, Any] = {
        "time_ns": T0 + round(at_ms * MS),
        "steal_ns": 0,
        "net_rx_ns": 0,
        "net_rx_runs": 0,
        "processed": 0,
        "squeezed": 0,
        "dropped": 0,
        "received_rps": 0,
        "flow_limit": 0,
        "backlog": 0,
        "tgid": 100,
        "tid": 101,
        "policy": 0,
        "prio": 120,
        "kind": TickKind.STACK,
        "serving": 0,
        "comm": b"spinner",
        "stack": (0x10, 0x20),
    }
    return TickSample(**(fields | changes))


def recent(ticks: Sequence[TickSample], since_ns: int) -> list[TickSample]:
    """Those after ``since_ns``, and the last one until then."""
    return [each for each in ticks if each.time_ns <= since_ns][-1:] + [
        each for each in ticks if each.time_ns > since_ns
    ]


class MadeHost:
    """A machine that answers as it is told, and counts how often it was asked for ticks.

    Args:
        before: the ticks that the kernel kept when a stall was first heard of.
        meanwhile: those at each look after that. What was before the stall stays.
        polls: what was polled in any stall.
    """

    def __init__(
        self,
        before: Sequence[TickSample] = (),
        meanwhile: Sequence[TickSample] = (),
        *,
        polls: Napi | None = MappingProxyType({}),
        inline: bool | None = True,
        tells_steal: bool = True,
        counts: Container[str] = SOFTNET,
    ) -> None:
        self.before = before
        self.meanwhile = meanwhile
        self.polls = polls
        self.inline = inline
        self.steal_told = tells_steal
        self.counted = counts
        self.looks = 0

    def ticks(self, cpu: int) -> Sequence[TickSample]:
        """``before``."""
        return self.before

    def recent(self, cpu: int, since_ns: int) -> Sequence[TickSample]:
        """Of ``before`` the first time."""
        self.looks += 1
        return recent(self.before if self.looks == 1 else self.meanwhile, since_ns)

    def polled(self, cpu: int, seq: int) -> Napi | None:
        """As told."""
        return self.polls

    def explain(self, sample: TickSample) -> Tick:
        """Each address has a name; without any the tick came in user mode."""
        frames = tuple(f"f{address:x}+0x1" for address in sample.stack)
        return Tick(sample, "kernel" if frames else "user", frames)

    def counts(self) -> Container[str]:
        """As told."""
        return self.counted

    threaded = False

    def serves_inline(self) -> bool | None:
        """As told."""
        return self.inline

    def tells_steal(self, cpu: int) -> bool:
        """As told."""
        return self.steal_told


def encode(given: StallRecord, padding: int = 0) -> bytes:
    """The bytes that the kernel would write, and what the perf buffer adds."""
    user = given.user_stack + (0,) * (USER_STACK_DEPTH - len(given.user_stack))
    fields = given._asdict()
    words: list[Any] = []
    for name in list(fields)[: list(fields).index("napi_name")]:
        words += fields[name] if isinstance(fields[name], tuple) else [fields[name]]
    head = HEAD.pack(
        *words,
        given.napi_name,
        len(given.kernel_stack) * 8,
        len(given.user_stack) * 8,
        given.comm,
        *user,
    )
    stack = b"".join(address.to_bytes(8, "little") for address in given.kernel_stack)
    return head + stack + bytes(padding)


def task(**changes: Any) -> TaskRecord:
    """Who the task of :func:`record` is."""
    fields: dict[str, Any] = {
        "type": RecordType.TASK,
        "source": Source.TICK,
        "cpu": 0,
        "seq": 1,
        "time_ns": T0 + 12 * MS,
        "file_inode": 0,
        "known": Known.ARGS | Known.CGROUP,
        "task_flags": 0,
        "tgid": 100,
        "tid": 101,
        "uid": 1000,
        "parent_pid": 1,
        "ns_pid": 0,
        "syscall": 0,
        "parent_comm": b"init",
        "file_system": b"",
        "args": b"spinner\0-v\0",
        "cgroup": NamePath((), cut=False),
        "controller": NamePath((), cut=False),
        "exe": NamePath((b"spinner", b"bin", b"usr"), cut=False),
        "file": NamePath((), cut=False),
    } | changes
    fields.setdefault("args_total", len(fields["args"]))
    return TaskRecord(**fields)


def encode_task(given: TaskRecord, padding: int = 0) -> bytes:
    """The bytes that the kernel would write, and what the perf buffer adds."""
    fields: tuple[Any, ...] = given
    *numbers, parent_comm, file_system, args = fields[: -records.PATH_COUNT]
    paths: tuple[NamePath, ...] = fields[-records.PATH_COUNT :]
    names = b"".join(name + b"\0" for path in paths for name in path.names)
    cut = sum(path.cut << at for at, path in enumerate(paths))
    counts = [len(path.names) for path in paths]
    sizes = [len(args), *counts, cut, len(names)]
    return WHO.pack(*numbers, *sizes, parent_comm, file_system, args) + names + bytes(padding)


def encode_tick(given: TickSample) -> bytes:
    """The bytes of one entry of the ring, its unused frames left from another one."""
    *numbers, comm, stack = given
    rest = (0xDEAD,) * (LOOKBACK_DEPTH - len(stack))
    return TICK.pack(*numbers, len(stack) * 8, comm, *stack, *rest)


@contextmanager
def memory(size: int) -> Iterator[int]:
    """A descriptor that can be mapped as that of a BPF array can."""
    fd = os.memfd_create("map")
    os.ftruncate(fd, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
    try:
        yield fd
    finally:
        os.close(fd)


def maps(cpus: int = 4) -> Maps:
    """The shared maps, in memory of our own."""
    with (
        memory(ctypes.sizeof(CpuState) * cpus) as cpus_fd,
        memory(ctypes.sizeof(WatchConfig)) as config_fd,
    ):
        return Maps(cpus_fd, config_fd, cpus)


def rings(maps: Maps) -> Rings:
    """The rings and NAPI tables of these CPUs, likewise."""
    cpus = len(maps.cpus)
    with (
        memory(cpus * LOOKBACK_RINGS * LOOKBACK_SAMPLES * TICK.size) as rings_fd,
        memory(cpus * NAPI_SLOTS * ctypes.sizeof(NapiSlot)) as napis_fd,
    ):
        return Rings(rings_fd, napis_fd, maps)


def keep(rings: Rings, cpu: int, given: TickSample) -> None:
    """Write one tick into a ring as ``handle_tick`` does."""
    at = place(rings, cpu)
    raw = encode_tick(given)
    rings._samples[at : at + 8] = bytes(8)
    rings._samples[at + 8 : at + TICK.size] = raw[8:]
    rings._samples[at : at + 8] = raw[:8]
    state = rings._cpus[cpu]
    state.ticks[state.ring] += 1


def place(rings: Rings, cpu: int) -> int:
    """Where the next tick of a CPU goes."""
    state = rings._cpus[cpu]
    number = state.ticks[state.ring] % LOOKBACK_SAMPLES
    return int((cpu * LOOKBACK_RINGS + state.ring) * LOOKBACK_SAMPLES + number) * TICK.size
