"""Who reads whose buffer while CPUs come and go; the kernel's part is played here."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Container, Iterable
from pathlib import Path

import pytest

from stalld import reading as module
from stalld.errors import StalldError
from stalld.reader import Changed, PerfReader
from stalld.reading import Reading, allowed_cpus

LOOP = threading.get_ident()


class Scheduler:
    """Affinities: tasks may run on `active` CPUs only."""

    def __init__(self, active: Iterable[int]) -> None:
        self.active = set(active)
        self.masks: dict[int, set[int]] = {}
        self.asked = 0

    def setaffinity(self, _: int, cpus: Iterable[int]) -> None:
        if not set(cpus) & self.active:
            raise OSError(errno.EINVAL, "none is active")
        self.masks[threading.get_ident()] = set(cpus)

    def getaffinity(self, _: int) -> set[int]:
        self.asked += 1
        return self.masks[threading.get_ident()] & self.active

    @property
    def loop(self) -> set[int]:
        return self.masks[LOOP]

    @property
    def far(self) -> set[int] | None:
        """Where the reader thread may run; None: there is none."""
        for thread in threading.enumerate():
            if thread.name == "stalld-reader":
                return self.masks.get(thread.ident or 0)
        return None


class Buffers(PerfReader):
    """A buffer is an event counter."""

    def __init__(self, online: Iterable[int]) -> None:
        self.lock = threading.RLock()
        self.online = list(online)
        self.dead: set[int] = set()
        self.refused: set[int] = set()
        self.fds: dict[int, int] = {}
        self.read_by: dict[int, int] = {}
        self.error: Exception | None = None
        self.refresh(self.online)

    @property
    def cpus(self) -> tuple[int, ...]:
        return tuple(sorted(self.fds))

    def fd(self, cpu: int) -> int:
        return self.fds[cpu]

    def detached(self, cpus: Iterable[int]) -> frozenset[int]:
        return frozenset(self.dead.intersection(cpus))

    def refresh(self, cpus: Iterable[int], reopen: Container[int] = ()) -> Changed:
        before, wanted = set(self.fds), set(cpus)
        for cpu in before:
            if cpu not in wanted or cpu in reopen:
                os.close(self.fds.pop(cpu))
                self.dead.discard(cpu)
        kept = set(self.fds)
        for cpu in wanted - kept - self.refused:
            self.fds[cpu] = os.eventfd(0, os.EFD_NONBLOCK)
        if self.refused & wanted:
            raise StalldError("refused")
        return Changed(frozenset(set(self.fds) - kept), frozenset(before - set(self.fds)))

    def consume(self, cpus: Iterable[int] | None = None) -> None:
        with self.lock:
            for cpu in self.cpus if cpus is None else cpus:
                try:
                    os.eventfd_read(self.fds[cpu])
                except BlockingIOError:
                    continue
                self.read_by[cpu] = threading.get_ident()
                if self.error:
                    raise self.error

    def close(self) -> None:
        self.refresh(())


class Machine:
    """CPUs, and a `Reading` on them."""

    def __init__(self, scheduler: Scheduler, buffers: Buffers, allowed: Collection[int]) -> None:
        self.scheduler = scheduler
        self.buffers = buffers
        self.errors: list[BaseException] = []
        self.reads = 0
        self.reading = Reading(
            buffers, self._on_read, self.errors.append, allowed=allowed, online=self._online
        )

    def _on_read(self) -> None:
        assert threading.get_ident() == LOOP
        self.reads += 1

    def _online(self) -> list[int]:
        return self.buffers.online

    def set_cpus(self, online: Iterable[int], active: Iterable[int] | None = None) -> None:
        """Only these are there now; what was pinned to others is set free."""
        self.buffers.online = list(online)
        self.scheduler.active = set(self.buffers.online if active is None else active)
        for mask in self.scheduler.masks.values():
            if not mask & self.scheduler.active:
                mask |= self.scheduler.active

    async def readers(self) -> dict[int, str]:
        """Who reads a record of each CPU, once the loop has read what waited at the start."""
        await asyncio.sleep(3 * module.SETTLE_S)
        self.buffers.read_by.clear()
        for fd in self.buffers.fds.values():
            os.eventfd_write(fd, 1)
        await until(lambda: len(self.buffers.read_by) == len(self.buffers.fds))
        return {
            cpu: "loop" if ident == LOOP else "thread"
            for cpu, ident in sorted(self.buffers.read_by.items())
        }


async def until(condition: Callable[[], object]) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SETTLE_S", 0.01)
    monkeypatch.setattr(module, "SETTLED_S", 0.05)


Run = Callable[..., None]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a test's coroutine with a machine; nothing is left of either afterwards."""

    def run(
        test: Callable[[Machine], Awaitable[None]],
        online: Iterable[int],
        allowed: Collection[int] | None = None,
        active: Iterable[int] | None = None,
    ) -> None:
        buffers = Buffers(online)
        scheduler = Scheduler(buffers.online if active is None else active)
        monkeypatch.setattr(os, "sched_setaffinity", scheduler.setaffinity)
        monkeypatch.setattr(os, "sched_getaffinity", scheduler.getaffinity)
        wanted = set(buffers.online if allowed is None else allowed)
        machine = Machine(scheduler, buffers, wanted)

        async def whole() -> None:
            machine.reading.start()
            try:
                await test(machine)
            finally:
                machine.reading.close()

        try:
            asyncio.run(whole())
        finally:
            buffers.close()
        assert scheduler.far is None
        assert scheduler.loop == wanted
        machine.reading.close()

    return run


def test_each_half_reads_the_other(run: Run) -> None:
    """The loop runs on the first half and reads the second, the thread the other way round."""

    async def test(machine: Machine) -> None:
        assert await machine.readers() == {0: "thread", 1: "loop", 2: "thread", 3: "loop"}
        assert machine.scheduler.loop == {0, 2}
        assert machine.scheduler.far == {1, 3}
        assert machine.reads >= 4
        assert machine.errors == []

    run(test, online=range(4))


def test_cpus_of_others_are_read_in_the_loop(run: Run) -> None:
    """Where we may not run, the loop reads; nobody is pinned there."""

    async def test(machine: Machine) -> None:
        assert await machine.readers() == {0: "thread", 1: "loop", 2: "loop", 3: "loop"}
        assert machine.scheduler.loop == {0}
        assert machine.scheduler.far == {3}

    run(test, online=range(4), allowed={0, 3})


def test_one_cpu(run: Run) -> None:
    """One CPU is read from itself, without a thread."""

    async def test(machine: Machine) -> None:
        assert await machine.readers() == {0: "loop"}
        assert machine.scheduler.far is None

    run(test, online=[0])


def test_no_cpu_of_ours(run: Run) -> None:
    """When no CPU is left that we were allowed, all are read from wherever the kernel put us."""

    async def test(machine: Machine) -> None:
        machine.set_cpus([0])
        assert machine.reading.refresh() == Changed(lost=frozenset({1}))
        assert await machine.readers() == {0: "loop"}
        machine.set_cpus([0, 1])
        assert machine.reading.refresh() == Changed(gained=frozenset({1}))
        assert await machine.readers() == {0: "loop", 1: "loop"}
        assert machine.scheduler.loop == {1}

    run(test, online=[0, 1], allowed={1})


def test_one_of_two_goes_and_comes_back(run: Run) -> None:
    """The last CPU of a half goes: the other reads itself. It comes back: they part again."""

    async def test(machine: Machine) -> None:
        for _ in range(3):
            assert await machine.readers() == {0: "thread", 1: "loop"}
            machine.set_cpus([0])
            assert machine.reading.refresh() == Changed(lost=frozenset({1}))
            assert await machine.readers() == {0: "loop"}
            assert machine.scheduler.loop == {0, 1}
            assert machine.scheduler.far is None
            machine.set_cpus([0, 1])
            assert machine.reading.refresh() == Changed(gained=frozenset({1}))
            await until(lambda: machine.scheduler.far == {1})
            assert machine.scheduler.loop == {0}
            assert machine.reading.refresh() == Changed()

    run(test, online=[0, 1])


def test_offline_at_start(run: Run) -> None:
    """A CPU that is allowed and offline at the start is used when it comes."""

    async def test(machine: Machine) -> None:
        assert await machine.readers() == {0: "loop"}
        machine.set_cpus([0, 1])
        assert machine.reading.refresh().gained == {1}
        assert await machine.readers() == {0: "thread", 1: "loop"}

    run(test, online=[0], allowed={0, 1})


def test_online_but_not_yet_active(run: Run) -> None:
    """A CPU on which no task may run yet is read by the others, and used as soon as it may."""

    async def test(machine: Machine) -> None:
        machine.set_cpus([0, 1], active=[0])
        assert machine.reading.refresh().gained == {1}
        assert await machine.readers() == {0: "loop", 1: "loop"}
        machine.set_cpus([0, 1])
        await until(lambda: machine.scheduler.far == {1})
        assert machine.scheduler.loop == {0}
        assert await machine.readers() == {0: "thread", 1: "loop"}

    run(test, online=[0], allowed={0, 1})


def test_gives_up_on_a_cpu_that_is_never_ours(run: Run) -> None:
    """Looking for more CPUs ends after a while: nothing wakes the loop on a quiet host."""

    async def test(machine: Machine) -> None:
        await asyncio.sleep(4 * module.SETTLED_S)
        asked = machine.scheduler.asked
        assert asked > 2
        await asyncio.sleep(4 * module.SETTLED_S)
        assert machine.scheduler.asked == asked

    run(test, online=[0, 1], active=[0])


def test_came_back_between_two_looks(run: Run) -> None:
    """A suspect whose buffer is dead gets a new one; without the suspicion nothing is done."""

    async def test(machine: Machine) -> None:
        machine.buffers.dead = {1}
        assert machine.reading.refresh() == Changed()
        assert machine.reading.refresh({0, 1}) == Changed(gained=frozenset({1}))
        assert machine.reading.refresh({0, 1}) == Changed()
        assert await machine.readers() == {0: "thread", 1: "loop"}

    run(test, online=[0, 1])


def test_what_waits_already_is_read(run: Run) -> None:
    """Records that were written before anybody waited for them are read, and followed up."""

    async def test(machine: Machine) -> None:
        machine.set_cpus(range(4))
        for fd in machine.buffers.fds.values():
            os.eventfd_write(fd, 1)
        machine.reads = 0
        machine.reading.refresh()
        await until(lambda: set(machine.buffers.read_by) == {0, 1} and machine.reads)

    run(test, online=[0, 1], allowed=range(4))


def test_buffer_refused(run: Run) -> None:
    """A buffer that cannot be opened is an error, and all others are read on."""

    async def test(machine: Machine) -> None:
        machine.set_cpus(range(3))
        machine.buffers.refused = {2}
        with pytest.raises(StalldError):
            machine.reading.refresh()
        assert await machine.readers() == {0: "thread", 1: "loop"}
        machine.buffers.refused.clear()
        assert machine.reading.refresh().gained == {2}
        assert await machine.readers() == {0: "thread", 1: "loop", 2: "thread"}

    run(test, online=[0, 1], allowed=range(3))


@pytest.mark.parametrize("cpu", [0, 1])
def test_failure_is_told_in_the_loop(run: Run, cpu: int) -> None:
    """Whatever reading raises, in either thread, arrives in the loop."""

    async def test(machine: Machine) -> None:
        machine.buffers.error = ValueError("bad record")
        os.eventfd_write(machine.buffers.fds[cpu], 1)
        await until(lambda: machine.errors)
        assert machine.errors == [machine.buffers.error]

    run(test, online=[0, 1])


def test_start_under_the_lock(run: Run) -> None:
    """Who starts it under the reader's lock has no record delivered before letting go of that."""

    def start(machine: Machine) -> None:
        with machine.buffers.lock:
            machine.reading.start()
            os.eventfd_write(machine.buffers.fds[0], 1)
            time.sleep(0.05)
            assert machine.buffers.read_by == {}

    async def test(machine: Machine) -> None:
        machine.reading.close()
        start(machine)
        await until(lambda: machine.buffers.read_by)

    run(test, online=[0, 1])


def test_allowed_cpus(tmp_path: Path) -> None:
    """The mask in the status file, which CPUs that are offline are part of."""
    path = tmp_path / "status"
    path.write_text("Name:\tx\nCpus_allowed:\tff\nCpus_allowed_list:\t0-2,7\nMems_allowed:\t1\n")
    assert allowed_cpus(str(path)) == {0, 1, 2, 7}
    path.write_text("Name:\tx\n")
    assert allowed_cpus(str(path)) == os.sched_getaffinity(0)
    assert allowed_cpus() >= os.sched_getaffinity(0)
