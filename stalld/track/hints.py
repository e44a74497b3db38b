"""What to look at or change, in one sentence: the ``hint`` of a stall."""

from __future__ import annotations

from stalld.track.model import Update
from stalld.track.verdict import Verdict

_DEADLINE, _FIFO, _RR = 6, 1, 2

_PLAIN = {
    Verdict.STUCK_IN_KERNEL: "one task stayed in the kernel without rescheduling: "
    "look at what its stack's system call does and how often it is called",
    Verdict.SOFTIRQS_DISABLED: "the task held bottom halves off: look for a long "
    "local_bh_disable() or spin_lock_bh() section in its stack",
    Verdict.CPU_CONTENTION: "other tasks had the CPU: look at their number, priorities and "
    "CPU affinity",
    Verdict.VCPU_PREEMPTED: "the hypervisor ran something else on this CPU: look at the "
    "overcommitment of the physical machine",
}


def hint(update: Update) -> str | None:
    """The sentence for one line, or None where nothing can be said."""
    if update.verdict is Verdict.UNKNOWN:
        return _unknown(update)
    if update.verdict is Verdict.IRQS_DISABLED:
        return _irqs_disabled(update)
    if update.verdict is Verdict.SOFTIRQ_HOG:
        return _softirq_hog(update)
    if update.verdict is Verdict.CPU_CONTENTION and update.blocker:
        names = {_FIFO: "SCHED_FIFO", _RR: "SCHED_RR", _DEADLINE: "SCHED_DEADLINE"}
        if update.blocker.policy in names:
            return (
                f"a real-time task ({names[update.blocker.policy]}) had the CPU: give it less "
                "to do there, another CPU, or a lower priority than the threads that wait"
            )
    return _PLAIN.get(update.verdict)


def _irqs_disabled(update: Update) -> str:
    if update.captured == "after" and update.blocker and update.blocker.mode == "hardirq":
        return (
            "an interrupt handler, or firmware, held the CPU while this task ran: "
            "look at /proc/interrupts and drivers"
        )
    if update.captured == "after":
        return (
            "interrupts were off: the innermost frames are where they were enabled again; if "
            "that is no unlock or enable function, an interrupt handler or firmware had the CPU"
        )
    return "interrupts were off: look for a long spin_lock_irqsave() section in the stack"


def _softirq_hog(update: Update) -> str:
    device = update.handler.device if update.handler else None
    if device is not None:
        return "one NAPI poll took long: look at the device's driver and what its packets pass"
    return "one softirq handler ran long: the frames above handle_softirqs show in what"


def _unknown(update: Update) -> str | None:
    if update.late_ns and 2 * update.late_ns >= update.duration_ns:
        return (
            "the timer interrupt came late: interrupts were off, or the hypervisor had the CPU; "
            "its steal clock does not tell which"
        )
    return None
