"""The sampler's books and errors; the kernel's part is played here."""

from __future__ import annotations

import errno
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stalld import perf
from stalld.errors import StalldError
from stalld.perf import NmiSampler, SamplerError

PROGRAM_FD = 1000


class Kernel:
    """Opens an eventfd for an event. A live event's time goes on, a dead one's stands still."""

    def __init__(self) -> None:
        self.online = {0, 1}
        self.events: dict[int, int] = {}
        self.opened: list[int] = []
        self.attached: dict[int, list[tuple[int, int]]] = {}
        self.dead: set[int] = set()
        self.open_error = 0
        self.ioctl_error = 0
        self.no_counter = False
        self.attr = b""
        self.time_ns = 0

    def open_event(self, attr: bytes, cpu: int) -> int:
        self.attr = attr
        if cpu not in self.online:
            raise OSError(errno.ENODEV, "offline")
        if self.open_error and cpu == max(self.online):
            raise OSError(self.open_error, os.strerror(self.open_error))
        fd = os.eventfd(0)
        self.events[fd] = cpu
        self.opened.append(cpu)
        self.attached[fd] = []
        self.dead.discard(fd)
        return fd

    def ioctl(self, fd: int, request: int, argument: int) -> int:
        if self.ioctl_error:
            raise OSError(self.ioctl_error, os.strerror(self.ioctl_error))
        self.attached[fd].append((request, argument))
        return 0

    def read(self, fd: int, _: int) -> bytes:
        if self.no_counter:
            return b""
        self.time_ns += fd not in self.dead
        return struct.pack("=QQ", 7, self.time_ns)

    def open_on(self) -> list[int]:
        """The CPUs with an event whose descriptor is open."""
        found = []
        for fd, cpu in self.events.items():
            try:
                os.fstat(fd)
            except OSError:
                continue
            found.append(cpu)
        return sorted(found)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    played = Kernel()
    monkeypatch.setattr(perf, "open_event", played.open_event)
    monkeypatch.setattr("fcntl.ioctl", played.ioctl)
    monkeypatch.setattr(os, "read", played.read)
    yield played
    assert played.open_on() == []


@pytest.mark.parametrize(("level", "says"), [("-1", ""), ("2", ""), ("3", "is 3"), ("x", "")])
def test_levels_of_distributions(level: str, says: str, tmp_path: Path) -> None:
    """Levels that the kernel itself does not know are named as what may be in the way."""
    sysctl = tmp_path / "perf_event_paranoid"
    sysctl.write_text(f"{level}\n")
    said = perf.stricter(str(sysctl))
    assert (says in said) is True
    assert bool(said) is bool(says)
    assert perf.stricter(str(tmp_path / "none")) == ""


def test_attribute_is_a_struct_perf_event_attr() -> None:
    """Type, size, config, period, sample type, read format and flags lie where the kernel looks."""
    attr = perf.attribute(1, 9, period=99, sample_type=4, flags=perf.FREQ, wakeup=8, clockid=1)
    flags = 1 << (10 if sys.byteorder == "little" else 53)
    assert struct.unpack_from("=IIQQQQQI", attr) == (1, len(attr), 9, 99, 4, 1, flags, 8)
    assert struct.unpack_from("=i", attr, 92) == (1,)
    assert len(attr) == 112


def test_unknown_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system call's number is not known the error says so."""
    monkeypatch.setattr(perf, "_MACHINE", "vax")
    with pytest.raises(OSError, match="vax") as caught:
        perf.open_event(perf.attribute(1, 9), 0)
    assert caught.value.errno == errno.ENOSYS


def test_opens_attaches_then_enables(kernel: Kernel) -> None:
    """Each CPU's event gets the program before it counts, at most as often as asked for.

    By their number: one event of a frequency keeps the tick of all nohz_full CPUs.
    """
    sampler = NmiSampler.open(PROGRAM_FD, [0, 1], 47)
    assert sampler.cpus == (0, 1)
    assert kernel.open_on() == [0, 1]
    for calls in kernel.attached.values():
        assert calls == [(perf._IOC_SET_BPF, PROGRAM_FD), (perf._IOC_ENABLE, 0)]
    kind, _, config, period, _, _, flags = struct.unpack_from("=IIQQQQQ", kernel.attr)
    assert (kind, config) == (perf.TYPE_HARDWARE, perf.HW_CPU_CYCLES)
    assert period == perf.max_cpu_hz() // 47
    assert flags == perf.DISABLED | perf.PINNED | perf.EXCLUDE_USER | perf.EXCLUDE_GUEST
    sampler.close()
    sampler.close()
    assert kernel.open_on() == []


def test_offline_cpus_are_passed_over(kernel: Kernel) -> None:
    """A CPU that has just gone offline is no error; a machine where all events fail so is."""
    kernel.online = {0}
    sampler = NmiSampler.open(PROGRAM_FD, [0, 1], 47)
    assert sampler.cpus == (0,)
    sampler.close()
    kernel.online.clear()
    with pytest.raises(SamplerError, match="PMU"):
        NmiSampler.open(PROGRAM_FD, [0, 1], 47)


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOENT, "PMU"),
        (errno.EOPNOTSUPP, "PMU"),
        (errno.EACCES, "CAP_PERFMON"),
        (errno.EPERM, "CAP_PERFMON"),
        (errno.EBUSY, "nmi_watchdog"),
        (errno.EINVAL, "perf_event_max_sample_rate"),
        (errno.EMFILE, "LimitNOFILE"),
        (errno.ENOSYS, os.strerror(errno.ENOSYS)),
    ],
)
def test_errors_name_the_remedy(kernel: Kernel, code: int, remedy: str) -> None:
    """Each error is ours, gives the kernel's reason and what to do; nothing stays open."""
    kernel.open_error = code
    with pytest.raises(SamplerError, match=remedy) as caught:
        NmiSampler.open(PROGRAM_FD, [0, 1], 47)
    assert os.strerror(code) in str(caught.value)
    assert isinstance(caught.value, StalldError)
    assert kernel.events
    assert kernel.open_on() == []


def test_program_refused(kernel: Kernel) -> None:
    """A program that cannot be attached leaves nothing open."""
    kernel.ioctl_error = errno.EINVAL
    with pytest.raises(SamplerError, match="not of type perf_event"):
        NmiSampler.open(PROGRAM_FD, [0, 1], 47)


def test_no_free_counter(kernel: Kernel) -> None:
    """A pinned event without a counter does not count, though opening it succeeds: an error."""
    kernel.no_counter = True
    with pytest.raises(SamplerError, match="nmi_watchdog"):
        NmiSampler.open(PROGRAM_FD, [0, 1], 47)


def test_refresh(kernel: Kernel) -> None:
    """CPUs that went are let go; those that came, or came back between two looks, are opened."""
    sampler = NmiSampler.open(PROGRAM_FD, [0, 1], 47)
    sampler.refresh([0, 1], {0, 1})
    assert kernel.opened == [0, 1]
    kernel.dead = {fd for fd, cpu in kernel.events.items() if cpu == 1}
    sampler.refresh([0, 1])
    assert kernel.opened == [0, 1]
    sampler.refresh([0, 1], {0, 1})
    assert kernel.opened == [0, 1, 1]
    assert kernel.open_on() == [0, 1]
    sampler.refresh([0])
    assert kernel.open_on() == [0]
    kernel.online.add(2)
    sampler.refresh([0, 2])
    assert kernel.open_on() == [0, 2]
    sampler.close()


def test_failed_refresh_keeps_the_others(kernel: Kernel) -> None:
    """An error at one CPU that came ends nothing on those that were there."""
    sampler = NmiSampler.open(PROGRAM_FD, [0, 1], 47)
    kernel.online |= {2, 3}
    kernel.open_error = errno.EBUSY
    with pytest.raises(SamplerError):
        sampler.refresh([0, 1, 2, 3])
    assert kernel.open_on() == [0, 1]
    kernel.open_error = 0
    sampler.refresh([0, 1, 2, 3])
    assert kernel.open_on() == [0, 1, 2, 3]
    sampler.close()
