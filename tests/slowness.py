"""How much slower than real hardware the machine is that the tests run on.

An emulated CPU takes ten times as long for the same code, while the stalls that are injected
there last as long as anywhere. So a test says how long *the program* may take at most with
``slow(seconds)``; how long a stall lasts, and how exactly it is told, is never stretched.
"""

from __future__ import annotations

import os

SLOWNESS = float(os.environ.get("STALLD_TEST_SLOWNESS", "1"))
"""Set by the runner of the guests (``tests/vm/guest.py``); 1 on real hardware."""


def slow(seconds: float) -> float:
    """A time limit for something that the CPU has to work for."""
    return seconds * SLOWNESS
