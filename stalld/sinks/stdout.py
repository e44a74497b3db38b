"""Events on standard output: a pipe, the journal, a terminal, a file."""

from __future__ import annotations

import errno
import os
import socket
import stat
from abc import abstractmethod

from stalld.events import Event
from stalld.sinks.sink import Context, DescriptorSink, Sink
from stalld.sinks.text import render
from stalld.sinks.thread import RETRY_S, ThreadSink

GONE = "nobody reads standard output any more"
_BROKEN = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EBADF, errno.EIO)


def open_stdout(fd: int, style: str, max_bytes: int, context: Context) -> Sink:
    """The sink for the descriptor that is our standard output.

    Args:
        style: ``json`` or ``text``.
    """
    kind = os.fstat(fd).st_mode
    if stat.S_ISSOCK(kind):
        return _SocketStdout(os.dup(fd), style, max_bytes, context)
    if not stat.S_ISREG(kind):
        try:
            # O_NONBLOCK belongs to what is open, which our callers share: so open it once more.
            own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError:
            pass  # Another user's, or nobody reads it: writing tells.
        else:
            return _PipeStdout(own, style, max_bytes, context)
    return _BlockingStdout(os.dup(fd), style, max_bytes, context)


def _encode(style: str, line: bytes, event: Event) -> bytes:
    return line if style == "json" else render(event).encode() + b"\n"


class _DescriptorStdout(DescriptorSink):
    """Never waits: see :class:`DescriptorSink`."""

    def __init__(self, fd: int, style: str, max_bytes: int, context: Context) -> None:
        super().__init__("stdout", max_bytes, context)
        self._fd = fd
        self._style = style
        self._opened = False
        self._failed = False
        self._gone = False

    def open(self) -> None:
        """Write from now on."""
        self._opened = True
        self.flush()

    def encode(self, line: bytes, event: Event) -> bytes:
        """JSON, or text for people."""
        return _encode(self._style, line, event)

    def fileno(self) -> int:
        """The descriptor, while anybody reads it."""
        return self._fd if self._opened and not self._gone else -1

    @property
    def fatal(self) -> bool:
        """Whether nobody reads it any more."""
        return self._gone

    def write_some(self) -> bool:
        """Write once."""
        try:
            self.outbox.advance(self.write(self.outbox.chunk()))
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _BROKEN:
                self.in_trouble(f"standard output: {error.strerror}")
                self._failed = True
                return False
            self._gone = True
            self.in_trouble(GONE)
        else:
            self._failed = False
            self.recovered("events are written again")
        return True

    def wait(self) -> None:
        """Until it takes more, or, after a failure, for a while."""
        if self._failed:
            self.context.loop.call_later(RETRY_S, self.go_on)
        else:
            super().wait()

    @abstractmethod
    def write(self, data: bytes) -> int:
        """Write some of it; how many bytes.

        Raises:
            BlockingIOError: nothing can be written now.
            OSError: nothing could be written.
        """

    async def close(self, deadline: float) -> None:
        """Write what waits."""
        await self.drain(deadline)
        self.stop_waiting()
        os.close(self._fd)
        self._gone = True


class _PipeStdout(_DescriptorStdout):
    def write(self, data: bytes) -> int:
        return os.write(self._fd, data)


class _SocketStdout(_DescriptorStdout):
    """The journal's socket: others may have it too, so it is not made non-blocking."""

    def __init__(self, fd: int, style: str, max_bytes: int, context: Context) -> None:
        super().__init__(fd, style, max_bytes, context)
        self._blocking = os.get_blocking(fd)
        self._socket = socket.socket(fileno=os.dup(fd))

    def wait(self) -> None:
        super().wait()
        # libuv makes whatever it watches non-blocking.
        os.set_blocking(self._fd, self._blocking)

    def write(self, data: bytes) -> int:
        return self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    async def close(self, deadline: float) -> None:
        await super().close(deadline)
        self._socket.close()


class _BlockingStdout(ThreadSink):
    """A file that output was redirected to, or a pipe that we may not open once more."""

    def __init__(self, fd: int, style: str, max_bytes: int, context: Context) -> None:
        super().__init__("stdout", max_bytes, context)
        self._fd = fd
        self._style = style
        self._gone = False

    def encode(self, line: bytes, event: Event) -> bytes:
        return _encode(self._style, line, event)

    @property
    def fatal(self) -> bool:
        return self._gone

    def write(self, data: bytes) -> int:
        return os.write(self._fd, data)

    def explain(self, error: OSError) -> str:
        self._gone = error.errno in _BROKEN
        return GONE if self._gone else f"standard output: {error.strerror}"

    def release(self) -> None:
        os.close(self._fd)
