"""Counters that grow too fast: when that begins, how it goes on, when it is over. Pure.

Of each source (a CPU, a device) the counters are looked at from time to time. While one of them
grows faster than its limit there is an episode; it is told when it begins, once at each look while
it lasts, and once when a look finds it over. All counts are sums since it began, exact however
long the looks are apart.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

Source = TypeVar("Source", bound=Hashable)


class Phase(enum.StrEnum):
    """Contract values of ``phase``."""

    BEGUN = "begun"
    ONGOING = "ongoing"
    ENDED = "ended"


class Episode(NamedTuple):
    """What there is to tell of one source.

    Attributes:
        since_ns: the look before it began.
        until_ns: the last look.
        counts: by which the counters have grown from the one to the other.
        per_second: how fast those with a limit grew between the last two looks.
    """

    phase: Phase
    since_ns: int
    until_ns: int
    counts: Mapping[str, int]
    per_second: Mapping[str, float]


@dataclass
class _Seen:
    at_ns: int
    counters: Mapping[str, int]
    since_ns: int = 0
    sums: dict[str, int] = field(default_factory=dict)


class Rates(Generic[Source]):
    """The sources of one kind.

    Args:
        limits: counter → by how much it may grow in a second.
        bits: width of the counters, which wrap.
        most: sources that are kept in mind; further ones are not looked at.
    """

    def __init__(self, limits: Mapping[str, float], bits: int, most: int) -> None:
        self.limits = limits
        self._mask = (1 << bits) - 1
        self._most = most
        self._seen: dict[Source, _Seen] = {}

    def take(self, source: Source, at_ns: int, counters: Mapping[str, int]) -> Episode | None:
        """One look at one source. What is not known this time is left out of ``counters``.

        The first look tells nothing, nor does one after which a counter went back: it was set to
        zero meanwhile.
        """
        seen = self._seen.get(source)
        if seen is None:
            if len(self._seen) < self._most:
                self._seen[source] = _Seen(at_ns, dict(counters))
            return None
        grown = {
            name: count - seen.counters[name] & self._mask
            for name, count in counters.items()
            if name in seen.counters
        }
        elapsed_s = (at_ns - seen.at_ns) / 1e9
        # A busy CPU's packets may really grow by half of 32 bits from one look to the next.
        told = self.limits.keys() & grown.keys() if self._mask < 1 << 32 else grown.keys()
        if elapsed_s <= 0 or any(grown[name] > self._mask >> 1 for name in told):
            self._seen[source] = _Seen(at_ns, dict(counters))
            return None
        before_ns, seen.at_ns, seen.counters = seen.at_ns, at_ns, dict(counters)
        rates = {name: grown[name] / elapsed_s for name in self.limits if name in grown}
        over = any(rate > self.limits[name] for name, rate in rates.items())
        if not over and not seen.since_ns:
            return None
        phase = Phase.ONGOING if over else Phase.ENDED
        if not seen.since_ns:
            phase, seen.since_ns, seen.sums = Phase.BEGUN, before_ns, {}
        for name, count in grown.items():
            seen.sums[name] = seen.sums.get(name, 0) + count
        episode = Episode(phase, seen.since_ns, at_ns, dict(seen.sums), rates)
        if phase is Phase.ENDED:
            seen.since_ns = 0
        return episode

    def keep(self, sources: Collection[Source]) -> None:
        """Forget all others: they are gone for good."""
        for source in self._seen.keys() - set(sources):
            del self._seen[source]
