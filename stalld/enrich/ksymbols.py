"""What appears in and leaves kernel text after start: BPF programs, trampolines, probe pages.

The kernel announces each one as PERF_RECORD_KSYMBOL (5.1, commit 76193a94522f; trampolines and
ftrace and kprobe pages since 5.9, commit 69e49088692c) to every perf event that asks for it, on
the CPU where it happens. One dummy event per CPU with a small ring is enough; nobody waits on
them: the rings are looked at when a stack holds an address that is not core kernel text. That
costs nothing on a quiet host, no wake-up and no interrupt, and the name is exact at once, with
no new reading of /proc/kallsyms. Needs CAP_PERFMON.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
import time
from collections.abc import Container, Iterable
from typing import NamedTuple, Self

from stalld import perf
from stalld.errors import DecodeError, StalldError

_TYPE_BPF = 1
_UNREGISTER = 1 << 0
_HEADER = struct.Struct("=IHH")
_KSYMBOL = struct.Struct("=QIHH")
_TIME = struct.Struct("=Q")
_LOST = struct.Struct("=QQ")
# The kernel refuses a record that does not fit. While this much is free, none was refused:
# headers, a name of KSYM_NAME_LEN (512) and the time.
_LARGEST_RECORD = _HEADER.size + _KSYMBOL.size + 512 + _TIME.size
# A loaded and unloaded program takes 160 bytes in all: 200 of them in a row fit, per CPU.
_RING_BYTES = 32 << 10
_HEAD = 1024 // 8  # perf_event_mmap_page.data_head, in 64-bit words
_TAIL = _HEAD + 1


class KsymbolError(StalldError):
    """The kernel does not announce its symbols to us; the message says why and what to do."""


class Ksymbol(NamedTuple):
    """Kernel text [address, address + length) got this name, or lost it (`removed`)."""

    time_ns: int  # CLOCK_MONOTONIC
    address: int
    length: int
    name: bytes
    bpf: bool  # else a page of ftrace or kprobes
    removed: bool


class Drained(NamedTuple):
    """What happened since the last look, oldest first; with `lost`, that is not all of it."""

    events: tuple[Ksymbol, ...]
    lost: bool


def decode(data: bytes) -> Drained:
    """The perf records in `data`, written with sample_id_all and PERF_SAMPLE_TIME.

    Records of other types are passed over. Raises DecodeError on lengths that cannot be.
    """
    events: list[Ksymbol] = []
    lost = False
    at = 0
    while at < len(data):
        if at + _HEADER.size > len(data):
            raise DecodeError(f"{len(data) - at} bytes left at {at}, a header has {_HEADER.size}")
        kind, _, size = _HEADER.unpack_from(data, at)
        if size < _HEADER.size or at + size > len(data):
            raise DecodeError(f"record of {size} bytes at {at}, {len(data) - at} are left")
        if kind == perf.RECORD_KSYMBOL:
            body = at + _HEADER.size
            name_end = at + size - _TIME.size
            if name_end < body + _KSYMBOL.size:
                raise DecodeError(f"ksymbol record of {size} bytes at {at} is too short")
            address, length, ksym_type, flags = _KSYMBOL.unpack_from(data, body)
            (time_ns,) = _TIME.unpack_from(data, name_end)
            name = data[body + _KSYMBOL.size : name_end].partition(b"\0")[0]
            removed = bool(flags & _UNREGISTER)
            events.append(Ksymbol(time_ns, address, length, name, ksym_type == _TYPE_BPF, removed))
        elif kind == perf.RECORD_LOST:
            lost = True
        at += size
    return Drained(tuple(events), lost)


class KsymbolFeed:
    """The kernel's announcements on the given CPUs, kept in rings until `drain`.

    Belongs to one thread, or is used under one lock.
    """

    def __init__(self, ring_bytes: int = _RING_BYTES) -> None:
        self._ring_bytes = max(ring_bytes, mmap.PAGESIZE)
        self._rings: dict[int, _Ring] = {}
        self._kept: list[Ksymbol] = []  # from rings that are closed
        self._lost = False

    @classmethod
    def open(cls, cpus: Iterable[int], ring_bytes: int = _RING_BYTES) -> Self:
        """Start listening. `ring_bytes`: a power of two, at least a page, for each CPU.

        Raises KsymbolError: kernel too old, CAP_PERFMON or locked memory missing.
        """
        feed = cls(ring_bytes)
        try:
            feed.refresh(cpus)
        except KsymbolError:
            feed.close()
            raise
        feed._lost = False
        return feed

    @property
    def fds(self) -> tuple[int, ...]:
        """The perf events; readable only when a ring is half full."""
        return tuple(ring.fd for ring in self._rings.values())

    def refresh(self, cpus: Iterable[int], suspects: Container[int] = ()) -> None:
        """Listen on these CPUs from now on.

        What a CPU announced before it went is drained all the same. What one announced before
        it got its ring is missed: the next drain is `lost` when any CPU got one.

        Args:
            cpus: those online.
            suspects: those among them that may have been offline since the last call.

        Raises:
            KsymbolError: a CPU could not be listened to; the others are, and the next drain is
                `lost`.
        """
        wanted = set(cpus)
        for cpu, ring in list(self._rings.items()):
            if cpu not in wanted or (cpu in suspects and perf.detached(ring.fd)):
                self._take(self._rings.pop(cpu))
                ring.close()
        try:
            for cpu in sorted(wanted - self._rings.keys()):
                new = _Ring.open(cpu, self._ring_bytes)
                if new is not None:
                    self._rings[cpu] = new
                    self._lost = True
        except OSError as error:
            self._lost = True
            raise KsymbolError(_explain(error)) from error

    def pending(self) -> bool:
        """Whether there is anything to drain; a memory read per CPU."""
        return (
            self._lost
            or bool(self._kept)
            or any(ring.words[_HEAD] != ring.words[_TAIL] for ring in self._rings.values())
        )

    def drain(self) -> Drained:
        """Take everything announced, of all CPUs in the order in which it happened."""
        for ring in self._rings.values():
            self._take(ring)
        drained = Drained(tuple(sorted(self._kept, key=lambda event: event.time_ns)), self._lost)
        self._kept.clear()
        self._lost = False
        return drained

    def close(self) -> None:
        """Stop listening."""
        while self._rings:
            self._rings.popitem()[1].close()

    def _take(self, ring: _Ring) -> None:
        data, refused = ring.take()
        try:
            part = decode(data)
        except DecodeError:
            self._lost = True
            return
        self._kept += part.events
        self._lost = self._lost or refused or part.lost

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Ring:
    """One CPU's dummy event and the ring it writes to."""

    __slots__ = ("_map", "_size", "fd", "words")

    def __init__(self, fd: int, ring: mmap.mmap) -> None:
        self.fd = fd
        self._map = ring
        self._size = len(ring) - mmap.PAGESIZE
        self.words = memoryview(ring)[: mmap.PAGESIZE].cast("Q")

    @classmethod
    def open(cls, cpu: int, size: int) -> _Ring | None:
        """None when the CPU has gone offline meanwhile."""
        flags = perf.KSYMBOL | perf.SAMPLE_ID_ALL | perf.USE_CLOCKID | perf.WATERMARK
        # Nothing is ever sampled; excluded all the same, so that no more rights are asked for.
        flags |= perf.EXCLUDE_KERNEL | perf.EXCLUDE_HV
        attr = perf.attribute(
            perf.TYPE_SOFTWARE,
            perf.SW_DUMMY,
            sample_type=perf.SAMPLE_TIME,
            flags=flags,
            wakeup=size // 2,
            clockid=time.CLOCK_MONOTONIC,
        )
        try:
            fd = perf.open_event(attr, cpu)
        except OSError as error:
            if error.errno == errno.ENODEV:
                return None
            raise
        try:
            return cls(fd, mmap.mmap(fd, mmap.PAGESIZE + size, mmap.MAP_SHARED))
        except OSError:
            os.close(fd)
            raise

    def take(self) -> tuple[bytes, bool]:
        """Everything in the ring, and whether the kernel may have had to refuse records."""
        head, tail = self.words[_HEAD], self.words[_TAIL]
        used = head - tail
        first = tail % self._size
        start = mmap.PAGESIZE + first
        data = self._map[start : min(start + used, len(self._map))]
        data += self._map[mmap.PAGESIZE : mmap.PAGESIZE + used - len(data)]
        self.words[_TAIL] = head
        return data, used > self._size - _LARGEST_RECORD

    def close(self) -> None:
        self.words.release()
        self._map.close()
        os.close(self.fd)


def _explain(error: OSError) -> str:
    reason = error.strerror or os.strerror(error.errno or 0)
    if error.errno in (errno.EACCES, errno.EPERM):
        return (
            f"{reason}: CAP_PERFMON is missing, or too little memory may be locked "
            "(LimitMEMLOCK=, kernel.perf_event_mlock_kb)"
        )
    if error.errno in (errno.EINVAL, errno.E2BIG):
        return f"{reason}: this kernel has no PERF_RECORD_KSYMBOL (it came with 5.1)"
    return reason
