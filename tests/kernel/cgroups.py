"""Control groups of our own, made to look like somebody else's and taken away again."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

NAME = f"stalldtest{os.getpid()}.slice"
"""All of ours are below it. To systemd it would be a slice, so what is below counts as units."""
REMOVE_TIMEOUT_S = 5.0


def mount(kind: str, controller: str | None = None) -> Path:
    """Where a hierarchy is mounted; without one the test is skipped."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, point, found, options, *_ = line.split()
        if found == kind and (controller is None or controller in options.split(",")):
            return Path(point)
    pytest.skip(f"no {kind} hierarchy {controller or ''} is mounted")


class Tree:
    """A hierarchy of which a part is ours."""

    def __init__(self, point: Path) -> None:
        self._point = point
        self._root = point / NAME

    def directory(self, path: str) -> Path:
        """Make a cgroup, and all above it."""
        made = self._root / path.lstrip("/")
        made.mkdir(parents=True, exist_ok=True)
        return made

    def move(self, pid: int, path: str) -> str:
        """Move a process into a cgroup; its path from the hierarchy's root."""
        made = self.directory(path)
        (made / "cgroup.procs").write_text(str(pid))
        return "/" + str(made.relative_to(self._point))

    def leave(self, pid: int) -> None:
        """Move a process out of our part."""
        (self._point / "cgroup.procs").write_text(str(pid))

    def back(self, pid: int, path: str) -> None:
        """Move a process to where it was."""
        (self._point / path.lstrip("/") / "cgroup.procs").write_text(str(pid))

    def remove(self, timeout_s: float = REMOVE_TIMEOUT_S) -> None:
        """Take everything of ours away, also what still has processes."""
        deadline = time.monotonic() + timeout_s
        while self._root.exists():
            for directory, _, _ in os.walk(self._root, topdown=False):
                with suppress(OSError):
                    for pid in Path(directory, "cgroup.procs").read_text().split():
                        self.leave(int(pid))
                with suppress(OSError):
                    os.rmdir(directory)
            assert time.monotonic() < deadline, f"{self._root} cannot be removed"


@contextmanager
def tree(kind: str = "cgroup2", controller: str | None = None) -> Iterator[Tree]:
    """Ours in one hierarchy, with an end."""
    made = Tree(mount(kind, controller))
    try:
        yield made
    finally:
        made.remove()
