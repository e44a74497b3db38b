"""An independent tracer: when was ksoftirqd/N woken, and when did it get the CPU?"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple, Self

from tests.injector import build
from tests.injector.kinds import InjectorError
from tests.injector.libbpf import BpfObject

_ENTRY = struct.Struct("=QII16s")
_LOG_SIZE = 1 << 15


class What(IntEnum):
    """What happened to ksoftirqd; numbers as in ksoftirqd.bpf.c."""

    WOKEN = 1
    GOT_CPU = 2
    LEFT_CPU = 3
    PREEMPTED = 4


class Entry(NamedTuple):
    """One line of the log.

    Attributes:
        time_ns: CLOCK_MONOTONIC.
        what: happened.
        other_tid: the task running when it was woken; before it got, after it left the CPU.
        other_comm: that task's name.
    """

    time_ns: int
    what: What
    other_tid: int
    other_comm: str


class Wait(NamedTuple):
    """ksoftirqd runnable without running.

    Attributes:
        woken_ns: CLOCK_MONOTONIC; or when it lost the CPU while still runnable.
        ran_ns: when it got the CPU; None if it had not by the time of asking.
        other_tid: the task running when the wait began.
        other_comm: that task's name.
    """

    woken_ns: int
    ran_ns: int | None
    other_tid: int
    other_comm: str

    @property
    def waited_ms(self) -> float | None:
        """Length in milliseconds, None while it lasts."""
        return None if self.ran_ns is None else (self.ran_ns - self.woken_ns) / 1e6

    def overlap_ms(self, start_ns: int, end_ns: int) -> float:
        """How much of the given time (CLOCK_MONOTONIC) it takes; 0 while it lasts."""
        return max(0, min(self.ran_ns or 0, end_ns) - max(self.woken_ns, start_ns)) / 1e6

    def lies_in(self, start_ns: int, end_ns: int) -> bool:
        """Whether at least half of it does."""
        return self.overlap_ms(start_ns, end_ns) >= (self.waited_ms or float("inf")) / 2


def waits(entries: Iterable[Entry]) -> list[Wait]:
    """Join the log of one ksoftirqd into its waits, oldest first."""
    result: list[Wait] = []
    running = False
    begun: Entry | None = None
    for entry in entries:
        if entry.what is What.GOT_CPU:
            if begun:
                result.append(Wait(begun.time_ns, entry.time_ns, begun.other_tid, begun.other_comm))
            running, begun = True, None
        elif entry.what is What.LEFT_CPU:
            running, begun = False, None
        elif entry.what is What.PREEMPTED:
            running, begun = False, entry
        elif not running:
            # Also of one that was preempted on its way to sleep: work has come only now.
            begun = entry
    if begun:
        result.append(Wait(begun.time_ns, None, begun.other_tid, begun.other_comm))
    return result


class KsoftirqdTruth:
    """Logs ksoftirqd of one CPU from ``with`` on."""

    def __init__(self, cpu: int) -> None:
        self.cpu = cpu
        self.pid = ksoftirqd_pid(cpu)
        self._bpf: BpfObject | None = None
        self._read: list[Entry] = []

    def __enter__(self) -> Self:
        bpf = BpfObject(build.compiled("ksoftirqd"))
        try:
            bpf.update(bpf.map_fd("watched_pid"), 0, self.pid.to_bytes(4, "little"))
            bpf.attach_raw_tracepoint("watch_sched_wakeup", "sched_wakeup")
            bpf.attach_raw_tracepoint("watch_sched_switch", "sched_switch")
        except InjectorError:
            bpf.close()
            raise
        self._bpf = bpf
        return self

    def __exit__(self, *_: object) -> None:
        if self._bpf is not None:
            self._bpf.close()
            self._bpf = None

    def entries(self) -> list[Entry]:
        """The log so far, oldest first.

        Raises:
            InjectorError: entries were overwritten; ask more often.
        """
        if self._bpf is None:
            return list(self._read)
        written = int.from_bytes(self._bpf.lookup(self._bpf.map_fd("written"), 0, 8), "little")
        if written - len(self._read) > _LOG_SIZE:
            raise InjectorError(f"the log of ksoftirqd/{self.cpu} overflowed")
        fd = self._bpf.map_fd("entries")
        for number in range(len(self._read), written):
            data = self._bpf.lookup(fd, number % _LOG_SIZE, _ENTRY.size)
            time_ns, what, tid, comm = _ENTRY.unpack(data)
            name = comm.partition(b"\0")[0].decode("utf-8", "replace")
            self._read.append(Entry(time_ns, What(what), tid, name))
        return list(self._read)

    def waits(self, start_ns: int = 0, end_ns: int | None = None) -> list[Wait]:
        """Waits that overlap the given time (CLOCK_MONOTONIC), all by default."""
        return [
            wait
            for wait in waits(self.entries())
            if (wait.ran_ns is None or wait.ran_ns >= start_ns)
            and (end_ns is None or wait.woken_ns <= end_ns)
        ]


def ksoftirqd_pid(cpu: int) -> int:
    """Process id of ksoftirqd/``cpu``.

    Raises:
        InjectorError: there is none.
    """
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        try:
            with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                head, _, tail = file.read().rpartition(")")
        except OSError:
            continue  # it ended meanwhile
        # Kernel threads are children of kthreadd.
        if head.partition("(")[2] == f"ksoftirqd/{cpu}" and tail.split()[1] == "2":
            return int(name)
    raise InjectorError(f"no ksoftirqd/{cpu}: is CPU {cpu} online?")
