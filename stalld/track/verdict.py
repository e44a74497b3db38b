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
        stolen: the steal clock counted half of the stall or more.
        late: a tick came too late by the threshold or longer, and by half of
            the stall or more, even without what was stolen.
        steal_told: a CPU that was taken away would have shown in the steal clock.
        interrupts_enabled: the first stack after is one that had just enabled
            interrupts, or an NMI saw them off.
        handler_long: one handler was in service for the threshold or longer,
            and for half of the stall or more.
        starved: a watched vector waited for the threshold or longer.
        starved_modes: modes of the samples that saw such a vector pending.
        handler_ran: a softirq handler was in service at one of those samples.
        enabled_late: the late vector was served when a task enabled bottom
            halves again.
        waited: a watched thread was runnable for the threshold or longer.
        ksoftirqd_runnable: ksoftirqd was runnable at some record, however short.
        serves_inline: this kernel serves softirqs while ksoftirqd is runnable;
            None: not learned yet.
        stuck: one task was in the kernel, without a context switch, for the
            threshold or longer and for a good part of the stall.
        user: a task was interrupted in user mode, or gave way out of it.
        others: context switches while somebody waited, or several tasks seen.
    """

    stolen: bool = False
    late: bool = False
    steal_told: bool = True
    interrupts_enabled: bool = False
    handler_long: bool = False
    starved: bool = False
    starved_modes: frozenset[str | None] = frozenset()
    handler_ran: bool = False
    enabled_late: bool = False
    waited: bool = False
    ksoftirqd_runnable: bool = False
    serves_inline: bool | None = None
    threaded: bool = False
    stuck: bool = False
    user: bool = False
    others: bool = False


def decide(evidence: Evidence) -> Verdict:
    """The verdict that the evidence supports; UNKNOWN when it supports none."""
    if evidence.stolen:
        return Verdict.VCPU_PREEMPTED
    if evidence.late:
        proven = evidence.steal_told or evidence.interrupts_enabled
        return Verdict.IRQS_DISABLED if proven else Verdict.UNKNOWN
    if evidence.handler_long:
        return Verdict.SOFTIRQ_HOG
    if evidence.starved:
        if evidence.handler_ran:
            return Verdict.UNKNOWN
        if evidence.enabled_late and evidence.starved_modes <= {"kernel"}:
            return Verdict.SOFTIRQS_DISABLED
        deferred = evidence.ksoftirqd_runnable and evidence.serves_inline is not True
        if not (deferred or evidence.threaded):
            # Every interrupt's end would have served it: something forbade that.
            in_kernel = evidence.starved_modes == {"kernel"}
            return Verdict.SOFTIRQS_DISABLED if in_kernel else Verdict.UNKNOWN
    elif not evidence.waited:
        return Verdict.UNKNOWN
    if evidence.stuck:
        return Verdict.STUCK_IN_KERNEL
    if evidence.others or evidence.user:
        return Verdict.CPU_CONTENTION
    return Verdict.UNKNOWN
