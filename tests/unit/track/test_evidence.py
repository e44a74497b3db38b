"""What records prove, one question after the other."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from stalld.records import RecordType, Source, TickKind
from stalld.rings import Polled
from stalld.track import evidence
from stalld.track.evidence import (
    after_late,
    enabled_interrupts,
    longest_in_kernel_ns,
    path,
    weigh,
)
from stalld.track.gather import Stall
from stalld.track.model import Net, Observation
from stalld.track.verdict import Evidence
from tests.unit.make import (
    MS,
    T0,
    THRESHOLD,
    close,
    observation,
    sample,
    tick,
    waiters,
    waits,
)


def stall(*observations: Observation, **changes: Any) -> Stall:
    """A stall of these records."""
    given = Stall(0, 1, T0, **{"before": (), **changes})
    for each in observations:
        given.take(each)
    return given


def net_of(given: Stall) -> Net:
    """What it did for the network, with ticks of 4 ms."""
    return evidence.net_of(given, 8 * MS, {"softnet"})


def weighed(*observations: Observation, **changes: Any) -> Evidence:
    """What they prove on a machine that serves inline and tells what is stolen."""
    return weigh(stall(*observations, **changes), THRESHOLD, True, True)


STUCK: dict[str, tuple[list[Observation], int]] = {
    "no sample": ([close(0, 50)], 0),
    "never switched: since the stall began": ([sample(1, 12)], 12),
    "until the close, which shows the same number of switches": (
        [sample(1, 12), close(1, 50)],
        50,
    ),
    "switched before the close": ([sample(1, 12), close(1, 50, switches=1)], 12),
    "two samples, no switch between": (
        [sample(1, 20, switches=3), sample(2, 35, switches=3)],
        15,
    ),
    "switched once, soon after the begin": (
        [sample(1, 12, switches=1, switched_ns=T0 + MS)],
        11,
    ),
    "a switch before the begin": ([sample(1, 12, switched_ns=T0 - 5 * MS)], 12),
    "a switch between": ([sample(1, 20, switches=3), sample(2, 35, switches=4)], 0),
    "another task": ([sample(1, 12, tid=1), sample(2, 35, tid=2, switches=1)], 12),
    "user mode between": (
        [sample(1, 12), sample(2, 24, mode="user"), sample(3, 48, switches=1)],
        12,
    ),
    "user mode between, and no switch at all": (
        [sample(1, 12), sample(2, 24, mode="user"), sample(3, 32), sample(4, 40)],
        16,
    ),
    "an interrupt over the kernel is the task's time": (
        [sample(1, 12, mode="hardirq", below="kernel")],
        12,
    ),
    "a softirq over user mode is not": ([sample(1, 12, mode="softirq", below="user")], 0),
    "user mode only": ([sample(1, 12, mode="user"), close(1, 50)], 0),
}


@pytest.mark.parametrize(("records", "ms"), STUCK.values(), ids=STUCK.keys())
def test_longest_in_kernel(records: list[Observation], ms: int) -> None:
    """Only time that samples prove to be one task's in the kernel counts."""
    closing = records.pop() if records[-1].record.type is RecordType.CLOSE else None
    assert longest_in_kernel_ns(records, closing) == ms * MS


ENABLED: dict[str, tuple[str | None, tuple[str, ...], bool]] = {
    "a spin lock": ("kernel", ("_raw_spin_unlock_irqrestore+0x14", "spin+0x1"), True),
    "another one": ("kernel", ("_raw_spin_unlock_irq+0x10",), True),
    "a lock for readers": ("kernel", ("_raw_read_unlock_irqrestore+0x14",), True),
    "of older kernels": ("kernel", ("__raw_spin_unlock_irqrestore+0x14",), True),
    "behind a context switch": ("kernel", ("finish_task_switch.isra.0+0x90",), True),
    "local_irq_enable": ("kernel", ("raw_local_irq_enable+0x1",), True),
    "a plain unlock": ("kernel", ("_raw_spin_unlock+0x14",), False),
    "bottom halves": ("kernel", ("_raw_spin_unlock_bh+0x14",), False),
    "one of a module that is called alike": ("kernel", ("my_raw_spin_unlock_irq+0x1",), False),
    "not on top": ("kernel", ("spin+0x1", "_raw_spin_unlock_irqrestore+0x14"), False),
    "in a softirq": ("softirq", ("_raw_spin_unlock_irqrestore+0x14",), False),
    "no stack": ("kernel", (), False),
    "user mode": ("user", (), False),
    "a stack that was not recognised": (None, ("_raw_spin_unlock_irqrestore+0x14",), False),
}


@pytest.mark.parametrize(("mode", "frames", "enabled"), ENABLED.values(), ids=ENABLED.keys())
def test_enabled_interrupts(mode: str | None, frames: tuple[str, ...], enabled: bool) -> None:
    """Only a function that enables them, at the very place where the interrupt came."""
    assert enabled_interrupts(observation(mode, frames)) is enabled


class TestAfterLate:
    """Which stack is the first one after a tick that came too late."""

    def test_the_late_tick_itself(self) -> None:
        """The first tick whose record tells of lateness; later ones are not it."""
        late = sample(2, 30, late_ns=15 * MS)
        assert after_late(
            stall(sample(1, 12), late, sample(3, 60, late_ns=15 * MS), close(3, 90, late_ns=15))
        ) == [late]

    def test_it_closed_the_stall(self) -> None:
        """Where nothing waits any more, the late tick's record is the last."""
        late = close(0, 30, source=Source.TICK, late_ns=30 * MS)
        assert after_late(stall(late)) == [late]

    def test_nmis_before(self) -> None:
        """They came while interrupts were off."""
        nmi, late = sample(1, 12, source=Source.NMI, late_ns=12 * MS), sample(2, 30, late_ns=1)
        assert after_late(stall(nmi, late)) == [nmi, late]

    @pytest.mark.parametrize("source", [Source.SWITCH, Source.ENTRY, Source.EXIT])
    def test_other_records(self, source: Source) -> None:
        """A switch or a service tells the lateness too, yet comes when it likes."""
        assert after_late(stall(close(0, 30, source=source, late_ns=20 * MS))) == []

    def test_no_late_tick(self) -> None:
        """Nothing was late."""
        assert after_late(stall(sample(1, 12), close(1, 30))) == []


class TestWeigh:
    """Thresholds and parts."""

    def test_nothing(self) -> None:
        """A stall without any record proves nothing, and fails nowhere."""
        assert weighed() == Evidence(serves_inline=True)

    @pytest.mark.parametrize(
        ("late_ms", "at_ms", "is_late"),
        [(10, 10, True), (10, 20, True), (10, 21, False), (9, 9, False), (30, 60, True)],
    )
    def test_late(self, late_ms: int, at_ms: int, is_late: bool) -> None:
        """The threshold and half of the stall."""
        assert weighed(sample(1, at_ms, late_ns=late_ms * MS)).late is is_late

    @pytest.mark.parametrize(
        ("stolen_ms", "stolen", "is_late"), [(0, 0, 1), (14, 0, 1), (15, 1, 1)]
    )
    def test_late_without_what_was_stolen(self, stolen_ms: int, stolen: int, is_late: int) -> None:
        """A CPU that was taken away for a part of it explains that part of the lateness."""
        late = sample(1, 30, late_ns=30 * MS, steal_ns=1 + stolen_ms * MS)
        found = weighed(late, before=[tick(-2, steal_ns=1)])
        assert (found.stolen, found.late) == (stolen, is_late)

    @pytest.mark.parametrize(("stolen_ms", "stuck"), [(0, True), (20, True), (21, False)])
    def test_stuck_without_what_was_stolen(self, stolen_ms: int, stuck: bool) -> None:
        """A task that lost its CPU to the hypervisor was not in the kernel meanwhile."""
        seen = sample(1, 30, switches=4, switched_ns=T0, steal_ns=1 + stolen_ms * MS)
        end = close(1, 30, switches=9, steal_ns=1 + stolen_ms * MS)
        assert weighed(seen, end, before=[tick(-2, steal_ns=1)]).stuck is stuck

    @pytest.mark.parametrize(
        ("served_ms", "at_ms", "long"), [(10, 20, True), (10, 21, False), (9, 10, False)]
    )
    def test_handler(self, served_ms: int, at_ms: int, long: bool) -> None:
        """Likewise for a handler."""
        found = weighed(sample(1, at_ms, served_ns=served_ms * MS, served_vec=3))
        assert found.handler_long is long

    @pytest.mark.parametrize(
        ("mode", "frames", "long"),
        [
            ("softirq", ("spin+0x1",), True),
            ("kernel", ("spin+0x1",), True),
            ("kernel", ("spin+0x1", "entry_SYSCALL_64_after_hwframe+0x76"), False),
            ("user", (), False),
        ],
    )
    def test_a_handler_that_was_preempted(
        self, mode: str, frames: tuple[str, ...], long: bool
    ) -> None:
        """Time in which a sample hit another task, to its very base, was not the handler's."""
        served = {"served_ns": 20 * MS, "served_vec": 3, "serving_vec": 3}
        assert weighed(sample(1, 20, mode=mode, frames=frames, **served)).handler_long is long

    def test_a_handler_in_service(self) -> None:
        """It counts where the sample saw a starved vector, not elsewhere."""
        starved = {"wait_ns": waits(TIMER=12 * MS)}
        assert weighed(sample(1, 12, serving_vec=3, **starved)).handler_ran
        assert not weighed(sample(1, 12, serving_vec=3), sample(2, 24, **starved)).handler_ran

    def test_starved_modes(self) -> None:
        """Those of samples that saw it pending for the threshold; what its end hit says nothing."""
        starved = {"wait_ns": waits(TIMER=THRESHOLD)}
        found = weighed(
            sample(1, 12, mode="user", wait_ns=waits(TIMER=THRESHOLD - 1)),
            sample(2, 20, mode="kernel", **starved),
            sample(3, 30, mode=None, **starved),
            close(3, 31, mode="idle", **starved),
        )
        assert found.starved
        assert found.starved_modes == {"kernel", None}

    @pytest.mark.parametrize(
        ("waiting", "waited", "runnable"),
        [
            (waiters(), False, False),
            (waiters(9 * MS), False, True),
            (waiters(10 * MS), True, True),
            (waiters(0, 0, 10 * MS), True, False),
            (waiters(9 * MS, 9 * MS, 9 * MS), False, True),
        ],
    )
    def test_waiters(self, waiting: tuple[int, ...], waited: bool, runnable: bool) -> None:
        """Any watched thread's wait counts from the threshold, only ksoftirqd's before."""
        found = weighed(sample(1, 12, waiter_ns=waiting, waiter_pid=waiters(16, 40, 50)))
        assert (found.waited, found.ksoftirqd_runnable) == (waited, runnable)

    def test_what_gave_way(self) -> None:
        """A task that gave way out of user mode was there; what served late vectors was not."""
        assert weighed(close(0, 12, source=Source.SWITCH, mode="user")).user
        assert not weighed(close(0, 12, source=Source.ENTRY, mode="user")).user
        assert weighed(sample(1, 12, mode="hardirq", below="user")).user

    def test_others(self) -> None:
        """Switches, or two tasks at two samples."""
        assert not weighed(sample(1, 12), sample(2, 20)).others
        assert weighed(sample(1, 12), sample(2, 20, tid=7)).others
        assert weighed(sample(1, 12, switches=1)).others


class TestNet:
    """What the CPU did for the network."""

    COUNTS: ClassVar[dict[str, int]] = {
        "net_rx_runs": 5,
        "net_rx_ns": 7 * MS,
        "processed": 100,
        "squeezed": 2,
    }

    def counted(self, **more: int) -> dict[str, int]:
        """The counters, some of them further on."""
        return {name: count + more.get(name, 0) for name, count in self.COUNTS.items()}

    def test_since_the_last_tick_before(self) -> None:
        """The differences of the counters."""
        before = [tick(-8), tick(-4, **self.COUNTS), tick(4, **self.counted(processed=9))]
        more = self.counted(net_rx_runs=3, net_rx_ns=2 * MS, processed=64, squeezed=1)
        assert net_of(stall(close(0, 12, **more), before=before)) == Net(3, 2 * MS, 64, 1, None)

    def test_the_newest_record_counts(self) -> None:
        """The last sample, then the closing record."""
        before = [tick(-4, **self.COUNTS)]
        given = stall(
            sample(1, 12, **self.counted(processed=1)),
            sample(2, 20, **self.counted(processed=2)),
            before=before,
        )
        assert net_of(given).packets == 2
        given.take(close(2, 30, **self.counted(processed=3)))
        assert net_of(given).packets == 3

    def test_counters_that_wrap(self) -> None:
        """The kernel's counters have 32 bits."""
        last = {"net_rx_runs": 0xFFFFFFFF, "processed": 0xFFFFFFF0, "squeezed": 0xFFFFFFFE}
        now = {"net_rx_runs": 1, "processed": 0x10, "squeezed": 0}
        found = net_of(stall(close(0, 12, **now), before=[tick(-4, **last)]))
        assert (found.runs, found.packets, found.squeezed) == (2, 0x20, 2)

    COLUMNS: ClassVar[dict[str, str]] = {
        "dropped": "dropped",
        "received_rps": "received_rps",
        "flow_limit": "flow_limited",
    }

    @pytest.mark.parametrize("place", COLUMNS)
    def test_what_the_kernel_has(self, place: str) -> None:
        """Each further counter is told where the kernel has it, also across 32 bits."""
        last: dict[str, Any] = self.COUNTS | {place: 0xFFFFFFFF}
        given = stall(close(0, 12, **self.COUNTS | {place: 13}), before=[tick(-4, **last)])
        found = evidence.net_of(given, 8 * MS, {"softnet", place})
        assert getattr(found, self.COLUMNS[place]) == 14
        others = [getattr(found, name) for at, name in self.COLUMNS.items() if at != place]
        assert (*others, found.backlog) == (None, None, None)

    def test_the_backlog(self) -> None:
        """It is no counter: what waited at the last record."""
        before = [tick(-4, **self.COUNTS, backlog=9)]
        given = stall(close(0, 12, **self.COUNTS, backlog=7), before=before)
        assert evidence.net_of(given, 8 * MS, {"backlog"}).backlog == 7
        assert evidence.net_of(given, 8 * MS, ()).backlog is None

    def test_counters_that_cannot_be_read(self) -> None:
        """They are unknown then, not 0; our own are known all the same."""
        before = [tick(-4, net_rx_runs=1)]
        found = net_of(stall(close(0, 12, net_rx_runs=2, net_rx_ns=MS), before=before))
        assert found == Net(1, MS, None, None, None)

    def test_without_a_tick_before(self) -> None:
        """Counted from the first sample on; of a closing record alone nothing is known."""
        first, last = self.counted(), self.counted(net_rx_runs=1, processed=5)
        assert net_of(stall(sample(1, 12, **first), close(1, 20, **last))) == Net(1, 0, 5, 0, None)
        assert net_of(stall(close(0, 20, **last))) == Net(0, 0, 0, 0, None)
        assert net_of(stall()) == Net(0, 0, None, None, None)

    def test_napi(self) -> None:
        """What was polled in the stall, as of the last look; unknown before that."""
        given = stall(sample(1, 12))
        assert net_of(given).napi is None
        given.polled = {(2, b"eth0"): Polled(2, 64, 1)}
        assert net_of(given).napi == {(2, b"eth0"): (2, 64, 1)}


def test_a_tick_of_another_time() -> None:
    """A last tick long ago is no base: then the first sample is, with the handler it ran in."""
    old = tick(-400, net_rx_runs=1, net_rx_ns=0, processed=1)
    in_service = {"serving_vec": 3, "served_ns": 12 * MS, "net_rx_ns": 50 * MS}
    given = stall(
        sample(1, 12, net_rx_runs=900, processed=900, **in_service),
        close(1, 40, net_rx_runs=901, net_rx_ns=78 * MS, processed=910),
        before=[old],
    )
    assert net_of(given) == Net(1, 40 * MS, 10, 0, None)


def test_path() -> None:
    """Offsets and modules make no difference, bare addresses do."""
    assert path(("a+0x1 [m]", "b+0x22", "0xffff800000001234")) == ("a", "b", "0xffff800000001234")
    assert path(()) == ()


def test_nobody_without_records() -> None:
    """A stall that has no record yet blames nobody and shows nothing."""
    given = stall()
    assert evidence.main_observation(given) is None
    assert evidence.main_consumer(given) is None
    assert evidence.longest_handler(given, THRESHOLD) is None


@pytest.mark.parametrize(("at_ms", "ms"), [((), 30), ((4, 8), 22), ((4, 36), 26), ((-4,), 30)])
def test_user_code_between_the_samples(at_ms: tuple[int, ...], ms: int) -> None:
    """A tick that found user code ends the time in the kernel; one before the stall does not."""
    records = [sample(1, 12), sample(2, 30)]
    given = stall(*records, meanwhile=[tick(at, kind=TickKind.USER, stack=()) for at in at_ms])
    assert longest_in_kernel_ns(records, None, given.user_ticks_ns()) == ms * MS


@pytest.mark.parametrize(("at_ms", "ms"), [((), 70), ((44, 68), 40), ((20, 44), 26)])
def test_user_code_after_the_last_sample(at_ms: tuple[int, ...], ms: int) -> None:
    """Nor was the task in the kernel from the last sample to the end, if ticks found it outside."""
    records = [sample(1, 12), sample(2, 40)]
    end = close(1, 70, switches=0)
    given = stall(*records, end, meanwhile=[tick(at, kind=TickKind.USER, stack=()) for at in at_ms])
    assert longest_in_kernel_ns(records, end, given.user_ticks_ns()) == ms * MS


def test_a_walk_that_ended_early() -> None:
    """A stack that does not reach the task's base stands behind one that does."""
    whole = ("spin+0x10", "do_syscall_64+0x5", "entry_SYSCALL_64_after_hwframe+0x76")
    given = stall(
        sample(1, 12, frames=whole), sample(2, 60, frames=("__x86_indirect_thunk_rax+0x6",))
    )
    found = evidence.main_observation(given)
    assert found is not None
    assert found.frames == whole
