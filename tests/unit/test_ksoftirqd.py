"""The witness of ksoftirqd: from its log to its waits."""

from __future__ import annotations

import pytest

from tests.injector.ksoftirqd import Entry, Wait, What, waits

MS = 1_000_000
W, G, L, P = What.WOKEN, What.GOT_CPU, What.LEFT_CPU, What.PREEMPTED

LOGS = {
    "woken, then run": ([(1, W), (4, G)], [(1, 4)]),
    "preempted": ([(1, G), (2, P), (9, G)], [(2, 9)]),
    "not yet run": ([(1, W)], [(1, None)]),
    "asleep between": ([(1, W), (2, G), (3, L), (7, W), (9, G)], [(1, 2), (7, 9)]),
    "woken while it runs": ([(1, G), (2, W), (3, L)], []),
    "preempted on its way to sleep: work comes with the wake-up": (
        [(1, G), (2, P), (6, W), (9, G)],
        [(6, 9)],
    ),
}


@pytest.mark.parametrize(("log", "expected"), LOGS.values(), ids=LOGS.keys())
def test_waits(log: list[tuple[int, What]], expected: list[tuple[int, int | None]]) -> None:
    """A wait goes from where there is work to where the CPU is had."""
    found = waits(Entry(time, what, 0, "") for time, what in log)
    assert [(wait.woken_ns, wait.ran_ns) for wait in found] == expected


@pytest.mark.parametrize(
    ("start_ms", "end_ms", "overlap_ms"), [(0, 9, 4), (6, 20, 2), (6, 7, 1), (8, 9, 0), (0, 4, 0)]
)
def test_overlap(start_ms: int, end_ms: int, overlap_ms: int) -> None:
    """A wait from 4 to 8 ms takes that much of a time, and half of it is enough to lie in it."""
    wait = Wait(4 * MS, 8 * MS, 0, "")
    assert wait.overlap_ms(start_ms * MS, end_ms * MS) == overlap_ms
    assert wait.lies_in(start_ms * MS, end_ms * MS) is (overlap_ms >= 2)


def test_what_lasts_lies_nowhere() -> None:
    """How long it takes is not known yet."""
    lasting = Wait(4 * MS, None, 0, "")
    assert lasting.overlap_ms(0, 9 * MS) == 0
    assert not lasting.lies_in(0, 9 * MS)
