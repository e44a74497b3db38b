"""Records as the kernel writes them: the Python side of ``bpf/records.h``.

All times are CLOCK_MONOTONIC nanoseconds, all sizes bytes. A test compares
every offset here with what the C compiler makes of the header.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

ABI_VERSION = 1

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
COMM_LEN = 16
KERNEL_STACK_DEPTH = 127
USER_STACK_DEPTH = 27
PF_KTHREAD = 0x00200000


class RecordType(enum.IntEnum):
    """First word of every record."""

    SAMPLE = 1
    CLOSE = 2


class Source(enum.IntEnum):
    """The hook that wrote a record: it says what the stack means."""

    TICK = 0
    SWITCH = 1
    ENTRY = 2


class StallRecord(NamedTuple):
    """One ``struct stall_record``.

    ``wait_ns`` has one entry per vector: in a sample the age of the pending
    vector now, in a closing record its longest wait at or over the threshold.
    """

    type: RecordType
    source: Source
    cpu: int
    seq: int
    time_ns: int
    started_ns: int
    ksoftirqd_wait_ns: int
    serving_ns: int
    cgroup_id: int
    wait_ns: tuple[int, ...]
    tgid: int
    tid: int
    task_flags: int
    policy: int
    prio: int
    serving_vec: int
    ksoftirqd_pid: int
    switches: int
    sample_nr: int
    lost: int
    comm: bytes
    kernel_stack: tuple[int, ...]
    user_stack: tuple[int, ...]


class TaskEntry(NamedTuple):
    """A kernel thread as the task iterator reports it."""

    task: int
    pid: int
    flags: int
    comm: bytes
