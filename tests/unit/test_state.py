"""The shared maps without a kernel: settings, states of stalls, counters."""

from __future__ import annotations

import ctypes

import pytest

from stalld.records import BRIEF_BIT
from stalld.state import TIMED_ALWAYS, CpuState, Maps
from tests.unit import make
from tests.unit.make import MS, waiters, waits


@pytest.fixture
def maps() -> Maps:
    """Four CPUs."""
    return make.maps(4)


def test_watch_and_stop(maps: Maps) -> None:
    """The settings arrive; stopping is a threshold of 0 and leaves the rest."""
    maps.watch(10 * MS, tick_ns=4 * MS, vec_mask=0b1011, max_samples=16)
    config = maps.config
    assert (config.threshold_ns, config.tick_ns) == (10 * MS, 4 * MS)
    assert (config.vec_mask, config.max_samples) == (0b1011, 16)
    maps.stop()
    assert (config.threshold_ns, config.tick_ns) == (0, 4 * MS)


def test_every_setting(maps: Maps) -> None:
    """Arrays and negative places are settings too."""
    maps.watch(MS, tick_function=[1 << 63, 7], steal_offset=-4096, lookback=True, max_stalls=20)
    config = maps.config
    assert (list(config.tick_function), config.steal_offset) == ([1 << 63, 7], -4096)
    assert (config.lookback, config.max_stalls) == (1, 20)


def test_each_cpu_knows_the_settings(maps: Maps) -> None:
    """What the hot path needs lies with each CPU; vectors that no kernel defers are timed too."""
    maps.watch(10 * MS, vec_mask=0b1000, tick_ns=6 * MS)
    for state in maps.cpus:
        assert (state.threshold_ns, state.vec_mask) == (10 * MS, 0b1000)
        assert state.timed_mask == 0b1000 | TIMED_ALWAYS == 0b1001001


def test_short_thresholds_are_timed_exactly(maps: Maps) -> None:
    """Only where less than a tick is brief may an entry take the time of its raise."""
    for tick_ns, brief in ((5 * MS, 1), (5 * MS + 1, 0), (1 * MS, 1)):
        maps.watch(10 * MS, vec_mask=0, tick_ns=tick_ns)
        assert {state.timed_mask >> BRIEF_BIT for state in maps.cpus} == {brief}


def test_stall_of_one_cpu(maps: Maps) -> None:
    """The state of the CPU asked for, as plain values."""
    state = maps.cpus[2]
    state.seq, state.active, state.ended_ns = 7, 1, 99
    state.waited_ns[3] = 11
    state.waiters[0].waited_ns, state.waiters[0].waited_pid = 12, 16
    state.waiters[4].waited_ns, state.waiters[4].waited_pid = 13, 40
    state.waiters[5].pid = 50  # has not waited
    assert maps.stall(2) == (
        7,
        True,
        99,
        waits(NET_RX=11),
        waiters(12, 0, 0, 0, 13),
        waiters(16, 0, 0, 0, 40),
    )
    assert maps.stall(1) == (0, False, 0, waits(), waiters(), waiters())


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
