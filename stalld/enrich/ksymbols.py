"""What appears in and leaves kernel text after start: BPF programs, trampolines, probe pages.

The kernel announces each one as PERF_RECORD_KSYMBOL (5.1, commit 76193a94522f; trampolines and
ftrace and kprobe pages since 5.9, commit 69e49088692c) to every perf event that asks for it, on
the CPU where it happens. One dummy event per CPU with a small ring is enough; nobody waits on
them: the rings are looked at when a stack holds an address that is not core kernel text. That
costs nothing on a quiet host, no wake-up and no interrupt, and the name is exact at once, with
no new reading of /proc/kallsyms. Needs CAP_PERFMON.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

from stalld.errors import DecodeError, StalldError

_SYSCALL_NR = {
    "x86_64": 298,
    "aarch64": 241,
    "riscv64": 241,
    "loongarch64": 241,
    "ppc64le": 319,
    "s390x": 331,
}

# include/uapi/linux/perf_event.h
_PERF_TYPE_SOFTWARE = 1
_PERF_COUNT_SW_DUMMY = 9
_PERF_SAMPLE_TIME = 1 << 2
_PERF_FLAG_FD_CLOEXEC = 1 << 3
_ATTR_EXCLUDE_KERNEL = 1 << 5
_ATTR_EXCLUDE_HV = 1 << 6
_ATTR_WATERMARK = 1 << 14
_ATTR_SAMPLE_ID_ALL = 1 << 18
_ATTR_USE_CLOCKID = 1 << 25
_ATTR_KSYMBOL = 1 << 29
_CLOCK_MONOTONIC = 1
# type, size, config, sample_period, sample_type, read_format, flags, wakeup_watermark, bp_type,
# config1, config2, branch_sample_type, sample_regs_user, sample_stack_user, clockid,
# sample_regs_intr, aux_watermark, sample_max_stack
_ATTR = struct.Struct("=IIQQQQQIIQQQQIiQIHxx")
_ATTR_SIZE = 112  # PERF_ATTR_SIZE_VER5: any kernel that knows attr.ksymbol takes it
assert _ATTR.size == _ATTR_SIZE

_RECORD_LOST = 2
_RECORD_KSYMBOL = 17
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
        if kind == _RECORD_KSYMBOL:
            body = at + _HEADER.size
            name_end = at + size - _TIME.size
            if name_end < body + _KSYMBOL.size:
                raise DecodeError(f"ksymbol record of {size} bytes at {at} is too short")
            address, length, ksym_type, flags = _KSYMBOL.unpack_from(data, body)
            (time_ns,) = _TIME.unpack_from(data, name_end)
            name = data[body + _KSYMBOL.size : name_end].partition(b"\0")[0]
            removed = bool(flags & _UNREGISTER)
            events.append(Ksymbol(time_ns, address, length, name, ksym_type == _TYPE_BPF, removed))
        elif kind == _RECORD_LOST:
            lost = True
        at += size
    return Drained(tuple(events), lost)


class KsymbolFeed:
    """The kernel's announcements on the given CPUs, kept in rings until `drain`.

    A CPU that comes online later is not covered: open a new feed then, and read the table anew.
    """

    def __init__(self, rings: Sequence[_Ring]) -> None:
        self._rings = tuple(rings)

    @classmethod
    def open(cls, cpus: Iterable[int], ring_bytes: int = _RING_BYTES) -> Self:
        """Start listening. `ring_bytes`: a power of two, at least a page, for each CPU.

        Raises KsymbolError: kernel too old, CAP_PERFMON or locked memory missing.
        """
        number = _SYSCALL_NR.get(platform.machine())
        if number is None:
            raise KsymbolError(f"perf_event_open on {platform.machine()} is not known")
        rings: list[_Ring] = []
        try:
            for cpu in cpus:
                ring = _Ring.open(number, cpu, max(ring_bytes, mmap.PAGESIZE))
                if ring is not None:
                    rings.append(ring)
        except OSError as error:
            for ring in rings:
                ring.close()
            raise KsymbolError(_explain(error)) from error
        return cls(rings)

    @property
    def fds(self) -> tuple[int, ...]:
        """The perf events; readable only when a ring is half full."""
        return tuple(ring.fd for ring in self._rings)

    def pending(self) -> bool:
        """Whether anything was announced since the last drain; a memory read per CPU."""
        return any(ring.words[_HEAD] != ring.words[_TAIL] for ring in self._rings)

    def drain(self) -> Drained:
        """Take everything announced, of all CPUs in the order in which it happened."""
        events: list[Ksymbol] = []
        lost = False
        for ring in self._rings:
            data, refused = ring.take()
            lost = lost or refused
            try:
                part = decode(data)
            except DecodeError:
                lost = True
                continue
            events += part.events
            lost = lost or part.lost
        events.sort(key=lambda event: event.time_ns)
        return Drained(tuple(events), lost)

    def close(self) -> None:
        """Stop listening."""
        for ring in self._rings:
            ring.close()
        self._rings = ()

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
    def open(cls, number: int, cpu: int, size: int) -> _Ring | None:
        """None when the CPU has gone offline meanwhile."""
        flags = _ATTR_KSYMBOL | _ATTR_SAMPLE_ID_ALL | _ATTR_USE_CLOCKID | _ATTR_WATERMARK
        # Nothing is ever sampled; excluded all the same, so that no more rights are asked for.
        flags |= _ATTR_EXCLUDE_KERNEL | _ATTR_EXCLUDE_HV
        attr = _ATTR.pack(
            _PERF_TYPE_SOFTWARE,
            _ATTR_SIZE,
            _PERF_COUNT_SW_DUMMY,
            0,
            _PERF_SAMPLE_TIME,
            0,
            flags,
            size // 2,
            *(0, 0, 0, 0, 0, 0),
            _CLOCK_MONOTONIC,
            *(0, 0, 0),
        )
        libc = ctypes.CDLL(None, use_errno=True)
        fd: int = libc.syscall(
            ctypes.c_long(number),
            ctypes.c_char_p(attr),
            ctypes.c_int(-1),
            ctypes.c_int(cpu),
            ctypes.c_int(-1),
            ctypes.c_ulong(_PERF_FLAG_FD_CLOEXEC),
        )
        if fd < 0:
            code = ctypes.get_errno()
            if code == errno.ENODEV:
                return None
            raise OSError(code, os.strerror(code))
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
    reason = os.strerror(error.errno or 0)
    if error.errno in (errno.EACCES, errno.EPERM):
        return (
            f"{reason}: CAP_PERFMON is missing, or too little memory may be locked "
            "(LimitMEMLOCK=, kernel.perf_event_mlock_kb)"
        )
    if error.errno in (errno.EINVAL, errno.E2BIG):
        return f"{reason}: this kernel has no PERF_RECORD_KSYMBOL (it came with 5.1)"
    return reason
