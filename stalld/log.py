"""The daemon's own log, on standard error. It never waits for whoever reads that."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress
from typing import TextIO

import structlog
from structlog.typing import FilteringBoundLogger


class PatientStream:
    """What structlog prints to: a line that finds no room is left out, and counted.

    Args:
        fd: standard error; a regular file, or -1 when it is closed.
    """

    def __init__(self, fd: int) -> None:
        self.left_out = 0
        self._socket: socket.socket | None = None
        self._fd = fd
        self._own = False
        if fd < 0:
            return
        kind = os.fstat(fd).st_mode
        if stat.S_ISSOCK(kind):
            self._socket = socket.socket(fileno=os.dup(fd))
        elif not stat.S_ISREG(kind):
            # What is open is shared with others, so it is opened once more. Another user's, or
            # one that nobody reads, is taken as it is.
            with suppress(OSError):
                self._fd = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
                self._own = True

    def write(self, text: str) -> int:
        """Write a line if that can be done at once."""
        if self.left_out:
            text = f"[{self.left_out} lines left out]\n{text}"
        data = text.encode("utf-8", "backslashreplace")
        try:
            if self._socket is not None:
                self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            elif self._fd >= 0:
                os.write(self._fd, data)
        except OSError:
            self.left_out += 1
        else:
            self.left_out = 0
        return len(text)

    def flush(self) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Let go of what was opened besides the given descriptor."""
        if self._socket is not None:
            self._socket.close()
        elif self._own:
            os.close(self._fd)


def open_log(stream: TextIO | None) -> FilteringBoundLogger:
    """The log on this stream; None: it is closed, and nothing is logged."""
    logger: FilteringBoundLogger = structlog.wrap_logger(
        structlog.PrintLogger(PatientStream(-1 if stream is None else stream.fileno())),  # type: ignore[arg-type]
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.KeyValueRenderer(key_order=["timestamp", "level", "event"]),
        ],
    )
    return logger
