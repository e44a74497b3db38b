"""Who a task is, in the words of the contract: from the kernel's record, else from /proc. Pure."""

from __future__ import annotations

import codecs
import re
import shlex
from functools import lru_cache
from typing import NamedTuple

from stalld.enrich import syscalls
from stalld.enrich.cgroup import Place, resolve
from stalld.records import PF_KTHREAD, Known, NamePath, TaskRecord

MAX_CMDLINE = 256
"""Bytes of a command line, its ellipsis included."""
ELLIPSIS = "…"


class Asked(NamedTuple):
    """What /proc said of a task; what it did not, or not yet, is None.

    ``args`` as in ``cmdline``; ``cgroups``: paths, the unified hierarchy's first.
    ``ns_pid``: None also in the first pid namespace.
    """

    args: bytes | None = None
    uid: int | None = None
    parent_pid: int | None = None
    parent_comm: bytes | None = None
    ns_pid: int | None = None
    cgroups: tuple[bytes, ...] | None = None


class Identity(NamedTuple):
    """Who a task is; what is not known is None."""

    cmdline: str | None = None
    exe: str | None = None
    uid: int | None = None
    parent: tuple[int, str] | None = None
    syscall: str | None = None
    file: str | None = None
    ns_pid: int | None = None
    place: Place = Place()


def lacks(task: TaskRecord | None) -> bool:
    """Whether /proc could tell something that the kernel's record does not."""
    if task is None:
        return True
    own = task.task_flags & PF_KTHREAD or Known.ARGS in task.known
    return not (own and task.tells_cgroup and task.parent_pid)


@lru_cache(maxsize=64)
def identify(
    task: TaskRecord | None, asked: Asked, frames: tuple[str, ...], mode: str | None
) -> Identity:
    """Join what is known, once for all lines of a stall.

    Args:
        task: from the kernel, taken when the task was first seen.
        asked: from /proc.
        frames: the task's kernel stack, innermost first.
        mode: what that stack interrupted.
    """
    syscall, file = _syscall(task, frames, mode)
    if task is None:
        return Identity(
            command(asked.args) if asked.args is not None else None,
            None,
            asked.uid,
            _parent(asked.parent_pid, asked.parent_comm),
            syscall,
            None,
            asked.ns_pid,
            resolve(asked.cgroups or ()),
        )
    args, total = asked.args, len(asked.args or b"")
    if Known.ARGS in task.known:
        args, total = task.args, task.args_total
    # A path that the kernel's record has cut is better than none.
    if task.tells_cgroup or (Known.CGROUP in task.known and not asked.cgroups):
        place = resolve([_path(path) for path in _cgroups(task)])
    else:
        place = resolve(asked.cgroups or ())
    return Identity(
        None if args is None else command(args, len(args) < total),
        _path(task.exe).decode("utf-8", "backslashreplace") if task.exe.names else None,
        task.uid,
        _parent(task.parent_pid, task.parent_comm) or _parent(asked.parent_pid, asked.parent_comm),
        syscall,
        file,
        task.ns_pid or asked.ns_pid,
        place,
    )


def command(args: bytes, cut: bool = False) -> str | None:
    """A command line as a shell would take it, of :data:`MAX_CMDLINE` bytes at most.

    None of no arguments at all, as a kernel thread or a zombie has them. One argument stands as
    it is: programs that rename themselves (``nginx: worker process``) leave a title there.

    Args:
        args: each argument with its NUL.
        cut: there are more.
    """
    raw = args.rstrip(b"\0").split(b"\0") if not cut else args.split(b"\0")
    words = [word.decode("utf-8", "backslashreplace") for word in raw[:-1]]
    # Of a character that was cut in two nothing is shown.
    last = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    words.append(last.decode(raw[-1], final=not cut))
    if words == [""]:
        return None
    text = words[0] if len(words) == 1 else " ".join(map(_quote, words))
    if not cut and len(text.encode()) <= MAX_CMDLINE:
        return text
    room = MAX_CMDLINE - len(ELLIPSIS.encode())
    return text.encode()[:room].decode("utf-8", "ignore") + ELLIPSIS


def _quote(word: str) -> str:
    return word if re.fullmatch(r"[\w@%+=:,./-]+", word) else shlex.quote(word)


def _parent(pid: int | None, comm: bytes | None) -> tuple[int, str] | None:
    return (pid, (comm or b"").decode("utf-8", "backslashreplace")) if pid else None


def _cgroups(task: TaskRecord) -> list[NamePath]:
    return [task.cgroup, *([task.controller] if task.controller.names else [])]


def _path(path: NamePath) -> bytes:
    """From the root of its file system, or from an ellipsis on."""
    if path.names == (b"/",):
        return b"/"
    start = [ELLIPSIS.encode()] if path.cut else [b""]
    return b"/".join([*start, *reversed(path.names)]) or b"/"


def _syscall(
    task: TaskRecord | None, frames: tuple[str, ...], mode: str | None
) -> tuple[str | None, str | None]:
    """The system call, and the file it works on."""
    if mode == "user":
        return None, None
    seen = syscalls.of_stack(frames)
    if task is None or Known.SYSCALL not in task.known:
        return seen, None
    name = syscalls.by_number(task.syscall)
    if seen is not None and seen != name:
        return seen, None  # The record is of the task's first sample, the stack of another.
    return name, _file(task) if name in syscalls.ON_A_DESCRIPTOR else None


def _file(task: TaskRecord) -> str | None:
    """As ``/proc/PID/fd`` shows what has no path; else the path, after the kind of file system."""
    kind = task.file_system.decode("utf-8", "backslashreplace")
    if not task.file.names:
        return None
    if kind == "sockfs":
        return f"socket:[{task.file_inode}]"
    if kind == "pipefs":
        return f"pipe:[{task.file_inode}]"
    if kind == "anon_inodefs":
        return f"anon_inode:{task.file.names[0].decode('utf-8', 'backslashreplace')}"
    return f"{kind}:{_path(task.file).decode('utf-8', 'backslashreplace')}"
