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
from stalld.records import COMM_LEN, LOOKBACK_RINGS, LOOKBACK_SAMPLES, NAPI_SLOTS, TickSample
from stalld.state import Maps, map_array, map_memory

# tick_sample.time_ns, of one sample and of all in a CPU's rings.
_TIME = struct.Struct("=Q")
_SAMPLES = LOOKBACK_RINGS * LOOKBACK_SAMPLES
_TIMES = struct.Struct("=" + f"Q{TICK.size - _TIME.size}x" * _SAMPLES)
_RINGS_BYTES = _SAMPLES * TICK.size


class NapiSlot(ctypes.Structure):
    """``struct napi_slot``."""

    _fields_ = (
        ("napi", ctypes.c_uint64),
        ("polls", ctypes.c_uint64),
        ("packets", ctypes.c_uint64),
        ("exhausted", ctypes.c_uint64),
        ("checked", ctypes.c_uint64),
        ("ifindex", ctypes.c_uint32),
        ("seq", ctypes.c_uint32),
        ("stall_polls", ctypes.c_uint32),
        ("stall_packets", ctypes.c_uint32),
        ("stall_exhausted", ctypes.c_uint32),
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


class Ticks(Sequence[TickSample]):
    """A copy of a CPU's rings, oldest first; a sample is decoded when it is first asked for."""

    def __init__(self, rings: bytes) -> None:
        self._rings = rings
        times = zip(_TIMES.unpack(rings), range(0, _RINGS_BYTES, TICK.size), strict=True)
        # A sample's time is 0 while it is written, and where there never was one.
        self._places = [at for time_ns, at in sorted(times) if time_ns]
        self._decoded: dict[int, TickSample] = {}

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
        known = self._decoded.get(at)
        if known is None:
            known = self._decoded[at] = decode_tick(self._rings[at : at + TICK.size])
        return known


class Rings:
    """The ``rings`` and ``napis`` maps of all CPUs.

    Args:
        rings_fd: array of ``tick_sample``, two rings of 64 for each possible CPU.
        napis_fd: array of ``napi_slot``, 16 for each possible CPU.
        maps: whose CPUs count what is in them.
    """

    def __init__(self, rings_fd: int, napis_fd: int, maps: Maps) -> None:
        cpus = len(maps.cpus)
        self._cpus = maps.cpus
        self._samples = map_memory(rings_fd, cpus * _RINGS_BYTES)
        self._slots = map_array(NapiSlot, napis_fd, cpus * NAPI_SLOTS)

    def ticks(self, cpu: int) -> Ticks:
        """The last ticks of ``cpu``, oldest first; those before its newest stall are kept longest.

        An idle CPU stops its tick, so the oldest may be from long ago.
        """
        first = cpu * _RINGS_BYTES
        while True:
            following = self._following(cpu)
            copy = self._samples[first : first + _RINGS_BYTES]
            # The kernel writes over the oldest: if it began to meanwhile, once more.
            at = following[1]
            now = self._samples[first + at : first + at + _TIME.size]
            if now == copy[at : at + _TIME.size] and following == self._following(cpu):
                return Ticks(copy)

    def _following(self, cpu: int) -> tuple[int, int]:
        """Number of the newest stall of ``cpu``, and where in its rings the next sample will be.

        The place alone is the same again when two more stalls have begun.
        """
        state = self._cpus[cpu]
        ring = state.ring & 1
        place = ring * LOOKBACK_SAMPLES + state.ticks[ring] % LOOKBACK_SAMPLES
        return state.seq, place * TICK.size

    def polled(self, cpu: int, seq: int) -> Napi | None:
        """What ``cpu`` polled in its stall ``seq``; None: it had another one since."""
        if self._cpus[cpu].seq != seq:
            return None
        found: dict[tuple[int, bytes], Polled] = {}
        for slot in self._slots_of(cpu):
            if slot.napi and slot.seq == seq:
                polled = Polled(slot.stall_polls, slot.stall_packets, slot.stall_exhausted)
                found[_key(slot)] = _sum(found.get(_key(slot)), polled)
        return found if self._cpus[cpu].seq == seq else None

    def napi(self, cpu: int) -> Napi:
        """What ``cpu`` polled since the start."""
        found: dict[tuple[int, bytes], Polled] = {}
        for slot in self._slots_of(cpu):
            if slot.napi:
                polled = Polled(slot.polls, slot.packets, slot.exhausted)
                found[_key(slot)] = _sum(found.get(_key(slot)), polled)
        state = self._cpus[cpu]
        if state.napi_polls:
            found[0, b""] = Polled(state.napi_polls, state.napi_packets, 0)
        return found

    def _slots_of(self, cpu: int) -> list[NapiSlot]:
        return list(self._slots[cpu * NAPI_SLOTS : (cpu + 1) * NAPI_SLOTS])

    def napi_totals(self) -> Napi:
        """What all CPUs polled since the start."""
        found: dict[tuple[int, bytes], Polled] = {}
        for cpu in range(len(self._cpus)):
            for key, polled in self.napi(cpu).items():
                found[key] = _sum(found.get(key), polled)
        return found


def _key(slot: NapiSlot) -> tuple[int, bytes]:
    # The queue of packets that other CPUs, or loopback, left has no device.
    return slot.ifindex, bytes(slot.name) if slot.ifindex else BACKLOG


def _sum(one: Polled | None, other: Polled) -> Polled:
    return Polled(*map(sum, zip(one, other, strict=True))) if one else other
