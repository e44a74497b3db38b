"""What is opened once and used at each look.

What a socket or a file of /proc leaves behind when it is closed the kernel frees after an RCU grace
period, for which that CPU's tick goes on: on an idle machine three interrupts more, where a look
costs one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class _Closable(Protocol):
    def close(self) -> None: ...


T = TypeVar("T", bound=_Closable)


class Kept(Generic[T]):
    """Opened when it is first wanted, and again after :meth:`close`. For one thread.

    Args:
        make: opens it.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._it: T | None = None

    def get(self) -> T:
        """It, open.

        Raises:
            OSError: it cannot be opened.
        """
        if self._it is None:
            self._it = self._make()
        return self._it

    def close(self) -> None:
        """Close it, if it is open."""
        it, self._it = self._it, None
        if it is not None:
            it.close()


def read_again(fd: int) -> bytes:
    """The whole of a file from its beginning, as it is now.

    Raises:
        OSError: it cannot be read.
    """
    parts: list[bytes] = []
    at = 0
    while data := os.pread(fd, 1 << 16, at):
        parts.append(data)
        at += len(data)
    return b"".join(parts)
