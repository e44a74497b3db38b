"""What really happened in a run, and what the daemon said. Data only; times are CLOCK_MONOTONIC."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from stalld.track.verdict import Verdict
from tests.injector.kinds import METHODS, Kind, Mode, Truth
from tests.injector.ksoftirqd import Wait
from tests.injector.pressure import Probe

Event = dict[str, Any]

EXPECTED = {
    Kind.PREEMPT_OFF: Verdict.STUCK_IN_KERNEL,
    Kind.BH_OFF: Verdict.SOFTIRQS_DISABLED,
    Kind.IRQS_OFF: Verdict.IRQS_DISABLED,
    Kind.IRQS_OFF_TIMER: Verdict.IRQS_DISABLED,
    Kind.SOFTIRQ_HOG: Verdict.SOFTIRQ_HOG,
    Kind.CPU_CONTENTION: Verdict.CPU_CONTENTION,
    Kind.TASK_CONTENTION: Verdict.CPU_CONTENTION,
}
"""The right verdict for each kind."""

TOLERATED = frozenset({Verdict.UNKNOWN, Verdict.VCPU_PREEMPTED})
"""Not right, but nobody is accused."""

STACK_AFTER = frozenset({Kind.IRQS_OFF, Kind.IRQS_OFF_TIMER})
"""Kinds whose stack can only be taken when they are over: the injected function is gone then."""


class Span(NamedTuple):
    """From one moment to another."""

    start_ns: int
    end_ns: int

    @property
    def length_ns(self) -> int:
        """Nanoseconds."""
        return self.end_ns - self.start_ns

    def overlap(self, other: Span) -> int:
        """Nanoseconds in common."""
        return max(0, min(self.end_ns, other.end_ns) - max(self.start_ns, other.start_ns))


class Steal(NamedTuple):
    """A reading of the time that the hypervisor took from a CPU; the kernel counts 10 ms steps."""

    time_ns: int
    total_ms: float


class Injected(NamedTuple):
    """One injected stall.

    Attributes:
        number: in the order of injection, from 1.
        truth: the injector's.
        waits: of ksoftirqd on that CPU that overlap it, from the independent tracer.
        steal_ms: what the hypervisor took from that CPU from before until after it.
    """

    number: int
    truth: Truth
    waits: tuple[Wait, ...]
    steal_ms: float

    @property
    def span(self) -> Span:
        """When the time was burned."""
        return Span(self.truth.start_ns, self.truth.end_ns)

    @property
    def tids(self) -> frozenset[int]:
        """Threads that may rightly be blamed."""
        return frozenset({self.truth.tid, *self.truth.others})

    @property
    def needs_luck(self) -> bool:
        """Whether it harms nothing unless ksoftirqd happened to be woken."""
        return METHODS[self.truth.kind].pressure in (Mode.BURSTS, Mode.FLOOD)


class Said(NamedTuple):
    """All that the daemon said about one stall.

    Attributes:
        span: as the resolved line tells it.
        resolved: that line.
        ongoing: the lines before; ``read_ns`` is when each reached us.
    """

    span: Span
    resolved: Event
    ongoing: tuple[Event, ...]

    @property
    def verdict(self) -> Verdict:
        """Of the resolved line."""
        return Verdict(self.resolved["verdict"])

    @property
    def blamed_tid(self) -> int | None:
        """Of the resolved line."""
        blocker = self.resolved["blocker"]
        return blocker["tid"] if blocker else None


class Run(NamedTuple):
    """Everything from one run.

    Attributes:
        cpu: that was stalled.
        threshold_ms: of the daemon.
        span: after all was set up, until before it was taken down.
        injected: in order.
        failed: why stalls could not be made, one message each.
        unsupported: kinds this machine cannot make, and why.
        said: about all CPUs.
        waits: of ksoftirqd on the stalled CPU, all.
        probes: pings received by the stalled CPU, all.
        steal: of the stalled CPU, in order.
        started: the daemon's first event.
        stopped: its last one.
        wanted: counted stalls asked for.
        seed: of the random numbers.
    """

    cpu: int
    threshold_ms: float
    span: Span
    injected: Sequence[Injected]
    failed: Sequence[str]
    unsupported: dict[Kind, str]
    said: Sequence[Said]
    waits: Sequence[Wait]
    probes: Sequence[Probe]
    steal: Sequence[Steal]
    started: Event
    stopped: Event
    wanted: int
    seed: int
