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
import os
import select
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from stalld.errors import StalldError

PAGES_PER_CPU = 32
"""128 KiB per CPU: some 90 of the largest records."""

_SAMPLE_FN = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(ctypes.c_char), ctypes.c_uint32
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
    lib.perf_buffer__new.restype = ctypes.c_void_p
    lib.perf_buffer__new.argtypes = [
        ctypes.c_int,
        ctypes.c_size_t,
        _SAMPLE_FN,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    lib.perf_buffer__buffer_cnt.argtypes = [ctypes.c_void_p]
    lib.perf_buffer__buffer_cnt.restype = ctypes.c_size_t
    lib.perf_buffer__buffer_fd.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    lib.perf_buffer__consume_buffer.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    lib.perf_buffer__free.argtypes = [ctypes.c_void_p]
    return lib


class PerfReader:
    """Perf buffers of all online CPUs.

    Args:
        map_fd: descriptor of the BPF_MAP_TYPE_PERF_EVENT_ARRAY.
        on_record: gets each raw record (bytes), under ``lock``, in the thread
            that reads. What the kernel had no room for it counts itself
            (``lost`` of ``struct cpu_state``).

    Raises:
        StalldError: the buffers cannot be opened; the reason and the remedy.
    """

    def __init__(
        self,
        map_fd: int,
        on_record: Callable[[bytes], None],
        pages: int = PAGES_PER_CPU,
    ) -> None:
        self._lib = libbpf()
        self._on_record = on_record
        self.lock = threading.RLock()
        self._errors: list[Exception] = []
        # libbpf keeps the callback's address, so we keep the callback.
        self._sample = _SAMPLE_FN(self._sampled)
        self._buffer = self._lib.perf_buffer__new(map_fd, pages, self._sample, None, None, None)
        if not self._buffer:
            reason = os.strerror(ctypes.get_errno())
            raise StalldError(
                f"cannot open the perf buffers: {reason}; CAP_PERFMON and "
                f"{pages * 4 + 4} KiB of locked memory per CPU are needed "
                "(ulimit -l, kernel.perf_event_mlock_kb)"
            )
        # libbpf opens one buffer for each CPU that is online, in their order.
        count = self._lib.perf_buffer__buffer_cnt(self._buffer)
        self.cpus = tuple(online_cpus())[:count]

    def fd(self, cpu: int) -> int:
        """The descriptor that is readable when a record of ``cpu`` waits."""
        return int(self._lib.perf_buffer__buffer_fd(self._buffer, self.cpus.index(cpu)))

    def consume(self, cpus: Iterable[int] | None = None) -> None:
        """Hand over every record that waits; returns at once when none does.

        Raises:
            Exception: whatever a callback raised, once all are handed over.
        """
        with self.lock:
            if self._buffer is None:
                raise StalldError("the perf buffers are closed")
            for cpu in self.cpus if cpus is None else cpus:
                status = self._lib.perf_buffer__consume_buffer(self._buffer, self.cpus.index(cpu))
                if status < 0:
                    raise StalldError(
                        f"reading the perf buffer of CPU {cpu}: {os.strerror(-status)}"
                    )
            if self._errors:
                error = self._errors[0]
                self._errors.clear()
                raise error

    def close(self) -> None:
        """Close and unmap the buffers."""
        if self._buffer:
            self._lib.perf_buffer__free(self._buffer)
            self._buffer = None

    # An exception cannot cross the C frames of libbpf: keep it for consume().

    def _sampled(
        self, _: object, cpu: int, data: ctypes._Pointer[ctypes.c_char], size: int
    ) -> None:
        try:
            self._on_record(ctypes.string_at(data, size))
        except Exception as error:  # noqa: BLE001 - consume() raises it again
            self._errors.append(error)


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
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="stalld-reader", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; the buffers stay."""
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        os.close(self._stop)

    def _run(self) -> None:
        try:
            os.sched_setaffinity(0, self._run_on)
            with select.epoll() as epoll:
                for fd in (self._stop, *self._cpu_of):
                    epoll.register(fd, select.EPOLLIN)
                while True:
                    ready = [fd for fd, _ in epoll.poll()]
                    if self._stop in ready:
                        return
                    self._reader.consume([self._cpu_of[fd] for fd in ready])
                    self._on_read()
        except Exception as error:  # noqa: BLE001 - the event loop raises it again
            self._on_error(error)


def online_cpus(path: str = "/sys/devices/system/cpu/online") -> list[int]:
    """CPU numbers from a kernel list such as ``0-3,5``."""
    cpus: list[int] = []
    for part in Path(path).read_text().strip().split(","):
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
