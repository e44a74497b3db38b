"""Events as RFC 5424 messages: every field, and what does not fit into one."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from stalld import values
from stalld.sinks.syslog import Format

LINE = b'{"event":"stall"}\n'
EVENT: dict[str, Any] = {
    "timestamp": "2026-01-02T03:04:05.678901Z",
    "level": "warning",
    "event": "stall",
    "host": "web-1",
}
# The grammar of RFC 5424, section 6, as far as we use it.
GRAMMAR = re.compile(
    rb"<(0|[1-9]\d{0,2})>1 \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z [!-~]{1,255} [!-~]{1,48} "
    rb'[!-~]{1,128} [!-~]{1,32} \[meta sequenceId="([1-9]\d*)"\] @cee: \{.*\}',
    re.DOTALL,
)


def message(facility: str = "daemon", **changed: Any) -> bytes:
    """The first message of a fresh format; it must follow the grammar."""
    made = Format(facility, "softirq-stalld", 4711).message(LINE, EVENT | changed)
    assert GRAMMAR.fullmatch(made)
    return made


def test_whole_message() -> None:
    """Facility and level, time, host, program, pid, event, number, then the JSON."""
    assert message() == (
        b"<28>1 2026-01-02T03:04:05.678901Z web-1 softirq-stalld 4711 stall "
        b'[meta sequenceId="1"] @cee: {"event":"stall"}'
    )


@pytest.mark.parametrize(
    ("level", "severity"), [("error", 3), ("warning", 4), ("info", 6), ("debug", 7), ("odd", 6)]
)
@pytest.mark.parametrize("facility", values.FACILITIES)
def test_priority(facility: str, level: str, severity: int) -> None:
    """PRI is eight times the facility's number plus the severity (section 6.2.1)."""
    number = values.FACILITIES.index(facility)
    assert message(facility, level=level).startswith(b"<%d>1 " % (number * 8 + severity))


@pytest.mark.parametrize(
    ("host", "written"),
    [
        ("", b"-"),
        ("two words", b"two?words"),
        ("b\u00fccher\n", b"b?cher?"),
        ("h" * 300, b"h" * 255),
    ],
)
def test_host(host: str, written: bytes) -> None:
    """A host that is no word of printable ASCII, or too long, still gives a valid message."""
    assert message(host=host).split(b" ")[2] == written


def test_event_name_is_cut() -> None:
    """MSGID holds 32 characters."""
    assert message(event="e" * 40).split(b" ")[5] == b"e" * 32


def test_numbers() -> None:
    """Messages are numbered from 1; after 2147483647 comes 1 again (section 7.3.1)."""
    form = Format("user", "x", 1)

    def number() -> int:
        found = GRAMMAR.fullmatch(form.message(LINE, EVENT))
        assert found
        return int(found[2])

    assert [number() for _ in range(3)] == [1, 2, 3]
    form._numbers = itertools.count(2_147_483_645)
    assert [number() for _ in range(4)] == [2_147_483_646, 2_147_483_647, 1, 2]


def test_utf8_stays() -> None:
    """The JSON is not touched, but for the newline at its end."""
    line = '{"text":"\u00f6 \u2028"}\n'.encode()
    assert Format("user", "x", 1).message(line, EVENT).endswith(b"@cee: " + line[:-1])
