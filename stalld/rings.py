"""What the kernel keeps per CPU for the asking: what ran at each tick, what was polled.

Mirrors ``struct tick_sample`` and ``struct napi_slot`` of ``bpf/records.h``.
Nothing is sent: the maps' memory is shared, and read when a stall asks.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, overload

from stalld.decode import TICK, decode_tick
from stalld.records import (
    COMM_LEN,
    LOOKBACK_RINGS,
    LOOKBACK_SAMPLES,
    NAPI_SLOTS,
    NAPI_UNREGISTERED,
    TickSample,
)
from stalld.state import Maps, map_array, map_memory, words

# tick_sample.time_ns, of one sample and of all in a CPU's rings.
_TIME = struct.Struct("=Q")
_SAMPLES = LOOKBACK_RINGS * LOOKBACK_SAMPLES
_TIMES = struct.Struct("=" + f"Q{TICK.size - _TIME.size}x" * _SAMPLES)
_RINGS_BYTES = _SAMPLES * TICK.size
MAX_COPIES = 8
"""CPUs of which the last copy is kept: some 200 KiB each, decoded."""


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
BACKLOG, UNREGISTERED = b"backlog", b"unregistered"


class Ticks(Sequence[TickSample]):
    """A copy of a CPU's rings, oldest first; a sample is decoded when it is first asked for.

    Args:
        before: an older copy of the same rings: what both have is decoded once.
    """

    def __init__(self, rings: bytes, before: Ticks | None = None) -> None:
        self._rings = rings
        places = dict(zip(_TIMES.unpack(rings), range(0, _RINGS_BYTES, TICK.size), strict=True))
        # A sample's time is 0 while it is written, and where there never was one.
        places.pop(0, None)
        self._places = places
        self._times_ns = sorted(places)
        known = {} if before is None else before._decoded
        self._decoded: dict[int, TickSample] = {
            time_ns: known[time_ns] for time_ns in known.keys() & places.keys()
        }

    def __len__(self) -> int:
        return len(self._times_ns)

    @overload
    def __getitem__(self, index: int) -> TickSample: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[TickSample, ...]: ...
    def __getitem__(self, index: int | slice) -> TickSample | tuple[TickSample, ...]:
        if isinstance(index, slice):
            return tuple([self._decode(time_ns) for time_ns in self._times_ns[index]])
        return self._decode(self._times_ns[index])

    def __iter__(self) -> Iterator[TickSample]:
        return map(self._decode, self._times_ns)

    def __reversed__(self) -> Iterator[TickSample]:
        return map(self._decode, reversed(self._times_ns))

    def _decode(self, time_ns: int) -> TickSample:
        known = self._decoded.get(time_ns)
        if known is None:
            at = self._places[time_ns]
            known = self._decoded[time_ns] = decode_tick(self._rings[at : at + TICK.size])
        return known


class _State(NamedTuple):
    """What tells that a CPU's rings are as they were.

    Attributes:
        seq: of the newest stall: the ring that is written changes with it.
        ticks: written ever to that ring.
        following: where in both rings the next one will be.
    """

    seq: int
    ticks: int
    following: int


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
        self._stalls = words(self._slots, "seq")
        # By CPU the last copy, and what it was a copy of.
        self._copies: dict[int, tuple[_State, Ticks]] = {}
        # By CPU those that `recent` told last, by their times.
        self._recent: dict[int, dict[int, TickSample]] = {}

    def ticks(self, cpu: int) -> Ticks:
        """The last ticks of ``cpu``, oldest first; those before its newest stall are kept longest.

        An idle CPU stops its tick, so the oldest may be from long ago.
        """
        first = cpu * _RINGS_BYTES
        state, copied = self._copies.get(cpu, (None, None))
        while True:
            before = self._state(cpu)
            if before == state and copied is not None:
                return copied
            copy = self._samples[first : first + _RINGS_BYTES]
            # The kernel writes over the oldest: if it began to meanwhile, once more.
            at = before.following
            now = self._samples[first + at : first + at + _TIME.size]
            if now == copy[at : at + _TIME.size] and before == self._state(cpu):
                ticks = Ticks(copy, copied)
                self._copies.pop(cpu, None)
                self._copies[cpu] = before, ticks
                if len(self._copies) > MAX_COPIES:
                    del self._copies[next(iter(self._copies))]
                return ticks

    def recent(self, cpu: int, since_ns: int) -> list[TickSample]:
        """The ticks of ``cpu`` after ``since_ns``, and the last one until then, oldest first.

        Copies these alone: all of :meth:`ticks` comes from another CPU's cache.
        """
        state = self._cpus[cpu]
        before = self._recent.get(cpu, {})
        found: dict[int, TickSample] = {}
        # A stall has its ticks in both rings, those from before it was detected in the older one.
        oldest_ns = 0
        for ring in range(LOOKBACK_RINGS):
            base = (cpu * LOOKBACK_RINGS + ring) * LOOKBACK_SAMPLES
            written = state.ticks[ring]
            later_ns = 1 << 64
            for number in range(written - 1, max(0, written - LOOKBACK_SAMPLES) - 1, -1):
                at = (base + number % LOOKBACK_SAMPLES) * TICK.size
                stamp = self._samples[at : at + _TIME.size]
                (time_ns,) = _TIME.unpack(stamp)
                if not 0 < time_ns < later_ns:
                    break  # The kernel writes there again.
                sample = before.get(time_ns)
                if sample is None:
                    copy = self._samples[at : at + TICK.size]
                    if not copy.startswith(stamp) or self._samples[at : at + _TIME.size] != stamp:
                        break
                    sample = decode_tick(copy)
                found[time_ns] = sample
                if time_ns <= since_ns:
                    oldest_ns = max(oldest_ns, time_ns)
                    break
                later_ns = time_ns
        self._recent.pop(cpu, None)
        self._recent[cpu] = found
        if len(self._recent) > MAX_COPIES:
            del self._recent[next(iter(self._recent))]
        return [found[time_ns] for time_ns in sorted(found) if time_ns >= oldest_ns]

    def _state(self, cpu: int) -> _State:
        state = self._cpus[cpu]
        ring = state.ring & 1
        ticks = state.ticks[ring]
        place = ring * LOOKBACK_SAMPLES + ticks % LOOKBACK_SAMPLES
        return _State(state.seq, ticks, place * TICK.size)

    def polled(self, cpu: int, seq: int) -> Napi | None:
        """What ``cpu`` polled in its stall ``seq``; None: it had another one since."""
        if self._cpus[cpu].seq != seq:
            return None
        found: dict[tuple[int, bytes], Polled] = {}
        seqs = self._stalls[cpu * NAPI_SLOTS : (cpu + 1) * NAPI_SLOTS].tolist()
        # Most stalls poll nothing.
        for slot in self._slots_of(cpu) if seq in seqs else ():
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


def device_of(ifindex: int, name: bytes) -> tuple[int, bytes]:
    """Index and name of what was polled, from what the kernel noted of it.

    The queue of packets that other CPUs, or loopback, left has no device. Wi-Fi drivers poll
    through one that is never registered: it has no index, and perhaps no name.
    """
    if not ifindex:
        return 0, BACKLOG
    if ifindex == NAPI_UNREGISTERED:
        return 0, name or UNREGISTERED
    return ifindex, name


def _key(slot: NapiSlot) -> tuple[int, bytes]:
    return device_of(slot.ifindex, bytes(slot.name))


def _sum(one: Polled | None, other: Polled) -> Polled:
    return Polled(*map(sum, zip(one, other, strict=True))) if one else other
