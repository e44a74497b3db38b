"""The perf buffers, read through libbpf.

libbpf and not bcc: bcc would map LLVM into the daemon, and its
``table.event()`` ends the process on types it does not know.

The CPU that writes a record is the one that is stuck: a reader that the
scheduler wakes there hears of the stall when it is over. So the CPUs are split
in two shares, and each share is read from a CPU of the other
(docs/decisions/0001-read-from-another-cpu.md).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import select
import struct
import threading
from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

from stalld import perf
from stalld.errors import StalldError, no_thread

PAGES_PER_CPU = max(1, (128 << 10) // mmap.PAGESIZE)
"""128 KiB per CPU: some 80 records of stalls with long stacks."""

# libbpf's perf_buffer_event_fn, and its answer "go on" (LIBBPF_PERF_EVENT_CONT).
_EVENT_FN = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
_CONTINUE = -2
# struct perf_event_header (type, misc, size), and of a sample the size of its raw data.
_SAMPLE = struct.Struct("=IHHI")


class _RawOpts(ctypes.Structure):
    """``struct perf_buffer_raw_opts``."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("cpu_cnt", ctypes.c_int),
        ("cpus", ctypes.POINTER(ctypes.c_int)),
        ("map_keys", ctypes.POINTER(ctypes.c_int)),
    )


def libbpf() -> ctypes.CDLL:
    """libbpf with the types of the functions the daemon calls.

    Raises:
        StalldError: it is not installed.
    """
    try:
        lib = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise StalldError(
            f"cannot load libbpf.so.1: {error}; install the package libbpf1"
        ) from error
    lib.perf_buffer__new_raw.restype = ctypes.c_void_p
    lib.perf_buffer__new_raw.argtypes = [
        ctypes.c_int,
        ctypes.c_size_t,
        ctypes.c_char_p,
        _EVENT_FN,
        ctypes.c_void_p,
        ctypes.POINTER(_RawOpts),
    ]
    lib.perf_buffer__buffer_fd.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    lib.perf_buffer__consume_buffer.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    lib.perf_buffer__free.argtypes = [ctypes.c_void_p]
    lib.bpf_map_delete_elem.argtypes = [ctypes.c_int, ctypes.c_void_p]
    return lib


class Changed(NamedTuple):
    """CPUs whose buffer was opened, for the first time or again, and those that have none now."""

    gained: frozenset[int] = frozenset()
    lost: frozenset[int] = frozenset()


class PerfReader:
    """Perf buffers of all online CPUs, each opened and closed by itself.

    Args:
        map_fd: descriptor of the BPF_MAP_TYPE_PERF_EVENT_ARRAY.
        on_record: gets each raw record (bytes), under ``lock``, in the thread
            that reads. What the kernel had no room for it counts itself
            (``lost`` of ``struct cpu_state``).
        lock: one that a thread may take twice; its own without.
        together: entered under ``lock`` around the records of one reading.

    Raises:
        StalldError: the buffers cannot be opened; the reason and the remedy.
    """

    def __init__(
        self,
        map_fd: int,
        on_record: Callable[[bytes], None],
        pages: int = PAGES_PER_CPU,
        lock: AbstractContextManager[object, None] | None = None,
        together: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._lib = libbpf()
        self._map_fd = map_fd
        self._on_record = on_record
        self._pages = pages
        self.lock = threading.RLock() if lock is None else lock
        self._together = together
        self._errors: list[Exception] = []
        self._buffers: dict[int, int] = {}  # CPU -> struct perf_buffer *
        # libbpf keeps the callback's address, so we keep the callback.
        self._event = _EVENT_FN(self._take)
        try:
            self.refresh(online_cpus())
        except StalldError:
            self.close()
            raise

    @property
    def cpus(self) -> tuple[int, ...]:
        """Whose buffers there are."""
        return tuple(sorted(self._buffers))

    def fd(self, cpu: int) -> int:
        """The descriptor that is readable when a record of ``cpu`` waits."""
        return int(self._lib.perf_buffer__buffer_fd(self._buffers[cpu], 0))

    def detached(self, cpus: Iterable[int]) -> frozenset[int]:
        """Those of these CPUs whose buffers are dead, as they have been offline meanwhile.

        The kernel detaches the buffer of a CPU that goes offline for good. Asking after one
        that lives interrupts its CPU.
        """
        return frozenset(
            cpu for cpu in cpus if cpu in self._buffers and perf.detached(self.fd(cpu))
        )

    def refresh(self, cpus: Iterable[int], reopen: Container[int] = ()) -> Changed:
        """Have buffers of these CPUs from now on; no record in a buffer that goes is lost.

        Descriptors of buffers that go are closed: nobody may wait on them any more.

        Args:
            cpus: those online. One that has gone meanwhile is passed over.
            reopen: those among them whose buffers are dead.

        Raises:
            StalldError: some buffers cannot be opened; all others are there.
        """
        wanted = set(cpus)
        with self.lock:
            before = set(self._buffers)
            for cpu in before:
                if cpu not in wanted or cpu in reopen:
                    self._drop(cpu)
            kept = set(self._buffers)
            failures = [error for cpu in sorted(wanted - kept) if (error := self._open(cpu))]
            now = set(self._buffers)
        if failures:
            raise StalldError(failures[0])
        return Changed(frozenset(now - kept), frozenset(before - now))

    def consume(self, cpus: Iterable[int] | None = None) -> None:
        """Hand over every record that waits; returns at once when none does.

        Args:
            cpus: whose; None for all. Those without a buffer are passed over.

        Raises:
            Exception: whatever a callback raised, once all are handed over.
        """
        with self.lock:
            with self._together():
                for cpu in self.cpus if cpus is None else cpus:
                    if cpu in self._buffers:
                        self._consume(cpu)
            if self._errors:
                error = self._errors[0]
                self._errors.clear()
                raise error

    def close(self) -> None:
        """Close and unmap the buffers."""
        while self._buffers:
            self._lib.perf_buffer__free(self._buffers.popitem()[1])

    def _open(self, cpu: int) -> str:
        """What is wrong, if anything."""
        attr = perf.attribute(
            perf.TYPE_SOFTWARE,
            perf.SW_BPF_OUTPUT,
            period=1,
            sample_type=perf.SAMPLE_RAW,
            wakeup=1,
        )
        number = ctypes.c_int(cpu)
        opts = _RawOpts(ctypes.sizeof(_RawOpts), 1, ctypes.pointer(number), ctypes.pointer(number))
        buffer = self._lib.perf_buffer__new_raw(
            self._map_fd, self._pages, attr, self._event, None, ctypes.byref(opts)
        )
        if buffer:
            self._buffers[cpu] = buffer
            return ""
        code = ctypes.get_errno()
        if code == errno.ENODEV:
            return ""  # It has gone offline meanwhile.
        stricter = perf.stricter() if code in (errno.EACCES, errno.EPERM) else ""
        if stricter:
            return (
                f"cannot open the perf buffer of CPU {cpu}: {os.strerror(code)}; {stricter}; "
                "set it to 2: sysctl kernel.perf_event_paranoid=2"
            )
        return (
            f"cannot open the perf buffer of CPU {cpu}: {os.strerror(code)}; CAP_PERFMON, "
            f"{(self._pages + 1) * mmap.PAGESIZE >> 10} KiB of locked memory (ulimit -l, "
            "kernel.perf_event_mlock_kb) and 2 descriptors (ulimit -n) per CPU are needed"
        )

    def _drop(self, cpu: int) -> None:
        # Out of the map first: a record that comes yet is counted as lost, not lost unseen.
        self._lib.bpf_map_delete_elem(self._map_fd, ctypes.byref(ctypes.c_int(cpu)))
        try:
            self._consume(cpu)
        except StalldError as error:
            self._errors.append(error)
        self._lib.perf_buffer__free(self._buffers.pop(cpu))

    def _consume(self, cpu: int) -> None:
        status = self._lib.perf_buffer__consume_buffer(self._buffers[cpu], 0)
        if status < 0:
            raise StalldError(f"reading the perf buffer of CPU {cpu}: {os.strerror(-status)}")

    # An exception cannot cross the C frames of libbpf: keep it for consume().

    def _take(self, _: object, cpu: int, event: int) -> int:
        try:
            kind, _misc, _size, raw = _SAMPLE.unpack(ctypes.string_at(event, _SAMPLE.size))
            if kind == perf.RECORD_SAMPLE:
                self._on_record(ctypes.string_at(event + _SAMPLE.size, raw))
        except Exception as error:  # noqa: BLE001 - consume() raises it again
            self._errors.append(error)
        return _CONTINUE


class ReaderThread:
    """Reads some CPUs' buffers in a thread of its own; sleeps while there is nothing.

    Args:
        cpus: whose buffers.
        run_on: the CPUs the thread may run on.
        on_read: called after each reading, in this thread.
        on_error: told what ended the thread before its time, in this thread.
    """

    def __init__(
        self,
        reader: PerfReader,
        cpus: Sequence[int],
        run_on: Sequence[int],
        on_read: Callable[[], None],
        on_error: Callable[[BaseException], None],
    ) -> None:
        self._reader = reader
        self._cpu_of = {reader.fd(cpu): cpu for cpu in cpus}
        self._run_on = run_on
        self._on_read = on_read
        self._on_error = on_error
        self._asked = os.eventfd(0, os.EFD_CLOEXEC)
        self._stopping = False
        self.answered = 0
        """How often it has answered :meth:`ask`."""
        self._thread = threading.Thread(target=self._run, name="stalld-reader", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            os.close(self._asked)
            raise no_thread(error) from error

    def stop(self) -> None:
        """End the thread; the buffers stay."""
        self._stopping = True
        self.ask()
        self._thread.join()
        os.close(self._asked)

    def ask(self) -> None:
        """Have it answer, if it still moves."""
        os.eventfd_write(self._asked, 1)

    def _run(self) -> None:
        try:
            with suppress(OSError):
                # Without any of them online the kernel chooses.
                os.sched_setaffinity(0, self._run_on)
            with select.epoll() as epoll:
                for fd in (self._asked, *self._cpu_of):
                    epoll.register(fd, select.EPOLLIN)
                # Registering takes the news of what waits already.
                ready = list(self._cpu_of)
                while not self._stopping:
                    if ready:
                        self._reader.consume([self._cpu_of[fd] for fd in ready])
                        self._on_read()
                    ready = [fd for fd, _ in epoll.poll()]
                    if self._asked in ready:
                        ready.remove(self._asked)
                        os.eventfd_read(self._asked)
                        self.answered += 1
        except Exception as error:  # noqa: BLE001 - the event loop raises it again
            self._on_error(error)


def online_cpus(path: str = "/sys/devices/system/cpu/online") -> list[int]:
    """The CPUs that are online, as numbers."""
    return cpu_list(Path(path).read_text())


def cpu_list(text: str) -> list[int]:
    """CPU numbers from a kernel list such as ``0-3,5``."""
    cpus: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        cpus.extend(range(int(first), int(last or first) + 1))
    return cpus


def split(cpus: Sequence[int], allowed: Iterable[int]) -> tuple[list[int], list[int]]:
    """Two groups of the CPUs we may run on, for reading each other's share.

    Returns:
        The groups; the second is empty where one CPU is all we have.
    """
    mine = sorted(set(cpus) & set(allowed))
    if len(mine) < 2:
        return mine, []
    return mine[0::2], mine[1::2]
