"""The shared maps without a kernel, and who is ksoftirqd."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from stalld.records import PF_KTHREAD, TaskEntry
from stalld.state import CpuState, Maps, ksoftirqd_cpu, ksoftirqd_pids
from tests.unit.make import MS, waits


@pytest.fixture
def maps() -> Iterator[Maps]:
    """Four CPUs, in memory of our own instead of a map's."""
    fds = [os.memfd_create(name) for name in ("cpus", "config")]
    for fd in fds:
        os.ftruncate(fd, mmap.PAGESIZE)
    yield Maps(fds[0], fds[1], 4)
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize(
    ("comm", "cpu"),
    [
        (b"ksoftirqd/0", 0),
        (b"ksoftirqd/1023", 1023),
        (b"ksoftirqd/", None),
        (b"ksoftirqd/0 ", None),
        (b"ksoftirqd/0\n", None),
        (b"ksoftirqd/-1", None),
        (b"ksoftirqd/0x1", None),
        (b"xksoftirqd/0", None),
        (b"ksoftirqd/\xd9\xa1", None),
        (b"ktimers/0", None),
        (b"", None),
    ],
)
def test_ksoftirqd_cpu(comm: bytes, cpu: int | None) -> None:
    """The number behind the exact name, in plain digits."""
    assert ksoftirqd_cpu(comm) == cpu


def process(proc: Path, pid: int, comm: str, flags: int) -> None:
    """One entry of a made-up /proc."""
    (proc / str(pid)).mkdir()
    (proc / str(pid) / "stat").write_text(f"{pid} ({comm}) S 2 0 0 0 -1 {flags} 0 0 20 0 1\n")


def test_ksoftirqd_pids(tmp_path: Path) -> None:
    """Kernel threads of that name, and no process that only calls itself so."""
    process(tmp_path, 16, "ksoftirqd/0", PF_KTHREAD | 0x4000040)
    process(tmp_path, 24, "ksoftirqd/1", PF_KTHREAD)
    process(tmp_path, 900, "ksoftirqd/0", 0x400000)
    process(tmp_path, 901, "ksoftirqd/3", 0x400000)
    process(tmp_path, 902, "x (ksoftirqd/4", PF_KTHREAD)
    process(tmp_path, 903, "ksoftirqd/5) S 2 0 0 0 -1 2097152 (x", 0)
    process(tmp_path, 904, "a) (ksoftirqd/6", 0)
    process(tmp_path, 17, "migration/0", PF_KTHREAD)
    (tmp_path / "905").mkdir()  # It ended meanwhile.
    (tmp_path / "906").mkdir()
    (tmp_path / "906" / "stat").write_text("")
    (tmp_path / "self").mkdir()
    (tmp_path / "version").write_text("Linux\n")
    assert ksoftirqd_pids(str(tmp_path)) == {0: 16, 1: 24}


def test_ksoftirqd_pids_of_this_host() -> None:
    """The real /proc: at most one for each CPU, each a thread of that name."""
    for cpu, pid in ksoftirqd_pids().items():
        assert Path(f"/proc/{pid}/comm").read_text() == f"ksoftirqd/{cpu}\n"


def test_learn_ksoftirqd(maps: Maps) -> None:
    """Each CPU gets its own thread's pointer and pid; the rest is passed over."""
    tasks = [
        TaskEntry(0xFFFF0001, 16, PF_KTHREAD, b"ksoftirqd/0"),
        TaskEntry(0xFFFF0002, 17, PF_KTHREAD, b"migration/0"),
        TaskEntry(0xFFFF0003, 24, PF_KTHREAD, b"ksoftirqd/3"),
        TaskEntry(0xFFFF0004, 99, PF_KTHREAD, b"ksoftirqd/4"),  # No such CPU.
    ]
    assert maps.learn_ksoftirqd(iter(tasks)) == {0: 16, 3: 24}
    known = [(state.ksoftirqd, state.ksoftirqd_pid) for state in maps.cpus]
    assert known == [(0xFFFF0001, 16), (0, 0), (0, 0), (0xFFFF0003, 24)]


def test_a_restarted_ksoftirqd(maps: Maps) -> None:
    """A new thread for a CPU replaces the old one."""
    maps.learn_ksoftirqd(iter([TaskEntry(0xFFFF0001, 16, PF_KTHREAD, b"ksoftirqd/1")]))
    maps.learn_ksoftirqd(iter([TaskEntry(0xFFFF0001, 50, PF_KTHREAD, b"ksoftirqd/1")]))
    assert (maps.cpus[1].ksoftirqd, maps.cpus[1].ksoftirqd_pid) == (0xFFFF0001, 50)


def test_learn_by_pid(maps: Maps) -> None:
    """Only a changed pid makes the kernel learn the pointer again."""
    maps.learn_ksoftirqd_pids({0: 16, 1: 24, 9: 99})
    maps.cpus[0].ksoftirqd, maps.cpus[1].ksoftirqd = 0xFFFF0001, 0xFFFF0002
    maps.learn_ksoftirqd_pids({0: 16, 1: 51})
    known = [(state.ksoftirqd, state.ksoftirqd_pid) for state in maps.cpus]
    assert known == [(0xFFFF0001, 16), (0, 51), (0, 0), (0, 0)]


def test_watch_and_stop(maps: Maps) -> None:
    """The settings arrive; stopping is a threshold of 0 and leaves the rest."""
    maps.watch(10 * MS, 4 * MS, 0b1011, 16)
    config = maps.config
    assert (config.threshold_ns, config.tick_ns) == (10 * MS, 4 * MS)
    assert (config.vec_mask, config.max_samples) == (0b1011, 16)
    maps.stop()
    assert (config.threshold_ns, config.tick_ns) == (0, 4 * MS)


def test_stall_of_one_cpu(maps: Maps) -> None:
    """The state of the CPU asked for, as plain values."""
    state = maps.cpus[2]
    state.seq, state.active, state.ended_ns, state.ksoftirqd_waited_ns = 7, 1, 99, 12
    state.waited_ns[3] = 11
    assert maps.stall(2) == (7, True, 99, waits(NET_RX=11), 12)
    assert maps.stall(1) == (0, False, 0, waits(), 0)


def test_total(maps: Maps) -> None:
    """Counters are summed over all CPUs, beyond 32 bits."""
    for state in maps.cpus:
        state.lost = 0xFFFFFFFF
    assert maps.total("lost") == 4 * 0xFFFFFFFF


@pytest.mark.parametrize(
    ("inline", "deferred", "answer"),
    [
        (0, 0, None),
        (2, 0, None),
        (3, 0, True),
        (3, 1, True),
        (0, 1, None),
        (0, 2, False),
        (2, 2, None),
        (5, 6, False),
        (6, 6, True),
    ],
)
def test_serves_inline(maps: Maps, inline: int, deferred: int, answer: bool | None) -> None:
    """Learned by what was seen more often, and only from more than a stray event."""
    maps.cpus[0].inline_served, maps.cpus[3].deferred = inline, deferred
    assert maps.serves_inline() is answer


def test_states_of_many_cpus_are_apart(maps: Maps) -> None:
    """Writing one CPU's state leaves its neighbours'."""
    ctypes.memset(ctypes.addressof(maps.cpus[1]), 0xFF, ctypes.sizeof(CpuState))
    assert bytes(maps.cpus[0]) == bytes(maps.cpus[2]) == bytes(ctypes.sizeof(CpuState))
