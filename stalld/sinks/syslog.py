"""Events as syslog messages (RFC 5424), over TCP or to a unix socket such as /dev/log."""

from __future__ import annotations

import errno
import itertools
import os
import socket

import orjson

from stalld import config, values
from stalld.events import Event
from stalld.sinks.connection import ConnectionSink, dial_tcp
from stalld.sinks.outbox import Gap
from stalld.sinks.resolve import Resolver
from stalld.sinks.sink import Context

LISTEN_S = 0.25
RETRY_S = 0.05
"""When the kernel is short of buffers it does not tell when there are some again."""
_SEVERITIES = {"error": 3, "warning": 4, "info": 6, "debug": 7}
_MAX_SEQUENCE = 2_147_483_647
_MAX_HOST = 255
_MAX_MSGID = 32


class Format:
    """Makes RFC 5424 messages of events.

    Args:
        pid: ours.
    """

    def __init__(self, facility: str, app_name: str, pid: int) -> None:
        self._priority = values.FACILITIES.index(facility) * 8
        self._sender = f"{app_name} {pid}"
        self._numbers = itertools.count()  # One step: two threads never get the same.

    def message(self, line: bytes, event: Event) -> bytes:
        """The message for an event; ``line`` is its JSON, with the newline.

        MSG has the mark of structured text, so that rsyslog's mmjsonparse takes it.
        """
        number = next(self._numbers) % _MAX_SEQUENCE + 1
        header = (
            f"<{self._priority + _SEVERITIES.get(event['level'], 6)}>1 {event['timestamp']} "
            f"{_word(event['host'], _MAX_HOST)} {self._sender} {_word(event['event'], _MAX_MSGID)} "
            f'[meta sequenceId="{number}"] @cee: '
        )
        return header.encode() + line.rstrip(b"\n")


def _word(text: str, length: int) -> str:
    return "".join(c if "!" <= c <= "~" else "?" for c in text[:length]) or "-"


class SyslogSink(ConnectionSink):
    """Sends messages to a syslog server, each with its length before it (RFC 6587, 3.4.1).

    A unix socket may be of datagrams: there each is a message, without the length.
    """

    def __init__(self, settings: config.SyslogSink, context: Context) -> None:
        self._path = settings.address if settings.address.startswith("/") else ""
        super().__init__(
            f"syslog {settings.address}",
            settings.address,
            settings.queue_kib * 1024,
            context,
            0.0 if self._path else LISTEN_S,
        )
        self._resolver = None if self._path else Resolver(*values.split_address(settings.address))
        self._format = Format(settings.facility, settings.app_name, os.getpid())
        self._datagrams = False
        self._starved = False
        self._too_long_told = False

    def encode(self, line: bytes, event: Event) -> bytes:
        """A message with its length before it."""
        message = self._format.message(line, event)
        return b"%d %b" % (len(message), message)

    def tell_gap(self, gap: Gap) -> bytes:
        """A message where some were dropped."""
        line = super().tell_gap(gap)
        return self.encode(line, orjson.loads(line))

    async def dial(self) -> socket.socket:
        """Connect to the server, in whichever way its socket takes."""
        self._datagrams = False
        if self._resolver is not None:
            return await dial_tcp(self._resolver, self.place)
        try:
            connection = _dial_unix(self._path, socket.SOCK_DGRAM)
            self._datagrams = True
        except OSError as error:
            if error.errno != errno.EPROTOTYPE:
                raise
            connection = _dial_unix(self._path, socket.SOCK_STREAM)
        return connection

    def send(self, connection: socket.socket) -> None:
        """Write once and advance the outbox."""
        if not self._datagrams:
            super().send(connection)
            return
        data = self.outbox.head()
        message = data[data.index(b" ") + 1 :]
        try:
            connection.send(message, socket.MSG_NOSIGNAL)
        except OSError as error:
            if error.errno == errno.EMSGSIZE:
                self._skip(len(message))
                return
            if error.errno == errno.ENOBUFS:
                self._starved = True
                raise BlockingIOError from None
            raise
        self.outbox.advance(len(data))

    def receive(self, connection: socket.socket) -> bool:
        """Take what the server says and forget it; False: it has hung up."""
        return super().receive(connection) or self._datagrams

    def _skip(self, size: int) -> None:
        self.outbox.skip()
        if not self._too_long_told:
            self._too_long_told = True
            self.in_trouble(
                f"{self.place} takes no message of {size} bytes: such are dropped and counted; "
                "set sinks.syslog.address to a TCP port of the server"
            )

    def wait(self) -> None:
        if self._starved:
            self._starved = False
            self.context.loop.call_later(RETRY_S, self.go_on)
        else:
            super().wait()


def _dial_unix(path: str, kind: socket.SocketKind) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, kind)
    try:
        connection.setblocking(False)
        connection.connect(path)
    except OSError:
        connection.close()
        raise
    return connection
