"""The sides of a comparison under a load, one after the other, round by round."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from bench.bpf import NOTHING, BenchError, empty
from bench.processes import Tool, our_programs, programs_of
from bench.row import Goal, Row, differences, ratio, row, spread

NONE, LIMIT, OURS = "none", "limit", "ours"
RUNS = 2
"""Of the load while a side is attached: the faster one counts, for a virtual machine has hiccups
that last longer than a run."""


class Sides:
    """What is compared; closed with `stack`.

    Args:
        limit: hooks that each get a program which returns at once.
        others: by name, how to start each.

    Attributes:
        missing: name → why that tool is not among them.
    """

    def __init__(
        self, stack: ExitStack, limit: Sequence[str], others: Mapping[str, Callable[[], Tool]]
    ) -> None:
        self.missing: dict[str, str] = {}
        self._programs = {NONE: NOTHING, LIMIT: stack.enter_context(empty(limit))}
        self._programs[OURS] = stack.enter_context(our_programs())
        for name, start in others.items():
            try:
                self._programs[name] = stack.enter_context(programs_of(start()))
            except BenchError as error:
                self.missing[name] = str(error)

    def interleave(self, load: Callable[[], float], rounds: int) -> dict[str, list[float]]:
        """Side → what the load said in each round; the order is reversed each time."""
        found: dict[str, list[float]] = defaultdict(list)
        load()
        names = list(self._programs)
        for number in range(rounds):
            for name in reversed(names) if number % 2 else names:
                with self._programs[name].attached():
                    found[name].append(min(load() for _ in range(RUNS)))
        return found


def added_ns(us: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Side → what a step takes more than without any program, round by round, in ns."""
    return {
        side: [(with_it - without) * 1e3 for with_it, without in zip(own, us[NONE], strict=True)]
        for side, own in us.items()
        if side != NONE
    }


def against_limit(
    name: str, us: Mapping[str, Sequence[float]], load: str, unit: str, goal: Goal | None = None
) -> Row:
    """What a step takes more because of us, against two empty programs.

    Args:
        us: from :meth:`Sides.interleave`.
        load: what a round is made of, such as ``2 x 100 steps a side``.
        unit: what one of it is called.
    """
    added = added_ns(us)
    ours, limit = spread(added[OURS], "ns"), spread(added[LIMIT], "ns")
    return row(
        f"{name}, against two empty programs",
        ours,
        reference=limit,
        against=ratio(ours, limit),
        goal=goal,
        why=f"{len(us[NONE])} rounds of {RUNS} x {load} a side; a {unit} without any program takes "
        f"{spread(us[NONE], 'us').text}; more than the empty ones: "
        f"{differences(added[OURS], added[LIMIT], 'ns').text}",
    )
