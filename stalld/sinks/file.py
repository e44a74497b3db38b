"""Events in a file: appended, opened again for logrotate, patient with a full disk."""

from __future__ import annotations

import errno
import os
import stat

from stalld import config
from stalld.sinks.sink import Context
from stalld.sinks.thread import ThreadSink

_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
_MODE = 0o640

_REMEDIES = {
    errno.ENOSPC: "the disk is full: make room",
    errno.EDQUOT: "the quota is used up: make room",
    errno.EFBIG: "the file is as large as files may be: rotate it",
    errno.EROFS: "the file system is read-only: under systemd name a directory below "
    "/var/log/softirq-stalld, or add it to ReadWritePaths=",
    errno.EACCES: "let our user write there, or name another file",
    errno.EPERM: "let our user write there, or name another file",
    errno.ENOENT: "make the directory",
    errno.ENOTDIR: "name a file in a directory",
    errno.EISDIR: "name a file, not a directory",
}


class FileSink(ThreadSink):
    """Appends JSON lines to one regular file.

    A file that ends in the middle of a line (of a writer that was killed) gets its newline first.
    """

    def __init__(self, settings: config.FileSink, context: Context) -> None:
        super().__init__(f"file {settings.path}", settings.queue_kib * 1024, context)
        self._path = settings.path
        self._fd = -1
        self._again = False

    def open(self) -> None:
        """Start; the file is there at once, also while there is no event."""
        super().open()
        self.flush()

    def reopen(self) -> None:
        """The file may have been moved away: open what has its name now."""
        self._again = True
        self.flush()

    def prepare(self) -> None:
        """Have the file open."""
        if self._again:
            self._again = False
            self.release()
        if self._fd < 0:
            self._fd = _open(self._path)
            # What was begun in another file is written whole in this one.
            self.outbox.restart()
            self.recovered("the file is open")

    def write(self, data: bytes) -> int:
        """Append."""
        return os.write(self._fd, data)

    def explain(self, error: OSError) -> str:
        """What the failure means and what to do."""
        reason = error.strerror or str(error)
        remedy = _REMEDIES.get(error.errno or 0, "see to the file system")
        return f"{self._path}: {reason}; {remedy}"

    def release(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _open(path: str) -> int:
    # Not to wait for the other end of a FIFO.
    fd = os.open(path, _FLAGS, _MODE)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        if status.st_size and os.pread(fd, 1, status.st_size - 1) != b"\n":
            os.write(fd, b"\n")
    except OSError:
        os.close(fd)
        raise
    return fd
