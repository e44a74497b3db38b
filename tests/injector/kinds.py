"""What can be injected, what comes back, what can go wrong. Imports nothing of ours."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

MIN_DURATION_MS = 0.1
MAX_DURATION_MS = 500.0
"""Longer stalls are refused here, and the BPF programs refuse them once more."""


class InjectorError(Exception):
    """A stall could not be made; the message says why."""


class DurationError(InjectorError, ValueError):
    """The asked duration lies outside the bounds."""


class UnsupportedError(InjectorError):
    """This machine or kernel cannot make this kind of stall."""


class Kind(StrEnum):
    """Kinds of stalls."""

    PREEMPT_OFF = "preempt_off"
    BH_OFF = "bh_off"
    IRQS_OFF = "irqs_off"
    IRQS_OFF_TIMER = "irqs_off_timer"
    SOFTIRQ_HOG = "softirq_hog"
    CPU_CONTENTION = "cpu_contention"
    TASK_CONTENTION = "task_contention"


class Mode(StrEnum):
    """Kinds of network pressure.

    PING measures and hardly weighs anything. BURSTS has ksoftirqd woken when another task wants
    the CPU, and leaves room for other packets. FLOOD has it woken in any case; packets queue.
    """

    NONE = "none"
    PING = "ping"
    BURSTS = "bursts"
    FLOOD = "flood"


class Method(NamedTuple):
    """How a kind is made.

    Attributes:
        comm: of the task that stalls the CPU.
        symbol: BPF function that burns the time; kallsyms and stacks show it after a
            ``bpf_prog_<tag>_`` prefix, its inner loops with ``_round`` and ``_step`` appended.
            None where a task burns it in user mode.
        pressure: what it takes for the kind to have its typical effect.
        means: one line for people.
    """

    comm: str
    symbol: str | None
    pressure: Mode
    means: str


METHODS = {
    Kind.PREEMPT_OFF: Method(
        "inj-preempt-off",
        "injected_spin_preempt_off",
        Mode.BURSTS,
        "a slow system call, preemption off; ksoftirqd waits once packets wake it",
    ),
    Kind.BH_OFF: Method(
        "inj-bh-off",
        "injected_spin_bh_off",
        Mode.PING,
        "a slow sendto with bottom halves off; softirqs wait, ksoftirqd sleeps",
    ),
    Kind.IRQS_OFF: Method(
        "inj-irqs-off",
        "injected_spin_irqs_off",
        Mode.PING,
        "a slow inter-processor interrupt; the CPU that sent it waits for it, stuck as well",
    ),
    Kind.IRQS_OFF_TIMER: Method(
        "inj-irqs-timer",
        "injected_spin_irqs_off_timer",
        Mode.PING,
        "a slow timer interrupt; no other CPU is held up",
    ),
    Kind.SOFTIRQ_HOG: Method(
        "inj-softirq-hog",
        "injected_spin_softirq_hog",
        Mode.PING,
        "one NET_RX handler that takes long",
    ),
    Kind.CPU_CONTENTION: Method(
        "inj-contention",
        None,
        Mode.FLOOD,
        "a SCHED_FIFO task in user mode; ksoftirqd waits once packets wake it",
    ),
    Kind.TASK_CONTENTION: Method(
        "inj-tasks",
        None,
        Mode.FLOOD,
        "ordinary tasks of high weight in user mode; ksoftirqd waits once packets wake it",
    ),
}


class Truth(NamedTuple):
    """One stall as it really was.

    Attributes:
        kind: of stall.
        cpu: that stalled.
        pid: process (thread group) that ran on the CPU meanwhile; 0 when it was idle.
        tid: its thread.
        comm: its name.
        start_ns: CLOCK_MONOTONIC, read where the time is burned.
        end_ns: likewise.
        symbol: the function that burned it, see :class:`Method`.
        others: further threads that took turns with ``tid``, none in most kinds.
    """

    kind: Kind
    cpu: int
    pid: int
    tid: int
    comm: str
    start_ns: int
    end_ns: int
    symbol: str | None
    others: tuple[int, ...] = ()

    @property
    def duration_ms(self) -> float:
        """Length in milliseconds."""
        return (self.end_ns - self.start_ns) / 1e6


def checked_duration_ns(duration_ms: float) -> int:
    """Convert a duration.

    Raises:
        DurationError: outside :data:`MIN_DURATION_MS` to :data:`MAX_DURATION_MS`, or NaN.
    """
    if not MIN_DURATION_MS <= duration_ms <= MAX_DURATION_MS:
        raise DurationError(
            f"a stall takes {MIN_DURATION_MS:g} to {MAX_DURATION_MS:g} ms, not {duration_ms:g} ms"
        )
    return int(duration_ms * 1e6)
