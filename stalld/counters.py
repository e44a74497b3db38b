"""What the kernel counted since the last look: records it lost, stalls it kept to itself."""

from __future__ import annotations

from typing import NamedTuple

from stalld.state import CpuState, Maps

_U32 = 0xFFFFFFFF


class Muted(NamedTuple):
    """Stalls of one CPU beyond its limit, all of them between two looks."""

    cpu: int
    stalls: int
    total_ns: int
    since_ns: int
    until_ns: int


class Counters:
    """Remembers what it was told last. Times are CLOCK_MONOTONIC in ns."""

    def __init__(self, maps: Maps, now_ns: int) -> None:
        self._maps = maps
        self._lost: dict[int, int] = {}
        self._muted: dict[int, tuple[int, int]] = {}
        self._looked_ns = now_ns

    def lost(self) -> list[tuple[int, int]]:
        """CPU and number of the records that the perf buffers had no room for."""
        found = []
        for cpu, state in enumerate(self._maps.cpus):
            # Read once: the kernel goes on counting.
            lost = int(state.lost)
            count = (lost - self._lost.get(cpu, 0)) & _U32
            if count:
                self._lost[cpu] = lost
                found.append((cpu, count))
        return found

    def muted(self, now_ns: int) -> list[Muted]:
        """The stalls that were only counted."""
        found = []
        for cpu, state in enumerate(self._maps.cpus):
            told = self._muted.get(cpu, (0, 0))
            # The sum first: what ends in between is told in whole the next time.
            total_ns, stalls = int(state.suppressed_ns), int(state.suppressed)
            count = (stalls - told[0]) & _U32
            if count:
                found.append(
                    Muted(cpu, count, total_ns - told[1], self._looked_ns, _end(state, now_ns))
                )
                self._muted[cpu] = (stalls, total_ns)
        self._looked_ns = now_ns
        return found


def _end(state: CpuState, now_ns: int) -> int:
    return min(int(state.ended_ns), now_ns)
