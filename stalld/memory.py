"""What libc keeps of the process's memory."""

from __future__ import annotations

import ctypes

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
