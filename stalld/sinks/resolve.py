"""Addresses of a host by its name, asked in a thread that nobody waits for."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from stalld.errors import no_thread

Address = tuple[Any, Any, int, str, Any]
"""Of ``socket.getaddrinfo``."""


class Resolver:
    """As the loop's getaddrinfo(), whose requests the loop waits for before it closes.

    DNS may take half a minute to say that it does not answer, and a name service that hangs never
    says so. What was asked is not asked once more before there is an answer: each has a thread.
    """

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._answer: asyncio.Future[Sequence[Address]] | None = None

    async def addresses(self) -> Sequence[Address]:
        """Of the host, for TCP.

        Raises:
            OSError, UnicodeError: as ``socket.getaddrinfo``; EAGAIN: no thread can be had.
        """
        if self._answer is None or self._answer.done():
            self._answer = self._ask()
        # Whoever waits may give up; the question stays asked.
        return await asyncio.shield(self._answer)

    def _ask(self) -> asyncio.Future[Sequence[Address]]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Sequence[Address]] = loop.create_future()
        # Perhaps nobody wants it any more when it comes.
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())

        def tell(found: Sequence[Address] | Exception) -> None:
            if isinstance(found, Exception):
                answer.set_exception(found)
            else:
                answer.set_result(found)

        def ask() -> None:
            found: Sequence[Address] | Exception
            try:
                found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
            except (OSError, UnicodeError) as error:
                found = error
            with suppress(RuntimeError):  # The loop is closed.
                loop.call_soon_threadsafe(tell, found)

        try:
            threading.Thread(target=ask, name="stalld-resolve", daemon=True).start()
        except RuntimeError as error:
            raise no_thread(error) from error
        return answer
