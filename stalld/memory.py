"""What keeps the process small: memory that libc keeps, libraries that nobody needs."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

_M_ARENA_MAX = -8
"""malloc.h"""


def one_arena() -> None:
    """Have all threads allocate from one heap, where libc can: before there are any.

    Each with its own would keep what it once needed. They seldom meet: Python runs one at a time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


def return_memory() -> None:
    """Hand what is free back to the kernel, where libc can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class _Placeholder(ModuleType):
    """Has whatever is asked of it at import: numbers, and classes of errors."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return 0 if name.isupper() else type(name, (OSError,), {})


@contextmanager
def no_openssl() -> Iterator[None]:
    """Keep what is imported within from loading OpenSSL, which takes 4 MB.

    For asyncio and uvloop, whose TLS nobody asks for: a sink that wants TLS imports ssl itself.
    """
    if "ssl" in sys.modules:
        yield
        return
    sys.modules["ssl"] = _Placeholder("ssl")
    try:
        yield
    finally:
        del sys.modules["ssl"]
