"""Compiled programs kept for the next start: compiling takes most of one.

What is in the file goes into the kernel, so it is only taken from a file and a directory that
nobody but this user, or root, can write; the verifier looks at it all the same.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import tempfile
from pathlib import Path

from stalld.probe.capabilities import effective
from stalld.probe.compiled import Compiled
from stalld.probe.compiler import SOURCES
from stalld.probe.protocol import Missing, Request

FILE = "programs"
ABILITY = "compile cache"
_EFFECT = "each start compiles the BPF programs anew, which takes a second or less"
_MAX_BYTES = 16 << 20


def key(request: Request, *, nmi: bool, notes: Path = Path("/sys/kernel/notes")) -> str:
    """Differs where anything does that the programs depend on.

    These are the sources and what makes code of them, the kernel (its build id is in its notes),
    and what this process may do, since that decides how net_rx_action is traced.

    Raises:
        OSError: something cannot be read.
    """
    system = os.uname()
    digest = hashlib.sha256()
    facts = system.release, system.version, system.machine, request.cpus, request.nmi, nmi
    digest.update(repr((*facts, effective())).encode())
    makers = sorted(Path(__file__).parent.glob("*.py"))
    sources = [Path(request.bpf_dir, name) for name in SOURCES]
    for path in (notes, *sources, *makers, Path(__file__).parents[1] / "records.py"):
        data = path.read_bytes()
        digest.update(b"%d:" % len(data) + data)
    return digest.hexdigest()


class Cache:
    """One file in ``directory``: that of the last start."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory / FILE

    def read(self, wanted: str) -> Compiled | None:
        """What was kept under this key; None where nothing was, or something is wrong with it.

        Raises:
            OSError: the file, or its directory, cannot be read or is not ours alone.
        """
        _require_ours(os.stat(self._directory), self._directory)
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        with open(fd, "rb") as file:
            status = os.fstat(fd)
            _require_ours(status, self._path)
            if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES:
                return None
            head, _, body = file.read().partition(b"\n")
        return Compiled.load(body) if head == _head(wanted, body) else None

    def write(self, name: str, compiled: Compiled) -> None:
        """Keep it in the last one's place.

        Raises:
            OSError: it cannot be written; what was there is there still.
        """
        body = compiled.dump()
        fd, temporary = tempfile.mkstemp(prefix=f".{FILE}-", dir=self._directory)
        try:
            with open(fd, "wb") as file:
                file.write(_head(name, body) + b"\n" + body)
            os.replace(temporary, self._path)
        except OSError:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise


def trouble(error: OSError) -> Missing:
    """What to say where nothing is kept, or taken."""
    where = f"{error.filename}: " if error.filename else ""
    return Missing(ABILITY, f"{where}{error.strerror or error}", _EFFECT)


def _head(name: str, body: bytes) -> bytes:
    return json.dumps({"key": name, "sha256": hashlib.sha256(body).hexdigest()}).encode()


def _require_ours(status: os.stat_result, path: Path) -> None:
    if status.st_uid not in (0, os.geteuid()):
        raise PermissionError(errno.EPERM, "it is another user's", str(path))
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(errno.EPERM, "others may write to it", str(path))
