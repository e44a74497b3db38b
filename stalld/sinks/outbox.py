"""A bounded queue of lines that counts what it had no room for, and says so in the stream."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

MAX_LINES = 65_536
"""However short they are: each costs some 100 bytes of memory besides."""


class Gap(NamedTuple):
    """Lines that one sink did not take: how many, and from when to when (CLOCK_REALTIME, ns)."""

    dropped: int
    since_ns: int
    until_ns: int


class Stats(NamedTuple):
    """What became of the lines given to a sink; ``delivered + queued + dropped`` are all."""

    name: str
    delivered: int
    queued: int
    dropped: int


class _Line(NamedTuple):
    data: bytes
    counts: bool  # not what tells of a gap


class _Kept(NamedTuple):
    line: _Line
    end: int  # the other side has it once it has so many bytes of the stream


class Outbox:
    """Lines on their way to one place.

    Any thread may :meth:`put`; one at a time may take out. No lock is held but for moments.
    When it is full, new lines are dropped and counted. Once half of it is free again, a line that
    tells of the gap stands where they would have stood.

    What was written is delivered (:meth:`advance`), or, where the other side tells how far it
    has come, handed over and kept (:meth:`hand_over`) until it has it (:meth:`acknowledge`). Kept
    lines count as queued, take room, and are written once more in a new stream.

    Args:
        max_bytes: that may wait.
        tell_gap: makes the line that tells of a gap; None: nothing is told.
        now_ns: CLOCK_REALTIME.
    """

    def __init__(
        self,
        max_bytes: int,
        tell_gap: Callable[[Gap], bytes] | None,
        now_ns: Callable[[], int],
    ) -> None:
        self._max_bytes = max_bytes
        self._tell_gap = tell_gap
        self._now_ns = now_ns
        self._mutex = threading.Lock()
        self._lines: deque[_Line] = deque()
        self._bytes = 0
        self._written = 0  # of the first line
        self._kept: deque[_Kept] = deque()
        self._handed = 0  # bytes of this stream
        self._gap: Gap | None = None
        self._put = 0
        self._dropped = 0
        self._delivered = 0

    def __bool__(self) -> bool:
        """Whether anything waits to be written."""
        return bool(self._lines)

    @property
    def unacknowledged(self) -> bool:
        """Whether anything was handed over that the other side is not known to have."""
        return bool(self._kept)

    def stats(self, name: str) -> Stats:
        """The counts as of now."""
        with self._mutex:
            queued = self._put - self._delivered - self._dropped
            return Stats(name, self._delivered, queued, self._dropped)

    def put(self, line: bytes) -> bool:
        """Queue a line; False: there was no room, so it is dropped and counted."""
        with self._mutex:
            self._put += 1
            self._close_gap()
            lines = len(self._lines) + len(self._kept)
            full = self._bytes + len(line) > self._max_bytes or lines >= MAX_LINES
            if self._gap is not None or full:
                now_ns = self._now_ns()
                since_ns = self._gap.since_ns if self._gap else now_ns
                self._gap = Gap(self._gap.dropped + 1 if self._gap else 1, since_ns, now_ns)
                self._dropped += 1
                return False
            self._append(_Line(line, counts=True))
            return True

    def chunk(self, max_bytes: int = 65_536) -> bytes:
        """What to write next: the rest of the first line, and whole lines up to ``max_bytes``."""
        with self._mutex:
            parts: list[bytes] = []
            size = -self._written
            for line in self._lines:
                if parts and size + len(line.data) > max_bytes:
                    break
                parts.append(line.data)
                size += len(line.data)
            joined = parts[0] if len(parts) == 1 else b"".join(parts)
            return joined[self._written :] if self._written else joined

    def head(self) -> bytes:
        """The first line alone, for who sends one message a line; b"" when there is none."""
        with self._mutex:
            return self._lines[0].data if self._lines else b""

    def advance(self, count: int) -> None:
        """``count`` bytes of what :meth:`chunk` gave were taken."""
        with self._mutex:
            self._written += count
            while self._lines and self._written >= len(self._lines[0].data):
                line = self._pop()
                self._written -= len(line.data)
                self._delivered += line.counts
            self._close_gap()

    def hand_over(self, count: int, *, whole: bool = False) -> None:
        """``count`` bytes of what :meth:`chunk` gave were taken; keep the lines.

        Args:
            whole: the other side can make nothing of a part of these bytes (a TLS record).
        """
        with self._mutex:
            self._written += count
            self._handed += count
            while self._lines and self._written >= len(self._lines[0].data):
                line = self._lines.popleft()
                self._written -= len(line.data)
                end = self._handed if whole else self._handed - self._written
                self._kept.append(_Kept(line, end))

    def acknowledge(self, outstanding: int) -> None:
        """The other side has all that was handed over but for the last ``outstanding`` bytes."""
        with self._mutex:
            reached = self._handed - outstanding
            while self._kept and self._kept[0].end <= reached:
                line = self._kept.popleft().line
                self._bytes -= len(line.data)
                self._delivered += line.counts
            self._close_gap()

    def skip(self) -> None:
        """Drop the first line: the other side will never take it."""
        with self._mutex:
            self._dropped += self._pop().counts
            self._written = 0
            self._close_gap()

    def restart(self) -> None:
        """A new stream begins with all lines, whole, that the other side is not known to have."""
        with self._mutex:
            self._lines.extendleft(kept.line for kept in reversed(self._kept))
            self._kept.clear()
            self._written = self._handed = 0

    def give_up(self) -> int:
        """Drop all that waits; how many lines that were, with those of a gap not told of yet."""
        with self._mutex:
            waiting = sum(line.counts for line in self._lines)
            waiting += sum(kept.line.counts for kept in self._kept)
            self._lines.clear()
            self._kept.clear()
            self._bytes = self._written = 0
            self._dropped += waiting
            return waiting + (self._gap.dropped if self._gap else 0)

    def _close_gap(self) -> None:
        lines = len(self._lines) + len(self._kept)
        if self._gap is None or self._bytes > self._max_bytes // 2 or lines > MAX_LINES // 2:
            return
        if self._tell_gap is not None:
            self._append(_Line(self._tell_gap(self._gap), counts=False))
        self._gap = None

    def _append(self, line: _Line) -> None:
        self._lines.append(line)
        self._bytes += len(line.data)

    def _pop(self) -> _Line:
        line = self._lines.popleft()
        self._bytes -= len(line.data)
        return line
