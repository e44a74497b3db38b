"""The maps shared with the BPF programs, as mappings of their memory.

Mirrors ``struct cpu_state`` and ``struct watch_config`` of ``bpf/records.h``.
Reading costs no system call. The programs write without locks, so a reader
sees each word whole, yet two words perhaps of different moments.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from stalld.decode import decode_tasks
from stalld.errors import StalldError
from stalld.records import PF_KTHREAD, VECTORS, TaskEntry


class CpuState(ctypes.Structure):
    """``struct cpu_state``: what one CPU knows about itself."""

    _fields_ = (
        ("ksoftirqd", ctypes.c_uint64),
        ("ksoftirqd_since", ctypes.c_uint64),
        ("ksoftirqd_pid", ctypes.c_uint32),
        ("active", ctypes.c_uint32),
        ("serving", ctypes.c_uint32),
        ("seq", ctypes.c_uint32),
        ("serving_since", ctypes.c_uint64),
        ("raised", ctypes.c_uint64 * len(VECTORS)),
        ("started_ns", ctypes.c_uint64),
        ("next_sample_ns", ctypes.c_uint64),
        ("spacing_ns", ctypes.c_uint64),
        ("ended_ns", ctypes.c_uint64),
        ("last_tick_ns", ctypes.c_uint64),
        ("waited_ns", ctypes.c_uint64 * len(VECTORS)),
        ("ksoftirqd_waited_ns", ctypes.c_uint64),
        ("net_rx_since", ctypes.c_uint64),
        ("net_rx_runs", ctypes.c_uint64),
        ("net_rx_ns", ctypes.c_uint64),
        ("net_rx_max_ns", ctypes.c_uint64),
        ("sample_nr", ctypes.c_uint32),
        ("switches", ctypes.c_uint32),
        ("lost", ctypes.c_uint32),
        ("sent", ctypes.c_uint32),
        ("inline_served", ctypes.c_uint32),
        ("deferred", ctypes.c_uint32),
        ("stale", ctypes.c_uint32),
        ("missed", ctypes.c_uint32),
        ("reserved", ctypes.c_uint64 * 9),
    )


class WatchConfig(ctypes.Structure):
    """``struct watch_config``: ``threshold_ns`` 0 records nothing."""

    _fields_ = (
        ("threshold_ns", ctypes.c_uint64),
        ("tick_ns", ctypes.c_uint64),
        ("vec_mask", ctypes.c_uint32),
        ("max_samples", ctypes.c_uint32),
    )


class StallState(NamedTuple):
    """What the kernel says about the newest stall of a CPU."""

    seq: int
    active: bool
    ended_ns: int
    wait_ns: tuple[int, ...]
    ksoftirqd_wait_ns: int


class Maps:
    """The ``cpus`` and ``config`` maps.

    Args:
        cpus_fd: array of ``cpu_state``, one per possible CPU.
        config_fd: array with the one ``watch_config``.
        cpus: possible CPUs.
    """

    def __init__(self, cpus_fd: int, config_fd: int, cpus: int) -> None:
        self._cpus_memory = _map(cpus_fd, ctypes.sizeof(CpuState) * cpus)
        self._config_memory = _map(config_fd, ctypes.sizeof(WatchConfig))
        self.cpus = (CpuState * cpus).from_buffer(self._cpus_memory)
        self.config = WatchConfig.from_buffer(self._config_memory)

    def watch(self, threshold_ns: int, tick_ns: int, vec_mask: int, max_samples: int) -> None:
        """Start detecting, or change the settings; the threshold goes last."""
        self.config.tick_ns = tick_ns
        self.config.vec_mask = vec_mask
        self.config.max_samples = max_samples
        self.config.threshold_ns = threshold_ns

    def stop(self) -> None:
        """Make the programs record nothing more."""
        self.config.threshold_ns = 0

    def learn_ksoftirqd(self, tasks: Iterator[TaskEntry]) -> dict[int, int]:
        """Tell each CPU the pointer of its ksoftirqd.

        Returns:
            CPU → pid of those found.
        """
        found = {}
        for task in tasks:
            cpu = ksoftirqd_cpu(task.comm)
            if cpu is None or cpu >= len(self.cpus):
                continue
            found[cpu] = task.pid
            state = self.cpus[cpu]
            if state.ksoftirqd != task.task or state.ksoftirqd_pid != task.pid:
                # The pid first: a pointer is believed only while its pid agrees.
                state.ksoftirqd_pid = task.pid
                state.ksoftirqd = task.task
        return found

    def learn_ksoftirqd_pids(self, pids: dict[int, int]) -> None:
        """Where tasks cannot be iterated: CPU → pid; the kernel learns the pointer."""
        for cpu, pid in pids.items():
            if cpu < len(self.cpus) and self.cpus[cpu].ksoftirqd_pid != pid:
                self.cpus[cpu].ksoftirqd_pid = pid
                self.cpus[cpu].ksoftirqd = 0

    def stall(self, cpu: int) -> StallState:
        """The newest stall of ``cpu``, whether or not its records arrived."""
        state = self.cpus[cpu]
        return StallState(
            state.seq,
            bool(state.active),
            state.ended_ns,
            tuple(state.waited_ns),
            state.ksoftirqd_waited_ns,
        )

    def total(self, counter: str) -> int:
        """Sum of one counter over all CPUs."""
        return sum(int(getattr(state, counter)) for state in self.cpus)

    def serves_inline(self) -> bool | None:
        """Does this kernel serve softirqs while ksoftirqd is runnable?

        Learned by behaviour: None until something was seen. Kernels before
        commit d15121be7485 (6.5) leave them to ksoftirqd instead.
        """
        inline, deferred = self.total("inline_served"), self.total("deferred")
        if deferred >= 2 and deferred > inline:
            return False
        return True if inline >= 3 else None


def _map(fd: int, size: int) -> mmap.mmap:
    page = mmap.PAGESIZE
    return mmap.mmap(fd, (size + page - 1) // page * page, mmap.MAP_SHARED)


def ksoftirqd_cpu(comm: bytes) -> int | None:
    """The CPU of a task named ``ksoftirqd/N``, else None."""
    match = re.fullmatch(rb"ksoftirqd/(\d+)", comm)
    return int(match[1]) if match else None


def iterate_tasks(link_fd: int) -> Iterator[TaskEntry]:
    """Every kernel thread, from the task iterator's link.

    Raises:
        StalldError: the kernel refused the iterator.
    """
    fd = ctypes.CDLL("libbpf.so.1", use_errno=True).bpf_iter_create(link_fd)
    if fd < 0:
        raise StalldError(f"cannot iterate tasks: {os.strerror(ctypes.get_errno())}")
    with os.fdopen(fd, "rb", buffering=0) as iterator:
        yield from decode_tasks(b"".join(iter(lambda: iterator.read(1 << 16), b"")))


def ksoftirqd_pids(proc: str = "/proc") -> dict[int, int]:
    """CPU → pid of each ksoftirqd, from ``/proc``."""
    found = {}
    for name in os.listdir(proc):
        if not name.isdigit():
            continue
        try:
            with open(f"{proc}/{name}/stat", "rb") as file:
                # pid (comm) state ppid pgrp session tty tpgid flags; a comm may hold ")".
                head, _, tail = file.read().rpartition(b") ")
        except OSError:
            continue  # It ended meanwhile.
        cpu = ksoftirqd_cpu(head.partition(b" (")[2])
        # Anybody may call itself ksoftirqd/0.
        if cpu is not None and int(tail.split()[6]) & PF_KTHREAD:
            found[cpu] = int(name)
    return found
