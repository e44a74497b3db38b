"""Folds the identical stalls of a storm into one sum a minute.

Guarantees: all lines of a stall come out, or none and it is counted when it is
resolved; every count is reported; what stands out is not held back.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

from stalld.track.evidence import path
from stalld.track.model import SERIOUS_FACTOR, Blocker, Phase, Update
from stalld.track.verdict import Verdict

MINUTE_NS = 60_000_000_000
MAX_KEYS = 1024
"""Kinds of stalls known at a time."""
OUTSTANDING_FACTOR = 4
"""So is a stall this many times longer than any of its kind that was shown."""


class Reason(enum.StrEnum):
    """Contract values of ``reason``.

    IDENTICAL: same blocker, same stack. RATE: over the kernel's limit for one CPU.
    """

    IDENTICAL = "identical"
    RATE = "rate"


class Suppressed(NamedTuple):
    """Stalls that were counted and not shown; of RATE only the first six are known.

    Times are CLOCK_MONOTONIC in ns: ``since_ns`` when the first began, ``until_ns`` when the
    last ended. ``starved_ns``: the longest starved wait. ``verdict``: None when mixed.
    ``kernel_stack``: of the first. ``like``: CPU and number of the last one shown.
    """

    reason: Reason
    cpus: frozenset[int]
    stalls: int
    total_ns: int
    since_ns: int
    until_ns: int
    longest_ns: int = 0
    starved_ns: int = 0
    verdict: Verdict | None = None
    blocker: Blocker | None = None
    kernel_stack: tuple[str, ...] = ()
    like: tuple[int, int] | None = None

    @property
    def level(self) -> str:
        """``warning`` when something starved or may have, else ``info``."""
        return "warning" if self.starved_ns or self.reason is Reason.RATE else "info"


class _Key(NamedTuple):
    """What makes stalls identical: tgid and comm, and the frames without their offsets."""

    process: tuple[int, bytes] | None
    names: tuple[str, ...]


@dataclass(slots=True)
class _Minute:
    """What was shown of one key in its minute, and the sum of what was not."""

    ends_ns: int
    shown: int = 0
    longest_shown_ns: int = 0
    like: tuple[int, int] | None = None
    held: Suppressed | None = None

    def report(self) -> list[Suppressed]:
        """The sum, if there is one."""
        return [self.held._replace(like=self.like)] if self.held else []


class Folder:
    """Decides of each stall, at its first line, whether it is shown.

    The minute of a key begins with its first stall. It is fixed, not sliding: so it ends in a
    storm that does not, and then the sum is told and new examples are shown.

    Args:
        per_minute: stalls of one key that are shown in its minute, at least 1.
        threshold_ns: the tracker's.
    """

    def __init__(self, per_minute: int, threshold_ns: int) -> None:
        self.per_minute = per_minute
        self.threshold_ns = threshold_ns
        # In the order in which they began, so in which they end.
        self._minutes: dict[_Key, _Minute] = {}
        # Stalls that go on, by CPU and number: their lines held back, none once shown.
        self._open: dict[tuple[int, int], list[Update]] = {}

    @property
    def pending(self) -> bool:
        """Whether a minute runs: :meth:`flush` is due at its end."""
        return bool(self._minutes)

    @property
    def next_flush_ns(self) -> int | None:
        """When the first minute ends; None when none runs."""
        return next((minute.ends_ns for minute in self._minutes.values()), None)

    def take(self, update: Update, now_ns: int) -> list[Update | Suppressed]:
        """What to write, in this order, now that the tracker says ``update``.

        Args:
            update: as the tracker promises them: each stall gets one that is resolved, its last.
            now_ns: CLOCK_MONOTONIC.
        """
        lines: list[Update | Suppressed] = [*self.flush(now_ns)]
        key = _key(update)
        if key not in self._minutes:
            lines += self._make_room()
            self._minutes[key] = _Minute(now_ns + MINUTE_NS)
        minute = self._minutes[key]
        stall = update.cpu, update.seq
        first = stall not in self._open
        held = self._open.pop(stall, [])
        shown = not first and not held
        if not shown and (
            (first and minute.shown < self.per_minute) or self._stands_out(update, minute)
        ):
            minute.shown += 1
            shown = True
        if shown:
            minute.longest_shown_ns = max(minute.longest_shown_ns, update.duration_ns)
            minute.like = stall
            lines += [*held, update]
        if update.phase is Phase.ONGOING:
            self._open[stall] = [] if shown else [*held, update]
        elif not shown:
            minute.held = _add(minute.held, update)
        return lines

    def flush(self, now_ns: int) -> list[Suppressed]:
        """Report and forget the minutes that are over."""
        over = list(takewhile(lambda key: self._minutes[key].ends_ns <= now_ns, self._minutes))
        return [line for key in over for line in self._minutes.pop(key).report()]

    def finish(self) -> list[Suppressed]:
        """Report everything: the daemon stops, and the tracker has resolved all stalls."""
        minutes = list(self._minutes.values())
        self._minutes.clear()
        return [line for minute in minutes for line in minute.report()]

    def _stands_out(self, update: Update, minute: _Minute) -> bool:
        if minute.like is None:
            return True  # its key has changed to one of which nothing was shown
        longest_ns = max(update.duration_ns, _starved_ns(update))
        return (
            longest_ns >= SERIOUS_FACTOR * self.threshold_ns
            or update.duration_ns >= OUTSTANDING_FACTOR * max(1, minute.longest_shown_ns)
        )

    def _make_room(self) -> list[Suppressed]:
        """Forget the oldest key without a sum; where all have one, report the oldest's."""
        if len(self._minutes) < MAX_KEYS:
            return []
        idle = (key for key, minute in self._minutes.items() if not minute.held)
        return self._minutes.pop(next(idle, next(iter(self._minutes)))).report()


def _add(held: Suppressed | None, update: Update) -> Suppressed:
    started_ns, duration_ns = update.started_ns, update.duration_ns
    if held is None:
        stack = update.kernel_stack
        held = Suppressed(Reason.IDENTICAL, frozenset(), 0, 0, started_ns, 0, kernel_stack=stack)
        held = held._replace(verdict=update.verdict, blocker=update.blocker)
    return held._replace(
        cpus=held.cpus | {update.cpu},
        stalls=held.stalls + 1,
        total_ns=held.total_ns + duration_ns,
        since_ns=min(held.since_ns, started_ns),
        until_ns=max(held.until_ns, started_ns + duration_ns),
        longest_ns=max(held.longest_ns, duration_ns),
        starved_ns=max(held.starved_ns, _starved_ns(update)),
        verdict=held.verdict if held.verdict is update.verdict else None,
    )


def _starved_ns(update: Update) -> int:
    """What waited longest; interrupts that could not come count too."""
    return max((update.late_ns, *update.starved.values()))


def _key(update: Update) -> _Key:
    blocker = update.blocker
    process = (blocker.tgid, blocker.comm) if blocker else None
    return _Key(process, path(update.kernel_stack))
