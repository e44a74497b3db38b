"""perf_event_open(2): what all our perf events share, and the sampler on hardware cycles.

An event belongs to one CPU. When that goes offline the kernel detaches the event for good:
nothing comes of it any more when the CPU is back, and no call fails (see `detached`).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import struct
import sys
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Self

from stalld.errors import StalldError

_MACHINE = platform.machine()
_SYSCALL_NR = {
    "x86_64": 298,
    "aarch64": 241,
    "riscv64": 241,
    "loongarch64": 241,
    "ppc64le": 319,
    "s390x": 331,
}


def _flag(bit: int) -> int:
    # The flags are bit fields: big-endian machines count them from the other end.
    return 1 << (bit if sys.byteorder == "little" else 63 - bit)


# include/uapi/linux/perf_event.h
TYPE_HARDWARE = 0
TYPE_SOFTWARE = 1
HW_CPU_CYCLES = 0
SW_CPU_CLOCK = 0
SW_DUMMY = 9
SW_BPF_OUTPUT = 10
SAMPLE_TIME = 1 << 2
SAMPLE_RAW = 1 << 10
DISABLED = _flag(0)
PINNED = _flag(2)
EXCLUDE_USER = _flag(4)
EXCLUDE_KERNEL = _flag(5)
EXCLUDE_HV = _flag(6)
FREQ = _flag(10)
WATERMARK = _flag(14)
SAMPLE_ID_ALL = _flag(18)
EXCLUDE_GUEST = _flag(20)
USE_CLOCKID = _flag(25)
KSYMBOL = _flag(29)

RECORD_LOST = 2
RECORD_SAMPLE = 9
RECORD_KSYMBOL = 17

_FORMAT_TOTAL_TIME_ENABLED = 1 << 0
_FLAG_FD_CLOEXEC = 1 << 3
# type, size, config, sample_period or sample_freq, sample_type, read_format, flags,
# wakeup_events or wakeup_watermark, bp_type, config1, config2, branch_sample_type,
# sample_regs_user, sample_stack_user, clockid, sample_regs_intr, aux_watermark, sample_max_stack
_ATTR = struct.Struct("=IIQQQQQIIQQQQIiQIHxx")
_ATTR_SIZE = 112  # PERF_ATTR_SIZE_VER5: any kernel that runs our programs takes it
assert _ATTR.size == _ATTR_SIZE
# The event's count and the nanoseconds for which it was enabled.
_READ_BYTES = 16
# asm-generic/ioctl.h; powerpc has its own: _IO is not 0 and _IOW is 4 there.
_IOC_ENABLE, _IOC_SET_BPF = (
    (0x20002400, 0x80042408) if _MACHINE.startswith("ppc") else (0x2400, 0x40042408)
)


def attribute(
    kind: int,
    config: int,
    *,
    period: int = 0,
    sample_type: int = 0,
    flags: int = 0,
    wakeup: int = 0,
    clockid: int = 0,
) -> bytes:
    """A ``struct perf_event_attr``. `period`: in Hz with FREQ; `wakeup`: in bytes with WATERMARK.

    An event opened with it reads as `detached` expects.
    """
    return _ATTR.pack(
        kind,
        _ATTR_SIZE,
        config,
        period,
        sample_type,
        _FORMAT_TOTAL_TIME_ENABLED,
        flags,
        wakeup,
        *(0, 0, 0, 0, 0, 0),
        clockid,
        *(0, 0, 0),
    )


def open_event(attr: bytes, cpu: int) -> int:
    """Open an event for whatever runs on `cpu`; its descriptor, which exec closes.

    Raises OSError: ENODEV when the CPU is offline, ENOSYS on a machine we do not know.
    """
    number = _SYSCALL_NR.get(_MACHINE)
    if number is None:
        raise OSError(errno.ENOSYS, f"perf_event_open on {_MACHINE} is not known")
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.syscall(
        ctypes.c_long(number),
        ctypes.c_char_p(attr),
        ctypes.c_int(-1),
        ctypes.c_int(cpu),
        ctypes.c_int(-1),
        ctypes.c_ulong(_FLAG_FD_CLOEXEC),
    )
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return fd


def stricter(sysctl: str = "/proc/sys/kernel/perf_event_paranoid") -> str:
    """What stands against CAP_PERFMON on kernels of distributions; empty if that is not it.

    Levels above 2 are not the kernel's own: at 3 Debian's opens events for CAP_SYS_ADMIN alone.
    """
    try:
        with open(sysctl) as file:
            level = int(file.read())
    except (OSError, ValueError):
        return ""
    if level <= 2:
        return ""
    return (
        f"kernel.perf_event_paranoid is {level}, and above 2 CAP_PERFMON may not be enough "
        "on kernels of distributions"
    )


def detached(fd: int) -> bool:
    """Whether the event is dead: its CPU has been offline since, or it got no counter.

    A detached event's time stands still. Asking one that lives interrupts its CPU, twice.
    """
    return os.read(fd, _READ_BYTES)[8:] == os.read(fd, _READ_BYTES)[8:]


_USUAL_HZ = 3_000_000_000
NMI_HZ = 200
"""How often the NMI sampler looks at a busy CPU."""


class SamplerError(StalldError):
    """No program can be run off a counter of the CPUs; the message says why and what to do."""


def max_cpu_hz(path: str = "/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq") -> int:
    """The highest frequency of a CPU; a usual one where the kernel does not tell."""
    try:
        return int(Path(path).read_text()) * 1000
    except (OSError, ValueError):
        return _USUAL_HZ


class NmiSampler:
    """Runs a BPF program on each CPU some times a second, also while interrupts are off.

    A cycle counter overflows with an NMI (on x86; elsewhere where the kernel has pseudo-NMIs),
    and stands still while its CPU is idle. The events are pinned: no other profiler's events
    can take the counter away for part of the time.
    """

    def __init__(self, program_fd: int, attr: bytes) -> None:
        self._program_fd = program_fd
        self._attr = attr
        self._fds: dict[int, int] = {}

    @classmethod
    def open(
        cls,
        program_fd: int,
        cpus: Iterable[int],
        frequency_hz: int,
        kind: int = TYPE_HARDWARE,
        config: int = HW_CPU_CYCLES,
    ) -> Self:
        """Start sampling; CPUs that are offline are passed over.

        Args:
            program_fd: of type BPF_PROG_TYPE_PERF_EVENT; the caller's, to keep open.
            frequency_hz: of cycles: at most, at the CPU's highest frequency; of others in seconds
                of CPU time, at most kernel.perf_event_max_sample_rate.
            kind, config: another event instead of hardware cycles.

        Raises:
            SamplerError: no PMU, no permission, or no free counter. Nothing stays open.
        """
        # Cycles by number, not by frequency: one event with FREQ keeps all nohz_full CPUs ticking.
        # User code cannot have interrupts off, nor is a guest ours.
        cycles = kind == TYPE_HARDWARE
        flags = DISABLED | PINNED | (EXCLUDE_USER | EXCLUDE_GUEST if cycles else FREQ)
        period = max_cpu_hz() // frequency_hz if cycles else frequency_hz
        sampler = cls(program_fd, attribute(kind, config, period=period, flags=flags))
        sampler.refresh(cpus)
        if not sampler.cpus:
            raise SamplerError(_explain(errno.ENODEV))
        return sampler

    @property
    def cpus(self) -> tuple[int, ...]:
        """Where it samples."""
        return tuple(sorted(self._fds))

    def refresh(self, cpus: Iterable[int], suspects: Container[int] = ()) -> None:
        """Sample on these CPUs from now on.

        Args:
            cpus: those online.
            suspects: those among them that may have been offline since the last call.

        Raises:
            SamplerError: as `open` does; it goes on on the CPUs it had, if they are still there.
        """
        wanted = set(cpus)
        for cpu, fd in list(self._fds.items()):
            if cpu not in wanted or (cpu in suspects and detached(fd)):
                os.close(self._fds.pop(cpu))
        opened: dict[int, int] = {}
        try:
            for cpu in sorted(wanted - self._fds.keys()):
                fd = self._start(cpu)
                if fd >= 0:
                    opened[cpu] = fd
        except OSError as error:
            for fd in opened.values():
                os.close(fd)
            raise SamplerError(_explain(error.errno or 0, error.strerror)) from error
        self._fds.update(opened)

    def close(self) -> None:
        """Stop sampling; may be called twice."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    def _start(self, cpu: int) -> int:
        """A descriptor, or -1 when the CPU is offline."""
        try:
            fd = open_event(self._attr, cpu)
        except OSError as error:
            if error.errno == errno.ENODEV:
                return -1
            raise
        try:
            fcntl.ioctl(fd, _IOC_SET_BPF, self._program_fd)
            fcntl.ioctl(fd, _IOC_ENABLE, 0)
            # A pinned event that gets no counter is in error, which reads as end of file.
            if not os.read(fd, _READ_BYTES):
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        except OSError:
            os.close(fd)
            raise
        return fd


def _explain(code: int, reason: str | None = None) -> str:
    reason = reason or os.strerror(code)
    if code in (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP):
        return (
            f"{reason}: this machine has no performance counters that can interrupt; "
            "in a virtual machine, have the hypervisor provide a PMU"
        )
    if code in (errno.EACCES, errno.EPERM):
        return f"{reason}: CAP_PERFMON is missing, or a seccomp filter forbids perf_event_open"
    if code == errno.EBUSY:
        return (
            f"{reason}: other pinned events have taken the counters; stop the other profiler, "
            "or free the counter of the NMI watchdog (sysctl kernel.nmi_watchdog=0)"
        )
    if code == errno.EINVAL:
        return (
            f"{reason}: the frequency is above kernel.perf_event_max_sample_rate, "
            "or the program is not of type perf_event"
        )
    if code == errno.EMFILE:
        return f"{reason}: raise the limit of open files (LimitNOFILE=, ulimit -n)"
    return reason
