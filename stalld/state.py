"""The maps shared with the BPF programs, as mappings of their memory.

Mirrors ``struct cpu_state`` and ``struct watch_config`` of ``bpf/records.h``.
Reading costs no system call. The programs write without locks, so a reader
sees each word whole, yet two words perhaps of different moments.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeVar

from stalld.records import BRIEF_BIT, COMM_LEN, LOOKBACK_RINGS, VEC_PENDING, VECTORS, WAITERS

TIMED_ALWAYS = sum(1 << VECTORS.index(name) for name in ("HI", "TASKLET"))

# Of struct's formats those for 4 and 8 bytes.
_WORDS: dict[int, Literal["H", "I", "Q"]] = {2: "H", 4: "I", 8: "Q"}
_Structure = TypeVar("_Structure", bound=ctypes.Structure)


class Waiter(ctypes.Structure):
    """``struct waiter``: a watched thread that waits for a CPU, or waited."""

    _fields_ = (
        ("task", ctypes.c_uint64),
        ("since_ns", ctypes.c_uint64),
        ("waited_ns", ctypes.c_uint64),
        ("waited_pid", ctypes.c_uint32),
        ("pid", ctypes.c_uint32),
    )


class CpuState(ctypes.Structure):
    """``struct cpu_state``: what one CPU knows about itself."""

    _fields_ = (
        ("waiting", ctypes.c_uint8 * WAITERS),
        ("active", ctypes.c_uint16),
        ("runs", ctypes.c_uint16),
        ("serving", ctypes.c_uint32),
        ("vec_mask", ctypes.c_uint32),
        ("timed_mask", ctypes.c_uint32),
        ("serving_since", ctypes.c_uint64),
        ("pending", ctypes.c_uint8 * VEC_PENDING),
        ("raise_jiffies", ctypes.c_uint64),
        ("jiffy_ns", ctypes.c_uint64),
        ("raised", ctypes.c_uint64 * len(VECTORS)),
        ("threshold_ns", ctypes.c_uint64),
        ("net_rx_since", ctypes.c_uint64),
        ("net_rx_runs", ctypes.c_uint64),
        ("net_rx_ns", ctypes.c_uint64),
        ("net_rx_max_ns", ctypes.c_uint64),
        ("napi_polls", ctypes.c_uint64),
        ("napi_packets", ctypes.c_uint64),
        ("waiters", Waiter * WAITERS),
        ("started_ns", ctypes.c_uint64),
        ("next_sample_ns", ctypes.c_uint64),
        ("spacing_ns", ctypes.c_uint64),
        ("ended_ns", ctypes.c_uint64),
        ("switched_ns", ctypes.c_uint64),
        ("waited_ns", ctypes.c_uint64 * len(VECTORS)),
        ("served_ns", ctypes.c_uint64),
        ("late_ns", ctypes.c_uint64),
        ("window_ns", ctypes.c_uint64),
        ("suppressed_ns", ctypes.c_uint64),
        ("last_tick_ns", ctypes.c_uint64),
        ("last_lookback_ns", ctypes.c_uint64),
        ("ticks", ctypes.c_uint64 * LOOKBACK_RINGS),
        ("tick_timer", ctypes.c_uint64),
        ("seq", ctypes.c_uint32),
        ("sample_nr", ctypes.c_uint32),
        ("switches", ctypes.c_uint32),
        ("served_vec", ctypes.c_uint32),
        ("muted", ctypes.c_uint32),
        ("window_stalls", ctypes.c_uint32),
        ("suppressed", ctypes.c_uint32),
        ("lost", ctypes.c_uint32),
        ("yields", ctypes.c_uint32),
        ("inline_served", ctypes.c_uint32),
        ("deferred", ctypes.c_uint32),
        ("stale", ctypes.c_uint32),
        ("missed", ctypes.c_uint32),
        ("unwatched", ctypes.c_uint32),
        ("steal_version", ctypes.c_uint32),
        ("hotplug", ctypes.c_uint32),
        ("source", ctypes.c_uint32),
        ("ring", ctypes.c_uint32),
        ("napi_wanted", ctypes.c_uint32),
        ("napi_ifindex", ctypes.c_uint32),
        ("napi_work", ctypes.c_uint32),
        ("napi_budget", ctypes.c_uint32),
        ("running", ctypes.c_uint64),
        ("napi_name", ctypes.c_char * COMM_LEN),
        ("told_task", ctypes.c_uint64),
    )


class WatchConfig(ctypes.Structure):
    """``struct watch_config``: ``threshold_ns`` 0 records nothing."""

    _fields_ = (
        ("threshold_ns", ctypes.c_uint64),
        ("tick_ns", ctypes.c_uint64),
        ("tick_function", ctypes.c_uint64 * 2),
        ("vec_mask", ctypes.c_uint32),
        ("max_samples", ctypes.c_uint32),
        ("max_stalls", ctypes.c_uint32),
        ("lookback", ctypes.c_uint32),
        ("steal_offset", ctypes.c_int32),
        ("cpustat_offset", ctypes.c_int32),
        ("softnet_offset", ctypes.c_int32),
        ("regs_offset", ctypes.c_int32),
        ("dropped_offset", ctypes.c_int32),
        ("dropped_more_offset", ctypes.c_int32),
        ("received_rps_offset", ctypes.c_int32),
        ("backlog_offset", ctypes.c_int32),
        ("flow_limit_offset", ctypes.c_int32),
        ("flow_count_offset", ctypes.c_int32),
    )


_OFFSET = "_offset"


def offsets(places: Mapping[str, int]) -> dict[str, int]:
    """The settings of :meth:`Maps.watch` that tell where things are.

    Args:
        places: see ``Description.percpu``; what is not there is not known.
    """
    names = [name for name, _ in WatchConfig._fields_ if name.endswith(_OFFSET)]
    return {name: places.get(name.removesuffix(_OFFSET), 0) for name in names}


class StallState(NamedTuple):
    """What the kernel says about the newest stall of a CPU."""

    seq: int
    active: bool
    ended_ns: int
    wait_ns: tuple[int, ...]
    waiter_ns: tuple[int, ...]
    waiter_pid: tuple[int, ...]


class Maps:
    """The ``cpus`` and ``config`` maps.

    Args:
        cpus_fd: array of ``cpu_state``, one per possible CPU.
        config_fd: array with the one ``watch_config``.
        cpus: possible CPUs.
    """

    def __init__(self, cpus_fd: int, config_fd: int, cpus: int) -> None:
        self.cpus = map_array(CpuState, cpus_fd, cpus)
        self.config = map_array(WatchConfig, config_fd, 1)[0]

    def watch(self, threshold_ns: int, **settings: int | list[int]) -> None:
        """Start detecting, or change the settings; the threshold goes last.

        Args:
            settings: further fields of ``struct watch_config``.
        """
        for name, value in settings.items():
            known = getattr(self.config, name)  # ctypes would take any name.
            if isinstance(value, int):
                setattr(self.config, name, value)
            else:
                known[:] = value
        brief = (threshold_ns >= 2 * self.config.tick_ns) << BRIEF_BIT
        for state in self.cpus:
            state.vec_mask = self.config.vec_mask
            # Those served at once by any kernel tell how it serves the others.
            state.timed_mask = self.config.vec_mask | TIMED_ALWAYS | brief
            state.threshold_ns = threshold_ns
        self.config.threshold_ns = threshold_ns

    def stop(self) -> None:
        """Make the programs record nothing more."""
        self.config.threshold_ns = 0

    def stall(self, cpu: int) -> StallState:
        """The newest stall of ``cpu``, whether or not its records arrived."""
        state = self.cpus[cpu]
        return StallState(
            state.seq,
            bool(state.active),
            state.ended_ns,
            tuple(state.waited_ns),
            tuple(waiter.waited_ns for waiter in state.waiters),
            tuple(waiter.waited_pid for waiter in state.waiters),
        )

    def total(self, counter: str) -> int:
        """Sum of one counter over all CPUs."""
        return sum(words(self.cpus, counter))

    def serves_inline(self) -> bool | None:
        """Does this kernel serve softirqs while ksoftirqd is runnable?

        Learned by behaviour: None until something was seen. Kernels before
        commit d15121be7485 (6.5) leave them to ksoftirqd instead.
        """
        inline, deferred = self.total("inline_served"), self.total("deferred")
        if deferred >= 2 and deferred > inline:
            return False
        return True if inline >= 3 else None


def map_array(kind: type[_Structure], fd: int, count: int) -> ctypes.Array[_Structure]:
    """The memory of an array map as ``count`` structures, shared with the kernel."""
    return (kind * count).from_buffer(map_memory(fd, ctypes.sizeof(kind) * count))


def words(array: ctypes.Array[_Structure], name: str) -> memoryview[int]:
    """One field of all structures of an array, as it is at any moment."""
    field: Any = getattr(array._type_, name)
    every = memoryview(array).cast("B").cast(_WORDS[field.size])
    return every[field.offset // field.size :: ctypes.sizeof(array._type_) // field.size]


def map_memory(fd: int, size: int) -> mmap.mmap:
    """The first ``size`` bytes, or a few more, of an array map, shared with the kernel."""
    page = mmap.PAGESIZE
    return mmap.mmap(fd, (size + page - 1) // page * page, mmap.MAP_SHARED)
