"""Whom a stall blames, and what it shows of them."""

from __future__ import annotations

from typing import Any

import pytest

from stalld.records import LOOKBACK_SAMPLES, Source, TickSample
from stalld.track.model import Observation, Update
from stalld.track.stall import Tracker
from stalld.track.verdict import Verdict
from tests.unit.make import (
    MS,
    THRESHOLD,
    TICK_NS,
    MadeHost,
    close,
    sample,
    tick,
    waiters,
    waits,
)


def last(*observations: Observation, host: MadeHost | None = None) -> Update:
    """The last line that the records bring about."""
    given = Tracker(THRESHOLD, TICK_NS, host or MadeHost())
    return [update for each in observations for update in given.observe(each)][-1]


def blamed(update: Update) -> bytes | None:
    """The blocker's name."""
    return update.blocker.comm if update.blocker else None


class TestCulprit:
    """Whom and what the event shows."""

    def test_most_samples_win(self) -> None:
        """The task and the path seen most often, in its first sample."""
        resolved = last(
            sample(1, 10, tid=7, comm=b"once", frames=("a+0x1",)),
            sample(2, 20, tid=8, comm=b"often", frames=("rare+0x1", "b+0x9")),
            sample(3, 30, tid=8, comm=b"often", frames=("hot+0x1", "b+0x9")),
            sample(4, 40, tid=8, comm=b"often", frames=("hot+0x2", "b+0x9")),
            close(4, 50, tid=9, comm=b"late"),
        )
        assert resolved.blocker is not None
        assert (resolved.blocker.tid, resolved.blocker.comm) == (8, b"often")
        assert resolved.kernel_stack == ("hot+0x1", "b+0x9")
        assert resolved.captured == "during"

    def test_time_counts_not_samples(self) -> None:
        """Samples grow rarer: the task that two of them show for longer had the CPU longer."""
        resolved = last(
            sample(1, 10, tid=7, comm=b"first"),
            sample(2, 14, tid=7, comm=b"first"),
            sample(3, 50, tid=8, comm=b"longest"),
            close(3, 51),
        )
        assert resolved.blocker is not None
        assert resolved.blocker.comm == b"longest"

    def test_fields_of_the_blocker(self) -> None:
        """Everything the record knows of the task is passed on."""
        update = last(sample(1, 12, policy=1, prio=49, cgroup_id=5, mode="user", tgid=3, tid=4))
        assert update.blocker == (3, 4, b"spinner", "user", 1, 49, 5)

    def test_null_user_frames_are_dropped(self) -> None:
        """The walker may end on a null frame pointer."""
        update = last(sample(1, 12, mode="user", user_stack=(0x40, 0x50, 0)))
        assert update.user_stack == (0x40, 0x50)

    def test_a_handler_in_service_blames_nobody(self) -> None:
        """While another vector is served, the task below it is not to blame."""
        resolved = last(
            sample(1, 12, serving_vec=3, wait_ns=waits(TIMER=12 * MS)),
            close(1, 20, wait_ns=waits(TIMER=20 * MS)),
        )
        assert resolved.verdict is Verdict.UNKNOWN


class TestMode:
    """Where the blocker was."""

    def test_kernel_and_user(self) -> None:
        """As the sample found it."""
        for mode in ("kernel", "user", "softirq", "hardirq", "idle", None):
            update = last(sample(1, 12, mode=mode))
            assert update.blocker is not None
            assert update.blocker.mode == mode

    @pytest.mark.parametrize(
        ("mode", "frames", "told"),
        [
            ("user", (), "hardirq"),
            ("kernel", ("irqentry_exit_to_user_mode+0x9", "asm_exc_page_fault+0x2"), "hardirq"),
            ("kernel", ("exit_to_user_mode_prepare+0x20",), "hardirq"),
            ("kernel", ("_raw_spin_unlock_irqrestore+0x14", "spin+0x1"), "kernel"),
            ("kernel", ("spin+0x1",), "kernel"),
            ("kernel", (), "kernel"),
            ("softirq", ("net_rx_action+0x1",), "softirq"),
            ("idle", ("pv_native_safe_halt+0x9",), "idle"),
        ],
    )
    def test_interrupts_off(self, mode: str, frames: tuple[str, ...], told: str) -> None:
        """User code cannot hold interrupts off: there, and on the way out of one, it was one."""
        irqs_off = {"source": Source.TICK, "late_ns": 30 * MS, "kernel_stack": (1, 2)}
        update = last(close(0, 30, mode=mode, frames=frames, **irqs_off))
        assert update.verdict is Verdict.IRQS_DISABLED
        assert update.blocker is not None
        assert update.blocker.mode == told
        assert update.captured == "after"

    def test_user_mode_under_another_verdict(self) -> None:
        """It stays what it is."""
        update = last(sample(1, 12, mode="user", waiter_ns=waiters(12 * MS)))
        assert update.verdict is Verdict.CPU_CONTENTION
        assert update.blocker is not None
        assert update.blocker.mode == "user"


class TestInterruptsOff:
    """Before and after a tick that came too late."""

    NMI = sample(1, 12, source=Source.NMI, late_ns=12 * MS, frames=("culprit+0x1",))
    LATE = sample(2, 40, late_ns=40 * MS, frames=("unlock+0x1",), tid=102)

    def test_an_nmi_came_before(self) -> None:
        """The one stack from inside wins, however short it stood there."""
        update = last(self.NMI, self.LATE, close(2, 41, late_ns=40 * MS))
        assert update.verdict is Verdict.IRQS_DISABLED
        assert update.kernel_stack == ("culprit+0x1",)
        assert (update.captured, update.nmi) == ("during", True)
        assert update.blocker is not None
        assert (update.blocker.tid, update.blocker.mode) == (101, "kernel")

    def test_no_nmi_came(self) -> None:
        """The tick's stack is that of the moment when interrupts were enabled."""
        update = last(self.LATE, close(2, 41, late_ns=40 * MS))
        assert update.kernel_stack == ("unlock+0x1",)
        assert (update.captured, update.nmi) == ("after", False)


class TestLetGo:
    """Stalls that nobody sampled: what the closing record may be blamed for."""

    @pytest.mark.parametrize(
        ("tid", "blames"),
        [
            (101, b"spinner"),
            (0, b"spinner"),  # the idle task, and slots that were never used have pid 0
            (16, None),  # ksoftirqd
            (40, None),  # it waited itself
            (50, b"spinner"),  # it waited in a stall long ago
        ],
    )
    def test_who_waited_did_not_stand_in_its_own_way(self, tid: int, blames: bytes | None) -> None:
        """A watched thread that serves what is late, after it got the CPU, is not to blame."""
        update = last(
            close(
                0,
                12,
                tid=tid,
                wait_ns=waits(NET_RX=12 * MS),
                waiter_ns=waiters(0, 11 * MS),
                waiter_pid=waiters(16, 40, 50),
            )
        )
        assert blamed(update) == blames
        assert update.captured == ("after" if blames else "none")


class TestConsumers:
    """Tasks that take turns: the ring has every tick, the samples only some."""

    BEFORE = (tick(-4),)

    def told(self, *ticks: TickSample, before: TickSample | None = None, **changes: Any) -> Update:
        """A contention of 60 ms with three samples of one task; the ring as it was at the end."""
        other = {"tid": 7, "comm": b"sampled", "mode": "user", **changes}
        ring = [before or tick(-4), *ticks]
        return last(
            *(
                sample(nr, at_ms, switches=nr, waiter_ns=waiters(at_ms * MS), **other)
                for nr, at_ms in ((1, 12), (2, 20), (3, 40))
            ),
            close(3, 60, source=Source.SWITCH, switches=9, waiter_ns=waiters(60 * MS)),
            host=MadeHost(self.BEFORE, ring),
        )

    def test_the_biggest_consumer(self) -> None:
        """Whom most ticks found is to blame, with the stack of its first tick."""
        found = {"tid": 8, "tgid": 80, "comm": b"consumer", "policy": 1, "prio": 49}
        update = self.told(
            tick(4, tid=7, comm=b"sampled"),
            *(tick(at_ms, **found, stack=(at_ms,)) for at_ms in range(8, 60, 4)),
        )
        assert update.verdict is Verdict.CPU_CONTENTION
        assert update.blocker == (80, 8, b"consumer", "kernel", 1, 49, None)
        assert update.kernel_stack == ("f8+0x1",)
        assert (update.captured, update.user_stack, update.nmi) == ("during", (), False)

    def test_it_was_sampled_too(self) -> None:
        """A sample knows more than the ring: user stack and cgroup."""
        update = self.told(
            *(tick(at_ms, tid=9) for at_ms in range(4, 20, 4)),
            *(tick(at_ms, tid=7) for at_ms in range(20, 60, 4)),
            user_stack=(0x40,),
        )
        assert blamed(update) == b"sampled"
        assert (update.blocker and update.blocker.cgroup_id, update.user_stack) == (77, (0x40,))

    def test_sampled_once(self) -> None:
        """The consumer's own sample is shown, also where others were sampled more."""
        once = sample(1, 12, tid=8, comm=b"consumer", mode="user", waiter_ns=waiters(12 * MS))
        ring = [tick(-4), *(tick(at_ms, tid=8, stack=()) for at_ms in range(4, 60, 4))]
        update = last(
            once,
            sample(2, 40, tid=7, comm=b"sampled", mode="user", switches=3),
            close(2, 60, source=Source.SWITCH, waiter_ns=waiters(60 * MS), switches=4),
            host=MadeHost(self.BEFORE, ring),
        )
        assert blamed(update) == b"consumer"
        assert update.blocker is not None
        assert update.blocker.cgroup_id == 77

    def test_ticks_outside_do_not_count(self) -> None:
        """Who ran before or after is not to blame."""
        outside = [tick(at_ms, tid=8, comm=b"outside") for at_ms in range(61, 120, 4)]
        before = tick(0, tid=8, comm=b"outside")
        assert blamed(self.told(tick(8, tid=7), *outside, before=before)) == b"sampled"

    def test_the_ring_went_round(self) -> None:
        """A ring that does not reach back to the begin cannot tell who had most."""
        ticks = [tick(50 + n / 10, tid=8, comm=b"late") for n in range(LOOKBACK_SAMPLES)]
        assert blamed(self.told(*ticks[1:], before=ticks[0])) == b"sampled"

    def test_the_ring_just_reaches_back(self) -> None:
        """A tick at the very begin is old enough to know all that came after."""
        ticks = [tick(at_ms, tid=8, comm=b"consumer") for at_ms in range(4, 60, 4)]
        assert blamed(self.told(*ticks, before=tick(0))) == b"consumer"

    def test_not_in_the_first_line(self) -> None:
        """The first line goes by its sample."""
        ring = [tick(-4), *(tick(at_ms, tid=8) for at_ms in (4, 8, 12))]
        update = last(
            sample(1, 12, mode="user", waiter_ns=waiters(12 * MS), switches=1),
            host=MadeHost(ring, ring),
        )
        assert (update.verdict, blamed(update)) == (Verdict.CPU_CONTENTION, b"spinner")

    def test_other_verdicts_go_by_the_samples(self) -> None:
        """Whoever ran, a task that holds bottom halves off is the one that was seen so."""
        ring = [tick(-4), *(tick(at_ms, tid=8) for at_ms in range(4, 60, 4))]
        update = last(
            sample(1, 12, wait_ns=waits(NET_RX=12 * MS)),
            close(1, 60, wait_ns=waits(NET_RX=60 * MS), enabled=True),
            host=MadeHost(self.BEFORE, ring),
        )
        assert (update.verdict, blamed(update)) == (Verdict.SOFTIRQS_DISABLED, b"spinner")
