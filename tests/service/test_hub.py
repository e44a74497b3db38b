"""All sinks together: when lines are written."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from stalld import config
from stalld.sinks.hub import BATCH_LINES, Hub
from tests.service.surroundings import Loop


@pytest.fixture
def hub() -> Iterator[tuple[Hub, int]]:
    """One that writes to a pipe, and the pipe's other end, which does not block."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    with Loop() as loop:
        made = Hub(
            loop.context, stdout_fd=writing, style="json", hello=dict, lock=threading.RLock()
        )
        loop.run(made.apply(config.Sinks(), config.Live(enabled=False)))
        try:
            yield made, reading
        finally:
            loop.run(made.close())
            os.close(reading)
            os.close(writing)


def read(fd: int) -> bytes:
    """What is there."""
    try:
        return os.read(fd, 65_536)
    except BlockingIOError:
        return b""


def test_a_line_is_written_at_once(hub: tuple[Hub, int]) -> None:
    """Nothing waits for the next one."""
    hub[0].publish(b"1\n", {})
    assert read(hub[1]) == b"1\n"


def test_lines_of_one_reading_are_written_together(hub: tuple[Hub, int]) -> None:
    """At its end, when somebody asks for it, and when they are many."""
    with hub[0].together():
        hub[0].publish(b"1\n", {})
        with hub[0].together():
            hub[0].publish(b"2\n", {})
        assert read(hub[1]) == b""
        hub[0].flush()
        assert read(hub[1]) == b"1\n2\n"
        hub[0].publish(b"3\n", {})
    assert read(hub[1]) == b"3\n"
    with hub[0].together():
        for _ in range(BATCH_LINES):
            assert read(hub[1]) == b""
            hub[0].publish(b"4\n", {})
        assert read(hub[1]) == b"4\n" * BATCH_LINES


def test_an_error_does_not_hold_lines_back(hub: tuple[Hub, int]) -> None:
    """What was told before it is written."""
    with suppress(ValueError), hub[0].together():
        hub[0].publish(b"1\n", {})
        raise ValueError
    assert read(hub[1]) == b"1\n"
