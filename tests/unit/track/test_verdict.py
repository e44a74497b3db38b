"""The rules of the verdict, one by one, each with the least evidence that supports it."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from stalld.track.verdict import HINTS, Evidence, Verdict, decide

KERNEL = frozenset({"kernel"})
USER = frozenset({"user"})

WAITED = {"ksoftirqd_waited": True, "ksoftirqd_runnable": True}
STARVED_IN_KERNEL = {"starved": True, "starved_modes": KERNEL}
OLD = {"serves_inline": False}
NEW = {"serves_inline": True}
STUCK = {"stuck": True}

RULES: dict[str, tuple[dict[str, Any], Verdict]] = {
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


def every_evidence() -> list[Evidence]:
    """All combinations of what may be seen."""
    modes = [frozenset(), KERNEL, USER, KERNEL | USER, frozenset({None}), frozenset({"softirq"})]
    values: dict[str, list[Any]] = {name: [False, True] for name in Evidence._fields}
    values |= {"starved_modes": modes, "serves_inline": [None, False, True]}
    return [Evidence(*each) for each in product(*values.values())]


def test_nobody_is_blamed_for_nothing() -> None:
    """Without a starved vector and a waiting ksoftirqd nothing is concluded."""
    for evidence in every_evidence():
        if not evidence.starved and not evidence.ksoftirqd_waited:
            assert decide(evidence) is Verdict.UNKNOWN


def test_disabled_softirqs_need_the_kernel() -> None:
    """A task can hold bottom halves off only in the kernel, and something must starve."""
    for evidence in every_evidence():
        if decide(evidence) is Verdict.SOFTIRQS_DISABLED:
            assert evidence.starved
            assert evidence.starved_modes <= KERNEL


def test_ksoftirqd_must_wait_for_the_rest() -> None:
    """Only a ksoftirqd that is runnable can be kept from the CPU by somebody."""
    for evidence in every_evidence():
        if decide(evidence) in (Verdict.STUCK_IN_KERNEL, Verdict.CPU_CONTENTION):
            assert evidence.ksoftirqd_runnable or evidence.ksoftirqd_waited


def test_every_verdict_given_has_a_hint() -> None:
    """Whatever can be concluded comes with what to do; unknown says nothing."""
    given = {decide(evidence) for evidence in every_evidence()}
    assert given == set(HINTS)
    for verdict, hint in HINTS.items():
        assert bool(hint) is (verdict is not Verdict.UNKNOWN)
