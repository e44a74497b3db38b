"""Which kernel threads are watched, and where the kernel finds them."""

from __future__ import annotations

import ctypes
from itertools import count, islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stalld.kthreads import Bucket, Watched, ksoftirqd_cpu, ksoftirqd_pids
from stalld.records import (
    BUCKET_TASKS,
    CPU_ANY,
    KSOFTIRQD,
    PF_KTHREAD,
    PF_NO_SETAFFINITY,
    TaskEntry,
    watched_bits,
    watched_bucket,
)
from tests.unit import make

CPUS = 4
BITS = watched_bits(CPUS)
BOUND = PF_KTHREAD | PF_NO_SETAFFINITY
POINTER = 0xFFFF888100D40000


class Kernel:
    """The maps as the programs see them, and the daemon's side of them."""

    def __init__(self, *patterns: str) -> None:
        self.maps = make.maps(CPUS)
        with make.memory(ctypes.sizeof(Bucket) << BITS) as fd:
            self.watched = Watched(fd, self.maps, patterns)

    def find(self, pointer: int) -> tuple[int, int] | None:
        """Pid and CPU of a task that wakes up, looked up as ``handle_sched_wakeup`` does."""
        bucket = self.watched._buckets[watched_bucket(pointer, BITS)]
        if pointer not in list(bucket.task):
            return None
        place = list(bucket.task).index(pointer)
        return bucket.pid[place], bucket.cpu[place]

    def pointers(self) -> list[int]:
        """All that are watched."""
        return sorted(task for bucket in self.watched._buckets for task in bucket.task if task)

    def ksoftirqd(self) -> list[tuple[int, int]]:
        """Pointer and pid that each CPU knows as its own."""
        waiters = [state.waiters[KSOFTIRQD] for state in self.maps.cpus]
        return [(waiter.task, waiter.pid) for waiter in waiters]


def thread(nr: int, comm: bytes, cpu: int = 0, allowed: int = 1, flags: int = BOUND) -> TaskEntry:
    """A kernel thread with a pointer and pid of its own."""
    return TaskEntry(POINTER + nr * 0x1980, 1000 + nr, flags, allowed, cpu, comm)


def ksoftirqd(cpu: int, nr: int = 0) -> TaskEntry:
    """Of one CPU."""
    return thread(nr or cpu, b"ksoftirqd/%d" % cpu, cpu)


def one_bucket() -> list[int]:
    """More task pointers of one bucket than it has room for."""
    wanted = watched_bucket(POINTER, BITS)
    pointers = (POINTER + n * 0x1980 for n in count())
    return list(islice((p for p in pointers if watched_bucket(p, BITS) == wanted), 7))


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


def test_processes_are_not_watched() -> None:
    """The iterator tells a few of them too, whatever they call themselves."""
    kernel = Kernel("napi/*")
    true = ksoftirqd(1)
    liars = [thread(5, b"ksoftirqd/0", flags=0x400000), thread(6, b"napi/eth0-1", flags=0x400000)]
    assert kernel.watched.learn([true, *liars]) == {1: true.pid}
    assert kernel.pointers() == [true.task]
    assert kernel.watched.names == {true.pid: true.comm}


def test_patterns() -> None:
    """Threads that match one of the patterns are watched, by pointer and pid; others are not."""
    kernel = Kernel("napi/*", "irq/*-nvme*")
    napi, nvme = thread(1, b"napi/eth0-8193", allowed=4), thread(2, b"irq/30-nvme0q1")
    others = [thread(3, b"irq/9-acpi"), thread(4, b"kswapd0"), thread(5, b"xnapi/eth0-1")]
    assert kernel.watched.learn([napi, *others, nvme]) == {}
    assert kernel.pointers() == sorted([napi.task, nvme.task])
    assert kernel.watched.names == {napi.pid: napi.comm, nvme.pid: nvme.comm}
    assert kernel.watched.left_out == 0
    assert kernel.find(nvme.task) == (nvme.pid, 0)


def test_names_that_are_no_text() -> None:
    """A name is matched whatever bytes it has, upper and lower case told apart."""
    kernel = Kernel("irq/*")
    strange = thread(1, b"irq/7-\xff\xfe")
    kernel.watched.learn([strange, thread(2, b"IRQ/7-x")])
    assert kernel.watched.names == {strange.pid: strange.comm}


def test_ksoftirqd_is_always_watched() -> None:
    """Each CPU gets its own thread's pointer and pid, without any pattern."""
    kernel = Kernel()
    tasks = [ksoftirqd(0), ksoftirqd(3), thread(9, b"migration/0"), ksoftirqd(CPUS)]
    assert kernel.watched.learn(iter(tasks)) == {0: 1000, 3: 1003}  # There is no CPU 4.
    assert kernel.ksoftirqd() == [tasks[0][:2], (0, 0), (0, 0), tasks[1][:2]]
    assert kernel.find(tasks[1].task) == (1003, 3)
    assert kernel.pointers() == sorted(task.task for task in tasks[:2])


def test_ksoftirqd_of_an_offline_cpu() -> None:
    """It belongs to the CPU in its name, wherever it is parked."""
    kernel = Kernel()
    parked = ksoftirqd(2)._replace(cpu=0)
    kernel.watched.learn([parked])
    assert kernel.find(parked.task) == (parked.pid, 2)


def test_a_restarted_ksoftirqd() -> None:
    """A new thread for a CPU replaces the old one, also at the same address."""
    kernel = Kernel()
    old = ksoftirqd(1)
    for new in (ksoftirqd(1, nr=7), old, old._replace(pid=50)):
        kernel.watched.learn([new])
        assert kernel.ksoftirqd()[1] == (new.task, new.pid)
        assert kernel.pointers() == [new.task]
        assert kernel.find(new.task) == (new.pid, 1)
        assert kernel.watched.names == {new.pid: b"ksoftirqd/1"}


def test_its_wait_is_kept() -> None:
    """Learning again what is known disturbs no wait that goes on."""
    kernel = Kernel()
    kernel.watched.learn([ksoftirqd(1)])
    kernel.maps.cpus[1].waiters[KSOFTIRQD].since_ns = 99
    kernel.watched.learn([ksoftirqd(1)])
    assert kernel.maps.cpus[1].waiters[KSOFTIRQD].since_ns == 99


def test_threads_that_are_gone() -> None:
    """A thread that ended is watched no more, and its name is forgotten."""
    kernel = Kernel("irq/*")
    stays, gone = thread(1, b"irq/1-a"), thread(2, b"irq/2-b")
    kernel.watched.learn([stays, gone])
    kernel.watched.learn([stays])
    assert (kernel.pointers(), kernel.find(gone.task)) == ([stays.task], None)
    assert kernel.watched.names == {stays.pid: stays.comm}


def test_a_pointer_with_another_pid() -> None:
    """Memory of a thread that ended may be another's: the new one's pid counts."""
    kernel = Kernel("irq/*")
    old = thread(1, b"irq/1-a")
    kernel.watched.learn([old])
    new = old._replace(pid=77, comm=b"irq/2-b")
    kernel.watched.learn([new])
    assert kernel.find(new.task) == (77, 0)
    assert kernel.pointers() == [new.task]


def test_a_pointer_that_the_kernel_dropped() -> None:
    """A pointer found to be stale in the kernel is watched again if the thread is there."""
    kernel = Kernel("irq/*")
    task = thread(1, b"irq/1-a")
    kernel.watched.learn([task])
    bucket = kernel.watched._buckets[watched_bucket(task.task, BITS)]
    bucket.task[list(bucket.task).index(task.task)] = 0
    kernel.watched.learn([task])
    assert kernel.find(task.task) == (task.pid, 0)


@pytest.mark.parametrize(
    ("allowed", "flags", "cpu"),
    [
        (1, BOUND, 2),
        (1, PF_KTHREAD, CPU_ANY),  # anybody may move it
        (2, BOUND, CPU_ANY),
        (2, PF_KTHREAD, CPU_ANY),
    ],
)
def test_threads_that_may_move(allowed: int, flags: int, cpu: int) -> None:
    """Only of a thread that stays on its CPU for good the kernel need not ask where it is."""
    kernel = Kernel("*")
    task = thread(1, b"any", 2, allowed, flags)
    kernel.watched.learn([task])
    assert kernel.find(task.task) == (task.pid, cpu)


def test_a_thread_that_moved() -> None:
    """A thread that is bound, unbound or bound elsewhere later is looked for there."""
    kernel = Kernel("kworker/*")
    task = thread(1, b"kworker/1:0", 1)
    for cpu, allowed, known in ((1, 1, 1), (0, 4, CPU_ANY), (3, 1, 3)):
        kernel.watched.learn([task._replace(cpu=cpu, cpus_allowed=allowed)])
        assert kernel.find(task.task) == (task.pid, known)


def test_a_full_bucket() -> None:
    """Threads beyond a bucket's room are counted, those that have a place keep it."""
    kernel = Kernel("*")
    tasks = [thread(n, b"t")._replace(task=pointer) for n, pointer in enumerate(one_bucket())]
    kernel.watched.learn(tasks)
    placed = sorted(task.task for task in tasks[:BUCKET_TASKS])
    assert kernel.pointers() == placed
    assert kernel.watched.left_out == len(tasks) - BUCKET_TASKS
    kernel.watched.learn(reversed(tasks))
    assert kernel.pointers() == placed
    kernel.watched.learn(tasks[2:6])
    assert kernel.pointers() == sorted(task.task for task in tasks[2:6])
    assert kernel.watched.left_out == 0


TASKS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 5)).map(
        lambda made: thread(made[0], b"irq/%d" % made[0])._replace(pid=made[1])
    ),
    unique_by=(lambda task: task.task, lambda task: task.pid),
)


@given(st.lists(TASKS, max_size=6))
def test_any_history(looks: list[list[TaskEntry]]) -> None:
    """Whatever was learned before, exactly the threads of the last look are watched."""
    kernel = Kernel("irq/*")
    for tasks in looks:
        kernel.watched.learn(tasks)
        assert kernel.pointers() == sorted(task.task for task in tasks)
        assert all(kernel.find(task.task) == (task.pid, 0) for task in tasks)
        assert kernel.watched.names == {task.pid: task.comm for task in tasks}


class TestPids:
    """Where tasks cannot be iterated."""

    def test_nothing_is_watched_before_the_kernel_knows_the_pointer(self) -> None:
        """The pids are told, and no wake-up can be recognised yet."""
        kernel = Kernel("*")
        kernel.watched.learn_pids({0: 16, 1: 24, CPUS: 99})  # There is no CPU 4.
        assert kernel.ksoftirqd() == [(0, 16), (0, 24), (0, 0), (0, 0)]
        assert kernel.pointers() == []

    def test_what_the_kernel_learned_is_watched(self) -> None:
        """A pointer that came in between is watched from the next call on."""
        kernel = Kernel()
        kernel.watched.learn_pids({0: 16, 1: 24})
        kernel.maps.cpus[1].waiters[KSOFTIRQD].task = POINTER
        kernel.watched.learn_pids({0: 16, 1: 24})
        assert kernel.find(POINTER) == (24, 1)
        assert kernel.ksoftirqd() == [(0, 16), (POINTER, 24), (0, 0), (0, 0)]
        assert kernel.watched.names == {24: b"ksoftirqd/1"}

    def test_another_pid(self) -> None:
        """A new thread makes the kernel learn the pointer again; the old one is dropped."""
        kernel = Kernel()
        kernel.watched.learn_pids({0: 16, 1: 24})
        kernel.maps.cpus[0].waiters[KSOFTIRQD].task = POINTER
        kernel.maps.cpus[1].waiters[KSOFTIRQD].task = POINTER + 0x1980
        kernel.watched.learn_pids({0: 16, 1: 24})
        kernel.watched.learn_pids({0: 16, 1: 51})
        assert kernel.ksoftirqd()[:2] == [(POINTER, 16), (0, 51)]
        assert kernel.pointers() == [POINTER]
