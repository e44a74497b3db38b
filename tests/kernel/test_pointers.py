"""Task pointers: learned at once or when ksoftirqd works, believed only while the pid agrees."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from stalld.kthreads import Bucket, Watched, iterate_tasks, ksoftirqd_pids
from stalld.probe.client import load_probes, possible_cpus
from stalld.records import KSOFTIRQD, PF_KTHREAD
from stalld.state import Maps, Waiter
from tests.injector import Injector, Kind, KsoftirqdTruth, Mode, Pressure
from tests.kernel.daemon import STALLED_CPU as CPU
from tests.service.surroundings import started

pytestmark = pytest.mark.kernel

NOBODY = 4_000_000
"""A pid that no ksoftirqd has."""


class Loaded:
    """The real programs, with nobody reading their records."""

    def __init__(self, stack: ExitStack) -> None:
        self.probes = load_probes().result()
        stack.callback(self.probes.close)
        fds = self.probes.fds
        self.maps = Maps(fds["map:cpus"], fds["map:config"], possible_cpus())
        self.watched = Watched(fds["map:watched"], self.maps, ())
        self.link = fds["iter:task"]

    def learn(self) -> dict[int, int]:
        """What the task iterator tells; CPU → pid of each ksoftirqd."""
        return self.watched.learn(iterate_tasks(self.link))

    def ksoftirqd(self, cpu: int = CPU) -> Waiter:
        """What the kernel knows of a CPU's ksoftirqd."""
        waiter: Waiter = self.maps.cpus[cpu].waiters[KSOFTIRQD]
        return waiter

    def bucket(self, pointer: int) -> tuple[Bucket, int]:
        """Where a wake-up of that task is looked up: the bucket, and its place there."""
        return next(
            (bucket, place)
            for bucket in self.watched._buckets
            for place, task in enumerate(bucket.task)
            if task == pointer
        )

    def wake_ksoftirqd(self, until: Callable[[], bool]) -> None:
        """Make the kernel wake ksoftirqd of ``CPU`` until something comes true."""
        with (
            KsoftirqdTruth(CPU) as ksoftirqd,
            Injector(CPU) as injector,
            Pressure(CPU, Mode.BURSTS) as pressure,
        ):
            deadline = time.monotonic() + 20
            while not until():
                assert time.monotonic() < deadline, f"woken {len(ksoftirqd.waits())} times"
                injector.inject(Kind.PREEMPT_OFF, 50, pressure=pressure)


@pytest.fixture
def loaded() -> Iterator[Loaded]:
    """Programs loaded and attached, pointers not learned yet."""
    with ExitStack() as stack:
        yield Loaded(stack)


def test_iterator_and_proc_agree(loaded: Loaded) -> None:
    """The task iterator finds the same ksoftirqd as /proc, each with a kernel address."""
    found = loaded.learn()
    assert found == ksoftirqd_pids()
    assert all(loaded.ksoftirqd(cpu).task >> 63 for cpu in found)
    for cpu, pid in found.items():
        bucket, place = loaded.bucket(loaded.ksoftirqd(cpu).task)
        assert (bucket.pid[place], bucket.cpu[place]) == (pid, cpu)


def test_no_read_of_the_iterator_takes_long(loaded: Loaded) -> None:
    """However many threads there are, some are told now and then, and so a read() ends."""
    threads = 2000
    crowd = f"""
import sys, threading
threading.stack_size(65536)
for _ in range({threads}):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
print(flush=True)
sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with started([sys.executable, "-c", crowd], **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        found = list(iterate_tasks(loaded.link))
    kernel = {task.pid for task in found if task.flags & PF_KTHREAD}
    assert set(ksoftirqd_pids().values()) <= kernel
    told = len(found) - len(kernel)
    assert threads // 256 <= told <= threads // 100


def test_pointer_is_learned_when_ksoftirqd_works(loaded: Loaded) -> None:
    """Where tasks cannot be iterated, a CPU learns its ksoftirqd's pointer from its work."""
    loaded.watched.learn_pids(ksoftirqd_pids())
    assert not loaded.ksoftirqd().task
    loaded.wake_ksoftirqd(lambda: bool(loaded.ksoftirqd().task))
    learned = loaded.ksoftirqd().task
    loaded.watched.learn_pids(ksoftirqd_pids())
    bucket, place = loaded.bucket(learned)
    assert (bucket.pid[place], bucket.cpu[place]) == (loaded.ksoftirqd().pid, CPU)
    loaded.learn()
    assert loaded.ksoftirqd().task == learned


def test_stale_pointer_is_dropped(loaded: Loaded) -> None:
    """A pointer whose task has another pid by now is dropped, counted, and learned anew."""
    loaded.learn()
    pointer, pid = loaded.ksoftirqd().task, loaded.ksoftirqd().pid
    bucket, place = loaded.bucket(pointer)
    bucket.pid[place] = NOBODY
    loaded.wake_ksoftirqd(lambda: loaded.maps.total("stale") > 0)
    assert bucket.task[place] == 0
    assert loaded.ksoftirqd().since_ns == 0
    loaded.learn()
    bucket, place = loaded.bucket(pointer)
    assert (bucket.pid[place], bucket.cpu[place]) == (pid, CPU)
