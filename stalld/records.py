"""Records as the kernel writes them: the Python side of ``bpf/records.h``.

All times are CLOCK_MONOTONIC nanoseconds, all sizes bytes. A test compares
every offset here with what the C compiler makes of the header.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

ABI_VERSION = 3

VECTORS = (
    "HI",
    "TIMER",
    "NET_TX",
    "NET_RX",
    "BLOCK",
    "IRQ_POLL",
    "TASKLET",
    "SCHED",
    "HRTIMER",
    "RCU",
)
"""Softirq names by number, as in ``/proc/softirqs`` and ``include/linux/interrupt.h``."""

VEC_NONE = 0xFFFFFFFF
VEC_PENDING = 16
COMM_LEN = 16
KERNEL_STACK_DEPTH = 127
USER_STACK_DEPTH = 27
LOOKBACK_DEPTH = 32
LOOKBACK_SAMPLES = 64
LOOKBACK_RINGS = 2
WAITERS = 8
KSOFTIRQD = 0
"""Which of the waiters is ksoftirqd."""
NAPI_SLOTS = 16
NAPI_UNREGISTERED = 0xFFFFFFFF
"""Instead of the index of a device that the kernel never registered."""
BUCKET_TASKS = 4
CPU_ANY = 0xFFFFFFFF
BRIEF_BIT = 31
ARGS_LEN = 256
PATH_DEPTH = 12
NAME_LEN = 128
NAMES_LEN = 2048
PATH_COUNT = 4
PF_KTHREAD = 0x00200000
PF_NO_SETAFFINITY = 0x04000000


class RecordType(enum.IntEnum):
    """First word of every record."""

    SAMPLE = 1
    CLOSE = 2
    HOTPLUG = 3
    TASK = 4


class Source(enum.IntEnum):
    """The hook that wrote a record: it says what the stack means."""

    TICK = 0
    SWITCH = 1
    ENTRY = 2
    EXIT = 3
    NMI = 4
    HOTPLUG = 5


class StallRecord(NamedTuple):
    """One ``struct stall_record``.

    ``wait_ns`` has one entry per vector: in a sample the age of the pending
    vector now, in a closing record its longest wait at or over the threshold.
    ``waiter_ns`` and ``waiter_pid`` say the same of watched threads, ksoftirqd
    first. ``late_ns``: the longest that a tick of this stall came too late.
    ``served_ns``: the longest run of one handler, of vector ``served_vec``.
    ``steal_ns``, ``net_rx_ns``, ``net_rx_runs`` and ``processed`` to ``flow_limit``
    are counters of the CPU that only grow; what the kernel does not have is 0.
    ``backlog``: packets that waited in the CPU's queue just then.
    ``switched_ns``: since when the task has had the CPU, if it got it while
    something waited.
    """

    type: RecordType
    source: Source
    cpu: int
    seq: int
    time_ns: int
    started_ns: int
    late_ns: int
    served_ns: int
    steal_ns: int
    net_rx_ns: int
    switched_ns: int
    cgroup_id: int
    wait_ns: tuple[int, ...]
    waiter_ns: tuple[int, ...]
    waiter_pid: tuple[int, ...]
    tgid: int
    tid: int
    task_flags: int
    policy: int
    prio: int
    serving_vec: int
    served_vec: int
    switches: int
    sample_nr: int
    lost: int
    net_rx_runs: int
    processed: int
    squeezed: int
    dropped: int
    received_rps: int
    flow_limit: int
    backlog: int
    napi_ifindex: int
    napi_work: int
    napi_budget: int
    napi_name: bytes
    comm: bytes
    kernel_stack: tuple[int, ...]
    user_stack: tuple[int, ...]


class Known(enum.IntFlag):
    """What of a task could be read."""

    ARGS = 0x1
    SYSCALL = 0x2
    CGROUP = 0x4


class NamePath(NamedTuple):
    """Names from a path's end upwards; ``cut``: there are more above these."""

    names: tuple[bytes, ...]
    cut: bool

    @property
    def whole(self) -> bool:
        """Whether nothing is missing: neither names nor a part of one, which the kernel cuts."""
        return not self.cut and all(len(name) < NAME_LEN - 1 for name in self.names)


class TaskRecord(NamedTuple):
    """One ``struct task_record``: who a task is, once per stall and task.

    ``args``: the first of the ``args_total`` bytes of its command line. ``cgroup``: its path in
    the unified hierarchy, ``controller`` in that of the memory (or cpu) controller, where that
    is another one. ``file``: what the first argument of the system call would be, if that is a
    descriptor, in a file system of the kind ``file_system``. ``ns_pid``: of the process in its
    pid namespace, 0 in the first one.
    """

    type: RecordType
    source: Source
    cpu: int
    seq: int
    time_ns: int
    file_inode: int
    known: Known
    task_flags: int
    tgid: int
    tid: int
    uid: int
    parent_pid: int
    ns_pid: int
    syscall: int
    args_total: int
    parent_comm: bytes
    file_system: bytes
    args: bytes
    cgroup: NamePath
    controller: NamePath
    exe: NamePath
    file: NamePath

    @property
    def tells_cgroup(self) -> bool:
        """Whether the record has the whole path, in both hierarchies."""
        return Known.CGROUP in self.known and self.cgroup.whole and self.controller.whole


class TaskEntry(NamedTuple):
    """A kernel thread as the task iterator reports it.

    ``cpus_allowed``: on how many CPUs it may run; ``cpu``: on which one it is.
    """

    task: int
    pid: int
    flags: int
    cpus_allowed: int
    cpu: int
    comm: bytes


class TickKind(enum.IntEnum):
    """What the ``stack`` of a tick sample is: walked, one address, or none as in user code."""

    STACK = 0
    ADDRESS = 1
    USER = 2


class TickSample(NamedTuple):
    """One ``struct tick_sample``: what ran on a CPU when its tick came.

    ``serving``: the vector in service plus 1, 0 for none.
    """

    time_ns: int
    steal_ns: int
    net_rx_ns: int
    net_rx_runs: int
    processed: int
    squeezed: int
    dropped: int
    received_rps: int
    flow_limit: int
    backlog: int
    tgid: int
    tid: int
    policy: int
    prio: int
    kind: TickKind
    serving: int
    comm: bytes
    stack: tuple[int, ...]


def watched_bits(cpus: int) -> int:
    """Logarithm of how many buckets the watched threads of ``cpus`` CPUs get."""
    return max(6, (16 * cpus - 1).bit_length())


def watched_bucket(task: int, bits: int) -> int:
    """The bucket of a task pointer, as ``handle_sched_wakeup`` finds it."""
    return (task * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF) >> (64 - bits)
