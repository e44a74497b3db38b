"""What ran before a stall: which ticks, and when they are looked at."""

from __future__ import annotations

from collections.abc import Sequence

from stalld.records import TickSample
from stalld.track.lookback import Lookback
from stalld.track.model import Tick
from tests.unit.make import MS, T0, MadeHost, tick


def lookback(ticks: Sequence[TickSample], reach_ms: int) -> Lookback:
    """Of a stall that began at T0."""
    return Lookback(lambda: ticks, T0, MadeHost().explain, reach_ms * MS)


def test_the_newest_ticks_before() -> None:
    """Of all the ticks kept, the last 64 before the stall are told."""
    found = lookback([tick(4 * nr) for nr in range(-128, 3)], 1000)
    assert [each.sample for each in found] == [tick(4 * nr) for nr in range(-63, 1)]


def test_its_begin_and_end() -> None:
    """Ticks up to the begin, from as long ago as asked for, oldest first, with their stacks."""
    ticks = [tick(-101), tick(-100), tick(-1, stack=()), tick(0), tick(1)]
    found = lookback(ticks, 100)
    assert [each.sample for each in found] == [tick(-100), tick(-1, stack=()), tick(0)]
    assert [each.mode for each in found] == ["kernel", "user", "kernel"]


def test_it_waits_to_be_asked() -> None:
    """What nobody reads is neither copied nor named; what is read twice is so once."""
    asked: list[str | TickSample] = []

    def ticks() -> list[TickSample]:
        asked.append("ticks")
        return [tick(-8), tick(-4)]

    def explain(sample: TickSample) -> Tick:
        asked.append(sample)
        return Tick(sample, "kernel", ())

    found = Lookback(ticks, T0, explain, 100 * MS)
    assert asked == []
    assert len(found) == 2
    assert [each.sample for each in found[1:]] == [tick(-4)] == [found[-1].sample]
    assert asked == ["ticks", tick(-8), tick(-4)]
