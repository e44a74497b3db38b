"""The stream of events: complete lines, at once, with the common keys in front."""

from __future__ import annotations

import gc
import json
import socket
import sys
from typing import Any

import pytest

from stalld.events import Event
from stalld.sinks.emitter import LEVELS, MAX_LINE_BYTES, Emitter
from tests.unit.schema import parse

WALL = 1_767_323_045_678_901_234


class Taken:
    """What an emitter published."""

    def __init__(self, host: str | None = "h") -> None:
        self.lines: list[bytes] = []
        self.events: list[Event] = []
        self.emitter = Emitter(self._take, lambda: WALL, host)

    def _take(self, line: bytes, event: Event) -> None:
        self.lines.append(line)
        self.events.append(event)

    def one(self) -> Event:
        """An event, emitted now."""
        self.emitter.emit("degraded", "info", {})
        return self.events[-1]


def test_common_keys_come_first() -> None:
    """Each event begins with the keys that every event has, then its own in their order."""
    taken = Taken("web-1")
    taken.emitter.emit("records_lost", "warning", {"cpu": 1, "count": 2})
    assert list(parse(taken.lines[0]).items()) == [
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
    taken = Taken()
    taken.emitter.emit("degraded", level, {})
    assert json.loads(taken.lines[0])["level"] == level


def test_line_and_mapping_agree() -> None:
    """The line that is published is the mapping's JSON and one newline."""
    taken = Taken()
    for count in (1, 2):
        taken.emitter.emit("records_lost", "warning", {"cpu": 0, "count": count})
    assert [json.loads(line) for line in taken.lines] == taken.events
    assert all(line.endswith(b"}\n") and line.count(b"\n") == 1 for line in taken.lines)


def test_line_for_one() -> None:
    """The line of an event that is not for everybody looks the same and is not published."""
    taken = Taken()
    fields = {"cpu": 0, "count": 1}
    line = taken.emitter.line("records_lost", "warning", fields)
    assert taken.lines == []
    taken.emitter.emit("records_lost", "warning", fields)
    assert taken.lines == [line]
    assert fields == {"cpu": 0, "count": 1}


def test_host_name() -> None:
    """Without a name it is the machine's; bytes that are no UTF-8 stand as escapes."""
    assert Taken(None).one()["host"] == socket.gethostname()
    assert Taken("a\udcffb").one()["host"] == "a\\xffb"


@pytest.mark.parametrize(
    "hostile",
    [
        "\udcff",
        "\n\r\x1b[2J\x00\x7f",
        "\u2028\u202e\x9b2J",
        "x" * (4 << 20),
        ["y" * 100] * 5_000,
        "é" * 40_000,
    ],
)
def test_hostile_values(hostile: object) -> None:
    """Whatever a value holds, the line is one line of valid JSON that journald takes whole."""
    taken = Taken()
    taken.emitter.emit("stall", "info", {"nested": {"comm": hostile}, "list": [hostile] * 100})
    (line,) = taken.lines
    assert len(line) <= MAX_LINE_BYTES
    assert line.count(b"\n") == 1
    assert line.decode()[:-1].isprintable()
    told = json.loads(line)
    assert list(told) == ["timestamp", "level", "event", "schema", "host", "nested", "list"]


def test_what_terminals_obey_is_escaped() -> None:
    """Also what JSON allows as it is, without a change of what it means; letters stay."""
    taken = Taken()
    value = "\x9b2J\x7f\u202e\U000e0001é中"
    taken.emitter.emit("stall", "info", {"comm": value})
    (line,) = taken.lines
    assert json.loads(line)["comm"] == value
    assert "é中".encode() in line
    assert b"\\u009b2J\\u007f\\u202e\\udb40\\udc01" in line


def test_what_is_not_ascii_is_cheap() -> None:
    """A long line with a character that is printable is looked at string by string."""
    taken = Taken()
    fields = {"hint": "cut…", "stack": [f"function_{n}+0x1" for n in range(1000)]}
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    gc.disable()
    sys.setprofile(count)
    try:
        taken.emitter.emit("stall", "info", fields)
    finally:
        sys.setprofile(None)
        gc.enable()
    (line,) = taken.lines
    assert "cut…".encode() in line
    assert calls < len(line) / 2


def test_only_what_is_long_is_cut() -> None:
    """A line that is too long keeps its short values, and what is cut ends in an ellipsis."""
    taken = Taken()
    taken.emitter.emit("stall", "info", {"cpu": 1, "short": "abc", "long": "z" * 60_000})
    told = json.loads(taken.lines[0])
    assert (told["cpu"], told["short"]) == (1, "abc")
    assert told["long"] == "z" * 2047 + "…"
