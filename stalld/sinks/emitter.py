"""structlog, set up to write events: one JSON object a line, or text for people."""

from __future__ import annotations

import socket
from collections.abc import Callable, MutableMapping
from typing import Any, BinaryIO

import orjson
import structlog

from stalld import events
from stalld.sinks.text import render

LEVELS = ("debug", "info", "warning", "error")


class Emitter:
    """Writes events to a binary stream, each at once.

    Args:
        stream: where to.
        style: ``json`` or ``text``.
        wall_ns: CLOCK_REALTIME in ns.
        host: what the events call this host.
    """

    def __init__(
        self,
        stream: BinaryIO,
        style: str,
        wall_ns: Callable[[], int],
        host: str | None = None,
    ) -> None:
        self.written = 0
        self._logger = structlog.wrap_logger(
            structlog.BytesLogger(stream),
            processors=[
                structlog.processors.add_log_level,
                _Frame(wall_ns, host or socket.gethostname()),
                _json if style == "json" else _text,
            ],
            cache_logger_on_first_use=True,
        )

    def emit(self, event: str, level: str, fields: events.Event) -> None:
        """Write one event.

        Raises:
            BrokenPipeError: nobody reads the stream any more.
        """
        getattr(self._logger, level)(event, **fields)
        self.written += 1


class _Frame:
    """Puts the keys that every event has in front."""

    def __init__(self, wall_ns: Callable[[], int], host: str) -> None:
        self._wall_ns = wall_ns
        self._host = host

    def __call__(
        self, _: object, __: str, event: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        framed = {
            "timestamp": events.rfc3339(self._wall_ns()),
            "level": event.pop("level"),
            "event": event.pop("event"),
            "schema": events.SCHEMA,
            "host": self._host,
        }
        framed.update(event)
        return framed


def _json(_: object, __: str, event: MutableMapping[str, Any]) -> bytes:
    return orjson.dumps(event)


def _text(_: object, __: str, event: MutableMapping[str, Any]) -> bytes:
    return render(event).encode()
