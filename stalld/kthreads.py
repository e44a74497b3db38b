"""The kernel threads whose waits are watched: which there are, and where the kernel looks.

Mirrors ``struct watched_bucket`` of ``bpf/records.h``.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import translate

from stalld.decode import TASK, decode_tasks
from stalld.errors import StalldError
from stalld.records import (
    BUCKET_TASKS,
    CPU_ANY,
    KSOFTIRQD,
    PF_KTHREAD,
    PF_NO_SETAFFINITY,
    TaskEntry,
    watched_bits,
    watched_bucket,
)
from stalld.state import Maps, map_array

_READ_BYTES = 16 * TASK.size


class Bucket(ctypes.Structure):
    """``struct watched_bucket``: threads whose pointers have one hash."""

    _fields_ = (
        ("task", ctypes.c_uint64 * BUCKET_TASKS),
        ("pid", ctypes.c_uint32 * BUCKET_TASKS),
        ("cpu", ctypes.c_uint32 * BUCKET_TASKS),
    )


class Watched:
    """The ``watched`` map, and the names of those in it.

    Args:
        fd: of the map.
        maps: whose CPUs are told their ksoftirqd.
        patterns: shell patterns of thread names; ksoftirqd is always watched.
    """

    def __init__(self, fd: int, maps: Maps, patterns: Sequence[str]) -> None:
        self._maps = maps
        self.want(patterns)
        self._bits = watched_bits(len(maps.cpus))
        self._buckets = map_array(Bucket, fd, 1 << self._bits)
        self.names: dict[int, bytes] = {}
        """pid → name of each watched thread."""
        self.left_out = 0
        """Threads that found no place; none on any host of a sane size."""

    def want(self, patterns: Sequence[str]) -> None:
        """Other patterns count from the next :meth:`learn` on."""
        # One for all: there are thousands of threads.
        self._wanted = re.compile("|".join(f"(?:{translate(p)})" for p in patterns) or r"(?!)")

    def learn(self, tasks: Iterable[TaskEntry]) -> dict[int, int]:
        """Watch the kernel threads of ``tasks`` that are wanted, and no others any more.

        Returns:
            CPU → pid of each ksoftirqd.
        """
        found: dict[int, int] = {}
        wanted: dict[int, TaskEntry] = {}
        for task in tasks:
            if not task.flags & PF_KTHREAD:
                continue
            cpu = ksoftirqd_cpu(task.comm)
            if cpu is not None and cpu < len(self._maps.cpus):
                found[cpu] = task.pid
                self._learn_ksoftirqd(cpu, task)
                # Where it belongs, also while that CPU is offline.
                task = task._replace(cpu=cpu)
            elif not self._wanted.match(_text(task.comm)):
                continue
            wanted[task.task] = task
        self._place(wanted)
        names = {task.pid: task.comm for task in wanted.values()}
        # Another thread may be naming a stall's waiters: no name goes away and comes back.
        self.names.update(names)
        for pid in self.names.keys() - names.keys():
            del self.names[pid]
        return found

    def learn_pids(self, pids: dict[int, int]) -> None:
        """Where tasks cannot be iterated: CPU → pid of each ksoftirqd.

        The kernel learns a pointer when that thread works; the next call
        then has its wake-ups watched.
        """
        tasks = []
        for cpu, pid in pids.items():
            if cpu >= len(self._maps.cpus):
                continue
            waiter = self._maps.cpus[cpu].waiters[KSOFTIRQD]
            if waiter.pid != pid:
                waiter.task = 0
                waiter.pid = pid
            if waiter.task:
                comm = b"ksoftirqd/%d" % cpu
                tasks.append(
                    TaskEntry(waiter.task, pid, PF_KTHREAD | PF_NO_SETAFFINITY, 1, cpu, comm)
                )
        self.learn(tasks)

    def _learn_ksoftirqd(self, cpu: int, task: TaskEntry) -> None:
        waiter = self._maps.cpus[cpu].waiters[KSOFTIRQD]
        if waiter.task != task.task or waiter.pid != task.pid:
            waiter.pid = task.pid
            waiter.task = task.task

    def _place(self, wanted: dict[int, TaskEntry]) -> None:
        there = set()
        for bucket in self._buckets:
            for place, task in enumerate(bucket.task):
                if not task:
                    continue
                known = wanted.get(task)
                if known is None or known.pid != bucket.pid[place]:
                    bucket.task[place] = 0
                else:
                    bucket.cpu[place] = _cpu(known)
                    there.add(task)
        self.left_out = 0
        for pointer, task in wanted.items():
            if pointer in there:
                continue
            bucket = self._buckets[watched_bucket(pointer, self._bits)]
            free = [place for place, other in enumerate(bucket.task) if not other]
            if not free:
                self.left_out += 1
                continue
            # The pointer last: the kernel looks at the others once it finds it.
            bucket.pid[free[0]] = task.pid
            bucket.cpu[free[0]] = _cpu(task)
            bucket.task[free[0]] = pointer
        for bucket in self._buckets:
            if not bucket.task[0] and any(bucket.task):
                # The kernel looks no further than an empty first place.
                last = max(place for place, other in enumerate(bucket.task) if other)
                bucket.pid[0], bucket.cpu[0] = bucket.pid[last], bucket.cpu[last]
                bucket.task[0] = bucket.task[last]
                bucket.task[last] = 0


def _cpu(task: TaskEntry) -> int:
    """The CPU that a task is bound to, as far as that is for good."""
    stays = task.cpus_allowed == 1 and task.flags & PF_NO_SETAFFINITY
    return task.cpu if stays else CPU_ANY


def _text(comm: bytes) -> str:
    return comm.decode("utf-8", "backslashreplace")


def ksoftirqd_cpu(comm: bytes) -> int | None:
    """The CPU of a task named ``ksoftirqd/N``, else None."""
    match = re.fullmatch(rb"ksoftirqd/(\d+)", comm)
    return int(match[1]) if match else None


def iterate_tasks(link_fd: int) -> Iterator[TaskEntry]:
    """Every kernel thread, and a few of the other tasks, from the task iterator's link.

    The others are there so that every read ends soon: until it does, kernels before 5.11 run
    nothing else on this CPU.

    Raises:
        StalldError: the kernel refused the iterator.
    """
    fd = ctypes.CDLL("libbpf.so.1", use_errno=True).bpf_iter_create(link_fd)
    if fd < 0:
        raise StalldError(f"cannot iterate tasks: {os.strerror(ctypes.get_errno())}")
    with os.fdopen(fd, "rb", buffering=0) as iterator:
        yield from decode_tasks(b"".join(iter(lambda: iterator.read(_READ_BYTES), b"")))


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
