"""Real records through a real daemon into four sinks at once: all arrive, or are counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.injector.records import Sent
from tests.service.flow import Flow, Result

pytestmark = pytest.mark.kernel

MAX_LATENCY_MS = 1000.0
"""Generous, for a busy machine: from a record to its line."""


def check(result: Result) -> None:
    """Every sink got every event, or says how many it did not; nothing is lost unseen."""
    assert result.lost == result.sent.lost
    for name, counted in result.sinks.items():
        assert counted.stalls <= result.sent.sent
        told = result.told[name]
        assert told["queued"] == 0, name
        assert told["dropped"] == counted.missing, name
        # `stopped` itself is not in its own counts.
        assert told["delivered"] == counted.all - 1, name
    every = {told["delivered"] + told["dropped"] for told in result.told.values()}
    assert len(every) == 1


def test_four_sinks(tmp_path: Path) -> None:
    """Pipe, file, rsyslog behind TCP and tail have the same events, each exactly once."""
    with Flow(tmp_path) as flow:
        with flow.source() as source:
            sent = source.flow(per_second=300, seconds=3)
        result = flow.finish(sent)
    assert sent == Sent(900, 0)
    check(result)
    assert {counted.stalls for counted in result.sinks.values()} == {900}
    assert {counted.missing for counted in result.sinks.values()} == {0}


def test_more_than_it_can_take(tmp_path: Path) -> None:
    """What the perf buffers have no room for is counted exactly; all else is in every sink."""
    with Flow(tmp_path) as flow:
        with flow.source() as source:
            sent = source.flow(per_second=12_000, seconds=2)
        result = flow.finish(sent)
    assert sent.sent + sent.lost == 24_000
    assert sent.lost > 0
    check(result)
    # Lines of any kind may be missing, not only stalls.
    assert len({counted.all + counted.missing for counted in result.sinks.values()}) == 1
    assert all(
        sent.sent - counted.missing <= counted.stalls <= sent.sent
        for counted in result.sinks.values()
    )


def test_readers_that_stand_still(tmp_path: Path) -> None:
    """A stopped tail and a stopped collector delay no line, and learn later what they missed."""
    with Flow(tmp_path) as flow, flow.source() as source:
        total = Sent(0, 0)
        for _ in range(2):
            with flow.stopped("tail", "rsyslog"):
                sent = source.flow(per_second=300, seconds=3)
            total = Sent(total.sent + sent.sent, total.lost + sent.lost)
        result = flow.finish(total)
    assert total.lost == 0
    check(result)
    for name in ("stdout", "file"):
        assert result.sinks[name].stalls == total.sent
    # The socket of a stopped tail is full within a second: had a line waited for room there, it
    # and all after it would have until the tail went on.
    assert max(result.latency_ms) < MAX_LATENCY_MS
