"""One sink in a real event loop, with events put from another thread under a lock."""

from __future__ import annotations

import json
import signal
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self

from stalld.events import rfc3339
from stalld.sinks.outbox import Stats
from stalld.sinks.sink import Context, Sink
from tests.service.rsyslog import Rsyslog
from tests.service.surroundings import MAX_PUT_S, Loop, until

CLOSE_S = 1.0
STOPPED_KIB = 64
"""The queue of a sink whose server stands still."""


class Running:
    """A sink in surroundings of its own; the test's thread is the reader's.

    Args:
        make: makes the sink.
        plain: asyncio's own loop, not uvloop.
    """

    def __init__(self, make: Callable[[Context], Sink], *, plain: bool = False) -> None:
        self._make = make
        self._surroundings = Loop(plain=plain)
        self.put_s: list[float] = []
        self.count = 0
        self._lock = threading.Lock()  # As the reader's.
        self._closed = False

    def __enter__(self) -> Self:
        self._surroundings.__enter__()
        self.troubles = self._surroundings.troubles
        self.sink = self._make(self._surroundings.context)
        self._surroundings.call(self.sink.open)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.close(0.0)
        finally:
            self._surroundings.__exit__()

    def close(self, within_s: float = CLOSE_S) -> None:
        """Close the sink; what was not delivered counts as queued still."""
        if not self._closed:
            self._closed = True

            async def close() -> None:
                await self.sink.close(self._surroundings.loop.time() + within_s)

            self._surroundings.run(close(), within_s + 10)

    def put(self, count: int = 1, padding: int = 0, pause_s: float = 0.0) -> list[dict[str, Any]]:
        """Put numbered events, each with so many bytes more than it needs."""
        events = []
        for _ in range(count):
            event = make_event(self.count, padding)
            line = json.dumps(event).encode() + b"\n"
            with self._lock:
                began = time.perf_counter()
                self.sink.put(line, event)
                self.sink.flush()
                self.put_s.append(time.perf_counter() - began)
            events.append(event)
            self.count += 1
            if pause_s:
                time.sleep(pause_s)
        return events

    @property
    def stats(self) -> Stats:
        """The counts; they must always sum up."""
        stats = self.sink.stats()
        assert stats.delivered + stats.queued + stats.dropped == self.count
        return stats

    def wait_for_trouble(self, over: bool = False, timeout_s: float = 10.0) -> str:
        """What was said when the latest trouble began, or ended."""
        until(lambda: self.troubles and self.troubles[-1].over is over, timeout_s, "trouble")
        return self.troubles[-1].reason

    def wait_delivered(self, count: int, timeout_s: float = 10.0) -> None:
        """Until so many events are counted as delivered."""
        with suppress(AssertionError):
            until(lambda: self.stats.delivered >= count, timeout_s)
        assert self.stats.delivered >= count, (self.stats, self.troubles)


def make_event(number: int, padding: int = 0) -> dict[str, Any]:
    """An event as good as any, with what JSON must quote."""
    return {
        "timestamp": rfc3339(time.time_ns()),
        "level": ("info", "warning", "error")[number % 3],
        "event": "stall",
        "schema": "softirq-stalld/1",
        "host": "web-1",
        "number": number,
        "text": 'say "ö" \\ \n\t\u2028',
        "half": 0.5,
        "nothing": None,
        "deep": {"list": [1, {"x": -2}], "empty": {}},
        "padding": "x" * padding,
    }


def put_while_stopped(rsyslog: Rsyslog, sink: Running, count: int) -> Stats:
    """Put so many events, with the queue full, while the server reads nothing.

    No put may wait and the queue stays bounded; then the server goes on, and has all that
    waited, and one event more.

    Returns:
        The counts while it stood still.
    """
    sink.put(1)
    sink.wait_delivered(1)
    rsyslog.kill(signal.SIGSTOP)
    try:
        until(lambda: sink.put(50, padding=1000) and sink.stats.dropped > 0, what="full")
        sink.put_s.clear()
        sink.put(count, padding=1000)
        stats = sink.stats
        assert stats.queued <= STOPPED_KIB  # An event has more than a KiB.
        assert max(sink.put_s) < MAX_PUT_S
        print(f"put, blocked: median {statistics.median(sink.put_s) * 1e6:.1f} us")
    finally:
        rsyslog.kill(signal.SIGCONT)
    until(lambda: sink.stats.queued == 0, what="all delivered")
    sink.put(1)
    last = sink.count - 1
    until(lambda: rsyslog.events()[-1].get("number") == last, what="the last event")
    assert told_gaps(rsyslog.events(), sink.count) == stats.dropped
    return stats


def told_gaps(events: list[dict[str, Any]], count: int) -> int:
    """How many events are missing of so many, as the lines say that stand in their places."""
    following = missing = told = 0
    for event in events:
        if event["event"] == "degraded":
            missing += event["dropped"]
            told += event["dropped"]
        else:
            assert event["number"] == following + missing
            following, missing = event["number"] + 1, 0
    assert following == count
    return told
