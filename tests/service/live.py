"""A live socket with events of the test's making, clients that talk to it, and real `tail`s."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from stalld import config
from stalld.sinks.live import LiveSink
from tests.service.surroundings import Loop, until

Event = dict[str, Any]

# The group's name must exist for a test that wants one.
ANY_GROUP = ""


class Server:
    """A :class:`LiveSink` in a loop of its own, fed from the test's thread under a lock."""

    def __init__(self, path: Path, **live: Any) -> None:
        self.path = path
        self._live = config.Live(**{"socket": str(path), "group": ANY_GROUP} | live)
        self._surroundings = Loop()
        self._lock = threading.Lock()  # As the reader's.
        self.put_s: list[float] = []
        self.lines: list[bytes] = []

    def __enter__(self) -> Self:
        self._surroundings.__enter__()
        self.troubles = self._surroundings.troubles
        self._closed = False
        self.sink = LiveSink(
            self._live, self._surroundings.context, lambda: {"instance": "run", "version": "9.9"}
        )
        self._surroundings._publish = self._put
        self.call(self.sink.open)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.close(0.0)
        finally:
            self._surroundings.__exit__()

    def close(self, within_s: float = 1.0) -> None:
        """As the service does at its end."""
        if not self._closed:
            self._closed = True
            self._surroundings.close(self.sink, within_s)

    def call(self, function: Callable[[], Any]) -> Any:
        """Call it in the loop."""
        return self._surroundings.call(function)

    @property
    def clients(self) -> int:
        """How many get events."""
        return self.sink.clients

    def _put(self, line: bytes, event: Event) -> None:
        with self._lock:
            begun = time.perf_counter()
            self.sink.put(line, event)
            self.sink.flush()
            self.put_s.append(time.perf_counter() - begun)
        self.lines.append(line)

    def emit(self, event: str = "records_lost", level: str = "warning", **fields: Any) -> None:
        """One event: a lost record with its number in `count`, unless said otherwise."""
        if event == "records_lost":
            fields = {"cpu": 0, "count": len(self.lines)} | fields
        self._surroundings.emitter.emit(event, level, fields)


class Client:
    """A client as a program would write it."""

    def __init__(self, path: Path, request: Any = None, *, timeout_s: float = 10.0) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self._text = b""
        try:
            # Not with a timeout: a socket that does not block is not let wait for its turn.
            self.socket.connect(str(path))
            self.socket.settimeout(timeout_s)
            if request is not None:
                self.send(request)
        except BaseException:
            self.socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, request: Any) -> None:
        """A request, or bytes that are none."""
        line = request if isinstance(request, bytes) else json.dumps(request).encode() + b"\n"
        self.socket.sendall(line)

    def line(self) -> Event | None:
        """The next line; None: the other side has hung up."""
        while b"\n" not in self._text:
            try:
                data = self.socket.recv(1 << 20)
            except ConnectionResetError:
                data = b""
            if not data:
                return None
            self._text += data
        line, _, self._text = self._text.partition(b"\n")
        parsed: Event = json.loads(line)
        return parsed

    def lines(self, count: int) -> list[Event]:
        """The next so many."""
        return [line for line in (self.line() for _ in range(count)) if line is not None]

    def nothing_comes(self, within_s: float = 0.2) -> bool:
        """Whether no line comes."""
        return b"\n" not in self._text and not select.select([self.socket], [], [], within_s)[0]


def asked(server: Server, **request: Any) -> tuple[Client, Event]:
    """A client that is served, and the hello it got."""
    client = Client(server.path, request)
    hello = client.line()
    assert hello is not None
    assert "error" not in hello
    return client, hello


class Tail:
    """A real ``softirq-stalld tail`` whose output is read all the time."""

    def __init__(self, path: Path, *arguments: str, **popen: Any) -> None:
        self._command = [*TAIL, "--socket", str(path), *arguments]
        self._popen = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | popen
        self.output = b""
        self.errors = b""

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(self._command, **self._popen)
        self._threads = [
            threading.Thread(target=self._read, args=(name, stream), daemon=True)
            for name, stream in (("output", self.process.stdout), ("errors", self.process.stderr))
            if stream is not None
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait()
        for thread in self._threads:
            thread.join()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()

    def _read(self, name: str, stream: Any) -> None:
        while data := os.read(stream.fileno(), 1 << 20):
            setattr(self, name, getattr(self, name) + data)

    def wait_for(self, text: bytes, timeout_s: float = 10.0) -> None:
        """Until it has said that on either stream."""
        until(lambda: text in self.output + self.errors, timeout_s)

    def end(self, number: int = signal.SIGINT) -> int:
        """Send a signal; the exit status."""
        self.process.send_signal(number)
        return self.process.wait(10)


TAIL = [sys.executable, "-m", "stalld.cli", "tail"]


class Terminal:
    """A ``tail`` on a pseudo-terminal of its own, as a person starts it."""

    def __init__(
        self,
        path: Path,
        *arguments: str,
        size: tuple[int, int] = (100, 30),
        environment: Mapping[str, str] = {},
    ) -> None:
        self.output = b""
        self._size = size
        self._command = [*TAIL, "--socket", str(path), *arguments]
        known = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
        self._environment = known | {"TERM": "xterm-256color", "TZ": "UTC", **environment}

    def __enter__(self) -> Self:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.execve(self._command[0], self._command, self._environment)
        self.resize(*self._size)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        self._status: int | None = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        self._thread.join()
        os.close(self._fd)

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # EIO: nobody has the other end any more.
            while data := os.read(self._fd, 1 << 16):
                self.output += data

    def resize(self, columns: int, rows: int) -> None:
        """As a person drags the window."""
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def type(self, keys: bytes) -> None:
        """On the keyboard."""
        os.write(self._fd, keys)

    def wait_for(self, text: str, timeout_s: float = 10.0) -> None:
        """Until that was written."""
        until(lambda: text.encode() in self.output, timeout_s)

    def wait(self) -> int:
        """Until it ends; the exit status."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
                self._thread.join()
                return self._status
            time.sleep(0.01)
        raise AssertionError("it does not end")

    @property
    def escapes(self) -> set[bytes]:
        """All control sequences and control characters, numbers in them left out."""
        found = re.findall(
            rb"\x1b(?:\[[0-9;?]*.|[^\[])|[\x00-\x1f\x7f]|\xc2[\x80-\x9f]", self.output
        )
        return {re.sub(rb"[0-9;]+", b"N", escape) for escape in found}
