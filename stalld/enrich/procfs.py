"""What /proc says of one task, and where a cgroup is by its number."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from stalld.enrich.identity import Asked
from stalld.records import ARGS_LEN, COMM_LEN

SCANNED_MAX = 100_000
"""Cgroups looked at in one search."""
PAUSE_EVERY = 16
PAUSE_S = 1e-5
"""A search pauses that often, less than a millisecond each: a line must not wait for Python's
lock."""

# Whose paths say most: the unified hierarchy's, those of the controllers that runtimes use.
_WANTED = ("", "memory", "cpu", "name=systemd")


# What would end a field of mountinfo.
_ESCAPED = re.compile(rb"\\([0-3][0-7]{2})")


class GoneError(Exception):
    """There is no such task any more, or another one has its number."""


def is_there(tid: int) -> bool:
    """Whether there is such a thread; asks nothing that has to be waited for."""
    try:
        os.getpriority(os.PRIO_PROCESS, tid)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # We may not ask: /proc tells.
    return True


def read_task(
    tgid: int, tid: int, comm: bytes, tell: Callable[[Asked], None], proc: str = "/proc"
) -> None:
    """Ask for everything, what is safe first: the last one may wait for the task's memory.

    Args:
        comm: of the thread; one that has another name is another thread.
        tell: told all that is known, as it grows.

    Raises:
        GoneError: it is not there, or not any more.
        OSError: it may not be read.
    """
    own = Path(proc, str(tgid))
    try:
        found = _comm(own / "task" / str(tid))
        if not _is_named(found, comm[: COMM_LEN - 1]):
            raise GoneError
        status = _status((own / "status").read_bytes())
        parent_pid = int(status.get(b"PPid", b"0"))
        ids = status.get(b"NSpid", b"").split()
        asked = Asked(
            uid=int(status[b"Uid"].split()[0]) if b"Uid" in status else None,
            parent_pid=parent_pid or None,
            parent_comm=_comm_if_there(Path(proc, str(parent_pid))),
            ns_pid=int(ids[-1]) if len(ids) > 1 else None,
        )
        tell(asked)
        asked = asked._replace(cgroups=tuple(_cgroups((own / "cgroup").read_bytes())))
        tell(asked)
        with (own / "cmdline").open("rb", buffering=0) as file:
            # One byte more tells that there are more.
            tell(asked._replace(args=file.read(ARGS_LEN + 1)))
    except (FileNotFoundError, ProcessLookupError):
        raise GoneError from None


def _comm(directory: Path) -> bytes:
    # A name may end in newlines of its own.
    return (directory / "comm").read_bytes().removesuffix(b"\n")


def _comm_if_there(directory: Path) -> bytes | None:
    try:
        return _comm(directory)
    except OSError:
        return None


def _is_named(found: bytes, comm: bytes) -> bool:
    """Whether a task that /proc calls ``found`` may have this name in the kernel.

    Of kernel threads /proc tells more: all of a long name, and a worker's work.
    """
    longer = len(found) >= COMM_LEN or comm.startswith(b"kworker/")
    return found == comm or (longer and found.startswith(comm))


def _status(raw: bytes) -> dict[bytes, bytes]:
    pairs = (line.partition(b":") for line in raw.splitlines())
    return {name: value.strip() for name, _, value in pairs}


def _cgroups(raw: bytes) -> Iterator[bytes]:
    """The paths of ``/proc/PID/cgroup``; the kernel lets no name have a newline."""
    paths: dict[str, bytes] = {}
    for line in filter(None, raw.split(b"\n")):
        _, _, rest = line.partition(b":")
        controllers, _, path = rest.partition(b":")
        for controller in controllers.decode("utf-8", "replace").split(","):
            paths[controller] = path.removesuffix(b" (deleted)")
    return (paths[name] for name in _WANTED if name in paths)


def unified_mount(proc: str = "/proc") -> str | None:
    """Where the unified hierarchy is mounted, as a whole; None: nowhere."""
    try:
        lines = Path(proc, "self/mountinfo").read_bytes().split(b"\n")
    except OSError:
        return None
    for line in lines:
        mount, _, source = line.partition(b" - ")
        fields = mount.split(b" ")
        if len(fields) > 4 and fields[3] == b"/" and source.startswith(b"cgroup2 "):
            return os.fsdecode(_ESCAPED.sub(lambda told: bytes([int(told[1], 8)]), fields[4]))
    return None


def find_cgroup(mount: str, wanted: int) -> bytes | None:
    """The path of the cgroup with this number (its inode), below the mount of its hierarchy.

    Level by level, since what is asked for is seldom deep. Nothing is kept: ten thousand
    cgroups are looked through in half a second, and hardly ever need be.
    """
    with suppress(OSError):
        if Path(mount).stat().st_ino == wanted:
            return b"/"
    levels = [""]
    seen = 0
    while levels:
        below: list[str] = []
        for directory in levels:
            try:
                with os.scandir(mount + directory) as entries:
                    for entry in entries:
                        if not entry.is_dir(follow_symlinks=False):
                            continue
                        seen += 1
                        if seen % PAUSE_EVERY == 0:
                            time.sleep(PAUSE_S)
                        path = f"{directory}/{entry.name}"
                        if entry.inode() == wanted:
                            return os.fsencode(path)
                        below.append(path)
            except OSError:
                continue  # It has just been removed.
            if seen > SCANNED_MAX:
                return None
        levels = below
    return None
