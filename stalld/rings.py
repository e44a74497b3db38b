"""What the kernel keeps per CPU for the asking: what ran at each tick, what was polled.

Mirrors ``struct tick_ring`` and ``struct napi_table`` of ``bpf/records.h``.
Nothing is sent: the maps' memory is shared, and read when a stall asks.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple, overload

from stalld.decode import TICK, decode_tick
from stalld.records import COMM_LEN, LOOKBACK_SAMPLES, NAPI_SLOTS, TickSample
from stalld.state import map_array

# tick_ring.written and tick_sample.time_ns are one such word each.
_WRITTEN = struct.Struct("=Q")


class TickRing(ctypes.Structure):
    """``struct tick_ring``."""

    _fields_ = (
        ("written", ctypes.c_uint64),
        ("samples", ctypes.c_char * TICK.size * LOOKBACK_SAMPLES),
    )


class NapiSlot(ctypes.Structure):
    """``struct napi_slot``."""

    _fields_ = (
        ("napi", ctypes.c_uint64),
        ("polls", ctypes.c_uint64),
        ("packets", ctypes.c_uint64),
        ("exhausted", ctypes.c_uint64),
        ("checked", ctypes.c_uint64),
        ("ifindex", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("name", ctypes.c_char * COMM_LEN),
    )


class NapiTable(ctypes.Structure):
    """``struct napi_table``."""

    _fields_ = (
        ("slots", NapiSlot * NAPI_SLOTS),
        ("untracked", ctypes.c_uint64),
        ("untracked_packets", ctypes.c_uint64),
    )


class Polled(NamedTuple):
    """Polls of one device; ``exhausted``: those that used their whole budget."""

    polls: int
    packets: int
    exhausted: int


Napi = Mapping[tuple[int, bytes], Polled]
"""(ifindex, name) → what was polled; (0, b"") is what found no place in the table."""
BACKLOG = b"backlog"
_UNTRACKED = (0, b"")
_NONE = Polled(0, 0, 0)


class Ticks(Sequence[TickSample]):
    """A copy of one ring, oldest first; each sample is decoded when it is asked for."""

    def __init__(self, ring: bytes) -> None:
        self._ring = ring
        written = _word(ring, 0)
        places = map(_place, range(max(0, written - LOOKBACK_SAMPLES), written))
        # A sample's time is 0 while it is written.
        self._places = [at for at in places if _word(ring, at)]

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> TickSample: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[TickSample, ...]: ...
    def __getitem__(self, index: int | slice) -> TickSample | tuple[TickSample, ...]:
        if isinstance(index, slice):
            return tuple(self._decode(at) for at in self._places[index])
        return self._decode(self._places[index])

    def _decode(self, at: int) -> TickSample:
        return decode_tick(self._ring[at : at + TICK.size])


def _place(number: int) -> int:
    return _WRITTEN.size + number % LOOKBACK_SAMPLES * TICK.size


def _word(ring: bytes, at: int) -> int:
    (value,) = _WRITTEN.unpack_from(ring, at)
    return int(value)


class Rings:
    """The ``rings`` and ``napis`` maps of all CPUs."""

    def __init__(self, rings_fd: int, napis_fd: int, cpus: int) -> None:
        self._rings = map_array(TickRing, rings_fd, cpus)
        self._napis = map_array(NapiTable, napis_fd, cpus)

    def ticks(self, cpu: int) -> Ticks:
        """The last ticks of ``cpu``, oldest first; at most 64.

        An idle CPU stops its tick, so the oldest may be from long ago.
        """
        ring = self._rings[cpu]
        while True:
            written = ring.written
            oldest = _place(written)
            copy = bytes(ring)
            # The kernel writes over the oldest: if it did meanwhile, or began to, once more.
            # It counts a sample when that is complete, so the count is compared first.
            same = ring.written == written
            now = ctypes.string_at(ctypes.addressof(ring) + oldest, _WRITTEN.size)
            if same and now == copy[oldest : oldest + _WRITTEN.size]:
                return Ticks(copy)

    def napi(self, cpu: int) -> Napi:
        """What ``cpu`` polled since the start."""
        table = self._napis[cpu]
        found: dict[tuple[int, bytes], Polled] = {}
        for slot in table.slots:
            if slot.napi:
                # The queue of packets that other CPUs, or loopback, left has no device.
                key = (slot.ifindex, bytes(slot.name) if slot.ifindex else BACKLOG)
                found[key] = _sum(found.get(key), Polled(slot.polls, slot.packets, slot.exhausted))
        if table.untracked:
            found[_UNTRACKED] = Polled(table.untracked, table.untracked_packets, 0)
        return found

    def napi_totals(self) -> Napi:
        """What all CPUs polled since the start."""
        found: dict[tuple[int, bytes], Polled] = {}
        for cpu in range(len(self._napis)):
            for key, polled in self.napi(cpu).items():
                found[key] = _sum(found.get(key), polled)
        return found


def polled_since(before: Napi, now: Napi) -> Napi:
    """What was polled between two looks at one CPU."""
    found: dict[tuple[int, bytes], Polled] = {}
    moved = _NONE
    for key, old in before.items():
        if now.get(key, _NONE).polls < old.polls:
            # Its slot was given away, and what that had counted is among the rest now.
            moved = _sum(moved, old)
    for key, polled in now.items():
        old = before.get(key, _NONE)
        if polled.polls < old.polls:
            old = _NONE
        elif key == _UNTRACKED:
            old = _sum(old, moved)
        new = Polled(*(max(0, n - o) for n, o in zip(polled, old, strict=True)))
        if new.polls:
            found[key] = new
    return found


def _sum(one: Polled | None, other: Polled) -> Polled:
    return Polled(*map(sum, zip(one, other, strict=True))) if one else other
