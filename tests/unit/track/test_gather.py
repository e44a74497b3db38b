"""What is known about one stall: waits joined, ticks picked, the steal clock read."""

from __future__ import annotations

from typing import Any

import pytest

from stalld.records import RecordType, Source, TickSample
from stalld.state import StallState
from stalld.track.gather import Stall
from stalld.track.model import Observation
from tests.unit.make import MS, T0, close, observation, sample, tick, waiters, waits


def stall(*observations: Observation, **changes: Any) -> Stall:
    """A stall of these records."""
    given = Stall(0, 1, T0, **{"before": (), **changes})
    for each in observations:
        given.take(each)
    return given


def test_an_empty_stall() -> None:
    """Before its first record nothing is known, and nothing fails."""
    given = stall()
    assert (given.duration_ns, given.last_record, given.during) == (0, None, [])
    assert (given.last_tick_before(), given.ticks_inside()) == (None, [])
    assert given.stolen_ns() is None


def test_samples_while_it_lasted() -> None:
    """Ticks and NMIs came during the stall; a switch or a service came when it let go."""
    given = stall(*(observation(source=source) for source in list(Source)[:5]))
    assert [o.record.source for o in given.during] == [Source.TICK, Source.NMI]
    assert len(given.observations) == 5


def test_the_newest_record() -> None:
    """The closing one, once it came."""
    given = stall(sample(1, 12), sample(2, 20))
    assert given.last_record is given.observations[-1].record
    given.take(close(2, 30))
    assert given.last_record is not None
    assert given.last_record.type is RecordType.CLOSE
    assert len(given.observations) == 2


def test_the_latest_tick_counts() -> None:
    """The longest lateness of all records is kept."""
    assert stall(sample(1, 12, late_ns=11), sample(2, 20, late_ns=30), close(2, 30)).late_ns == 30


def test_slots_that_are_used_again() -> None:
    """Waits belong to the thread, not to its slot: each has its own longest."""
    given = stall(
        sample(1, 12, waiter_ns=waiters(0, 12, 5), waiter_pid=waiters(16, 40, 50)),
        sample(2, 20, waiter_ns=waiters(0, 3, 13), waiter_pid=waiters(16, 60, 50)),
        sample(3, 30, waiter_ns=waiters(0, 8, 0, 9), waiter_pid=waiters(16, 40, 50, 50)),
        close(3, 40, waiter_ns=waiters(0, 12, 13), waiter_pid=waiters(16, 40, 50)),
    )
    assert given.waiting == {40: 12, 50: 13, 60: 3}


def test_ksoftirqd_apart() -> None:
    """The first slot is ksoftirqd's and no other; its pid is kept when a record has none."""
    given = stall(
        sample(1, 12, waiter_ns=waiters(12), waiter_pid=waiters(16)),
        close(1, 20, waiter_ns=waiters(11), waiter_pid=waiters()),
    )
    assert (given.ksoftirqd_pid, given.ksoftirqd_wait_ns, given.waiting) == (16, 12, {})


def test_the_state_adds_waits() -> None:
    """What the shared state knows is joined like a record's."""
    given = stall(sample(1, 12, wait_ns=waits(NET_RX=12), waiter_ns=waiters(9)))
    given.take_state(
        StallState(1, False, 0, waits(NET_RX=11, TIMER=5), waiters(10, 4), waiters(16, 40))
    )
    assert given.wait_ns == list(waits(NET_RX=12, TIMER=5))
    assert (given.ksoftirqd_wait_ns, given.waiting) == (10, {40: 4})


class TestTicks:
    """Those of the ring that concern the stall."""

    def test_the_last_before(self) -> None:
        """The newest one up to the begin, however old."""
        given = stall(sample(1, 12), before=[tick(-9000), tick(0), tick(4), tick(8)])
        assert given.last_tick_before() == tick(0)
        assert stall(before=[tick(-9000), tick(1)]).last_tick_before() == tick(-9000)

    def test_none_before(self) -> None:
        """The ring has gone round, or is new."""
        assert stall(sample(1, 12), before=[tick(4), tick(8)]).last_tick_before() is None

    def test_those_inside(self) -> None:
        """From behind the begin to the last record, as of the last look."""
        given = stall(sample(1, 12))
        given.meanwhile = [tick(at_ms) for at_ms in (-4, 0, 4, 8, 12, 16)]
        assert [(each.time_ns - T0) // MS for each in given.ticks_inside()] == [4, 8, 12]


def stolen(ms: float) -> int:
    """A steal clock that began with a year of it."""
    return round((1e9 + ms) * MS)


STOLEN: dict[str, tuple[list[TickSample], list[Observation], float | None]] = {
    "nothing kept": ([], [sample(1, 30, steal_ns=stolen(30))], None),
    "not a single one": (
        [tick(-2, steal_ns=stolen(0)), tick(30, steal_ns=stolen(0))],
        [sample(1, 30, steal_ns=stolen(0))],
        0,
    ),
    "all of it, at one go": (
        [tick(-2, steal_ns=stolen(0)), tick(30, steal_ns=stolen(28))],
        [sample(1, 30, steal_ns=stolen(28))],
        28,
    ),
    "up to the closing record": (
        [tick(-2, steal_ns=stolen(0))],
        [sample(1, 12, steal_ns=stolen(0)), close(1, 30, steal_ns=stolen(15))],
        15,
    ),
    "no clock": ([tick(-2), tick(4)], [sample(1, 30)], None),
    "some before the begin: not more than the stall lasted": (
        [tick(-4, steal_ns=stolen(0))],
        [close(0, 12, steal_ns=stolen(15))],
        12,
    ),
    "the last tick is long ago, a tick inside shows when it was": (
        [tick(-9000, steal_ns=stolen(0)), tick(3, steal_ns=stolen(500))],
        [sample(1, 12, steal_ns=stolen(500))],
        3,
    ),
    "long ago, and some inside": (
        [tick(-9000, steal_ns=stolen(0)), tick(3, steal_ns=stolen(1)), tick(7, steal_ns=stolen(2))],
        [sample(1, 12, steal_ns=stolen(5))],
        5,
    ),
    "long ago, and no tick inside": (
        [tick(-9000, steal_ns=stolen(0))],
        [close(0, 12, steal_ns=stolen(500))],
        12,
    ),
    "the ring went round: since its oldest": (
        [tick(40, steal_ns=stolen(30)), tick(44, steal_ns=stolen(31))],
        [sample(1, 44, steal_ns=stolen(35))],
        5,
    ),
    "looked at late: ticks from after the record do not count": (
        [tick(-2, steal_ns=stolen(0)), tick(20, steal_ns=stolen(9)), tick(24, steal_ns=stolen(9))],
        [close(0, 12, steal_ns=stolen(4))],
        4,
    ),
    "looked at so late that nothing older is left": (
        [tick(20, steal_ns=stolen(9)), tick(24, steal_ns=stolen(9))],
        [close(0, 12, steal_ns=stolen(4))],
        None,
    ),
    "a clock that steps back": (
        [tick(-2, steal_ns=stolen(9)), tick(4, steal_ns=stolen(0))],
        [sample(1, 12, steal_ns=stolen(3))],
        3,
    ),
}


@pytest.mark.parametrize(("kept", "records", "ms"), STOLEN.values(), ids=STOLEN.keys())
def test_stolen(kept: list[TickSample], records: list[Observation], ms: float | None) -> None:
    """What the steal clock counted of the stall, from the last tick before it on."""
    found = stall(*records, before=kept).stolen_ns()
    assert found == (None if ms is None else ms * MS)
