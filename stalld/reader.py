"""The perf buffers, read through libbpf on the event loop.

libbpf and not bcc: bcc would map LLVM into the daemon, and its
``table.event()`` ends the process on types it does not know.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

from stalld.errors import StalldError

PAGES_PER_CPU = 32
"""128 KiB per CPU: some 90 of the largest records."""

_SAMPLE_FN = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(ctypes.c_char), ctypes.c_uint32
)
_LOST_FN = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64)


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
        _LOST_FN,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    lib.perf_buffer__epoll_fd.argtypes = [ctypes.c_void_p]
    lib.perf_buffer__consume.argtypes = [ctypes.c_void_p]
    lib.perf_buffer__free.argtypes = [ctypes.c_void_p]
    return lib


class PerfReader:
    """Perf buffers of all online CPUs.

    Args:
        map_fd: descriptor of the BPF_MAP_TYPE_PERF_EVENT_ARRAY.
        on_record: gets each raw record (bytes).
        on_lost: gets CPU and number of records the kernel had no room for.

    Raises:
        StalldError: the buffers cannot be opened; the reason and the remedy.
    """

    def __init__(
        self,
        map_fd: int,
        on_record: Callable[[bytes], None],
        on_lost: Callable[[int, int], None],
        pages: int = PAGES_PER_CPU,
    ) -> None:
        self._lib = libbpf()
        self._on_record = on_record
        self._on_lost = on_lost
        self._errors: list[BaseException] = []
        # libbpf keeps the callbacks' addresses, so we keep the callbacks.
        self._sample = _SAMPLE_FN(self._sampled)
        self._lost = _LOST_FN(self._overflowed)
        self._buffer = self._lib.perf_buffer__new(
            map_fd, pages, self._sample, self._lost, None, None
        )
        if not self._buffer:
            reason = os.strerror(ctypes.get_errno())
            raise StalldError(
                f"cannot open the perf buffers: {reason}; CAP_PERFMON and "
                f"{pages * 4 + 4} KiB of locked memory per CPU are needed "
                "(ulimit -l, kernel.perf_event_mlock_kb)"
            )
        self.fd: int = self._lib.perf_buffer__epoll_fd(self._buffer)
        """Readable when a record waits."""

    def consume(self) -> None:
        """Hand over every record that waits; returns at once when none does.

        Raises:
            Exception: whatever a callback raised, once all are handed over.
        """
        status = self._lib.perf_buffer__consume(self._buffer)
        if self._errors:
            error = self._errors[0]
            self._errors.clear()
            raise error
        if status < 0:
            raise StalldError(f"reading the perf buffers: {os.strerror(-status)}")

    def close(self) -> None:
        """Close and unmap the buffers."""
        if self._buffer:
            self._lib.perf_buffer__free(self._buffer)
            self._buffer = None

    # An exception cannot cross the C frames of libbpf: keep it for consume().

    def _sampled(self, _: object, cpu: int, data: ctypes._Pointer[ctypes.c_char], size: int) -> None:
        try:
            self._on_record(ctypes.string_at(data, size))
        except BaseException as error:
            self._errors.append(error)

    def _overflowed(self, _: object, cpu: int, count: int) -> None:
        try:
            self._on_lost(cpu, count)
        except BaseException as error:
            self._errors.append(error)
