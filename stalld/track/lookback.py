"""What ran before a stall."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import overload

from stalld.records import LOOKBACK_SAMPLES, TickSample
from stalld.track.model import Tick


class Lookback(Sequence[Tick]):
    """What ran in the ``reach_ns`` before a stall, oldest first: the last 64 ticks.

    Looked up when it is first asked for: of a storm most stalls are folded and never are.

    Args:
        ticks: the CPU's last ones, oldest first, those since then among them.
        started_ns: when the stall began.
        explain: names the stack of one.
    """

    def __init__(
        self,
        ticks: Callable[[], Sequence[TickSample]],
        started_ns: int,
        explain: Callable[[TickSample], Tick],
        reach_ns: int,
    ) -> None:
        self._look = ticks
        self.started_ns = started_ns
        self._explain = explain
        self._reach_ns = reach_ns

    @cached_property
    def _ticks(self) -> tuple[Tick, ...]:
        ticks = self._look()
        end = bisect_right(ticks, self.started_ns, key=time_ns)
        first = bisect_left(ticks, self.started_ns - self._reach_ns, hi=end, key=time_ns)
        first = max(first, end - LOOKBACK_SAMPLES)
        return tuple([self._explain(tick) for tick in ticks[first:end]])

    def __len__(self) -> int:
        return len(self._ticks)

    @overload
    def __getitem__(self, index: int) -> Tick: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Tick, ...]: ...
    def __getitem__(self, index: int | slice) -> Tick | tuple[Tick, ...]:
        return self._ticks[index]


def time_ns(tick: TickSample) -> int:
    """When it was; to search ticks, which are in order."""
    return tick.time_ns
