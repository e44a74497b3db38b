"""From records to stalls: each way a stall can live and end."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from stalld.records import VECTORS, Source
from stalld.state import StallState
from stalld.track.model import Ended, Observation, Phase, Update
from stalld.track.stall import CLOSE_GRACE_NS, MAX_ONGOING, RING_PERIOD_NS, Tracker
from stalld.track.verdict import Verdict
from stalld.upkeep import EXPIRE_EVERY_S
from tests.unit.make import (
    MS,
    T0,
    THRESHOLD,
    TICK_NS,
    MadeHost,
    close,
    sample,
    task,
    tick,
    waiters,
    waits,
)


def tracker(serves_inline: bool | None = True) -> Tracker:
    """A tracker for a kernel that serves softirqs inline, or not."""
    return Tracker(THRESHOLD, TICK_NS, MadeHost(inline=serves_inline))


def feed(given: Tracker, *observations: Observation) -> list[Update]:
    """All updates that the records bring about."""
    return [update for each in observations for update in given.observe(each)]


def kernel(
    seq: int = 1, active: bool = False, ended_ms: int = 0, waited_ms: int = 0
) -> Callable[[int], StallState]:
    """What the shared state says, of any CPU."""
    ended_ns = T0 + ended_ms * MS if ended_ms else 0
    waited = waits(NET_RX=waited_ms * MS), waiters(), waiters()
    known = StallState(seq, active, ended_ns, *waited)
    return lambda cpu: known


def test_sample_then_close() -> None:
    """The first sample brings the first line, the closing record the last."""
    given = tracker()
    ongoing, resolved = feed(
        given,
        sample(1, 12, wait_ns=waits(NET_RX=12 * MS)),
        close(1, 50, wait_ns=waits(NET_RX=50 * MS)),
    )
    assert (ongoing.phase, ongoing.duration_ns, ongoing.ended) == (Phase.ONGOING, 12 * MS, None)
    assert ongoing.starved == {"NET_RX": 12 * MS}
    assert (resolved.phase, resolved.duration_ns) == (Phase.RESOLVED, 50 * MS)
    assert resolved.ended is Ended.RECORD
    assert resolved.starved == {"NET_RX": 50 * MS}
    assert resolved.verdict is Verdict.SOFTIRQS_DISABLED
    assert (resolved.samples, resolved.expected, resolved.lost) == (1, 1, 0)
    assert not given.open


def test_close_alone() -> None:
    """A stall that nobody sampled is told when it ends, with what the end showed."""
    (resolved,) = feed(
        tracker(), close(0, 11, wait_ns=waits(TIMER=11 * MS), enabled=True, mode="kernel")
    )
    assert (resolved.phase, resolved.captured) == (Phase.RESOLVED, "after")
    assert (resolved.samples, resolved.expected) == (0, 0)
    assert resolved.blocker is not None
    assert resolved.blocker.tid == 101
    assert resolved.verdict is Verdict.SOFTIRQS_DISABLED


def test_who_gives_way_speaks_after() -> None:
    """A record of the switch to ksoftirqd is no sample during the stall, but all there is."""
    ongoing, resolved = feed(
        tracker(),
        sample(1, 12, source=Source.SWITCH, mode="user", waiter_ns=waiters(12 * MS)),
        close(1, 12, source=Source.SWITCH, waiter_ns=waiters(12 * MS)),
    )
    assert ongoing.captured == resolved.captured == "after"
    assert resolved.verdict is Verdict.CPU_CONTENTION


def test_giving_way_in_the_kernel_proves_nothing() -> None:
    """A task enters the kernel to give way: that alone does not make it stuck there."""
    *_, resolved = feed(
        tracker(),
        sample(1, 12, source=Source.SWITCH, waiter_ns=waiters(12 * MS)),
        close(1, 12, source=Source.SWITCH, waiter_ns=waiters(12 * MS)),
    )
    assert resolved.verdict is Verdict.UNKNOWN


def test_few_ongoing_lines() -> None:
    """Lines come when the stall has grown fourfold or is serious, and no more than a handful."""
    given = tracker()
    ages = [10, 11, 39, 40, 41, 99, 100, 101, 399, 400, 5000, 60000]
    lines = feed(given, *(sample(nr, age) for nr, age in enumerate(ages, 1)))
    assert [update.duration_ns // MS for update in lines] == [10, 40, 100, 400]
    assert len(lines) == MAX_ONGOING
    (resolved,) = feed(given, close(len(ages), 60001))
    assert (resolved.samples, resolved.lost) == (len(ages), 0)


def test_a_whole_stack_is_told_at_once() -> None:
    """Where the walk of the first stack ended early, the first whole one has a line of its own."""
    short, whole = ("__x86_indirect_thunk_rax+0x0",), ("spin+0x10", "do_syscall_64+0x5")
    stacks = [short, short, whole, whole]
    samples = (sample(nr, 12 + 4 * nr, frames=frames) for nr, frames in enumerate(stacks, 1))
    lines = feed(tracker(), *samples)
    assert [update.kernel_stack for update in lines] == [short, whole]
    assert lines[1].duration_ns == 24 * MS


def test_starved_only_from_the_threshold() -> None:
    """A wait just below the threshold is not named, at the threshold it is."""
    (update,) = feed(tracker(), sample(1, 12, wait_ns=waits(NET_RX=THRESHOLD, TIMER=THRESHOLD - 1)))
    assert update.starved == {"NET_RX": THRESHOLD}


def test_longest_waits_are_kept() -> None:
    """A vector that starved early and was served since is still named at the end."""
    *_, resolved = feed(
        tracker(),
        sample(1, 12, wait_ns=waits(NET_RX=12 * MS), waiter_ns=waiters(9 * MS)),
        sample(2, 24, wait_ns=waits(TIMER=15 * MS)),
        close(2, 30, wait_ns=waits(TIMER=20 * MS)),
    )
    assert resolved.starved == {"TIMER": 20 * MS, "NET_RX": 12 * MS}
    assert list(resolved.starved) == [v for v in VECTORS if v in resolved.starved]
    assert (resolved.ksoftirqd_pid, resolved.ksoftirqd_wait_ns) == (16, 9 * MS)


def test_ksoftirqd_that_never_waited_is_not_named() -> None:
    """No wait, no pid."""
    (update,) = feed(tracker(), sample(1, 12))
    assert (update.ksoftirqd_pid, update.ksoftirqd_wait_ns) == (0, 0)


def test_lost_samples_are_counted() -> None:
    """The kernel numbers samples: the closing record tells how many did not arrive."""
    *_, resolved = feed(tracker(), sample(2, 20), close(5, 100))
    assert (resolved.samples, resolved.expected, resolved.lost) == (1, 5, 4)


def test_an_overflow_is_counted_once() -> None:
    """Losses that the perf buffer reports and the numbering shows are the same ones."""
    given = tracker()
    feed(given, sample(1, 12))
    given.lost(0, 3)
    given.lost(7, 5)  # No stall there.
    (resolved,) = feed(given, close(4, 100))
    assert resolved.lost == 3


def test_the_next_stall_ends_one_without_its_close() -> None:
    """A new number on the same CPU resolves the old stall as lost, before its own line."""
    given = tracker()
    feed(given, sample(1, 12))
    old, new = feed(given, sample(1, 912, seq=2, started_ns=T0 + 900 * MS))
    assert (old.seq, old.phase, old.ended, old.lost) == (1, Phase.RESOLVED, Ended.LOST, 1)
    assert old.duration_ns == 12 * MS
    assert (new.seq, new.phase, new.duration_ns) == (2, Phase.ONGOING, 12 * MS)


def test_cpus_do_not_mix() -> None:
    """Two CPUs stall at once, each under its own number."""
    given = tracker()
    lines = feed(given, sample(1, 12), sample(1, 13, cpu=1), close(1, 20, cpu=1), close(1, 21))
    assert [(u.cpu, u.phase) for u in lines] == [
        (0, Phase.ONGOING),
        (1, Phase.ONGOING),
        (1, Phase.RESOLVED),
        (0, Phase.RESOLVED),
    ]


@pytest.mark.parametrize("seq", [1, 0, 0xFFFFFFFF])
def test_nothing_after_resolved(seq: int) -> None:
    """A record of a stall that is over, or older, is left out."""
    given = tracker()
    feed(given, sample(1, 12), close(1, 50))
    assert feed(given, sample(2, 51, seq=seq), close(2, 52, seq=seq)) == []
    assert not given.open


@pytest.mark.parametrize("seq", [0, 0xFFFFFFFF])
def test_a_late_record(seq: int) -> None:
    """A record of an older stall does not end the one that goes on."""
    given = tracker()
    lines = feed(given, sample(1, 12), close(2, 13, seq=seq), sample(2, 40), close(3, 50))
    assert {u.seq for u in lines} == {1}
    assert [u.phase for u in lines] == [Phase.ONGOING, Phase.RESOLVED]
    assert lines[-1].ended is Ended.RECORD


def test_numbers_wrap() -> None:
    """After number 0xffffffff comes 0."""
    given = tracker()
    lines = feed(
        given, sample(1, 12, seq=0xFFFFFFFF), close(1, 20, seq=0xFFFFFFFF), sample(1, 40, seq=0)
    )
    assert [(u.seq, u.phase) for u in lines][1:] == [
        (0xFFFFFFFF, Phase.RESOLVED),
        (0, Phase.ONGOING),
    ]


@pytest.mark.parametrize("at_ms", [0, 5, 19])
def test_clocks_that_step_back(at_ms: int) -> None:
    """A tick may interrupt the program that closes: the end is never before a sample."""
    ongoing, resolved = feed(tracker(), sample(1, 20), close(1, at_ms))
    assert resolved.duration_ns == ongoing.duration_ns == 20 * MS


def test_a_sample_before_its_stall() -> None:
    """Clocks of two CPUs may disagree: no time is negative."""
    (update,) = feed(tracker(), sample(1, -3))
    assert update.duration_ns == 0


class TestExpire:
    """What happens when no closing record comes."""

    def test_a_stall_that_goes_on_stays(self) -> None:
        """As long as the kernel says so, it is open."""
        given = tracker()
        feed(given, sample(1, 12))
        for at_ms in range(100, 10_000, 100):
            assert given.expire(T0 + at_ms * MS, kernel(active=True)) == []
        assert given.open

    def test_the_state_tells_the_end(self) -> None:
        """After the grace time, end and waits come from the shared state."""
        given = tracker()
        feed(given, sample(1, 12))
        over = kernel(ended_ms=90, waited_ms=88)
        now = T0 + 100 * MS
        assert given.expire(now, over) == []
        assert given.expire(now + CLOSE_GRACE_NS - 1, over) == []
        (resolved,) = given.expire(now + CLOSE_GRACE_NS, over)
        assert (resolved.ended, resolved.duration_ns) == (Ended.STATE, 90 * MS)
        assert resolved.starved == {"NET_RX": 88 * MS}
        assert resolved.record_ns == 0
        assert not given.open
        assert feed(given, close(1, 90)) == []

    def test_the_record_comes_in_time(self) -> None:
        """Within the grace time the closing record still ends the stall."""
        given = tracker()
        feed(given, sample(1, 12))
        given.expire(T0 + 100 * MS, kernel(ended_ms=90))
        (resolved,) = feed(given, close(1, 90))
        assert resolved.ended is Ended.RECORD
        assert given.expire(T0 + 900 * MS, kernel(ended_ms=90)) == []

    def test_the_grace_spans_a_look(self) -> None:
        """The daemon reads what waits before it looks, so two looks apart none can wait still."""
        assert CLOSE_GRACE_NS >= 2 * EXPIRE_EVERY_S * 1e9

    def test_active_again_restarts_the_grace(self) -> None:
        """Words of the state may be of different moments: over must hold, not flicker."""
        given = tracker()
        feed(given, sample(1, 12))
        given.expire(T0, kernel(ended_ms=90))
        given.expire(T0 + CLOSE_GRACE_NS - 1, kernel(active=True))
        assert given.expire(T0 + CLOSE_GRACE_NS, kernel(ended_ms=90)) == []

    @pytest.mark.parametrize("state", [kernel(seq=2, active=True), kernel(seq=1, ended_ms=-1)])
    def test_both_gone(self, state: Callable[[int], StallState]) -> None:
        """A newer stall in the state, or an end from before: only what was seen is left."""
        given = tracker()
        feed(given, sample(1, 12))
        given.expire(T0 + 100 * MS, state)
        (resolved,) = given.expire(T0 + 100 * MS + CLOSE_GRACE_NS, state)
        assert (resolved.ended, resolved.duration_ns) == (Ended.LOST, 12 * MS)
        assert (resolved.lost, resolved.record_ns) == (1, 0)

    def test_an_end_before_the_last_sample(self) -> None:
        """The state's end does not shorten what was reported already."""
        given = tracker()
        feed(given, sample(1, 12))
        given.expire(T0 + 100 * MS, kernel(ended_ms=11))
        (resolved,) = given.expire(T0 + 100 * MS + CLOSE_GRACE_NS, kernel(ended_ms=11))
        assert (resolved.ended, resolved.duration_ns) == (Ended.STATE, 12 * MS)


@pytest.mark.parametrize(("now_ms", "duration_ms"), [(70, 70), (5, 12)])
def test_finish(now_ms: int, duration_ms: int) -> None:
    """A stop in mid-stall resolves each stall once, as of now."""
    given = tracker()
    feed(given, sample(1, 12), sample(1, 12, cpu=3))
    lines = given.finish(T0 + now_ms * MS)
    assert [(u.cpu, u.phase, u.ended) for u in lines] == [
        (0, Phase.RESOLVED, Ended.SHUTDOWN),
        (3, Phase.RESOLVED, Ended.SHUTDOWN),
    ]
    assert {u.duration_ns for u in lines} == {duration_ms * MS}
    assert given.finish(T0 + now_ms * MS) == []


def test_the_mode_of_the_kernel_is_asked_each_time() -> None:
    """What is learned in mid-stall changes the verdict: an old kernel starves by deferring."""
    host = MadeHost(inline=True)
    given = Tracker(THRESHOLD, TICK_NS, host)
    waiting = {"wait_ns": waits(NET_RX=50 * MS), "waiter_ns": waiters(50 * MS)}
    (ongoing,) = feed(given, sample(1, 50, **waiting))
    host.inline = False
    (resolved,) = feed(given, close(1, 60, **waiting))
    assert (ongoing.verdict, ongoing.serves_inline) == (Verdict.SOFTIRQS_DISABLED, True)
    assert (resolved.verdict, resolved.serves_inline) == (Verdict.STUCK_IN_KERNEL, False)


def test_when_the_record_was_written() -> None:
    """Each update names the moment of the record that brought it; none after a stop."""
    given = tracker()
    lines = feed(given, sample(1, 12), close(1, 20), sample(1, 30, seq=2), sample(1, 40, seq=3))
    lines += given.finish(T0 + 99 * MS)
    assert [u.record_ns and (u.record_ns - T0) // MS for u in lines] == [12, 20, 30, 40, 40, 0]


@pytest.mark.parametrize(
    ("mode", "stuck_ms", "end_ms", "verdict"),
    [
        ("kernel", 20, 60, Verdict.STUCK_IN_KERNEL),
        ("kernel", 20, 61, Verdict.CPU_CONTENTION),  # less than a third of it
        ("kernel", 9, 12, Verdict.CPU_CONTENTION),  # less than the threshold
        ("user", 20, 60, Verdict.CPU_CONTENTION),
    ],
)
def test_a_good_part_of_the_stall(mode: str, stuck_ms: int, end_ms: int, verdict: Verdict) -> None:
    """Who stays in the kernel for a short part of a long wait is not the one to blame."""
    waited = {"waiter_ns": waiters(end_ms * MS)}
    *_, resolved = feed(
        tracker(),
        sample(1, stuck_ms, mode=mode, **waited),
        close(1, end_ms, switches=1, **waited),
    )
    assert resolved.verdict is verdict


class TestLookback:
    """What ran before: in every line but the first, which waits for nothing."""

    BEFORE = (tick(-600), tick(-513), tick(-512), tick(-4), tick(0), tick(4))

    def test_not_in_the_first_line(self) -> None:
        """The first line has none; later ones have it, oldest first, up to the stall's begin."""
        given = Tracker(THRESHOLD, TICK_NS, MadeHost(self.BEFORE))
        first, second, resolved = feed(given, sample(1, 12), sample(2, 48), close(2, 50))
        assert first.lookback is None
        for update in (second, resolved):
            assert update.lookback is not None
            ages = [(each.sample.time_ns - T0) // MS for each in update.lookback]
            assert ages == [-512, -4, 0]
        assert resolved.lookback
        assert resolved.lookback[0].frames == ("f10+0x1", "f20+0x1")

    def test_in_the_only_line(self) -> None:
        """A stall that is told when it is over has it in its one line."""
        (resolved,) = feed(Tracker(THRESHOLD, TICK_NS, MadeHost(self.BEFORE)), close(0, 12))
        assert resolved.lookback is not None
        assert len(resolved.lookback) == 3

    def test_nothing_is_kept(self) -> None:
        """Where the kernel keeps nothing, it is empty, not null."""
        *_, resolved = feed(tracker(), sample(1, 12), close(1, 50))
        assert resolved.lookback is not None
        assert list(resolved.lookback) == []

    @pytest.mark.parametrize(("tick_ms", "reach_ms"), [(10, 1280), (4, 512), (1, 448)])
    def test_its_reach(self, tick_ms: int, reach_ms: int) -> None:
        """Two rings full of ticks: what an idle CPU left there is not from before this stall."""
        assert 128 * max(tick_ms * MS, RING_PERIOD_NS) == reach_ms * MS
        before = [tick(-reach_ms - 1), tick(-reach_ms)]
        given = Tracker(THRESHOLD, tick_ms * MS, MadeHost(before))
        (resolved,) = feed(given, close(0, 12))
        assert resolved.lookback is not None
        assert [each.sample for each in resolved.lookback] == before[1:]

    def test_the_first_line_looks_once(self) -> None:
        """The kernel's memory is read when a stall is first heard of, and for each later line."""
        host = MadeHost()
        given = Tracker(THRESHOLD, TICK_NS, host)
        looks = []
        for each in (sample(1, 12), sample(2, 20), sample(3, 48), close(3, 60)):
            feed(given, each)
            looks.append(host.looks)
        assert looks == [1, 1, 2, 3]

    def test_the_begin_may_turn_out_earlier(self) -> None:
        """What ran inside the stall, as a later record dates it, is not what ran before."""
        given = Tracker(THRESHOLD, TICK_NS, MadeHost(self.BEFORE))
        *_, resolved = feed(given, sample(1, 12), close(1, 50, started_ns=T0 - 4 * MS))
        assert resolved.lookback is not None
        ages = [(each.sample.time_ns - T0) // MS for each in resolved.lookback]
        assert ages == [-513, -512, -4]


def test_the_task_of_a_stall_whose_end_was_lost() -> None:
    """The next stall's task comes before its first record, which ends the stall that is open."""
    given = tracker()
    first, second = task(seq=1), task(seq=2, args=b"other\0")
    given.take_task(first)
    (ongoing,) = feed(given, sample(1, 12))
    given.take_task(second)
    resolved, following = feed(given, sample(1, 80, seq=2))
    assert (ongoing.task, resolved.task, following.task) == (first, first, second)
    given.take_task(task(seq=3))
    assert given._tasks[0] == [second, task(seq=3)]


def test_waiting_threads() -> None:
    """Threads other than ksoftirqd are told by pid, with their longest waits from the threshold."""
    *_, resolved = feed(
        tracker(),
        sample(1, 12, waiter_ns=waiters(0, 12 * MS, 3 * MS), waiter_pid=waiters(16, 40, 50)),
        close(1, 30, waiter_ns=waiters(0, 29 * MS, 10 * MS), waiter_pid=waiters(16, 40, 60)),
    )
    assert resolved.waiting == {40: 29 * MS, 60: 10 * MS}
    assert (resolved.ksoftirqd_pid, resolved.ksoftirqd_wait_ns) == (0, 0)


def test_a_state_tells_waiting_threads() -> None:
    """Where the closing record was lost, the shared state has the waits of all of them."""
    given = tracker()
    feed(given, sample(1, 12))
    known = StallState(1, False, T0 + 40 * MS, waits(), waiters(39 * MS, 20 * MS), waiters(16, 40))
    given.expire(T0, lambda cpu: known)
    (resolved,) = given.expire(T0 + CLOSE_GRACE_NS, lambda cpu: known)
    assert resolved.waiting == {40: 20 * MS}
    assert (resolved.ksoftirqd_pid, resolved.ksoftirqd_wait_ns) == (16, 39 * MS)


def test_an_nmi_took_the_stack() -> None:
    """The update says whether the stack that it shows is the NMI sampler's."""
    for source in (Source.NMI, Source.TICK):
        (update,) = feed(tracker(), sample(1, 12, source=source, late_ns=12 * MS))
        assert update.nmi is (source is Source.NMI)


def test_rules_of_a_line_with_little() -> None:
    """A lone closing record of a watched thread itself: no blocker, no stack, no error."""
    (resolved,) = feed(tracker(), close(0, 12, tid=16, waiter_ns=waiters(12 * MS)))
    assert (resolved.blocker, resolved.kernel_stack, resolved.captured) == (None, (), "none")
    assert (resolved.stolen_ns, resolved.handler, resolved.net.napi) == (None, None, {})
