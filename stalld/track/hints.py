"""What to look at or change, in one sentence: the ``hint`` of a stall.

A table of rules: the first that applies speaks. Each sentence ends with where docs/runbook.md
explains it; what the CPU's network says besides is in :mod:`stalld.enrich.nic_hints`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from stalld.track.evidence import path
from stalld.track.model import Update
from stalld.track.verdict import Verdict

RUNBOOK = "docs/runbook.md"

_REAL_TIME = {1: "SCHED_FIFO", 2: "SCHED_RR", 6: "SCHED_DEADLINE"}
# Whoever reads memory.stat has the counters of all cgroups below summed up.
_MEMCG_STAT = frozenset(
    (
        *("memcg_stat_show", "memory_stat_show", "memcg_numa_stat_show", "memory_numa_stat_show"),
        *("mem_cgroup_flush_stats", "do_flush_stats", "mem_cgroup_css_rstat_flush"),
        *("cgroup_rstat_flush", "cgroup_rstat_flush_locked", "css_rstat_flush"),
    )
)
# Whose innermost function is one of these does nothing but wait, and cannot sleep.
_WAITS = frozenset(
    (
        *("smp_call_function_many_cond", "smp_call_function_single", "__csd_lock_wait"),
        *("csd_lock_wait", "multi_cpu_stop", "rcu_momentary_eqs", "stop_machine_yield"),
        *("native_queued_spin_lock_slowpath", "__pv_queued_spin_lock_slowpath"),
        *("queued_spin_lock_slowpath", "queued_read_lock_slowpath", "queued_write_lock_slowpath"),
    )
)


def _always(_: Update) -> bool:
    return True


class Rule(NamedTuple):
    """What a line ``says`` if it has one of these verdicts, and the rule ``applies`` besides.

    ``section``: of the runbook, which explains it.
    """

    section: str
    verdicts: tuple[Verdict, ...]
    says: Callable[[Update], str]
    applies: Callable[[Update], bool] = _always


def see(sentence: str, section: str) -> str:
    """The sentence with its pointer."""
    return f"{sentence}; see {RUNBOOK}#{section}"


def hint(update: Update) -> str | None:
    """The sentence for one line, or None where nothing can be said."""
    rules = _BY_VERDICT[update.verdict]
    rule = next((rule for rule in rules if rule.applies(update)), None)
    return see(rule.says(update), rule.section) if rule else None


def _plainly(sentence: str) -> Callable[[Update], str]:
    return lambda _: sentence


def _reads_memcg_stat(update: Update) -> bool:
    # A task in the kernel is to blame, and that is what it does there.
    return update.captured != "none" and _sums_up(update.kernel_stack or ())


@lru_cache(maxsize=128)
def _sums_up(frames: tuple[str, ...]) -> bool:
    return any(name.partition(".")[0] in _MEMCG_STAT for name in path(frames))


def _waits_for_another(update: Update) -> bool:
    return bool(update.kernel_stack) and _waits(update.kernel_stack)


@lru_cache(maxsize=128)
def _waits(frames: tuple[str, ...]) -> bool:
    return path(frames)[0].partition(".")[0] in _WAITS


def _is_real_time(update: Update) -> bool:
    return update.blocker is not None and update.blocker.policy in _REAL_TIME


def _says_real_time(update: Update) -> str:
    policy = _REAL_TIME[update.blocker.policy] if update.blocker else ""
    return (
        f"a real-time task ({policy}) had the CPU: give it less "
        "to do there, another CPU, or a lower priority than the threads that wait"
    )


def _captured_after(update: Update) -> bool:
    return update.captured == "after"


def _over_an_interrupt(update: Update) -> bool:
    interrupt = update.blocker is not None and update.blocker.mode == "hardirq"
    return interrupt and _captured_after(update)


def _polled(update: Update) -> bool:
    return update.handler is not None and update.handler.device is not None


def _late_for_half(update: Update) -> bool:
    return bool(update.late_ns and 2 * update.late_ns >= update.duration_ns)


RULES: tuple[Rule, ...] = (
    Rule(
        "waits-for-another-cpu",
        (
            Verdict.STUCK_IN_KERNEL,
            Verdict.SOFTIRQS_DISABLED,
            Verdict.IRQS_DISABLED,
            Verdict.UNKNOWN,
        ),
        _plainly(
            "it waited for another CPU, or for a lock that another one held: look for a stall of "
            "another CPU at that time, this one may be its victim"
        ),
        _waits_for_another,
    ),
    Rule(
        "memcg-stat-readers",
        (Verdict.STUCK_IN_KERNEL, Verdict.CPU_CONTENTION, Verdict.UNKNOWN),
        _plainly(
            "the task summed up the memory statistics of many cgroups: read memory.stat less "
            "often (fewer scrapes of cadvisor or kubelet), get rid of dying cgroups (drop_caches "
            "frees what keeps them), or use a kernel that limits such flushes"
        ),
        _reads_memcg_stat,
    ),
    Rule(
        Verdict.STUCK_IN_KERNEL,
        (Verdict.STUCK_IN_KERNEL,),
        _plainly(
            "one task stayed in the kernel without rescheduling: look at what its stack's system "
            "call does and how often it is called"
        ),
    ),
    Rule(
        Verdict.SOFTIRQS_DISABLED,
        (Verdict.SOFTIRQS_DISABLED,),
        _plainly(
            "the task held bottom halves off: look for a long local_bh_disable() or "
            "spin_lock_bh() section in its stack"
        ),
    ),
    Rule("real-time-tasks", (Verdict.CPU_CONTENTION,), _says_real_time, _is_real_time),
    Rule(
        Verdict.CPU_CONTENTION,
        (Verdict.CPU_CONTENTION,),
        _plainly("other tasks had the CPU: look at their number, priorities and CPU affinity"),
    ),
    Rule(
        Verdict.VCPU_PREEMPTED,
        (Verdict.VCPU_PREEMPTED,),
        _plainly(
            "the hypervisor ran something else on this CPU: look at the overcommitment of the "
            "physical machine"
        ),
    ),
    Rule(
        "interrupt-handlers-and-firmware",
        (Verdict.IRQS_DISABLED,),
        _plainly(
            "an interrupt handler, or firmware, held the CPU while this task ran: look at "
            "/proc/interrupts and drivers"
        ),
        _over_an_interrupt,
    ),
    Rule(
        Verdict.IRQS_DISABLED,
        (Verdict.IRQS_DISABLED,),
        _plainly(
            "interrupts were off: the innermost frames are where they were enabled again; if "
            "that is no unlock or enable function, an interrupt handler or firmware had the CPU"
        ),
        _captured_after,
    ),
    Rule(
        Verdict.IRQS_DISABLED,
        (Verdict.IRQS_DISABLED,),
        _plainly("interrupts were off: look for a long spin_lock_irqsave() section in the stack"),
    ),
    Rule(
        Verdict.SOFTIRQ_HOG,
        (Verdict.SOFTIRQ_HOG,),
        _plainly("one NAPI poll took long: look at the device's driver and what its packets pass"),
        _polled,
    ),
    Rule(
        Verdict.SOFTIRQ_HOG,
        (Verdict.SOFTIRQ_HOG,),
        _plainly("one softirq handler ran long: the frames above handle_softirqs show in what"),
    ),
    Rule(
        Verdict.UNKNOWN,
        (Verdict.UNKNOWN,),
        _plainly(
            "the timer interrupt came late: interrupts were off, or the hypervisor had the CPU; "
            "its steal clock does not tell which"
        ),
        _late_for_half,
    ),
)
"""In this order; what is told of a verdict in a special case stands before what always holds."""

_BY_VERDICT = {verdict: [rule for rule in RULES if verdict in rule.verdicts] for verdict in Verdict}
