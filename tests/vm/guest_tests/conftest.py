"""One daemon for all tests here: on an emulated CPU it takes 20 s to start."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.daemon import Daemon, Event
from tests.unit import schema

PER_KIND = 2
THRESHOLD_MS = 50.0
"""A busy host takes an emulated CPU away for 10 to 30 ms now and then: too many lines to read."""


class QuickDaemon(Daemon):
    """Takes lines as they are: to validate one takes an emulated CPU longer than a stall lasts."""

    def parse(self, line: bytes) -> Event:
        """A line as an event."""
        event: Event = json.loads(line)
        return event

    def validate(self) -> None:
        """Hold some lines of each event, phase and verdict against the schema."""
        seen: Counter[tuple[str, ...]] = Counter()
        for line, event in zip(self.lines, self.events, strict=True):
            kind = event["event"], event.get("phase", ""), event.get("verdict", "")
            seen[kind] += 1
            if seen[kind] <= PER_KIND:
                schema.parse(line.encode())


@pytest.fixture(scope="session")
def daemon() -> Iterator[Daemon]:
    """A running daemon; it ends well, its lines are valid."""
    with QuickDaemon("--threshold-ms", str(THRESHOLD_MS)) as running:
        yield running
        assert running.stop() == 0
        running.validate()


@pytest.fixture(scope="session")
def tick_ms(daemon: Daemon) -> float:
    """The scheduler tick, as the daemon found it."""
    period: float = daemon.started["tick_ms"]
    return period


@pytest.fixture
def keep() -> Callable[[str, Any], None]:
    """Leaves evidence with the results of the guest's run."""
    directory = os.environ.get("STALLD_TEST_EVIDENCE")

    def write(name: str, what: Any) -> None:
        if directory:
            Path(directory, name).write_text(json.dumps(what, indent=1))

    return write
