"""A listening unix socket for one group, in a place that others may want too."""

from __future__ import annotations

import errno
import grp
import os
import socket
import stat
from contextlib import suppress
from typing import NamedTuple

from stalld.config import DEFAULT_SOCKET
from stalld.errors import StalldError

BACKLOG = 128
MODE = 0o660
DIRECTORY_MODE = 0o750


class SocketError(StalldError):
    """Nobody can connect; the message says why and what to do."""


class Listener(NamedTuple):
    """The socket, and which file it is."""

    socket: socket.socket
    path: str
    device: int
    inode: int

    def is_in_place(self) -> bool:
        """Whether its name still leads to it."""
        try:
            found = os.lstat(self.path)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == (self.device, self.inode)

    def close(self) -> None:
        """Listen no more, and remove the name if it still is ours."""
        if self.is_in_place():
            with suppress(OSError):
                os.unlink(self.path)
        self.socket.close()


def listen(path: str, group: str) -> Listener:
    """Listen at ``path``, for our own user and ``group``.

    Until it listens nobody can connect, whatever the mode of the file: so there is no moment
    in which others could.

    Raises:
        SocketError: it cannot be; nothing that is not ours has been touched.
    """
    gid = _gid(group)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        _provide_directory(path, gid)
        _clear(path)
        listener.bind(path)
        try:
            if gid is not None:
                # Not root and not of the group: our own group then.
                with suppress(PermissionError):
                    os.chown(path, -1, gid)
            os.chmod(path, MODE)
            found = os.lstat(path)
            listener.listen(BACKLOG)
        except OSError:
            os.unlink(path)
            raise
    except OSError as error:
        listener.close()
        raise SocketError(f"{path}: cannot listen there: {_remedy(error)}") from error
    except SocketError:
        listener.close()
        raise
    return Listener(listener, path, found.st_dev, found.st_ino)


def _gid(group: str) -> int | None:
    if not group:
        return None
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        return None


def _provide_directory(path: str, gid: int | None) -> None:
    directory = os.path.dirname(path)
    if os.path.isdir(directory):
        return
    if path != DEFAULT_SOCKET or os.geteuid() != 0:
        raise SocketError(
            f"{path}: its directory is missing; create {directory} "
            "(systemd does with RuntimeDirectory=), or set live.socket to another path"
        )
    os.mkdir(directory, DIRECTORY_MODE)
    os.chmod(directory, DIRECTORY_MODE)  # Whatever our umask is.
    if gid is not None:
        os.chown(directory, -1, gid)


def _clear(path: str) -> None:
    """Remove the socket of a daemon that is gone; nothing else."""
    try:
        kind = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise SocketError(
            f"{path}: something is there that is no socket; "
            "remove it, or set live.socket to another path"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            with suppress(FileNotFoundError):
                os.unlink(path)
            return
        except FileNotFoundError:
            return
        except OSError as error:
            # EAGAIN: it is served, its backlog is full. EPROTOTYPE: by something else.
            if error.errno not in (errno.EAGAIN, errno.EPROTOTYPE):
                raise
    raise SocketError(
        f"{path}: another process listens there; stop it, or set live.socket to another path"
    )


def _remedy(error: OSError) -> str:
    if isinstance(error, PermissionError):
        return f"{error.strerror}; our user must be able to write to the directory"
    return f"{error.strerror}; correct that, or set live.socket to another path"
