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
BUCKET_TASKS = 4
CPU_ANY = 0xFFFFFFFF
BRIEF_BIT = 31
PF_KTHREAD = 0x00200000
PF_NO_SETAFFINITY = 0x04000000


class RecordType(enum.IntEnum):
    """First word of every record."""

    SAMPLE = 1
    CLOSE = 2
    HOTPLUG = 3


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
