"""Task pointers: learned at once or at the first wake-up, believed only while the pid agrees."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from stalld.probe.client import load_probes, possible_cpus
from stalld.state import Maps, iterate_tasks, ksoftirqd_pids
from tests.injector import Injector, Kind, KsoftirqdTruth, Mode, Pressure
from tests.kernel.daemon import STALLED_CPU as CPU

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
        self.link = fds["iter:task"]

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
    found = loaded.maps.learn_ksoftirqd(iterate_tasks(loaded.link))
    assert found == ksoftirqd_pids()
    assert all(loaded.maps.cpus[cpu].ksoftirqd >> 63 for cpu in found)


def test_pointer_is_learned_at_the_first_wakeup(loaded: Loaded) -> None:
    """Where tasks cannot be iterated, a CPU learns its ksoftirqd's pointer when that is woken."""
    loaded.maps.learn_ksoftirqd_pids(ksoftirqd_pids())
    state = loaded.maps.cpus[CPU]
    loaded.wake_ksoftirqd(lambda: bool(state.ksoftirqd))
    learned = state.ksoftirqd
    loaded.maps.learn_ksoftirqd(iterate_tasks(loaded.link))
    assert state.ksoftirqd == learned


def test_stale_pointer_is_dropped(loaded: Loaded) -> None:
    """A pointer whose task has another pid by now is dropped, counted, and learned anew."""
    loaded.maps.learn_ksoftirqd(iterate_tasks(loaded.link))
    state = loaded.maps.cpus[CPU]
    pointer, pid = state.ksoftirqd, state.ksoftirqd_pid
    state.ksoftirqd_pid = NOBODY
    loaded.wake_ksoftirqd(lambda: state.stale > 0)
    assert state.ksoftirqd == 0
    assert state.ksoftirqd_since == 0
    loaded.maps.learn_ksoftirqd(iterate_tasks(loaded.link))
    assert (state.ksoftirqd, state.ksoftirqd_pid) == (pointer, pid)
