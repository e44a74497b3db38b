"""What kind of stall it was: one rule after the other, as docs/events.md tells them."""

from __future__ import annotations

import enum
from typing import NamedTuple


class Verdict(enum.StrEnum):
    """Contract values of ``verdict``."""

    STUCK_IN_KERNEL = "stuck_in_kernel"
    SOFTIRQS_DISABLED = "softirqs_disabled"
    IRQS_DISABLED = "irqs_disabled"
    SOFTIRQ_HOG = "softirq_hog"
    CPU_CONTENTION = "cpu_contention"
    VCPU_PREEMPTED = "vcpu_preempted"
    UNKNOWN = "unknown"


class Evidence(NamedTuple):
    """All that a verdict may rest on.

    Attributes:
        starved: a watched vector waited for the threshold or longer.
        ksoftirqd_waited: ksoftirqd was runnable for the threshold or longer.
        ksoftirqd_runnable: it was runnable at some sample, however short.
        serves_inline: this kernel serves softirqs while ksoftirqd is runnable;
            None: not learned yet.
        modes: modes of the samples taken during the stall; without any,
            "user" where the task gave way out of user mode.
        tasks: how many tasks those samples saw.
        switches: context switches while ksoftirqd waited.
        handler_ran: a softirq handler was in service at a sample.
        enabled_late: the late vector was served when a task in the kernel
            enabled bottom halves again.
    """

    starved: bool
    ksoftirqd_waited: bool
    ksoftirqd_runnable: bool
    serves_inline: bool | None
    modes: frozenset[str | None]
    tasks: int
    switches: int
    handler_ran: bool
    enabled_late: bool


def decide(evidence: Evidence) -> Verdict:
    """The verdict that the evidence supports; UNKNOWN when it supports none."""
    in_kernel = evidence.modes == {"kernel"}
    alone = evidence.tasks == 1 and evidence.switches == 0
    if evidence.starved:
        if evidence.handler_ran:
            return Verdict.UNKNOWN
        deferred = evidence.ksoftirqd_runnable and evidence.serves_inline is not True
        if not deferred:
            # Every interrupt's end would have served it: something forbade that.
            late = evidence.enabled_late and not evidence.modes - {"kernel"}
            return Verdict.SOFTIRQS_DISABLED if in_kernel or late else Verdict.UNKNOWN
    elif not evidence.ksoftirqd_waited:
        return Verdict.UNKNOWN
    if in_kernel and alone:
        return Verdict.STUCK_IN_KERNEL
    if evidence.switches or evidence.tasks > 1 or "user" in evidence.modes:
        return Verdict.CPU_CONTENTION
    return Verdict.UNKNOWN


HINTS = {
    Verdict.STUCK_IN_KERNEL: "one task stayed in the kernel without rescheduling: "
    "look at what its stack's system call does and how often it is called",
    Verdict.SOFTIRQS_DISABLED: "the task held bottom halves off: look for a long "
    "local_bh_disable() or spin_lock_bh() section in its stack",
    Verdict.CPU_CONTENTION: "ksoftirqd lost the CPU to other tasks: look at their priorities, "
    "real-time policies and CPU affinity",
    Verdict.UNKNOWN: None,
}
"""What to look at or change, one sentence for each verdict given here."""
