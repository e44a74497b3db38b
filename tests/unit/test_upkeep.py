"""What is short for a while ends nothing: it is told once, and tried again."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from stalld.errors import StalldError
from stalld.upkeep import Upkeep


class Machine:
    """A detector, a reader and a log; the kernel refuses what ``wanting`` says."""

    def __init__(self) -> None:
        self.wanting: Exception | None = None
        self.learnt = 0
        self.warnings: list[tuple[str, str]] = []
        self.maps = SimpleNamespace(cpus=())
        self.lock = threading.RLock()
        self.cpus = ()
        parts: Any = self
        self.upkeep = Upkeep(parts, parts, None, parts, fail=_refuse, on_report=_refuse)

    def tasks(self) -> list[Any]:
        """None, or an error."""
        if self.wanting is not None:
            raise self.wanting
        return []

    def learn(self, tasks: list[Any]) -> None:
        """Count it."""
        self.learnt += 1

    def warning(self, _: str, *, what: str, reason: str) -> None:
        """Keep it."""
        self.warnings.append((what, reason))


def _refuse(*_: object) -> None:
    raise AssertionError


@pytest.mark.parametrize("error", [OSError(23, "Too many open files in system"), StalldError("no")])
def test_tried_again(error: Exception) -> None:
    """The same reason is told once, until it has worked again."""
    machine = Machine()
    machine.wanting = error
    for _ in range(3):
        machine.upkeep._learn()
    assert machine.warnings == [("kernel threads", str(error))]
    machine.wanting = None
    machine.upkeep._learn()
    assert machine.learnt == 1
    machine.wanting = error
    machine.upkeep._learn()
    assert len(machine.warnings) == 2


def test_a_fault_of_ours_is_none_of_these() -> None:
    """It ends the daemon, with its trace."""
    machine = Machine()
    machine.wanting = TypeError("a fault")
    with pytest.raises(TypeError):
        machine.upkeep._learn()
