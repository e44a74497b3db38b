"""Symbols of the running kernel, and BPF programs that appear while we look."""

import ctypes
import errno
import os
import platform
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from stalld.enrich.kallsyms import Kallsyms
from stalld.enrich.ksymbols import Ksymbol, KsymbolError, KsymbolFeed
from stalld.enrich.symbols import SymbolTable

pytestmark = pytest.mark.kernel

_BPF_SYSCALL = {"x86_64": 321, "aarch64": 280}
_PROG_LOAD = 5
_RAW_TRACEPOINT = 17
_RETURN_ZERO = struct.pack("=BBhi", 0xB7, 0, 0, 0) + struct.pack("=BBhi", 0x95, 0, 0, 0)


def load_program(name: str) -> int:
    """Load a program that does nothing and is attached to nothing; its descriptor."""
    number = _BPF_SYSCALL.get(platform.machine())
    if number is None:
        pytest.skip(f"bpf(2) has no known number on {platform.machine()}")
    code = ctypes.create_string_buffer(_RETURN_ZERO)
    licence = ctypes.create_string_buffer(b"GPL")
    attr = struct.pack(
        "=IIQQIIQII16s",
        _RAW_TRACEPOINT,
        len(_RETURN_ZERO) // 8,
        ctypes.addressof(code),
        ctypes.addressof(licence),
        *(0, 0, 0, 0, 0),
        name.encode(),
    )
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.syscall(
        ctypes.c_long(number), ctypes.c_int(_PROG_LOAD), attr, ctypes.c_uint(len(attr))
    )
    if fd < 0:
        if ctypes.get_errno() == errno.EPERM:
            pytest.skip("loading BPF programs is not permitted (CAP_BPF, CAP_PERFMON)")
        raise OSError(ctypes.get_errno(), "BPF_PROG_LOAD")
    return fd


@contextmanager
def program(name: str) -> Iterator[None]:
    """A loaded program, gone at the end."""
    fd = load_program(name)
    try:
        yield
    finally:
        os.close(fd)


@pytest.fixture
def base() -> Kallsyms:
    table = Kallsyms.load()
    if table.hidden:
        pytest.skip("the kernel hides its addresses (CAP_SYSLOG, kernel.kptr_restrict)")
    return table


@pytest.fixture
def feed() -> Iterator[KsymbolFeed]:
    try:
        opened = KsymbolFeed.open(sorted(os.sched_getaffinity(0)))
    except KsymbolError as error:
        pytest.skip(f"the kernel does not announce its symbols: {error}")
    with opened:
        yield opened


def mine(events: tuple[Ksymbol, ...], name: str) -> list[Ksymbol]:
    """Announcements of our program; others load programs too."""
    return [event for event in events if event.name.endswith(f"_{name}".encode())]


def wait_for(feed: KsymbolFeed, name: str, count: int) -> list[Ksymbol]:
    """`count` announcements of `name`: programs are freed some time after the last close."""
    events: list[Ksymbol] = []
    deadline = time.monotonic() + 5
    while len(events) < count and time.monotonic() < deadline:
        drained = feed.drain()
        assert not drained.lost
        events += mine(drained.events, name)
        time.sleep(0.01)
    return events


def test_every_text_address_resolves_to_itself(base: Kallsyms) -> None:
    """Each text symbol the kernel lists is found at its own address, at offset 0."""
    checked = 0
    with open("/proc/kallsyms") as lines:
        for line in lines:
            digits, kind, name = line.split()[:3]
            # Programs of others may go between the two readings; section ends hold no code.
            if (
                kind not in "tTwW"
                or name.startswith(("__pfx_", "__cfi_", "bpf_"))
                or name in ("_etext", "_einittext")
                or int(digits, 16) == 0
            ):
                continue
            symbol = base.resolve(int(digits, 16))
            assert symbol is not None, line
            assert symbol.offset == 0, line
            checked += 1
    assert checked > 10_000


def test_known_function(base: Kallsyms) -> None:
    """A function that every kernel has reads back by its usual name and offset."""
    with open("/proc/kallsyms") as lines:
        address = next(int(line.split()[0], 16) for line in lines if line.split()[2] == "vfs_read")
    assert base.format(address + 0x10) == "vfs_read+0x10"
    assert base.is_core(address)


def test_program_is_announced_and_named_at_once(base: Kallsyms, feed: KsymbolFeed) -> None:
    """A program loaded after the table was read has its exact name and extent, no reload."""
    table = SymbolTable(base, feed)
    with program("stalld_test"):
        # What kallsyms says is the reference; the table itself does not read it again.
        with open("/proc/kallsyms") as lines:
            found = [
                line.split() for line in lines if line.rstrip().endswith("_stalld_test\t[bpf]")
            ]
        if not found:
            pytest.skip("BPF programs are not listed (net.core.bpf_jit_enable, bpf_jit_kallsyms)")
        address, name = int(found[0][0], 16), found[0][2]
        assert table.format(address) == f"{name}+0x0 [bpf]"
        assert table.format(address + 4) == f"{name}+0x4 [bpf]"
        assert table.trimmed((address, address + 4), "tick").frames[1] == f"{name}+0x4 [bpf]"
        assert not table.needs_reload
        assert Kallsyms.load().format(address) == table.format(address)


def test_burst_of_loads_fits_the_ring(feed: KsymbolFeed) -> None:
    """100 programs loaded and unloaded without a drain in between are all seen, in order."""
    for _ in range(100):
        os.close(load_program("stalld_burst"))
    events = wait_for(feed, "stalld_burst", 200)
    assert [e.removed for e in events].count(True) == 100
    assert [e.removed for e in events].count(False) == 100
    assert sorted(events) == events
    assert all(event.bpf and event.length > 0 for event in events)


def test_events_of_several_cpus_are_in_order(feed: KsymbolFeed) -> None:
    """What happened on different CPUs comes out in the order of time, not of CPUs."""
    cpus = os.sched_getaffinity(0)
    if len(cpus) < 2:
        pytest.skip("one CPU only")
    fds = []
    try:
        for nth in range(8):
            os.sched_setaffinity(0, {sorted(cpus)[nth % 2]})
            fds.append(load_program(f"stalld_cpu_{nth}"))
    finally:
        os.sched_setaffinity(0, cpus)
        for fd in fds:
            os.close(fd)
    names = [e.name for e in feed.drain().events if b"_stalld_cpu_" in e.name and not e.removed]
    assert [int(name[-1:]) for name in names] == list(range(8))


def test_ring_goes_round() -> None:
    """Records that lie across the end of a ring are read whole: a small ring loses none."""
    try:
        feed = KsymbolFeed.open(sorted(os.sched_getaffinity(0)), ring_bytes=1)
    except KsymbolError as error:
        pytest.skip(f"the kernel does not announce its symbols: {error}")
    rounds = 4 * max(os.sysconf("SC_PAGESIZE"), 4096) // 64
    seen: list[int] = []
    with feed:
        for nth in range(rounds):
            os.close(load_program(f"stalld_r{nth}"))
            if nth % 8 == 7:
                drained = feed.drain()
                assert not drained.lost
                seen += [
                    int(event.name.rpartition(b"_r")[2])
                    for event in drained.events
                    if b"_stalld_r" in event.name and not event.removed
                ]
    assert seen == list(range(rounds))


def test_overflow_is_never_silent() -> None:
    """A ring that was too small says so, at the first drain after it was full."""
    try:
        feed = KsymbolFeed.open(sorted(os.sched_getaffinity(0)), ring_bytes=1)
    except KsymbolError as error:
        pytest.skip(f"the kernel does not announce its symbols: {error}")
    cpus = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cpus)})
        with feed:
            for _ in range(os.sysconf("SC_PAGESIZE") // 64):
                os.close(load_program("stalld_flood"))
            assert feed.drain().lost
    finally:
        os.sched_setaffinity(0, cpus)


def test_nothing_is_left_open(feed: KsymbolFeed) -> None:
    """Closing gives every descriptor back."""
    fds = feed.fds
    assert fds
    feed.close()
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
