"""Which events a client of the live socket wants. Pure.

An event passes if it satisfies every filter that was given; of the values of one filter, one is
enough. An event that lacks what a filter asks for does not pass it.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from stalld.track.verdict import Verdict

EVENTS = (
    *("started", "stopped", "stall", "records_lost", "suppressed"),
    *("softnet", "nic", "cfs_throttled", "task_blocked", "degraded"),
)
"""Contract values of ``event``."""
VERDICTS = tuple(verdict.value for verdict in Verdict)
MAX_PATTERNS = 16
MAX_PATTERN = 64
MAX_CPU = 65_535


class Facts(NamedTuple):
    """What filters look at, of one event. ``ms`` None, ``cpus`` empty and so on: it has none.

    ``ms`` is how long a stall took (so far), or the longest of those that a ``suppressed`` event
    counts. Where the kernel only counted them it is what they took in all: one of them may have
    been that long.
    """

    event: str
    ms: float | None
    cpus: tuple[int, ...]
    comm: str | None
    verdict: str | None

    @classmethod
    def of(cls, event: Mapping[str, Any]) -> Self:
        """Of an event as the contract has it."""
        kind = event["event"]
        ms = None
        if kind == "stall":
            ms = event.get("duration_ms")
        elif kind == "suppressed":
            longest = event.get("longest_ms")
            ms = event.get("total_ms") if longest is None else longest
        cpu, cpus = event.get("cpu"), event.get("cpus")
        if isinstance(cpu, int):
            cpus = (cpu,)
        elif not isinstance(cpus, list | tuple):  # `started` has their number there.
            cpus = ()
        blocker = event.get("blocker")
        return cls(
            kind, ms, tuple(cpus), blocker.get("comm") if blocker else None, event.get("verdict")
        )


@dataclass(frozen=True)
class Filter:
    """What a client asked for; empty or None: all."""

    min_ms: float | None = None
    cpus: frozenset[int] = frozenset()
    comms: tuple[re.Pattern[str], ...] = ()
    verdicts: frozenset[str] = frozenset()
    events: frozenset[str] = frozenset()

    @classmethod
    def from_request(cls, request: Mapping[str, Any]) -> Self:
        """The filter that a request spells out: see docs/live.md.

        Raises:
            ValueError: a key is unknown, or its value is not what it must be; says which.
        """
        unknown = [key for key in request if key not in _READ]
        if unknown:
            raise ValueError(f"filter: {unknown[0]!r} is unknown; there are {', '.join(_READ)}")
        read = {name: _READ[name](value) for name, value in request.items()}
        return cls(
            read.get("min_ms"),
            frozenset(read.get("cpu", ())),
            tuple(read.get("comm", ())),
            frozenset(read.get("verdict", ())),
            frozenset(read.get("event", ())),
        )

    def passes(self, facts: Facts) -> bool:
        """Whether an event passes; its facts are the same for all filters."""
        if self.events and facts.event not in self.events:
            return False
        if self.min_ms is not None and (facts.ms is None or facts.ms < self.min_ms):
            return False
        if self.cpus and self.cpus.isdisjoint(facts.cpus):
            return False
        if self.verdicts and facts.verdict not in self.verdicts:
            return False
        if not self.comms:
            return True
        comm = facts.comm
        return comm is not None and any(pattern.match(comm) for pattern in self.comms)


def _min_ms(value: Any) -> float:
    # Not isinstance: a bool is an int to Python.
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise ValueError("filter.min_ms: give a number of milliseconds, 0 or more")
    return float(value)


def _list(name: str, kind: type, allowed: str) -> Callable[[Any], list[Any]]:
    def read(value: Any) -> list[Any]:
        if type(value) is not list or any(type(item) is not kind for item in value):
            raise ValueError(f"filter.{name}: give an array of {allowed}")
        return value

    return read


def _cpus(value: Any) -> list[int]:
    cpus: list[int] = _list("cpu", int, "CPU numbers")(value)
    if not all(0 <= cpu <= MAX_CPU for cpu in cpus):
        raise ValueError(f"filter.cpu: CPUs are numbered from 0 to {MAX_CPU}")
    return cpus


def _comms(value: Any) -> list[re.Pattern[str]]:
    patterns: list[str] = _list("comm", str, "shell patterns")(value)
    if len(patterns) > MAX_PATTERNS or any(len(p) > MAX_PATTERN for p in patterns):
        raise ValueError(
            f"filter.comm: give at most {MAX_PATTERNS} patterns of at most {MAX_PATTERN} characters"
        )
    return [re.compile(fnmatch.translate(pattern)) for pattern in patterns]


def _one_of(name: str, values: tuple[str, ...]) -> Callable[[Any], list[str]]:
    read = _list(name, str, ", ".join(values))

    def read_known(value: Any) -> list[str]:
        given: list[str] = read(value)
        for item in given:
            if item not in values:
                raise ValueError(f"filter.{name}: {item!r} is none of {', '.join(values)}")
        return given

    return read_known


_READ: dict[str, Callable[[Any], Any]] = {
    "min_ms": _min_ms,
    "cpu": _cpus,
    "comm": _comms,
    "verdict": _one_of("verdict", VERDICTS),
    "event": _one_of("event", EVENTS),
}
