"""The client's end of the live socket. Blocking sockets, so that it starts fast."""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from typing import Any, NamedTuple

import orjson

from stalld.errors import StalldError
from stalld.live_request import PROTOCOL
from stalld.sinks.text import safe

MAX_LINE_BYTES = 8 << 20
ANSWER_S = 5.0
"""So long the daemon may take to answer."""
_CHUNK_BYTES = 262_144


class ConnectError(StalldError):
    """There is no daemon to talk to; the message says what to do."""


class LostError(Exception):
    """The daemon hung up."""


class Hello(NamedTuple):
    """The first line of an answer."""

    line: bytes
    fields: dict[str, Any]

    @property
    def instance(self) -> str:
        """Which run of the daemon this is."""
        return str(self.fields["instance"])


class Lines:
    """Cuts a stream into lines. What is longer than ``most`` bytes is left out, and counted."""

    def __init__(self, most: int = MAX_LINE_BYTES) -> None:
        self._most = most
        self._rest = bytearray()
        self._skipping = False
        self.skipped = 0

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that are whole now, each with its newline."""
        *whole, rest = data.split(b"\n")
        lines = []
        for part in whole:
            self._add(part)
            if not self._skipping:
                lines.append(bytes(self._rest) + b"\n")
            self._rest.clear()
            self._skipping = False
        self._add(rest)
        return lines

    def _add(self, part: bytes) -> None:
        if self._skipping:
            return
        if len(self._rest) + len(part) > self._most:
            self._skipping = True
            self.skipped += 1
            self._rest = bytearray()  # Gives the memory back.
        else:
            self._rest += part


class Connection:
    """Connected, asked, answered.

    Raises:
        ConnectError: there is no daemon, or it does not want us.
    """

    def __init__(self, path: str, request: dict[str, Any]) -> None:
        self._path = path
        self.lines = Lines()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._ready: list[bytes] = []
        try:
            # Not settimeout(): a socket that does not block is not let wait for its turn.
            self._socket.setsockopt(
                socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(ANSWER_S), 0)
            )
            self._connect()
            self._socket.settimeout(ANSWER_S)
            self.hello = self._ask(request)
            self._socket.setblocking(False)
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """For poll()."""
        return self._socket.fileno()

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def read(self) -> list[bytes]:
        """The lines that have come; maybe none.

        Raises:
            LostError: there will be no more.
        """
        if self._ready:
            ready, self._ready = self._ready, []
            return ready
        try:
            data = self._socket.recv(_CHUNK_BYTES)
        except BlockingIOError:
            return []
        except OSError as error:
            raise LostError from error
        if not data:
            raise LostError
        return self.lines.feed(data)

    @property
    def has_lines(self) -> bool:
        """Whether lines wait that poll() knows nothing of."""
        return bool(self._ready)

    def _connect(self) -> None:
        try:
            self._socket.connect(self._path)
        except FileNotFoundError:
            raise self._error(
                "there is no such socket: is the service running? "
                "Look at `systemctl status softirq-stalld`, and at live.socket in its configuration"
            ) from None
        except PermissionError:
            raise self._error(
                "permission denied: only root and members of the socket's group may connect; "
                "have yourself added to it (`usermod --append --groups softirq-stalld USER`), "
                "and log in again"
            ) from None
        except ConnectionRefusedError:
            raise self._error(
                "nobody listens there, the service that did is gone: "
                "look at `systemctl status softirq-stalld`, and start it again"
            ) from None
        except (BlockingIOError, TimeoutError):
            raise self._error(
                "the service lets nobody in: look at `systemctl status softirq-stalld`"
            ) from None
        except OSError as error:
            raise self._error(
                f"{error.strerror or error}; name the live socket of the service with --socket"
            ) from None

    def _ask(self, request: dict[str, Any]) -> Hello:
        try:
            with suppress(BrokenPipeError):  # It may have said why.
                self._socket.sendall(orjson.dumps(request) + b"\n")
            while not self._ready:
                data = self._socket.recv(_CHUNK_BYTES)
                if not data:
                    raise self._error("the service hung up without an answer; try again")
                self._ready = self.lines.feed(data)
                if self.lines.skipped:
                    raise self._not_ours()
        except TimeoutError:
            raise self._error(
                "the service does not answer: look at `systemctl status softirq-stalld`"
            ) from None
        except OSError as error:
            raise self._error(f"{error.strerror}; try again") from None
        return self._hello(self._ready.pop(0))

    def _hello(self, line: bytes) -> Hello:
        try:
            fields = orjson.loads(line)
        except orjson.JSONDecodeError:
            raise self._not_ours() from None
        if not isinstance(fields, dict):
            raise self._not_ours()
        if "error" in fields:
            raise self._error(f"the service refuses: {safe(fields['error'])[:500]}")
        if (
            not _is_flat(fields)
            or fields.get("live") != PROTOCOL
            or not isinstance(fields.get("instance"), str)
        ):
            raise self._not_ours()
        return Hello(line, fields)

    def _not_ours(self) -> ConnectError:
        return self._error(
            "what answers there is not a softirq-stalld that this version knows; "
            "name the right socket with --socket"
        )

    def _error(self, reason: str) -> ConnectError:
        return ConnectError(f"{safe(self._path)}: {reason}")


def _is_flat(value: Any, depth: int = 8) -> bool:
    """No deeper than anything that we would have to walk through."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return True
    return depth > 0 and all(_is_flat(item, depth - 1) for item in value)
