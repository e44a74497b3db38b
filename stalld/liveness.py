"""Whether the daemon still does its work: what feeds the service manager's watchdog."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from stalld.notify import Notifier

PARTS = 3
"""How often to look within the time that the manager allows."""


async def feed(
    notifier: Notifier, ask: Callable[[], Callable[[], bool]], read: Callable[[], None]
) -> None:
    """Feed the watchdog as long as everything moves; for ever.

    That this runs shows that the loop turns. Besides, the reader's thread must have answered
    since the last look, and reading all buffers, which takes the lock that every reader takes,
    must come to an end.

    Args:
        notifier: says how often.
        ask: asks the reader's thread; what it returns tells whether it has answered.
        read: reads what waits in any buffer.
    """
    if notifier.watchdog_s is None:
        return
    while True:
        notifier.alive()
        answered = False
        while not answered:
            asked = ask()
            await asyncio.sleep(notifier.watchdog_s / PARTS)
            read()
            answered = asked()
