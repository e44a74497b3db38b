"""What the kernel keeps for the asking: the order of ticks, copies that are whole, sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stalld.decode import TICK
from stalld.records import (
    LOOKBACK_DEPTH,
    LOOKBACK_RINGS,
    LOOKBACK_SAMPLES,
    NAPI_SLOTS,
    NAPI_UNREGISTERED,
    TickSample,
)
from stalld.rings import MAX_COPIES, NapiSlot, Rings, Ticks
from tests.unit import make
from tests.unit.make import MS, T0, keep, tick

CPUS = 2
BYTES = LOOKBACK_RINGS * LOOKBACK_SAMPLES * TICK.size
"""Of all rings of a CPU."""


def made() -> Rings:
    """The maps of some CPUs, all empty."""
    return make.rings(make.maps(CPUS))


class Cpu:
    """What the kernel does on one CPU, and what of it must be left to read."""

    def __init__(self, rings: Rings, cpu: int = 0) -> None:
        self.rings = rings
        self.cpu = cpu
        self.ticks = 0
        self._kept: list[list[int]] = [[] for _ in range(LOOKBACK_RINGS)]

    def run(self, count: int) -> None:
        """So many ticks, a millisecond apart."""
        for _ in range(count):
            self.ticks += 1
            keep(self.rings, self.cpu, tick(self.ticks, stack=(self.ticks,) * LOOKBACK_DEPTH))
            self._kept[self.rings._cpus[self.cpu].ring].append(self.ticks)

    def begin(self) -> None:
        """A stall begins: the other ring is written from now on."""
        state = self.rings._cpus[self.cpu]
        state.ring ^= 1
        state.seq += 1

    def left(self) -> list[int]:
        """The ticks that each ring has room for."""
        return sorted(at for kept in self._kept for at in kept[-LOOKBACK_SAMPLES:])

    def half_written(self) -> list[int]:
        """The same with the next tick begun: the oldest place is lost."""
        now = self.rings._cpus[self.cpu].ring
        full = len(self._kept[now]) >= LOOKBACK_SAMPLES
        lost = self._kept[now][-LOOKBACK_SAMPLES] if full else 0
        return [at for at in self.left() if at != lost]


def ages(ticks: Sequence[TickSample]) -> list[int]:
    """When they were, in ms."""
    return [(each.time_ns - T0) // MS for each in ticks]


class TestTicks:
    """The rings of one CPU."""

    def test_nothing_yet(self) -> None:
        """Before the first tick there is none."""
        assert list(made().ticks(0)) == []

    @pytest.mark.parametrize("count", [1, 5, LOOKBACK_SAMPLES - 1, LOOKBACK_SAMPLES, 65, 200])
    @pytest.mark.parametrize("cpu", range(CPUS))
    def test_oldest_first(self, cpu: int, count: int) -> None:
        """The last 64 in their order, however often the ring went round, of that CPU alone."""
        rings = made()
        Cpu(rings, cpu).run(count)
        assert ages(rings.ticks(cpu)) == list(range(max(1, count - 63), count + 1))
        assert list(rings.ticks(1 - cpu)) == []

    @pytest.mark.parametrize("inside", [0, 1, 64, 1000])
    def test_what_was_before_a_stall_stays(self, inside: int) -> None:
        """However long a stall lasts, the 64 ticks before it are not written over."""
        rings = made()
        cpu = Cpu(rings)
        cpu.run(100)
        cpu.begin()
        cpu.run(inside)
        found = ages(rings.ticks(0))
        assert found[:64] == list(range(37, 101))
        assert found[64:] == list(range(max(101, 37 + inside), 101 + inside))

    @given(st.lists(st.integers(0, 150), max_size=6))
    def test_any_stalls(self, runs: list[int]) -> None:
        """After any number of stalls: the last 64 of either ring, oldest first, none twice."""
        rings = made()
        cpu = Cpu(rings)
        for count in runs:
            cpu.begin()
            cpu.run(count)
        assert ages(rings.ticks(0)) == cpu.left()

    def test_every_field(self) -> None:
        """A tick is decoded as it was written."""
        rings = made()
        wanted = tick(7, tid=9, comm=b"consumer", stack=(1, 2, 3), squeezed=0xFFFFFFFF)
        keep(rings, 1, wanted)
        assert list(rings.ticks(1)) == [wanted]

    def test_indices(self) -> None:
        """It is a sequence: from the end, slices, backwards, and an end."""
        rings = made()
        Cpu(rings).run(100)
        ticks = rings.ticks(0)
        assert len(ticks) == LOOKBACK_SAMPLES
        assert [(each.time_ns - T0) // MS for each in (ticks[0], ticks[-1])] == [37, 100]
        assert [(each.time_ns - T0) // MS for each in ticks[1:3]] == [38, 39]
        assert next(reversed(ticks)) == ticks[-1]
        with pytest.raises(IndexError):
            ticks[LOOKBACK_SAMPLES]

    def test_looked_at_again(self) -> None:
        """What has not changed is neither copied nor decoded once more; what has, is."""
        rings = made()
        cpu = Cpu(rings)
        cpu.run(70)
        first = rings.ticks(0)
        newest = first[-1]
        assert rings.ticks(0) is first
        cpu.run(1)
        second = rings.ticks(0)
        assert ages(second) == list(range(8, 72))
        assert second[-2] is newest
        cpu.begin()
        assert rings.ticks(0) is not second
        assert ages(first) == list(range(7, 71))

    def test_few_copies_are_kept(self) -> None:
        """However many CPUs are looked at."""
        maps = make.maps(3 * MAX_COPIES)
        rings = make.rings(maps)
        for cpu in range(3 * MAX_COPIES):
            Cpu(rings, cpu).run(cpu + 1)
            assert ages(rings.ticks(cpu)) == list(range(1, cpu + 2))
        assert len(rings._copies) == MAX_COPIES

    @pytest.mark.parametrize("count", [3, LOOKBACK_SAMPLES, 100])
    def test_one_that_is_being_written(self, count: int) -> None:
        """A tick whose time is 0 is left out, the others stay."""
        rings = made()
        cpu = Cpu(rings)
        cpu.run(count)
        at = make.place(rings, 0)
        rings._samples[at : at + 8] = bytes(8)
        assert ages(rings.ticks(0)) == cpu.half_written()
        assert ages(rings.recent(0, T0)) == cpu.half_written()


class TestRecent:
    """The ticks since a moment, and the one before."""

    @given(st.lists(st.integers(0, 150), max_size=6), st.integers(-3, 30))
    def test_part_of_all(self, runs: list[int], ago: int) -> None:
        """Of what both rings have the newest, whichever ring they are in."""
        rings = made()
        cpu = Cpu(rings)
        for count in runs:
            cpu.begin()
            cpu.run(count)
        since_ns = T0 + (cpu.ticks - ago) * MS
        assert rings.recent(0, since_ns) == make.recent(list(rings.ticks(0)), since_ns)

    def test_another_cpu(self) -> None:
        """Each CPU has its own."""
        rings = made()
        Cpu(rings, 1).run(3)
        assert rings.recent(0, T0) == []
        assert ages(rings.recent(1, T0 + 2 * MS)) == [2, 3]

    def test_again(self) -> None:
        """What was told before is not decoded once more; few CPUs' are kept."""
        maps = make.maps(3 * MAX_COPIES)
        rings = make.rings(maps)
        cpu = Cpu(rings)
        cpu.run(5)
        first = rings.recent(0, T0 + 3 * MS)
        cpu.run(1)
        assert [id(each) for each in rings.recent(0, T0 + 3 * MS)][:3] == list(map(id, first))
        for other in range(3 * MAX_COPIES):
            rings.recent(other, T0)
        assert len(rings._recent) == MAX_COPIES

    @given(st.integers(1, 200), st.integers(0, 40), st.integers(0, 300), st.integers(0, 70))
    def test_no_tick_is_torn(self, count: int, inside: int, pause: int, more: int) -> None:
        """However many ticks come between two reads: whole ones, in order, none left out."""
        cpu = Cpu(made(), 1)
        cpu.run(count)
        cpu.begin()
        cpu.run(inside)
        known, since_ns = cpu.ticks, T0 + (cpu.ticks - 20) * MS
        wanted = ages(make.recent(list(cpu.rings.ticks(1)), since_ns))
        interrupted: Any = Interrupted(cpu, pause, more)
        cpu.rings._samples = interrupted
        found = cpu.rings.recent(1, since_ns)
        assert all(
            each.stack == (at,) * LOOKBACK_DEPTH
            for each, at in zip(found, ages(found), strict=True)
        )
        assert ages(found) == sorted(ages(found))
        if more < LOOKBACK_SAMPLES - 20:
            assert [at for at in ages(found) if at <= known] == wanted


class Interrupted:
    """Memory in which the kernel writes ticks after so many reads."""

    def __init__(self, cpu: Cpu, reads: int, ticks: int) -> None:
        self.cpu = cpu
        self.memory = cpu.rings._samples
        self.left = reads
        self.ticks = ticks

    def __getitem__(self, where: slice) -> bytes:
        """A copy, before which the kernel may have its turn."""
        if self.left == 0:
            self.cpu.run(self.ticks)
        self.left -= 1
        return self.memory[where]

    def __setitem__(self, where: slice, value: bytes) -> None:
        """The kernel writes."""
        self.memory[where] = value


Pauses = list[tuple[int, list[int]]]
"""Bytes copied so far; ticks that come then, and more after each stall that begins then."""


class Racing:
    """Memory that the kernel goes on writing while it is copied, piece by piece."""

    def __init__(self, cpu: Cpu, pauses: Pauses) -> None:
        self.cpu = cpu
        self.memory = cpu.rings._samples
        self.pauses = pauses
        self.copies = 0

    def __getitem__(self, where: slice) -> bytes:
        """A copy, from its start to its end."""
        at, end = where.start, where.stop
        copied = b""
        if end - at == BYTES:
            self.copies += 1
            start = at
            while self.pauses:
                until, ticks = self.pauses.pop(0)
                copied += self.memory[at : start + until]
                at = start + until
                self.interrupt(ticks)
        return copied + self.memory[at:end]

    def __setitem__(self, where: slice, value: bytes) -> None:
        """The kernel writes."""
        self.memory[where] = value

    def interrupt(self, ticks: list[int]) -> None:
        """The kernel's turn."""
        for nr, count in enumerate(ticks):
            if nr:
                self.cpu.begin()
            self.cpu.run(count)

    def read(self) -> Ticks:
        """The ticks, read while they are written."""
        memory: Any = self
        self.cpu.rings._samples = memory
        return self.cpu.rings.ticks(self.cpu.cpu)


PAUSES = st.tuples(
    st.integers(0, BYTES), st.lists(st.sampled_from([0, 1, 2, 63, 64, 65]), max_size=4)
)


@given(st.integers(0, 200), st.integers(0, 100), st.lists(PAUSES, min_size=1, max_size=3))
def test_no_copy_is_torn(before: int, inside: int, pauses: Pauses) -> None:
    """However far the kernel came while it was copied: whole ticks, all, in order."""
    cpu = Cpu(made(), 1)
    cpu.run(before)
    cpu.begin()
    cpu.run(inside)
    racing = Racing(cpu, sorted(pauses))
    ticks = racing.read()
    assert ages(ticks) == cpu.left()
    assert all(
        each.stack == (at_ms,) * LOOKBACK_DEPTH
        for each, at_ms in zip(ticks, ages(ticks), strict=True)
    )
    assert racing.copies <= 2


class Begun(Racing):
    """The kernel only begins a tick."""

    def interrupt(self, ticks: list[int]) -> None:
        """It has written all but the time."""
        at = make.place(self.cpu.rings, self.cpu.cpu)
        self.memory[at : at + TICK.size] = bytes(8) + b"\xee" * (TICK.size - 8)


@given(st.integers(0, BYTES), st.sampled_from([0, 30, 64, 100]), st.booleans())
def test_a_tick_begun_while_it_is_copied(until: int, count: int, other: bool) -> None:
    """One that is not complete yet is left out, whether it began before or after its copy."""
    cpu = Cpu(made(), 1)
    cpu.run(count)
    if other:
        cpu.begin()
        cpu.run(count)
    racing = Begun(cpu, [(until, [])])
    assert ages(racing.read()) == cpu.half_written()
    assert racing.copies <= 2


def slot(number: int, ifindex: int, name: bytes, polls: int, packets: int, full: int) -> NapiSlot:
    """A slot in use."""
    return NapiSlot(
        napi=0xFFFF888100000000 + number,
        polls=polls,
        packets=packets,
        exhausted=full,
        ifindex=ifindex,
        name=name,
    )


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

    def test_a_device_that_was_never_registered(self) -> None:
        """It has no number, and is not the CPU's queue."""
        rings = made()
        rings._slots[3] = slot(3, NAPI_UNREGISTERED, b"", 4, 8, 0)
        rings._slots[4] = slot(4, NAPI_UNREGISTERED, b"dummy", 1, 1, 0)
        assert rings.napi(0) == {(0, b"unregistered"): (4, 8, 0), (0, b"dummy"): (1, 1, 0)}

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


class TestPolledInAStall:
    """What was polled since the present stall was detected."""

    def rings(self, *slots: NapiSlot, seq: int = 7) -> Rings:
        """Of a CPU in its stall ``seq``."""
        rings = made()
        rings._cpus[0].seq = seq
        for place, each in enumerate(slots):
            rings._slots[place] = each
        return rings

    def polled(self, number: int, ifindex: int, name: bytes, seq: int, *counts: int) -> NapiSlot:
        """A slot that polled in a stall."""
        given = slot(number, ifindex, name, 1000, 2000, 3000)
        given.seq = seq
        given.stall_polls, given.stall_packets, given.stall_exhausted = counts
        return given

    def test_by_device(self) -> None:
        """Only what was polled in that stall, the queues of a device as one."""
        rings = self.rings(
            self.polled(0, 2, b"eth0", 7, 3, 30, 1),
            self.polled(1, 2, b"eth0", 7, 4, 40, 0),
            self.polled(2, 3, b"eth1", 6, 5, 50, 5),
            self.polled(3, 0, b"", 7, 1, 2, 0),
        )
        assert rings.polled(0, 7) == {(2, b"eth0"): (7, 70, 1), (0, b"backlog"): (1, 2, 0)}

    def test_nothing(self) -> None:
        """A stall without a poll is empty, not unknown."""
        assert self.rings().polled(0, 7) == {}

    @pytest.mark.parametrize("seq", [6, 8, 0])
    def test_another_stall(self, seq: int) -> None:
        """Once the CPU has had another one, what was polled in the old one is not known."""
        rings = self.rings(self.polled(0, 2, b"eth0", 7, 3, 30, 1))
        assert rings.polled(0, seq) is None

    def test_slots_that_were_never_used(self) -> None:
        """An empty slot is of no stall, whatever number that has."""
        assert self.rings(seq=0).polled(0, 0) == {}
