"""The life of ``softirq-stalld tail``: connect, show, reconnect, until told to stop."""

from __future__ import annotations

import errno
import os
import select
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

import orjson

from stalld.errors import StalldError, UsageError
from stalld.live_request import MAX_REQUEST_BYTES, SINCE_START
from stalld.sinks.text import escaped
from stalld.tail.client import ConnectError, Connection, LostError
from stalld.tail.screen import (
    Display,
    JsonDisplay,
    JsonTerminalDisplay,
    Output,
    Screen,
    TextDisplay,
    stats_lines,
)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 2.0
STDIN, STDOUT, STDERR = 0, 1, 2
_SPARE_BYTES = 100  # for the instance
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Options:
    """What the command line asked for.

    Attributes:
        filter: as the protocol has it.
        history: so many events first; None: all since the start.
    """

    socket: str
    json: bool = False
    filter: Mapping[str, Any] = field(default_factory=dict)
    history: int | None = 0
    stats: bool = False


class _Stop(BaseException):
    """A signal says so. It may come anywhere, also while somebody does not read our output."""


class _NobodyReads(Exception):
    """Of our standard output."""


def run(options: Options, environment: Mapping[str, str] = os.environ) -> int:
    """Show events until a signal, or until nobody reads them.

    Returns:
        0

    Raises:
        StalldError: there is no daemon to begin with, or output cannot be written.
    """
    _occupy()
    try:
        for number in _SIGNALS:
            signal.signal(number, _stop)
        _tail(options, environment)
    except (_Stop, _NobodyReads):
        return 0
    except OSError as error:
        # EIO: the terminal is gone.
        if error.errno in (errno.EPIPE, errno.ECONNRESET, errno.EIO):
            return 0
        raise StalldError(f"standard output: {error.strerror}; give it room") from None
    finally:
        # Each drawing leaves the terminal as it was; one that was cut off does not.
        if not (options.json or options.stats):
            _restore(environment)
    return 0


def _stop(*_: object) -> NoReturn:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)  # A second one forces.
    raise _Stop


def _occupy() -> None:
    """What is closed must not become the connection: notes would be written to it."""
    try:
        os.fstat(STDOUT)
    except OSError:
        raise UsageError("standard output is closed: events have nowhere to go") from None
    for fd in (STDIN, STDERR):
        try:
            os.fstat(fd)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != fd:
                os.dup2(null, fd)
                os.close(null)


def _is_smart(environment: Mapping[str, str]) -> bool:
    return os.isatty(STDOUT) and environment.get("TERM", "") not in ("", "dumb")


def _restore(environment: Mapping[str, str]) -> None:
    if not _is_smart(environment):
        return
    # Autowrap on; colours, if there were any, off.
    text = "\x1b[?7h" + ("" if environment.get("NO_COLOR") else "\x1b[0m")
    with suppress(OSError):
        os.write(STDOUT, text.encode())


def _display(options: Options, environment: Mapping[str, str]) -> Display:
    output, errors = Output(STDOUT), Output(STDERR)
    terminal = os.isatty(STDOUT)
    if options.json:
        return (JsonTerminalDisplay if terminal else JsonDisplay)(output, errors)
    if not terminal:
        return TextDisplay(output, errors)
    smart = _is_smart(environment)
    return Screen(output, errors, colour=smart and not environment.get("NO_COLOR"), moves=smart)


def _tail(options: Options, environment: Mapping[str, str]) -> None:
    if options.stats:
        connection = Connection(options.socket, {"stats": True})
        connection.close()
        hello = connection.hello
        text = "".join(f"{line}\n" for line in stats_lines(hello.fields))
        # Whatever answers at the socket may be in that line.
        line = hello.line
        if os.isatty(STDOUT):
            line = escaped(line.rstrip(b"\n")) + b"\n"
        Output(STDOUT).write(line if options.json else text.encode(errors="replace"))
        return
    Tail(options, _display(options, environment)).run()


class Tail:
    """One connection after the other."""

    def __init__(self, options: Options, display: Display) -> None:
        self._options = options
        self._display = display
        self._instance: str | None = None
        self._skipped = 0
        self._poll = select.poll()
        # No events asked for: it still tells when nobody reads any more.
        self._poll.register(STDOUT, 0)
        if isinstance(display, Screen):
            if _is_foreground_terminal():
                self._poll.register(STDIN, select.POLLIN)
            # We were stopped, and the shell has written something.
            signal.signal(signal.SIGCONT, lambda *_: display.disturb())

    def run(self) -> NoReturn:
        """Until an exception ends it.

        Raises:
            ConnectError: already the first connection fails.
        """
        history = SINCE_START if self._options.history is None else self._options.history
        request = self._request(history)
        if len(orjson.dumps(request)) > MAX_REQUEST_BYTES - _SPARE_BYTES:
            raise UsageError("the filters are too long, all together; give fewer or shorter ones")
        connection = Connection(self._options.socket, request)
        while True:
            self._instance = connection.hello.instance
            try:
                self._follow(connection)
            except LostError:
                connection.close()
            self._display.freeze()
            self._display.note(
                f"lost the service at {self._options.socket!r}; trying again until it is back"
            )
            before = self._instance
            connection = self._connect_again()
            self._display.note(
                "connected again; events of the time between are missing"
                if connection.hello.instance == before
                else "connected again, to a new run of the service"
            )

    def _request(self, history: int | str) -> dict[str, Any]:
        return {
            "filter": dict(self._options.filter),
            "history": history,
            "instance": self._instance,
        }

    def _connect_again(self) -> Connection:
        pause_s = FIRST_PAUSE_S
        while True:
            self._wait(None, pause_s)
            try:
                return Connection(self._options.socket, self._request(0))
            except ConnectError:
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _follow(self, connection: Connection) -> None:
        self._skipped = 0
        self._poll.register(connection, select.POLLIN)
        try:
            while True:
                if not connection.has_lines and not self._wait(connection, self._display.tick_s):
                    self._display.tick()
                    continue
                for line in connection.read():
                    self._show(line)
                if connection.lines.skipped > self._skipped:
                    self._skipped = connection.lines.skipped
                    self._display.note("a line is left out that is far too long")
        finally:
            self._poll.unregister(connection)

    def _show(self, line: bytes) -> None:
        try:
            event = orjson.loads(line)
        except orjson.JSONDecodeError:
            event = None
        if not isinstance(event, dict):
            self._display.note("a line is left out that is no event")
            return
        try:
            self._display.show(line, event)
        except RecursionError:
            self._display.note("an event is left out that this version does not understand")

    def _wait(self, connection: Connection | None, timeout_s: float | None) -> bool:
        """Until the connection has something, at most so long; whether it has."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_s = None if until is None else max(until - time.monotonic(), 0.0)
            found = dict(self._poll.poll(None if left_s is None else left_s * 1000))
            if found.pop(STDOUT, 0):
                raise _NobodyReads
            if STDIN in found:
                self._read_keys()
            if connection is not None and connection.fileno() in found:
                return True
            if until is not None and time.monotonic() >= until:
                return False

    def _read_keys(self) -> None:
        """Somebody pressed Enter: the lines on the screen are no more where they were."""
        try:
            typed = os.read(STDIN, 4096) if _is_foreground_terminal() else b""
        except OSError:
            typed = b""
        if not typed:
            self._poll.unregister(STDIN)
        self._display.disturb()


def _is_foreground_terminal() -> bool:
    try:
        return os.isatty(STDIN) and os.tcgetpgrp(STDIN) == os.getpgrp()
    except OSError:
        return False
