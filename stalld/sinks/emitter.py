"""structlog, set up to make events: one JSON object a line, for every sink the same."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import orjson
import structlog

from stalld import events
from stalld.sinks.text import escaped

LEVELS = ("debug", "info", "warning", "error")
MAX_LINE_BYTES = 47 * 1024
"""journald cuts lines at 48 KiB (LineMax=), which leaves no valid JSON."""
_CUTS = ((2048, 1000), (256, 64), (64, 16), (16, 4))
"""Characters of a string and items of an array that are left, tried in this order."""

Publish = Callable[[bytes, events.Event], object]


class Emitter:
    """Makes the line of each event and hands it on, at once.

    Args:
        publish: takes the line, with its newline, and the event as a mapping.
        flush: has those written that it may have kept back.
        wall_ns: CLOCK_REALTIME in ns.
        host: what the events call this host.
    """

    def __init__(
        self,
        publish: Publish,
        wall_ns: Callable[[], int],
        host: str | None = None,
        flush: Callable[[], object] = lambda: None,
    ) -> None:
        self._publish = publish
        self.flush = flush
        self._frame = _Frame(wall_ns, host or socket.gethostname())
        self._logger = structlog.wrap_logger(
            self,
            processors=[structlog.processors.add_log_level, self._frame, _arguments],
        ).bind()

    def emit(self, event: str, level: str, fields: events.Event) -> None:
        """Make one event and hand it on."""
        getattr(self._logger, level)(event, **fields)

    def line(self, event: str, level: str, fields: events.Event) -> bytes:
        """The line of an event that is not for everybody."""
        return _line(self._frame(None, level, {"level": level, "event": event, **fields}))

    # What structlog calls in the end, under the level's name.

    def _take(self, line: bytes, event: events.Event) -> None:
        self._publish(line, event)

    debug = info = warning = error = _take


class _Frame:
    """Puts the keys that every event has in front."""

    def __init__(self, wall_ns: Callable[[], int], host: str) -> None:
        self._wall_ns = wall_ns
        self._host = _valid(host)

    def __call__(self, _: object, __: str, event: MutableMapping[str, Any]) -> dict[str, Any]:
        framed = {
            "timestamp": events.rfc3339(self._wall_ns()),
            "level": event.pop("level"),
            "event": event.pop("event"),
            "schema": events.SCHEMA,
            "host": self._host,
        }
        framed.update(event)
        return framed


def _arguments(_: object, __: str, event: Mapping[str, Any]) -> tuple[tuple[Any, ...], Any]:
    return (_line(event), event), {}


def _line(event: Mapping[str, Any]) -> bytes:
    line = _dumps(event)
    for characters, items in _CUTS:
        if len(line) <= MAX_LINE_BYTES:
            break
        line = _dumps(_cut(event, characters, items))
    return line


def _dumps(event: Mapping[str, Any]) -> bytes:
    try:
        line = orjson.dumps(event)
    except orjson.JSONEncodeError:
        # A path, say, with bytes that are no UTF-8.
        line = orjson.dumps(_cut(event, sys.maxsize, sys.maxsize))
    # orjson escapes what is below a space; terminals obey more than that.
    if not line.isascii() or b"\x7f" in line:
        line = escaped(line)
    # Not OPT_APPEND_NEWLINE: orjson's own object keeps its whole buffer, some 8 KiB, and lines
    # that wait are many.
    return line + b"\n"


def _cut(value: Any, characters: int, items: int) -> Any:
    """The value with long strings and arrays shortened, all its strings valid Unicode."""
    if isinstance(value, str):
        value = _valid(value)
        return value if len(value) <= characters else f"{value[: characters - 1]}…"
    if isinstance(value, list | tuple):
        return [_cut(item, characters, items) for item in value[:items]]
    if isinstance(value, Mapping):
        return {key: _cut(item, characters, items) for key, item in value.items()}
    return value


def _valid(text: str) -> str:
    """No surrogates: a host name may be bytes that are no UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
