"""The stream of events: complete lines, at once, with the common keys in front."""

from __future__ import annotations

import io
import os
import socket

import pytest

from stalld.sinks.emitter import LEVELS, Emitter
from tests.unit.schema import parse

WALL = 1_767_323_045_678_901_234


def test_common_keys_come_first() -> None:
    """Each event begins with the keys that every event has, then its own in their order."""
    stream = io.BytesIO()
    Emitter(stream, "json", lambda: WALL, "web-1").emit(
        "records_lost", "warning", {"cpu": 1, "count": 2}
    )
    assert list(parse(stream.getvalue()).items()) == [
        ("timestamp", "2026-01-02T03:04:05.678901Z"),
        ("level", "warning"),
        ("event", "records_lost"),
        ("schema", "softirq-stalld/1"),
        ("host", "web-1"),
        ("cpu", 1),
        ("count", 2),
    ]


@pytest.mark.parametrize("level", LEVELS)
def test_levels(level: str) -> None:
    """No level is filtered."""
    stream = io.BytesIO()
    Emitter(stream, "json", lambda: 0, "h").emit("degraded", level, {})
    assert f'"level":"{level}"'.encode() in stream.getvalue()


def test_every_line_leaves_at_once() -> None:
    """Nothing waits in a buffer: a reader of a pipe has the line when emit returns."""
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb", buffering=0) as out, os.fdopen(writer, "wb") as stream:
        emitter = Emitter(stream, "json", lambda: WALL, "h")
        for number in (1, 2):
            emitter.emit("records_lost", "warning", {"cpu": 0, "count": number})
            assert parse(out.read(4096))["count"] == number
            assert emitter.written == number


def test_a_closed_pipe_is_told() -> None:
    """When nobody reads any more, the caller hears of it."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb", buffering=0) as stream:
        emitter = Emitter(stream, "json", lambda: WALL, "h")
        with pytest.raises(BrokenPipeError):
            emitter.emit("degraded", "info", {})
    assert emitter.written == 0


def test_text_style() -> None:
    """For people: a line without JSON."""
    stream = io.BytesIO()
    Emitter(stream, "text", lambda: WALL, "h").emit("records_lost", "warning", {"cpu": 1})
    assert stream.getvalue() == b"2026-01-02T03:04:05.678901Z warning records_lost cpu=1\n"


def test_this_host_by_default() -> None:
    """Without a name the host's own is used."""
    stream = io.BytesIO()
    Emitter(stream, "json", lambda: WALL).emit("degraded", "info", {})
    assert parse(stream.getvalue())["host"] == socket.gethostname()
