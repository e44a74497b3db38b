"""Filters and requests of the live socket: what passes, and what is refused by name."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

import stalld
from stalld.live_filter import EVENTS, MAX_PATTERN, MAX_PATTERNS, Facts, Filter
from stalld.live_request import MAX_HISTORY, Request, error_line, parse

STALL: dict[str, Any] = {
    "event": "stall",
    "cpu": 3,
    "duration_ms": 51.2,
    "verdict": "stuck_in_kernel",
    "blocker": {"comm": "cadvisor"},
}
SUPPRESSED: dict[str, Any] = {
    "event": "suppressed",
    "cpus": [1, 3],
    "total_ms": 340.0,
    "longest_ms": 40.0,
    "verdict": None,
    "blocker": None,
}
STARTED = {"event": "started", "cpus": 4}
LOST = {"event": "records_lost", "cpu": 1, "count": 2}
STOPPED = {"event": "stopped"}


def matches(event: dict[str, Any], /, **request: Any) -> bool:
    """Whether an event passes what a request spells out."""
    return Filter.from_request(request).passes(Facts.of(event))


@pytest.mark.parametrize("event", [STALL, SUPPRESSED, STARTED, LOST, STOPPED])
def test_no_filter_lets_all_pass(event: dict[str, Any]) -> None:
    """Nothing asked for, nothing held back; an empty array asks for nothing either."""
    assert matches(event)
    assert matches(event, cpu=[], comm=[], verdict=[], event=[])


def test_min_ms() -> None:
    """Of a stall its length; of suppressed ones the longest, or what may have been as long."""
    assert matches(STALL, min_ms=51.2)
    assert not matches(STALL, min_ms=51.3)
    assert matches(SUPPRESSED, min_ms=40)
    assert not matches(SUPPRESSED, min_ms=41)
    assert matches(SUPPRESSED | {"longest_ms": None}, min_ms=340)
    assert not matches(SUPPRESSED | {"longest_ms": None}, min_ms=341)


@pytest.mark.parametrize(
    "request_", [{"min_ms": 0}, {"cpu": [4]}, {"comm": ["*"]}, {"verdict": ["unknown"]}]
)
@pytest.mark.parametrize("event", [STARTED, STOPPED])
def test_what_is_not_there_does_not_pass(event: dict[str, Any], request_: dict[str, Any]) -> None:
    """An event that lacks what a filter asks for is held back: `started` has a number of CPUs."""
    assert not matches(event, **request_)


def test_cpu() -> None:
    """One of those given is one that the event is about."""
    assert matches(STALL, cpu=[0, 3])
    assert not matches(STALL, cpu=[0])
    assert matches(SUPPRESSED, cpu=[1])
    assert not matches(SUPPRESSED, cpu=[2])
    assert matches(LOST, cpu=[1])


@pytest.mark.parametrize(
    ("pattern", "passes"),
    [
        ("cadvisor", True),
        ("cad*", True),
        ("?advisor", True),
        ("[a-c]advisor", True),
        ("Cadvisor", False),
        ("cad", False),
        ("advisor", False),
        ("[z-a]*", False),
        ("(", False),
    ],
)
def test_comm(pattern: str, passes: bool) -> None:
    """Shell patterns for the whole name, case and all."""
    assert matches(STALL, comm=["nobody", pattern]) is passes


def test_a_blocker_that_is_not_known_has_no_name() -> None:
    """No pattern matches it, not even a star."""
    assert not matches(STALL | {"blocker": None}, comm=["*"])


def test_verdict_and_event() -> None:
    """By the contract's values."""
    assert matches(STALL, verdict=["unknown", "stuck_in_kernel"])
    assert not matches(STALL, verdict=["unknown"])
    assert matches(STALL, event=["stall", "stopped"])
    assert not matches(STALL, event=["stopped"])


def test_all_kinds_must_be_satisfied() -> None:
    """Filters of different kinds are joined by `and`."""
    assert matches(STALL, cpu=[3], comm=["c*"], min_ms=10, event=["stall"])
    assert not matches(STALL, cpu=[3], comm=["x*"], min_ms=10, event=["stall"])


def test_events_are_those_of_the_contract() -> None:
    """No kind of event can be asked for that there is not, none is left out."""
    schema = json.loads(Path(stalld.__file__).with_name("schema.json").read_bytes())
    assert set(schema["$defs"]["common"]["properties"]["event"]["enum"]) == set(EVENTS)


@pytest.mark.parametrize(
    ("request_", "fault"),
    [
        ({"pid": 1}, "'pid' is unknown; there are min_ms, cpu"),
        ({"min_ms": "10"}, "min_ms: give a number"),
        ({"min_ms": True}, "min_ms: give a number"),
        ({"min_ms": -1}, "min_ms: give a number"),
        ({"min_ms": None}, "min_ms: give a number"),
        ({"cpu": 1}, "cpu: give an array of CPU numbers"),
        ({"cpu": [True]}, "cpu: give an array"),
        ({"cpu": [1.0]}, "cpu: give an array"),
        ({"cpu": [-1]}, "cpu: CPUs are numbered from 0"),
        ({"cpu": [65_536]}, "cpu: CPUs are numbered from 0"),
        ({"comm": "x"}, "comm: give an array of shell patterns"),
        ({"comm": ["x" * (MAX_PATTERN + 1)]}, "comm: give at most"),
        ({"comm": ["x"] * (MAX_PATTERNS + 1)}, "comm: give at most"),
        ({"verdict": ["bad"]}, "verdict: 'bad' is none of stuck_in_kernel"),
        ({"event": ["stal"]}, "event: 'stal' is none of started"),
        ({"event": [["stall"]]}, "event: give an array of"),
    ],
)
def test_bad_filters(request_: dict[str, Any], fault: str) -> None:
    """Refused, and the fault is named."""
    with pytest.raises(ValueError, match=r"^filter") as error:
        Filter.from_request(request_)
    assert fault in str(error.value)


def test_hostile_patterns_take_no_time() -> None:
    """Many stars do not make matching explode."""
    wanted = Filter.from_request({"comm": ["*a" * 32] * MAX_PATTERNS})
    began = time.thread_time()
    assert not wanted.passes(Facts.of(STALL | {"blocker": {"comm": "a" * 31 + "b" * 64}}))
    assert time.thread_time() - began < 0.1


def test_whole_request() -> None:
    """Everything that may be asked for."""
    request = parse(
        b'{"filter": {"cpu": [1]}, "history": "since_start", "instance": "a", "stats": true}'
    )
    assert request == Request(Filter(cpus=frozenset([1])), None, "a", True)
    assert parse(b"{}") == Request()
    assert parse(b'{"history": 100, "instance": null}\r') == Request(history=MAX_HISTORY)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b"", "not valid JSON"),
        (b"GET / HTTP/1.1\r", "not valid JSON"),
        (b'{"filter": {"comm": ["\xff"]}}', "not valid JSON"),
        (b'{"filter": {"min_ms": NaN}}', "not valid JSON"),
        (b"[" * 4000, "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"filters": {}}', "'filters' is unknown; there are filter"),
        (b'{"filter": null}', "filter: give an object"),
        (b'{"filter": {"x": 1}}', "filter: 'x' is unknown"),
        (b'{"history": -1}', "history: give a number from 0 to 100"),
        (b'{"history": 101}', "history: give a number"),
        (b'{"history": true}', "history: give a number"),
        (b'{"history": 1.0}', "history: give a number"),
        (b'{"history": "all"}', "history: give a number"),
        (b'{"instance": 1}', "instance: give null"),
        (b'{"instance": ""}', "instance: give null"),
        (b'{"stats": 1}', "stats: give true or false"),
    ],
)
def test_bad_requests(line: bytes, fault: str) -> None:
    """Refused, and the fault is named."""
    with pytest.raises(ValueError, match=r".") as error:
        parse(line)
    assert fault in str(error.value)
    assert fault in orjson.loads(error_line(str(error.value)))["error"]


@given(st.binary(max_size=200))
def test_any_bytes(line: bytes) -> None:
    """Whatever comes is a request or a ValueError that can be told."""
    fault = ""
    try:
        parse(line)
    except ValueError as error:
        fault = str(error)
    assert error_line(fault).endswith(b"\n")
