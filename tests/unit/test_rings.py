"""What the kernel keeps for the asking: the order of ticks, copies that are whole, sums."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stalld.decode import TICK
from stalld.records import LOOKBACK_SAMPLES, NAPI_SLOTS
from stalld.rings import Napi, NapiSlot, Polled, Rings, Ticks, polled_since
from tests.unit import make
from tests.unit.make import MS, T0, keep, tick

CPUS = 2
RING = LOOKBACK_SAMPLES * TICK.size


def made() -> Rings:
    """The maps of some CPUs, all empty."""
    return make.rings(make.maps(CPUS))


def fill(rings: Rings, count: int, cpu: int = 0) -> None:
    """The first ``count`` ticks, a millisecond apart."""
    for at_ms in range(1, count + 1):
        keep(rings, cpu, tick(at_ms, stack=(at_ms,) * 48))


def ages(ticks: Ticks) -> list[int]:
    """When they were, in ms."""
    return [(each.time_ns - T0) // MS for each in ticks]


class TestTicks:
    """The ring of one CPU."""

    def test_nothing_yet(self) -> None:
        """Before the first tick there is none."""
        assert list(made().ticks(0)) == []

    @pytest.mark.parametrize("count", [1, 5, LOOKBACK_SAMPLES - 1, LOOKBACK_SAMPLES, 65, 200])
    @pytest.mark.parametrize("cpu", range(CPUS))
    def test_oldest_first(self, cpu: int, count: int) -> None:
        """At most 64, the last ones, in their order, however often the ring went round."""
        rings = made()
        fill(rings, count, cpu)
        assert ages(rings.ticks(cpu)) == list(range(max(1, count - 63), count + 1))
        assert list(rings.ticks(1 - cpu)) == []

    def test_every_field(self) -> None:
        """A tick is decoded as it was written."""
        rings = made()
        wanted = tick(7, tid=9, comm=b"consumer", stack=(1, 2, 3), squeezed=0xFFFFFFFF)
        keep(rings, 1, wanted)
        assert list(rings.ticks(1)) == [wanted]

    def test_indices(self) -> None:
        """It is a sequence: from the end, slices, backwards, and an end."""
        rings = made()
        fill(rings, 100)
        ticks = rings.ticks(0)
        assert len(ticks) == LOOKBACK_SAMPLES
        assert [(each.time_ns - T0) // MS for each in (ticks[0], ticks[-1])] == [37, 100]
        assert [(each.time_ns - T0) // MS for each in ticks[1:3]] == [38, 39]
        assert next(reversed(ticks)) == ticks[-1]
        with pytest.raises(IndexError):
            ticks[LOOKBACK_SAMPLES]

    @pytest.mark.parametrize("count", [3, LOOKBACK_SAMPLES, 100])
    def test_one_that_is_being_written(self, count: int) -> None:
        """A tick whose time is 0 is left out, the others stay."""
        rings = made()
        fill(rings, count)
        at = make.place(rings, 0)
        rings._samples[at : at + 8] = bytes(8)
        assert ages(rings.ticks(0)) == list(range(max(1, count - 62), count + 1))


class Racing:
    """Memory that the kernel goes on writing while a ring is copied, piece by piece.

    Args:
        pauses: bytes copied so far, and ticks that are written then.
    """

    def __init__(self, rings: Rings, pauses: list[tuple[int, int]]) -> None:
        self.rings = rings
        self.memory = rings._samples
        self.pauses = pauses
        self.copies = 0

    def __getitem__(self, where: slice) -> bytes:
        """A copy, from its start to its end."""
        at, end = where.start, where.stop
        copied = b""
        if end - at == RING:
            self.copies += 1
            start = at
            while self.pauses:
                until, count = self.pauses.pop(0)
                copied += self.memory[at : start + until]
                at = start + until
                for _ in range(count):
                    self.interrupt()
        return copied + self.memory[at:end]

    def __setitem__(self, where: slice, value: bytes) -> None:
        """The kernel writes."""
        self.memory[where] = value

    def interrupt(self) -> None:
        """The kernel writes a whole tick."""
        at_ms = self.rings._cpus[1].ticks + 1
        keep(self.rings, 1, tick(at_ms, stack=(at_ms,) * 48))


def race(rings: Rings, racing: Racing) -> Ticks:
    """The ticks of the second CPU, read while they are written."""
    memory: Any = racing
    rings._samples = memory
    return rings.ticks(1)


@given(
    st.integers(0, 200),
    st.lists(st.tuples(st.integers(0, RING), st.integers(1, 70)), min_size=1, max_size=3),
)
def test_no_copy_is_torn(count: int, pauses: list[tuple[int, int]]) -> None:
    """However far the kernel came while the ring was copied: whole ticks, all, in order."""
    rings = made()
    fill(rings, count, 1)
    racing = Racing(rings, sorted(pauses))
    ticks = race(rings, racing)
    written = rings._cpus[1].ticks
    assert ages(ticks) == list(range(max(1, written - 63), written + 1))
    assert all(each.stack == (at_ms,) * 48 for each, at_ms in zip(ticks, ages(ticks), strict=True))
    assert racing.copies <= 2


@given(st.integers(0, RING), st.sampled_from([0, 30, 64, 100]))
def test_a_tick_begun_while_it_is_copied(until: int, count: int) -> None:
    """One that is not complete yet is left out, whether it began before or after its copy."""
    rings = made()
    fill(rings, count, 1)

    class Begun(Racing):
        def interrupt(self) -> None:
            at = make.place(self.rings, 1)
            self.memory[at : at + TICK.size] = bytes(8) + b"\xee" * (TICK.size - 8)

    racing = Begun(rings, [(until, 1)])
    assert ages(race(rings, racing)) == list(range(max(1, count - 62), count + 1))
    assert racing.copies <= 2


def slot(number: int, ifindex: int, name: bytes, polls: int, packets: int, full: int) -> NapiSlot:
    """A slot in use."""
    return NapiSlot(0xFFFF888100000000 + number, polls, packets, full, 1, ifindex, 0, name)


class TestNapi:
    """What was polled."""

    def test_nothing_yet(self) -> None:
        """No device before the first poll."""
        assert made().napi(0) == {}

    def test_by_device(self) -> None:
        """The queues of a device are one; devices of one name are apart by their number."""
        rings = made()
        rings._slots[0] = slot(0, 2, b"eth0", 10, 100, 1)
        rings._slots[7] = slot(7, 2, b"eth0", 5, 50, 2)
        rings._slots[NAPI_SLOTS - 1] = slot(9, 3, b"eth0", 1, 1, 0)
        assert rings.napi(0) == {(2, b"eth0"): (15, 150, 3), (3, b"eth0"): (1, 1, 0)}
        assert rings.napi(1) == {}

    def test_the_backlog(self) -> None:
        """A queue without a device is that of the CPU, which loopback fills."""
        rings = made()
        rings._slots[3] = slot(3, 0, b"", 4, 8, 0)
        assert rings.napi(0) == {(0, b"backlog"): (4, 8, 0)}

    def test_what_found_no_slot(self) -> None:
        """Polls that could not be told apart are one entry without a name."""
        rings = made()
        rings._cpus[0].napi_polls, rings._cpus[0].napi_packets = 6, 60
        assert rings.napi(0) == {(0, b""): (6, 60, 0)}

    def test_a_name_of_full_length(self) -> None:
        """All 16 bytes of a name count."""
        rings = made()
        rings._slots[0] = slot(0, 2, b"0123456789abcdef", 1, 1, 0)
        assert list(rings.napi(0)) == [(2, b"0123456789abcdef")]

    def test_totals(self) -> None:
        """The sums over all CPUs, device by device, beyond 32 bits."""
        rings = made()
        for cpu in range(CPUS):
            rings._slots[cpu * NAPI_SLOTS + cpu] = slot(cpu, 2, b"eth0", 1 << 32, 3, 1)
            rings._cpus[cpu].napi_polls = cpu
        assert rings.napi_totals() == {(2, b"eth0"): (1 << 33, 6, 2), (0, b""): (1, 0, 0)}
        assert made().napi_totals() == {}

    def test_a_full_table(self) -> None:
        """Every slot counts."""
        rings = made()
        for number in range(CPUS * NAPI_SLOTS):
            rings._slots[number] = slot(number, number + 1, b"x", 1, 1, 1)
        for cpu in range(CPUS):
            first = cpu * NAPI_SLOTS + 1
            assert [index for index, _ in rings.napi(cpu)] == [*range(first, first + NAPI_SLOTS)]


ETH0, ETH1, REST = (2, b"eth0"), (3, b"eth1"), (0, b"")

SINCE: dict[str, tuple[Napi, Napi, Napi]] = {
    "nothing at all": ({}, {}, {}),
    "the first polls": ({}, {ETH0: Polled(3, 30, 1)}, {ETH0: Polled(3, 30, 1)}),
    "more of them": (
        {ETH0: Polled(3, 30, 1)},
        {ETH0: Polled(5, 32, 1)},
        {ETH0: Polled(2, 2, 0)},
    ),
    "not a poll": ({ETH0: Polled(3, 30, 1)}, {ETH0: Polled(3, 30, 1)}, {}),
    "polls that brought nothing": (
        {ETH0: Polled(3, 30, 1)},
        {ETH0: Polled(4, 30, 1)},
        {ETH0: Polled(1, 0, 0)},
    ),
    "its slot was given away and it began anew": (
        {ETH0: Polled(100, 1000, 9)},
        {ETH0: Polled(4, 40, 0), REST: Polled(100, 1000, 0)},
        {ETH0: Polled(4, 40, 0)},
    ),
    "its slot was given to another one": (
        {ETH0: Polled(100, 1000, 9), REST: Polled(7, 70, 0)},
        {ETH1: Polled(5, 50, 5), REST: Polled(107, 1070, 0)},
        {ETH1: Polled(5, 50, 5)},
    ),
    "polled some more before that": (
        {ETH0: Polled(100, 1000, 9)},
        {ETH1: Polled(5, 50, 5), REST: Polled(102, 1020, 0)},
        {ETH1: Polled(5, 50, 5), REST: Polled(2, 20, 0)},
    ),
    "no slot was free": (
        {REST: Polled(7, 70, 0)},
        {REST: Polled(9, 71, 0)},
        {REST: Polled(2, 1, 0)},
    ),
    "the table was read in the middle of it": (
        {ETH0: Polled(100, 1000, 9)},
        {REST: Polled(100, 900, 0)},
        {},
    ),
}


@pytest.mark.parametrize(("before", "now", "polled"), SINCE.values(), ids=SINCE.keys())
def test_polled_since(before: Napi, now: Napi, polled: Napi) -> None:
    """Only what came in between, also where a slot changed hands; never less than nothing."""
    assert polled_since(before, now) == polled


COUNTS = st.builds(Polled, *[st.integers(0, 100)] * 3)
TABLES = st.dictionaries(st.sampled_from([ETH0, ETH1, REST]), COUNTS)


@given(TABLES, TABLES)
def test_any_two_looks(before: Napi, now: Napi) -> None:
    """No two looks, however torn, make a negative count."""
    for polled in polled_since(before, now).values():
        assert polled.polls > 0
        assert min(polled) >= 0
