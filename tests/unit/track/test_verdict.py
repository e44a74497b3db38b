"""The rules of the verdict, one by one, each with the least evidence that supports it."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import pytest

from stalld.track.verdict import Evidence, Verdict, decide

KERNEL = frozenset({"kernel"})
USER = frozenset({"user"})

WAITED = {"waited": True, "ksoftirqd_runnable": True}
OTHER_WAITED = {"waited": True}
STARVED_IN_KERNEL = {"starved": True, "starved_modes": KERNEL}
OLD = {"serves_inline": False}
NEW = {"serves_inline": True}
STUCK = {"stuck": True}

HOG = {"handler_long": True, "handler_ran": True}
NO_CLOCK = {"steal_told": False}

RULES: dict[str, tuple[dict[str, Any], Verdict]] = {
    # vcpu_preempted: nothing of this machine ran
    "stolen": ({"stolen": True}, Verdict.VCPU_PREEMPTED),
    "stolen, and all that follows from it": (
        STARVED_IN_KERNEL | WAITED | OLD | STUCK | HOG | {"stolen": True, "late": True},
        Verdict.VCPU_PREEMPTED,
    ),
    # irqs_disabled: not even the tick came
    "late, and a thief would have been seen": ({"late": True}, Verdict.IRQS_DISABLED),
    "late, and right behind where interrupts are enabled": (
        {"late": True, "interrupts_enabled": True} | NO_CLOCK,
        Verdict.IRQS_DISABLED,
    ),
    "late, and it may have been the hypervisor": ({"late": True} | NO_CLOCK, Verdict.UNKNOWN),
    "late, in a handler, everything starved": (
        STARVED_IN_KERNEL | WAITED | OLD | STUCK | HOG | {"late": True, "enabled_late": True},
        Verdict.IRQS_DISABLED,
    ),
    "interrupts were enabled some time, the tick was not late": (
        {"interrupts_enabled": True},
        Verdict.UNKNOWN,
    ),
    # softirq_hog: one handler ran on
    "a handler": (HOG, Verdict.SOFTIRQ_HOG),
    "a handler, and others starved behind it": (
        STARVED_IN_KERNEL | WAITED | NEW | HOG,
        Verdict.SOFTIRQ_HOG,
    ),
    # stuck_in_kernel: ksoftirqd waits behind one task that stays in the kernel
    "inline kernel: only ksoftirqd waits": (WAITED | NEW | STUCK, Verdict.STUCK_IN_KERNEL),
    "not learned yet: only ksoftirqd waits": (WAITED | STUCK, Verdict.STUCK_IN_KERNEL),
    "old kernel: NET_RX starves with ksoftirqd (the field report)": (
        STARVED_IN_KERNEL | WAITED | OLD | STUCK,
        Verdict.STUCK_IN_KERNEL,
    ),
    "old kernel: NET_RX starves, ksoftirqd runnable for less": (
        STARVED_IN_KERNEL | OLD | STUCK | {"ksoftirqd_runnable": True},
        Verdict.STUCK_IN_KERNEL,
    ),
    "not learned yet: NET_RX starves with ksoftirqd": (
        STARVED_IN_KERNEL | WAITED | STUCK,
        Verdict.STUCK_IN_KERNEL,
    ),
    "stuck for a good part, others took turns before": (
        WAITED | NEW | STUCK | {"others": True, "user": True},
        Verdict.STUCK_IN_KERNEL,
    ),
    "another watched thread waits": (OTHER_WAITED | STUCK, Verdict.STUCK_IN_KERNEL),
    # softirqs_disabled: the next interrupt would have served it, something forbade that
    "inline kernel: starved, ksoftirqd never woken": (
        STARVED_IN_KERNEL | NEW,
        Verdict.SOFTIRQS_DISABLED,
    ),
    "inline kernel: starved although ksoftirqd waits too": (
        STARVED_IN_KERNEL | WAITED | NEW | STUCK,
        Verdict.SOFTIRQS_DISABLED,
    ),
    "old kernel: starved, ksoftirqd not runnable": (
        STARVED_IN_KERNEL | OLD | STUCK,
        Verdict.SOFTIRQS_DISABLED,
    ),
    "not learned yet: starved, ksoftirqd not runnable": (
        STARVED_IN_KERNEL,
        Verdict.SOFTIRQS_DISABLED,
    ),
    "no sample, served when bottom halves came back": (
        {"starved": True, "enabled_late": True} | NEW,
        Verdict.SOFTIRQS_DISABLED,
    ),
    "samples in the kernel and served when bottom halves came back": (
        STARVED_IN_KERNEL | NEW | {"enabled_late": True},
        Verdict.SOFTIRQS_DISABLED,
    ),
    "old kernel: ksoftirqd runnable, yet served when bottom halves came back": (
        STARVED_IN_KERNEL | WAITED | OLD | STUCK | {"enabled_late": True},
        Verdict.SOFTIRQS_DISABLED,
    ),
    "starved in the kernel, user mode seen at other samples": (
        STARVED_IN_KERNEL | NEW | {"user": True, "others": True},
        Verdict.SOFTIRQS_DISABLED,
    ),
    # cpu_contention: ksoftirqd loses the run queue
    "only ksoftirqd waits, behind a program in user mode": (
        WAITED | NEW | {"user": True},
        Verdict.CPU_CONTENTION,
    ),
    "ksoftirqd waits while others take turns": (
        WAITED | NEW | {"others": True},
        Verdict.CPU_CONTENTION,
    ),
    "old kernel: starved behind a program in user mode": (
        {"starved": True, "starved_modes": USER, "user": True} | WAITED | OLD,
        Verdict.CPU_CONTENTION,
    ),
    "another watched thread loses the run queue": (
        OTHER_WAITED | {"others": True},
        Verdict.CPU_CONTENTION,
    ),
    # unknown: everything else
    "nothing waited": (NEW | STUCK, Verdict.UNKNOWN),
    "ksoftirqd was runnable, but not for long": (
        STUCK | {"ksoftirqd_runnable": True},
        Verdict.UNKNOWN,
    ),
    "a handler was in service": (
        STARVED_IN_KERNEL | WAITED | OLD | STUCK | {"handler_ran": True},
        Verdict.UNKNOWN,
    ),
    "inline kernel: starved in user mode": (
        {"starved": True, "starved_modes": USER, "user": True} | NEW,
        Verdict.UNKNOWN,
    ),
    "inline kernel: starved, partly in user mode": (
        {"starved": True, "starved_modes": KERNEL | USER} | NEW,
        Verdict.UNKNOWN,
    ),
    "starved in user mode, served late all the same": (
        {"starved": True, "starved_modes": USER, "enabled_late": True} | NEW,
        Verdict.UNKNOWN,
    ),
    "starved, no sample at all": ({"starved": True} | NEW, Verdict.UNKNOWN),
    "starved over an idle CPU": (
        {"starved": True, "starved_modes": frozenset({"idle"})} | NEW,
        Verdict.UNKNOWN,
    ),
    "starved, a stack that cannot be read": (
        {"starved": True, "starved_modes": frozenset({None})} | NEW,
        Verdict.UNKNOWN,
    ),
    "ksoftirqd waits, nothing else is known": (WAITED | NEW, Verdict.UNKNOWN),
}


@pytest.mark.parametrize(("evidence", "verdict"), RULES.values(), ids=RULES.keys())
def test_rule(evidence: dict[str, Any], verdict: Verdict) -> None:
    """The evidence named supports this verdict and no other."""
    assert decide(Evidence(**evidence)) is verdict


@cache
def every_evidence() -> list[tuple[Evidence, Verdict]]:
    """All combinations of what may be seen, and what is concluded."""
    modes = [frozenset(), KERNEL, USER, KERNEL | USER, frozenset({None}), frozenset({"softirq"})]
    values: dict[str, list[Any]] = {name: [False, True] for name in Evidence._fields}
    values |= {"starved_modes": modes, "serves_inline": [None, False, True]}
    found = (Evidence(*each) for each in product(*values.values()))
    return [(evidence, decide(evidence)) for evidence in found]


def test_nobody_is_blamed_for_nothing() -> None:
    """Without anything that waited, came late or ran long nothing is concluded."""
    for evidence, verdict in every_evidence():
        if not any((evidence.starved, evidence.waited, evidence.late, evidence.handler_long)):
            assert verdict is (Verdict.VCPU_PREEMPTED if evidence.stolen else Verdict.UNKNOWN)


def test_the_order_of_the_causes() -> None:
    """No CPU at all comes before no interrupts, that before a handler, that before tasks."""
    for evidence, verdict in every_evidence():
        assert (verdict is Verdict.VCPU_PREEMPTED) is evidence.stolen
        if verdict is Verdict.IRQS_DISABLED:
            assert evidence.late
        assert (verdict is Verdict.SOFTIRQ_HOG) is (
            evidence.handler_long and not evidence.late and not evidence.stolen
        )


def test_a_late_tick_needs_a_witness() -> None:
    """Interrupts were off only if no thief can have been, or the stack shows it."""
    for evidence, verdict in every_evidence():
        if verdict is Verdict.IRQS_DISABLED:
            assert evidence.steal_told or evidence.interrupts_enabled
        elif evidence.late and not evidence.stolen:
            assert verdict is Verdict.UNKNOWN


def test_disabled_softirqs_need_the_kernel() -> None:
    """A task can hold bottom halves off only in the kernel, and something must starve."""
    for evidence, verdict in every_evidence():
        if verdict is Verdict.SOFTIRQS_DISABLED:
            assert evidence.starved
            assert evidence.starved_modes <= KERNEL


def test_somebody_must_wait_for_the_rest() -> None:
    """Only a thread that is runnable can be kept from the CPU by somebody."""
    for evidence, verdict in every_evidence():
        if verdict in (Verdict.STUCK_IN_KERNEL, Verdict.CPU_CONTENTION):
            # Where threads serve softirqs, what starves waits for one.
            assert evidence.ksoftirqd_runnable or evidence.waited or evidence.threaded


def test_every_verdict_is_given() -> None:
    """None is there for nothing."""
    assert {verdict for _, verdict in every_evidence()} == set(Verdict)
