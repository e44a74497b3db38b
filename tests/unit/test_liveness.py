"""The watchdog is fed only while the reader's thread answers and the buffers can be read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

import pytest

from stalld.liveness import PARTS, feed
from stalld.notify import Notifier

PERIOD_S = 0.03


class Manager(Notifier):
    """Counts how often it is fed."""

    def __init__(self, watchdog_s: float | None) -> None:
        super().__init__("", watchdog_s)
        self.fed = 0

    def alive(self) -> None:
        """Once more."""
        self.fed += 1


def run(manager: Manager, ask: Callable[[], Callable[[], bool]], read: Callable[[], None]) -> None:
    """Feed for ten of its periods."""

    async def for_a_while() -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(10 * PERIOD_S):
                await feed(manager, ask, read)

    asyncio.run(for_a_while())


def test_fed_while_all_moves() -> None:
    """Some times in each period."""
    manager, reads = Manager(PERIOD_S), []
    run(manager, lambda: lambda: True, lambda: reads.append(1))
    assert 10 <= manager.fed <= 10 * PARTS + 1
    assert len(reads) >= manager.fed - 1


def test_nobody_asks() -> None:
    """Without a watchdog nothing is looked at."""
    manager = Manager(None)
    run(manager, lambda: pytest.fail("asked"), lambda: pytest.fail("read"))
    assert manager.fed == 0


def test_thread_hangs() -> None:
    """A thread that does not answer is asked again, and nothing is fed meanwhile."""
    manager, asked = Manager(PERIOD_S), []

    def ask() -> Callable[[], bool]:
        asked.append(1)
        return lambda: len(asked) >= 12

    run(manager, ask, lambda: None)
    assert len(asked) > 12
    assert 1 < manager.fed <= 10 * PARTS + 1 - 11


def test_buffers_cannot_be_read() -> None:
    """A reading that fails ends the feeding; the caller hears why."""
    manager = Manager(PERIOD_S)

    def read() -> None:
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        run(manager, lambda: lambda: True, read)
    assert manager.fed == 1
