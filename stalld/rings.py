"""What the kernel keeps per CPU for the asking: what ran at each tick, what was polled.

Mirrors ``struct tick_sample`` and ``struct napi_slot`` of ``bpf/records.h``.
Nothing is sent: the maps' memory is shared, and read when a stall asks.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple, overload

from stalld.decode import TICK, decode_tick
from stalld.records import COMM_LEN, LOOKBACK_SAMPLES, NAPI_SLOTS, TickSample
from stalld.state import Maps, map_array, map_memory

# tick_sample.time_ns
_TIME = struct.Struct("=Q")
_RING_BYTES = LOOKBACK_SAMPLES * TICK.size


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
    """A copy of one ring, oldest first; each sample is decoded when it is asked for.

    Args:
        ring: its 64 places.
        written: samples ever; the next goes to ``written % 64``.
    """

    def __init__(self, ring: bytes, written: int) -> None:
        self._ring = ring
        places = (
            number % LOOKBACK_SAMPLES * TICK.size
            for number in range(max(0, written - LOOKBACK_SAMPLES), written)
        )
        # A sample's time is 0 while it is written.
        self._places = [at for at in places if _TIME.unpack_from(ring, at)[0]]

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


class Rings:
    """The ``rings`` and ``napis`` maps of all CPUs.

    Args:
        rings_fd: array of ``tick_sample``, 64 for each possible CPU.
        napis_fd: array of ``napi_slot``, 16 for each possible CPU.
        maps: whose CPUs count what is in them.
    """

    def __init__(self, rings_fd: int, napis_fd: int, maps: Maps) -> None:
        cpus = len(maps.cpus)
        self._cpus = maps.cpus
        self._samples = map_memory(rings_fd, cpus * _RING_BYTES)
        self._slots = map_array(NapiSlot, napis_fd, cpus * NAPI_SLOTS)

    def ticks(self, cpu: int) -> Ticks:
        """The last ticks of ``cpu``, oldest first; at most 64.

        An idle CPU stops its tick, so the oldest may be from long ago.
        """
        ring = cpu * _RING_BYTES
        while True:
            written = self._cpus[cpu].ticks
            copy = self._samples[ring : ring + _RING_BYTES]
            # The kernel writes over the oldest: if it began to meanwhile, once more.
            oldest = written % LOOKBACK_SAMPLES * TICK.size
            now = self._samples[ring + oldest : ring + oldest + _TIME.size]
            if now == copy[oldest : oldest + _TIME.size] and written == self._cpus[cpu].ticks:
                return Ticks(copy, written)

    def napi(self, cpu: int) -> Napi:
        """What ``cpu`` polled since the start."""
        found: dict[tuple[int, bytes], Polled] = {}
        for slot in self._slots[cpu * NAPI_SLOTS : (cpu + 1) * NAPI_SLOTS]:
            if slot.napi:
                # The queue of packets that other CPUs, or loopback, left has no device.
                key = (slot.ifindex, bytes(slot.name) if slot.ifindex else BACKLOG)
                polled = Polled(slot.polls, slot.packets, slot.exhausted)
                found[key] = _sum(found.get(key), polled)
        state = self._cpus[cpu]
        if state.napi_polls:
            found[0, b""] = Polled(state.napi_polls, state.napi_packets, 0)
        return found

    def napi_totals(self) -> Napi:
        """What all CPUs polled since the start."""
        found: dict[tuple[int, bytes], Polled] = {}
        for cpu in range(len(self._cpus)):
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
