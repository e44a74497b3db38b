"""What a record costs in Python, in figures that are the same on every machine.

Times are the bench's affair. More than these bounds means that somebody has put work on the path
of every record: take it off again, or raise the bound knowingly.
"""

from __future__ import annotations

import gc
import json
import re
import sys
from pathlib import Path
from types import FrameType

import pytest

from tests.unit.whole_path import WholePath

MAX_CALLS = {"ongoing": 300, "look back": 960, "resolved": 300}
"""From the raw record to the line: calls of Python and of C functions. `look back`: while the
stall goes on, when its first line is written."""
MAX_BLOCKS = 16
"""Memory blocks that stay for each stall: what is known of it for the minute in which the next
ones may be folded."""
MAX_FREE_TUPLES = 400
"""Bytes that each stall adds to CPython's lists of free tuples, which keep some 4 MB. Those of 20
places, one of each record, it keeps and never takes again."""
WARM = 20
STALLS = 40


def calls(path: WholePath, record: bytes) -> tuple[int, int]:
    """How many functions are called until the line is made, and how many after that."""
    counted, lines = [0, 0], len(path.lines)

    def count(frame: FrameType, event: str, argument: object) -> None:
        counted[len(path.lines) - lines] += event in ("call", "c_call")

    # Whoever asked to be called at garbage collections (Hypothesis does) would be counted too.
    gc.disable()
    sys.setprofile(count)
    try:
        path.pipeline.take(record)
    finally:
        sys.setprofile(None)
        gc.enable()
    return counted[0], counted[1]


def test_calls_for_a_line(tmp_path: Path) -> None:
    """Each phase's line takes a bounded number of calls, the same for each stall."""
    path = WholePath(tmp_path)
    found = []
    for number in range(1, WARM + 3):
        sample, end = path.stall(number)
        (ongoing, look_back), (resolved, _) = calls(path, sample), calls(path, end)
        found.append({"ongoing": ongoing, "look back": look_back, "resolved": resolved})
    first, last = json.loads(path.lines[-2]), json.loads(path.lines[-1])
    assert (first["phase"], last["phase"]) == ("ongoing", "resolved")
    assert len(last["lookback"]) >= 8
    assert found[-1] == found[-2]
    assert {phase: n for phase, n in found[-1].items() if n > MAX_CALLS[phase]} == {}


def test_blocks_that_stay(tmp_path: Path) -> None:
    """A stall leaves little behind, lines not counted."""
    path = WholePath(tmp_path)
    for number in range(1, WARM + STALLS + 1):
        if number == WARM + 1:
            gc.collect()
            before = sys.getallocatedblocks()
        for record in path.stall(number):
            path.pipeline.take(record)
        path.lines.clear()
    gc.collect()
    assert (sys.getallocatedblocks() - before) / STALLS <= MAX_BLOCKS


def test_tuples_kept_free(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What is taken from the lists of free tuples goes back to the same.

    A tuple made of an iterator begins with ten places and ends in another list than it came from:
    so each adds one to that, up to 2,000 of each size. One made of a list does not.
    """
    path = WholePath(tmp_path)
    grown = 0
    for number in range(1, WARM + STALLS + 1):
        records = path.stall(number)
        before = free_tuples(capfd)
        for record in records:
            path.pipeline.take(record)
        if number > WARM:
            grown += free_tuples(capfd) - before
    assert grown / STALLS <= MAX_FREE_TUPLES


def free_tuples(capfd: pytest.CaptureFixture[str]) -> int:
    """Bytes in CPython's lists of free tuples."""
    capfd.readouterr()
    sys._debugmallocstats()
    found = re.findall(r"-sized PyTupleObjects .* = +([\d,]+)", capfd.readouterr().err)
    assert len(found) == 20
    return sum(int(size.replace(",", "")) for size in found)
