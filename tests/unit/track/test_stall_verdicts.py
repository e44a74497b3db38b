"""Every verdict from records as a kernel writes them, and refused where the evidence lacks."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from stalld.records import VECTORS, Source
from stalld.track.model import Observation, Phase, Update
from stalld.track.stall import Tracker
from stalld.track.verdict import Verdict
from tests.unit.make import (
    MS,
    T0,
    THRESHOLD,
    TICK_NS,
    MadeHost,
    close,
    sample,
    tick,
    waiters,
    waits,
)

NET_RX, TIMER = VECTORS.index("NET_RX"), VECTORS.index("TIMER")
UNLOCK = ("_raw_spin_unlock_irqrestore+0x14", "spin+0x10")


class Case(NamedTuple):
    """A machine, what it wrote about one stall, and the verdicts of all its lines."""

    records: list[Observation]
    verdicts: list[Verdict]
    stolen_ms: float | None = None
    """What the steal clock counted from the last tick before until the last record."""
    inline: bool | None = True
    tells_steal: bool = True

    def lines(self) -> list[Update]:
        """What the tracker says."""
        kept = []
        records = self.records
        if self.stolen_ms is not None:
            kept = [tick(-2, steal_ns=1)]
            stolen = 1 + round(self.stolen_ms * MS)
            records = [o._replace(record=o.record._replace(steal_ns=stolen)) for o in records]
        host = MadeHost(kept, inline=self.inline, tells_steal=self.tells_steal)
        given = Tracker(THRESHOLD, TICK_NS, host)
        return [line for each in records for line in given.observe(each)]


def late(late_ms: int, at_ms: int, **changes: object) -> Observation:
    """A tick that came too late closes the stall."""
    return close(0, at_ms, **{"source": Source.TICK, "late_ns": late_ms * MS, **changes})


def starved(ms: int) -> dict[str, tuple[int, ...]]:
    """NET_RX has waited."""
    return {"wait_ns": waits(NET_RX=ms * MS)}


def runnable(ms: int, *others: int) -> dict[str, tuple[int, ...]]:
    """ksoftirqd has waited, and other threads perhaps."""
    pids = waiters(16, *range(40, 40 + len(others)))
    return {"waiter_ns": waiters(ms * MS, *(n * MS for n in others)), "waiter_pid": pids}


def served(ms: int, vec: int = NET_RX) -> dict[str, int]:
    """A handler has run, and does still."""
    return {"served_ns": ms * MS, "served_vec": vec, "serving_vec": vec}


V = Verdict

PREEMPTED = {
    "the hypervisor took the CPU while NET_RX was pending": Case(
        [late(28, 30, wait_ns=waits(NET_RX=30 * MS), mode="user")],
        [V.VCPU_PREEMPTED],
        stolen_ms=28,
    ),
    "half of the stall is enough": Case([late(15, 30)], [V.VCPU_PREEMPTED], stolen_ms=15),
    "less than half is not, and the rest was interrupts": Case(
        [late(28, 30)], [V.IRQS_DISABLED], stolen_ms=13
    ),
    "less than half is not, and nor is the rest": Case([late(16, 30)], [V.UNKNOWN], stolen_ms=14.9),
    "less than the threshold is not": Case(
        [sample(1, 12, **starved(12))], [V.SOFTIRQS_DISABLED], stolen_ms=9.9
    ),
    "taken while a task held bottom halves off": Case(
        [sample(1, 12, **starved(12)), close(1, 60, enabled=True, **starved(60))],
        [V.VCPU_PREEMPTED, V.VCPU_PREEMPTED],
        stolen_ms=40,
    ),
    "taken from a queue of tasks": Case(
        [
            sample(1, 12, switches=3, **runnable(12)),
            close(1, 40, source=Source.SWITCH, switches=4, **runnable(40)),
        ],
        [V.VCPU_PREEMPTED, V.VCPU_PREEMPTED],
        stolen_ms=35,
    ),
    "a steal clock that nobody has": Case([late(28, 30)], [V.IRQS_DISABLED], stolen_ms=0),
    "a steal clock that never ran": Case([late(28, 30)], [V.IRQS_DISABLED]),
    "no tick to count from": Case([late(28, 30, steal_ns=MS)], [V.UNKNOWN]),
    "no tick to count from, an unlocking function on top": Case(
        [late(28, 30, steal_ns=MS, frames=UNLOCK)], [V.IRQS_DISABLED]
    ),
}

IRQS = {
    "the tick was late and no thief was seen": Case([late(30, 30)], [V.IRQS_DISABLED]),
    "no clock to see a thief, an unlocking function on top": Case(
        [late(30, 30, frames=UNLOCK)], [V.IRQS_DISABLED], tells_steal=False
    ),
    "no clock, another function on top": Case([late(30, 30)], [V.UNKNOWN], tells_steal=False),
    "no clock, user mode": Case(
        [late(30, 30, mode="user", frames=())], [V.UNKNOWN], tells_steal=False
    ),
    "no clock, an unlocking function of another tick": Case(
        [sample(1, 12, **starved(12), frames=UNLOCK), late(30, 42, sample_nr=1)],
        [V.SOFTIRQS_DISABLED, V.UNKNOWN],
        tells_steal=False,
    ),
    "no clock, an NMI saw them off": Case(
        [sample(1, 12, source=Source.NMI, late_ns=12 * MS), late(30, 30, sample_nr=1)],
        [V.IRQS_DISABLED, V.IRQS_DISABLED],
        tells_steal=False,
    ),
    "over the idle task": Case([late(30, 30, mode="idle", tid=0)], [V.IRQS_DISABLED]),
    "the tick goes on to sample, since something starves": Case(
        [
            sample(1, 30, late_ns=30 * MS, **starved(25)),
            close(1, 31, **starved(26)),
        ],
        [V.IRQS_DISABLED, V.IRQS_DISABLED],
    ),
    "a late tick in a stall with bottom halves off": Case(
        [
            sample(1, 12, **starved(12)),
            sample(2, 30, late_ns=15 * MS, **starved(30)),
            close(2, 40, enabled=True, late_ns=15 * MS, **starved(40)),
        ],
        [V.SOFTIRQS_DISABLED, V.SOFTIRQS_DISABLED],
    ),
    "a tick late by half of such a stall": Case(
        [
            sample(1, 12, **starved(12)),
            sample(2, 40, late_ns=25 * MS, **starved(40)),
            close(2, 50, enabled=True, late_ns=25 * MS, **starved(50)),
        ],
        [V.SOFTIRQS_DISABLED, V.IRQS_DISABLED],
    ),
    "interrupts off first, softirqs for long after": Case(
        [
            sample(1, 12, late_ns=12 * MS, **starved(11)),
            close(1, 60, enabled=True, late_ns=12 * MS, **starved(60)),
        ],
        [V.IRQS_DISABLED, V.SOFTIRQS_DISABLED],
    ),
}

HOG = {
    "a handler ran on, NET_RX waits behind it": Case(
        [sample(1, 12, mode="softirq", **served(12, TIMER), **starved(12))],
        [V.SOFTIRQ_HOG],
    ),
    "nothing waited at all": Case(
        [
            sample(1, 12, mode="softirq", **served(12)),
            close(1, 30, source=Source.EXIT, served_ns=30 * MS, served_vec=NET_RX),
        ],
        [V.SOFTIRQ_HOG, V.SOFTIRQ_HOG],
    ),
    "one of several handlers, but half of the stall": Case(
        [sample(1, 40, mode="softirq", **served(20), **starved(40))], [V.SOFTIRQ_HOG]
    ),
    "a small part of a stall, and it was seen: no task is to blame for sure": Case(
        [
            sample(1, 12, mode="softirq", **served(12), **starved(12)),
            close(1, 60, served_ns=12 * MS, served_vec=NET_RX, **starved(60)),
        ],
        [V.SOFTIRQ_HOG, V.UNKNOWN],
    ),
    "a small part of a wait for the CPU": Case(
        [
            sample(1, 12, mode="softirq", below="user", **served(12), **runnable(12)),
            sample(2, 20, mode="user", served_ns=12 * MS, served_vec=NET_RX, **runnable(20)),
            close(2, 60, source=Source.SWITCH, served_ns=12 * MS, served_vec=NET_RX, switches=4),
        ],
        [V.SOFTIRQ_HOG, V.CPU_CONTENTION],
    ),
    "a handler below the threshold": Case(
        [sample(1, 12, mode="softirq", **served(9), **starved(12))], [V.UNKNOWN]
    ),
}

DISABLED = {
    "a task holds bottom halves off": Case(
        [sample(1, 12, **starved(12)), close(1, 50, enabled=True, **starved(50))],
        [V.SOFTIRQS_DISABLED, V.SOFTIRQS_DISABLED],
    ),
    "between two ticks": Case([close(0, 11, enabled=True, **starved(11))], [V.SOFTIRQS_DISABLED]),
    "served, but not by who held them off": Case([close(0, 11, **starved(11))], [V.UNKNOWN]),
    "seen in user mode": Case([sample(1, 12, mode="user", **starved(12))], [V.UNKNOWN]),
    "seen over the idle task": Case([sample(1, 12, mode="idle", **starved(12))], [V.UNKNOWN]),
    "of a kernel that defers, with ksoftirqd runnable": Case(
        [sample(1, 12, **starved(12), **runnable(5))],
        [V.STUCK_IN_KERNEL],
        inline=False,
    ),
}

WAITING = {
    "a task stays in the kernel": Case(
        [sample(1, 12, **runnable(12)), close(1, 30, source=Source.SWITCH, **runnable(30))],
        [V.STUCK_IN_KERNEL, V.STUCK_IN_KERNEL],
    ),
    "for a NAPI thread": Case([sample(1, 12, **runnable(0, 12))], [V.STUCK_IN_KERNEL]),
    "tasks take turns before another watched thread": Case(
        [sample(1, 12, mode="user", switches=2, **runnable(0, 3, 12))], [V.CPU_CONTENTION]
    ),
    "several wait, none for long": Case(
        [sample(1, 12, mode="user", switches=2, **runnable(9, 9, 9))], [V.UNKNOWN]
    ),
    "one after the other in one slot, none for long": Case(
        [
            sample(1, 12, mode="user", waiter_ns=waiters(0, 9 * MS), waiter_pid=waiters(16, 40)),
            sample(2, 48, mode="user", waiter_ns=waiters(0, 9 * MS), waiter_pid=waiters(16, 50)),
        ],
        [V.UNKNOWN, V.UNKNOWN],
    ),
    "the idle task": Case([sample(1, 12, mode="idle", tid=0, **runnable(12))], [V.UNKNOWN]),
}

CASES = PREEMPTED | IRQS | HOG | DISABLED | WAITING


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_verdicts(case: Case) -> None:
    """Each line has the verdict that the records so far support."""
    lines = case.lines()
    assert [line.verdict for line in lines] == case.verdicts
    ended = [line for line in lines if line.phase is Phase.RESOLVED]
    assert bool(ended) is (case.records[-1].record.type == 2)


def test_nobody_is_blamed_for_a_stolen_cpu() -> None:
    """No task of this machine had the CPU: no blocker, no stack, yet what was stolen."""
    (update,) = PREEMPTED["the hypervisor took the CPU while NET_RX was pending"].lines()
    assert (update.blocker, update.kernel_stack, update.captured) == (None, (), "none")
    assert (update.stolen_ns, update.late_ns, update.nmi) == (28 * MS, 28 * MS, False)
    assert update.starved == {"NET_RX": 30 * MS}


def test_a_late_tick_is_told_in_every_line() -> None:
    """Also where it does not explain the stall."""
    lines = IRQS["a late tick in a stall with bottom halves off"].lines()
    assert [line.late_ns for line in lines] == [0, 15 * MS]


def test_started_when_the_tick_was_due() -> None:
    """The stall begins when the tick should have come, the record says."""
    (update,) = Case([late(30, 30, started_ns=T0)], []).lines()
    assert (update.started_ns, update.duration_ns) == (T0, 30 * MS)


class TestHandler:
    """The softirq handler that ran long."""

    def polling(self, **changes: object) -> list[Update]:
        """A NET_RX handler that ran for 12 ms, then 30, and what is known of its poll."""
        return Case(
            [
                sample(1, 12, mode="softirq", **served(12)),
                close(1, 30, source=Source.EXIT, served_ns=30 * MS, served_vec=NET_RX, **changes),
            ],
            [],
        ).lines()

    def test_its_device(self) -> None:
        """The poll tells its device once it is over, so in the last line only."""
        ongoing, resolved = self.polling(
            napi_ifindex=2, napi_name=b"eth0", napi_work=64, napi_budget=64
        )
        assert ongoing.handler == (NET_RX, 12 * MS, None, None, None)
        assert resolved.handler == (NET_RX, 30 * MS, b"eth0", 64, 64)

    def test_the_backlog(self) -> None:
        """A poll without a device is that of the CPU's own queue."""
        *_, resolved = self.polling(napi_work=0, napi_budget=64)
        assert resolved.handler == (NET_RX, 30 * MS, b"backlog", 0, 64)

    def test_the_last_poll(self) -> None:
        """Of several that were told, the newest is the one of the long run that is over."""
        (update,) = Case(
            [
                sample(1, 12, **served(12), napi_ifindex=2, napi_name=b"eth0", napi_budget=64),
                sample(2, 20, **served(20), napi_ifindex=3, napi_name=b"eth1", napi_budget=64),
                close(2, 30, **served(30), napi_ifindex=3, napi_name=b"eth1", napi_budget=64),
            ],
            [],
        ).lines()[1:]
        assert update.handler == (NET_RX, 30 * MS, b"eth1", 0, 64)

    def test_no_poll(self) -> None:
        """Where no poll was seen, there is no device."""
        *_, resolved = self.polling()
        assert resolved.handler == (NET_RX, 30 * MS, None, None, None)

    def test_another_vector(self) -> None:
        """What was polled behind a long timer handler is not what took its time."""
        (resolved,) = Case(
            [close(0, 30, served_ns=30 * MS, served_vec=TIMER, napi_budget=64, napi_ifindex=2)], []
        ).lines()
        assert resolved.handler == (TIMER, 30 * MS, None, None, None)

    def test_it_is_told_under_any_verdict(self) -> None:
        """A handler of the threshold or longer is told even if it does not explain the stall."""
        lines = HOG["a small part of a wait for the CPU"].lines()
        assert [line.handler and line.handler.service_ns for line in lines] == [12 * MS] * 2
        (update,) = HOG["a handler below the threshold"].lines()
        assert update.handler is None
