"""Where lines go: a terminal that is drawn on, or anything that text is appended to."""

from __future__ import annotations

import os
import select
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from datetime import date, datetime
from typing import Any, NamedTuple

import orjson

from stalld.sinks.text import escaped, render, safe
from stalld.tail.view import Line, Span, clean, columns, event_lines, moment, paint, when

REDRAW_S = 0.2
SILENCE_S = 60.0
"""A stall that nothing was heard of for so long is not known to go on."""
_NO_WRAP, _WRAP = "\x1b[?7l", "\x1b[?7h"
_TO_LINE_END, _TO_SCREEN_END = "\x1b[K", "\x1b[J"


class Output:
    """A descriptor that is written to until all is written."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def write(self, data: bytes) -> None:
        """Write, and wait for who reads.

        Raises:
            OSError: nobody does any more, or the disk is full.
        """
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self.fd, view) :]
            except BlockingIOError:  # Somebody else made it so.
                poll = select.poll()
                poll.register(self.fd, select.POLLOUT)
                poll.poll()

    def size(self) -> tuple[int, int]:
        """Columns and rows of the terminal."""
        try:
            size = os.get_terminal_size(self.fd)
        except OSError:
            return 80, 24
        return size.columns or 80, size.lines or 24


class Display(ABC):
    """Shows events one after the other."""

    def __init__(self, output: Output, errors: Output) -> None:
        self._output = output
        self._errors = errors

    @abstractmethod
    def show(self, line: bytes, event: dict[str, Any]) -> None:
        """Show an event, which is ``line`` parsed."""

    def note(self, text: str) -> None:
        """Tell what is no event."""
        with suppress(OSError):  # Events go on, even if nobody reads this.
            self._errors.write(f"softirq-stalld: {text}\n".encode(errors="replace"))

    def tick(self) -> None:  # noqa: B027
        """Time has passed."""

    def disturb(self) -> None:  # noqa: B027
        """Something else was written on the terminal. May be called in a signal handler."""

    def freeze(self) -> None:  # noqa: B027
        """Nothing is known any more of what goes on."""

    @property
    def tick_s(self) -> float | None:
        """When to call :meth:`tick`; None: not at all."""
        return None


class JsonDisplay(Display):
    """Lines as they are."""

    def show(self, line: bytes, event: dict[str, Any]) -> None:
        """Write it at once."""
        self._output.write(line)


class JsonTerminalDisplay(Display):
    """Lines as they are, but for characters that JSON allows and terminals obey."""

    def show(self, line: bytes, event: dict[str, Any]) -> None:
        """A service escapes them itself; whatever else answers at the socket may not."""
        self._output.write(escaped(line.rstrip(b"\n")) + b"\n")


class TextDisplay(Display):
    """Plain text, only ever appended: for pipes and files."""

    def show(self, line: bytes, event: dict[str, Any]) -> None:
        """As ``run --format text`` writes it."""
        try:
            text = render(clean(event))
        except (KeyError, TypeError, ValueError, AttributeError):
            self.note("an event is left out that this version does not understand")
            return
        self._output.write(text.encode(errors="replace") + b"\n")


class _Live(NamedTuple):
    """The last thing on the screen: a stall that goes on."""

    event: dict[str, Any]
    base_ms: float
    since: float  # on our clock, when it was base_ms
    drawn: tuple[Line, ...]
    rows: int  # of the screen, when it was drawn


class Screen(Display):
    """A terminal: one stall a block, that of a stall which goes on is drawn anew all the time.

    Args:
        colour: colours may be used.
        moves: the cursor may be moved; else everything is appended.
        clock: seconds, monotonic.
        wall: seconds since 1970.
    """

    def __init__(
        self,
        output: Output,
        errors: Output,
        *,
        colour: bool,
        moves: bool,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(output, errors)
        self._colour = colour
        self._moves = moves
        self._clock = clock
        self._wall = wall
        self._live: _Live | None = None
        self._disturbed = False
        self._day: date | None = datetime.fromtimestamp(wall()).astimezone().date()

    def show(self, line: bytes, event: dict[str, Any]) -> None:
        """Draw it, over the block of the same stall if that is the last on the screen."""
        event = clean(event)
        stall_id = event.get("stall_id") if event.get("event") == "stall" else None
        before = self._live
        if before is not None and (not stall_id or before.event.get("stall_id") != stall_id):
            before = None
        self._live = None
        day = self._new_day(event) if before is None else []
        if stall_id and event.get("phase") == "ongoing" and self._moves:
            base_ms, now = self._so_far_ms(event), self._clock()
            self._draw(_Live(event, base_ms, now, (), 0), before, day)
        else:
            width, _ = self._output.size()
            self._put([*day, *event_lines(event, width=width)], before)

    def note(self, text: str) -> None:
        """Below what is there."""
        self._live = None
        super().note(text)

    def tick(self) -> None:
        """Let the duration grow."""
        live = self._live
        if live is None:
            return
        if self._clock() - live.since > SILENCE_S:
            self._live = None
            return
        self._draw(live, live, [])

    def disturb(self) -> None:
        """What is drawn next stands below."""
        self._disturbed = True

    def freeze(self) -> None:
        """Nothing grows any more."""
        self._live = None

    @property
    def tick_s(self) -> float | None:
        """While a stall goes on."""
        return REDRAW_S if self._live is not None else None

    def _so_far_ms(self, event: dict[str, Any]) -> float:
        """How long it has lasted by now: it may have been told a while ago."""
        told = when(event.get("timestamp"), None)
        age_s = self._wall() - told.timestamp() if told else 0.0
        ms = event.get("duration_ms")
        known_ms = float(ms) if isinstance(ms, int | float) else 0.0
        return known_ms + (age_s * 1000 if 0 < age_s <= SILENCE_S else 0.0)

    def _draw(self, live: _Live, before: _Live | None, day: list[Line]) -> None:
        width, rows = self._output.size()
        so_far_ms = live.base_ms + (self._clock() - live.since) * 1000
        lines = event_lines(live.event, width=width, so_far_ms=so_far_ms)
        # What has scrolled away cannot be drawn over.
        lines = [*day, *lines][: max(rows - 1, 1)]
        if before is not None and tuple(lines) == before.drawn and not self._disturbed:
            self._live = live
            return
        self._put(lines, before)
        self._live = live._replace(drawn=tuple(lines[len(day) :]), rows=rows)

    def _put(self, lines: list[Line], before: _Live | None) -> None:
        """Write lines, over those of ``before`` if they are known to be where they were."""
        painted = [paint(line, colour=self._colour) for line in lines]
        if not self._moves:
            self._output.write("".join(f"{text}\n" for text in painted).encode(errors="replace"))
            return
        up = ""
        if before is not None and not self._disturbed and self._is_in_place(before):
            up = f"\x1b[{len(before.drawn)}A"
        self._disturbed = False
        # Before the text: behind a full line it would take the last character away again.
        text = "".join(f"{_TO_LINE_END}{line}\n" for line in painted)
        self._output.write(
            f"{_NO_WRAP}\r{up}{text}{_TO_SCREEN_END}{_WRAP}".encode(errors="replace")
        )

    def _is_in_place(self, before: _Live) -> bool:
        # A terminal that became narrower may have folded lines, one with fewer rows may have
        # moved them out of reach.
        width, rows = self._output.size()
        widest = max(sum(columns(span.text) for span in line) for line in before.drawn)
        return widest <= width and len(before.drawn) < rows

    def _new_day(self, event: dict[str, Any]) -> list[Line]:
        at = moment(event, None)
        if at is None or at.date() == self._day:
            return []
        self._day = at.date()
        return [(Span(f"--- {self._day.isoformat()}", "dim"),)]


def stats_lines(hello: dict[str, Any]) -> list[str]:
    """What a daemon tells of itself, for people."""
    lines = []
    for key, value in clean(hello).items():
        if isinstance(value, list) and all(isinstance(item, dict) for item in value):
            for item in value:
                rest = dict(item)
                name = rest.pop("name", "")
                lines.append(f"{key}: {name}: " + ", ".join(f"{k} {v}" for k, v in rest.items()))
        else:
            lines.append(
                f"{key}: {value if isinstance(value, str) else orjson.dumps(value).decode()}"
            )
    return [safe(line) for line in lines]
