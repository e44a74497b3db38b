"""What a client of the live socket says first, and what it is answered. Pure.

The protocol is told for programs in docs/live.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import orjson

from stalld.live_filter import Filter

PROTOCOL = "softirq-stalld-live/1"
MAX_REQUEST_BYTES = 4096
MAX_HISTORY = 100
SINCE_START = "since_start"
_KEYS = ("filter", "history", "instance", "stats")
_MAX_INSTANCE = 64


class Request(NamedTuple):
    """One client's wish.

    Attributes:
        filter: which events.
        history: so many of the last ones first; None: all since the start that are kept.
        instance: of the daemon that the client knew before, if any.
        stats: only the hello.
    """

    filter: Filter = Filter()
    history: int | None = 0
    instance: str | None = None
    stats: bool = False


def parse(line: bytes) -> Request:
    """The request in a line.

    Raises:
        ValueError: it is none; the message is for the client.
    """
    try:
        document = orjson.loads(line)
    except orjson.JSONDecodeError:
        raise ValueError("the request is not valid JSON") from None
    if type(document) is not dict:
        raise ValueError("the request is not a JSON object")
    for key in document:
        if key not in _KEYS:
            raise ValueError(f"{key[:64]!r} is unknown; there are {', '.join(_KEYS)}")
    wanted = document.get("filter", {})
    if type(wanted) is not dict:
        raise ValueError("filter: give an object")
    stats = document.get("stats", False)
    if type(stats) is not bool:
        raise ValueError("stats: give true or false")
    return Request(
        Filter.from_request(wanted),
        _history(document.get("history", 0)),
        _instance(document.get("instance")),
        stats,
    )


def _history(value: Any) -> int | None:
    if value == SINCE_START:
        return None
    if type(value) is not int or not 0 <= value <= MAX_HISTORY:
        raise ValueError(f'history: give a number from 0 to {MAX_HISTORY}, or "{SINCE_START}"')
    return value


def _instance(value: Any) -> str | None:
    if value is not None and (type(value) is not str or not 1 <= len(value) <= _MAX_INSTANCE):
        raise ValueError("instance: give null, or what an earlier hello said")
    return value


def error_line(reason: str) -> bytes:
    """The answer to a client that is not served."""
    return orjson.dumps({"error": reason}) + b"\n"
