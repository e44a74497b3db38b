"""/proc/net/softnet_stat: what each CPU received, dropped and had no time for. Pure.

One row a CPU that is online, in hex, see softnet_seq_show() in net/core/net-procfs.c. Columns
came with time: 9 at first, received_rps with RPS (2.6.35), flow_limit_count (3.11), the backlog
and the CPU's number (5.10), the backlog's two parts (6.10).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

PATH = "/proc/net/softnet_stat"

_PROCESSED, _DROPPED, _SQUEEZED, _RECEIVED_RPS, _FLOW_LIMIT = 0, 1, 2, 9, 10
_BACKLOG, _CPU, _INPUT_QLEN = 11, 12, 13


class Softnet(NamedTuple):
    """Counters of one CPU, of 32 bits each; None: this kernel does not tell.

    ``backlog`` is none: it is what waits now.
    """

    processed: int
    dropped: int
    squeezed: int
    received_rps: int | None = None
    flow_limited: int | None = None
    backlog: int | None = None


def parse(text: str, online: Callable[[], Sequence[int]]) -> dict[int, Softnet]:
    """The row of each CPU.

    Args:
        online: the CPUs that have a row; asked where the kernel does not number them.

    Raises:
        ValueError: it is no such table, or has not a row for each of ``online``.
    """
    rows = [[int(word, 16) for word in line.split()] for line in text.splitlines()]
    if any(len(row) <= _SQUEEZED for row in rows):
        raise ValueError("a row of softnet_stat is too short")
    numbers: Sequence[int] = [row[_CPU] for row in rows if len(row) > _CPU]
    if len(numbers) != len(rows):
        numbers = online()
    if len(numbers) != len(rows):
        # A CPU went or came just now: whose row is which?
        raise ValueError(f"softnet_stat has {len(rows)} rows for {len(numbers)} CPUs")
    return {number: _softnet(row) for number, row in zip(numbers, rows, strict=True)}


def _softnet(row: Sequence[int]) -> Softnet:
    return Softnet(
        row[_PROCESSED],
        row[_DROPPED],
        row[_SQUEEZED],
        _column(row, _RECEIVED_RPS),
        _column(row, _FLOW_LIMIT),
        # What the limit of net.core.netdev_max_backlog counts, where that is told apart.
        _column(row, _INPUT_QLEN if len(row) > _INPUT_QLEN else _BACKLOG),
    )


def _column(row: Sequence[int], place: int) -> int | None:
    return row[place] if len(row) > place else None
