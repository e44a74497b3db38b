"""What sinks have in common that write to a connection: made again for ever, nothing lost by us."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
import struct
import sys
import termios
import time
from abc import abstractmethod
from contextlib import suppress

from stalld.events import Event
from stalld.sinks.outbox import Stats
from stalld.sinks.resolve import Resolver
from stalld.sinks.sink import Context, DescriptorSink

CONNECT_S = 10.0
"""So long a name may take to resolve, and then each address to answer."""
LOOK_EVERY_S = 1.0
"""How often to look what the other side has acknowledged; putting a line looks too."""
STUCK_S = 10.0
"""When so long nothing is acknowledged of what waits, it is told."""
SILENT_S = 30.0
"""A peer that so long does not answer what it is sent is gone. This is looked after here and not
by TCP_USER_TIMEOUT, which would also break the connection to a collector that answers and only
has no room for so long."""
STEADY_S = 10.0
"""When a connection has lasted so long, the next is tried without much delay again."""
_CHUNK_BYTES = 65_536
_RECEIVE_BYTES = 4096
# The kernel gives up on a peer that is silent for a minute, while no data waits.
_KEEPALIVE = (
    (socket.TCP_KEEPIDLE, 30),
    (socket.TCP_KEEPINTVL, 10),
    (socket.TCP_KEEPCNT, 3),
)
# TIOCOUTQ is SIOCOUTQ for a socket. TCP: what was written less what was acknowledged (also after
# a reset, which leaves both as they were). Unix: at least what has not been read.
_OUTQ = termios.TIOCOUTQ

# struct tcp_info (include/uapi/linux/tcp.h): retransmits and window probes not answered, and
# milliseconds since anything was acknowledged.
_TCP_INFO = struct.Struct("=2xBB52xI")

_FIREWALL = "does a firewall, or IPAddressDeny= in our systemd unit, forbid it?"
_REMEDIES = {
    errno.ECONNREFUSED: "is the collector running?",
    errno.ECONNRESET: "is the collector running?",
    errno.EPIPE: "is the collector running?",
    errno.ENOENT: "is the syslog server running, and is this its socket?",
    errno.EHOSTUNREACH: "is the address right, and the host up?",
    errno.ENETUNREACH: "is the address right, and is there a route to it?",
    errno.EADDRNOTAVAIL: "is the address right, and is there a route to it?",
    errno.ETIMEDOUT: f"is the host up? If so, {_FIREWALL}",
    errno.EPERM: _FIREWALL,
    errno.EAFNOSUPPORT: "the systemd unit lets nothing out: add a drop-in with "
    "RestrictAddressFamilies=AF_INET AF_INET6 and IPAddressAllow=ADDRESS",
    errno.EPROTOTYPE: "is this the socket of a syslog server?",
    errno.EACCES: "may our user write there? If so, " + _FIREWALL,
    errno.EAGAIN: "the server takes no more connections: is it stuck?",
}


class LostError(Exception):
    """There is no connection, or no more: what happened, and what to look at."""


class Backoff:
    """How long to wait before trying again: doubles each time, by a fourth more or less."""

    LEAST_S = 0.25
    MOST_S = 30.0

    def __init__(self) -> None:
        self._next_s = self.LEAST_S

    def next_s(self) -> float:
        """The next wait in seconds."""
        wait_s = self._next_s
        self._next_s = min(2 * wait_s, self.MOST_S)
        return wait_s * (0.75 + os.urandom(1)[0] / 510)

    def reset(self) -> None:
        """Begin anew: all was well for a while."""
        self._next_s = self.LEAST_S


class ConnectionSink(DescriptorSink):
    """Keeps a connection and writes lines to it.

    Lines that the kernel took are kept until the other side's kernel has them, and written once
    more on the next connection. Threads other than the loop's only write; the loop connects,
    watches and closes. Whoever uses the socket holds ``_io``, so that it is not closed meanwhile.

    Args:
        place: the other side's address.
        listen_s: A new connection is only listened to at first: who accepts and hangs up at
            once, such as a proxy that has no server behind it, shall not get events that nobody
            will ever see.
    """

    def __init__(
        self, name: str, place: str, max_bytes: int, context: Context, listen_s: float
    ) -> None:
        super().__init__(name, max_bytes, context)
        self.place = place
        self._listen_s = listen_s
        self._kept = f"Events are kept up to {max_bytes // 1024} KiB"
        self._socket: socket.socket | None = None
        self._fd = -1
        self._lost: asyncio.Future[LostError] | None = None
        self._task: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        self._closing = False
        self._trouble_since = 0.0

    # What kinds of connections differ in.

    @abstractmethod
    async def dial(self) -> socket.socket:
        """A new connection, not blocking.

        Raises:
            OSError, LostError: there is none to be had.
        """

    def send(self, connection: socket.socket) -> None:
        """Write once and advance the outbox.

        Raises:
            BlockingIOError: the other side takes no more now.
            OSError, LostError: the connection is of no use any more.
        """
        data = self.outbox.chunk(_CHUNK_BYTES)
        self.outbox.hand_over(connection.send(data, socket.MSG_NOSIGNAL))

    def receive(self, connection: socket.socket) -> bool:
        """Take what the other side says and forget it; False: it has hung up.

        Raises:
            BlockingIOError: it says nothing.
            OSError, LostError: the connection is of no use any more.
        """
        return bool(connection.recv(_RECEIVE_BYTES))

    def hang_up(self, connection: socket.socket) -> None:
        """Tell the other side that no more will come."""
        connection.shutdown(socket.SHUT_WR)

    def explain(self, error: OSError) -> str:
        """What the error means and what to do."""
        number = errno.ETIMEDOUT if isinstance(error, TimeoutError) else error.errno or 0
        reason = os.strerror(number) if number > 0 else str(error)
        reason = reason[:1].lower() + reason[1:]
        remedy = _REMEDIES.get(number, "do the network and the collector work?")
        if number == errno.ECONNREFUSED:
            return f"{reason} by {self.place}: {remedy}"
        return f"{self.place}: {reason}: {remedy}"

    # What the service calls.

    def open(self) -> None:
        """Begin to connect."""
        self._task = self.context.loop.create_task(self._run())

    def reopen(self) -> None:
        """Try again at once, if there is no connection."""
        self._hurry.set()

    def put(self, line: bytes, event: Event) -> None:
        """Take one event; what was acknowledged meanwhile makes room first."""
        self._settle()
        super().put(line, event)

    def stats(self) -> Stats:
        """The counts, with what is acknowledged by now."""
        self._settle()
        return super().stats()

    async def close(self, deadline: float) -> None:
        """Deliver what waits, hang up."""
        if self._task is None:
            return
        loop = self.context.loop
        self._closing = True
        self._hurry.set()
        while (self.outbox or self.outbox.unacknowledged) and loop.time() < deadline:
            await asyncio.sleep(0.01)
            self._settle()
            self.flush()
        with self._io:
            if self._socket is not None:
                with suppress(OSError):
                    self.hang_up(self._socket)
        self._task.cancel()
        await asyncio.wait([self._task])
        self._task = None

    # Writing, in any thread.

    def fileno(self) -> int:
        """The descriptor, or -1 while there is no connection that works."""
        return self._fd

    def write_some(self) -> bool:
        """Write once."""
        assert self._socket is not None
        try:
            self.send(self._socket)
        except BlockingIOError:
            return False
        except (OSError, LostError) as error:
            self._lose(error)
        return True

    def _settle(self) -> None:
        """Look what the other side has; in any thread."""
        if not self.outbox.unacknowledged or not self._io.acquire(blocking=False):
            return
        try:
            self._count_acknowledged()
        finally:
            self._io.release()
        # Whoever came meanwhile with a line has left it to us.
        self.flush()

    def _count_acknowledged(self) -> None:
        """With ``_io`` held."""
        if self._socket is not None:
            answer = fcntl.ioctl(self._socket, _OUTQ, bytes(4))
            self.outbox.acknowledge(int.from_bytes(answer, sys.byteorder))

    def _lose(self, error: OSError | LostError) -> None:
        """The connection works no more. With ``_io`` held, in any thread."""
        self._fd = -1
        self.in_loop(self._tell_lost, self._lost, self._as_lost(error))

    def _as_lost(self, error: OSError | LostError) -> LostError:
        return error if isinstance(error, LostError) else LostError(self.explain(error))

    @staticmethod
    def _tell_lost(lost: asyncio.Future[LostError], error: LostError) -> None:
        if not lost.done():
            lost.set_result(error)

    # The life of connections, in the loop.

    async def _run(self) -> None:
        backoff = Backoff()
        loop = self.context.loop
        while True:
            began = loop.time()
            try:
                await self._connect()
                began = loop.time()
                error = await self._watch()
            except (OSError, LostError) as caught:
                error = self._as_lost(caught)
            finally:
                self._disconnect()
            self.in_trouble(f"{error} {self._kept}")
            if loop.time() - began >= STEADY_S:
                backoff.reset()
            wait_s = Backoff.LEAST_S if self._closing else backoff.next_s()
            self._hurry.clear()
            # Not wait_for(): up to Python 3.11 that may swallow being cancelled.
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._hurry.wait()

    async def _connect(self) -> None:
        loop = self.context.loop
        connection = await self.dial()
        fd = connection.fileno()
        lost: asyncio.Future[LostError] = loop.create_future()
        with self._io:
            self._socket = connection
            self._lost = lost
            self.outbox.restart()
        loop.add_reader(fd, self._readable)
        await asyncio.wait([lost], timeout=self._listen_s)
        if not lost.done():
            self._fd = fd
            self.flush()

    async def _watch(self) -> LostError:
        """Look after the connection until it is lost; why it was."""
        assert self._lost is not None
        loop = self.context.loop
        delivered, moved = self.stats().delivered, loop.time()
        silent = False
        while not self._lost.done():
            await asyncio.wait([self._lost], timeout=LOOK_EVERY_S)
            if self._lost.done():
                break
            now_delivered = self.stats().delivered
            self.flush()
            waits = self.outbox or self.outbox.unacknowledged
            if not waits or now_delivered > delivered:
                moved = loop.time()
                self.recovered(f"{self.place} takes events again, after {self._trouble_s():.1f} s")
            elif loop.time() - moved >= STUCK_S:
                reason = f"{self.place} takes no more events: is the collector stuck?"
                self.in_trouble(f"{reason} {self._kept}")
            delivered = now_delivered
            # Twice: a probe may be on its way just now.
            was_silent, silent = silent, self._is_silent()
            if was_silent and silent:
                return LostError(f"{self.place} answers no more: {_REMEDIES[errno.ETIMEDOUT]}")
        return self._lost.result()

    def _is_silent(self) -> bool:
        connection = self._socket
        if connection is None or connection.family == socket.AF_UNIX:
            return False
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        retransmits, probes, acknowledged_ms_ago = _TCP_INFO.unpack(info)
        return bool(retransmits or probes) and acknowledged_ms_ago >= SILENT_S * 1000

    def _readable(self) -> None:
        with self._io:
            if self._socket is None:
                return
            try:
                if not self.receive(self._socket):
                    raise LostError(
                        f"{self.place} closed the connection: is the collector running, "
                        "and does it take this kind of connection?"
                    )
            except BlockingIOError:
                pass
            except (OSError, LostError) as error:
                self.context.loop.remove_reader(self._socket.fileno())
                self._lose(error)
        self.flush()

    def _disconnect(self) -> None:
        connection = self._socket
        if connection is None:
            return
        self._fd = -1
        self.context.loop.remove_reader(connection.fileno())
        self.context.loop.remove_writer(connection.fileno())
        with self._io:
            self._waits = False
            self._count_acknowledged()
            self._socket = None
            connection.close()
            self.outbox.restart()

    def in_trouble(self, reason: str) -> None:
        """Say it once; from now on it lasts."""
        if not self._troubled:
            self._trouble_since = time.monotonic()
        super().in_trouble(reason)

    def _trouble_s(self) -> float:
        return time.monotonic() - self._trouble_since


async def dial_tcp(resolver: Resolver, place: str) -> socket.socket:
    """A TCP connection to the first address of a host that answers, not blocking.

    Raises:
        OSError: none does; of the last one.
        LostError: there is no such name.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(CONNECT_S):
            found = await resolver.addresses()
    except (socket.gaierror, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no host name"
        raise LostError(
            f"{place}: the name cannot be resolved: {reason}: is it right, and does DNS answer?"
        ) from None
    except TimeoutError:
        raise LostError(f"{place}: the name cannot be resolved: does DNS answer?") from None
    failure: OSError = OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    for family, kind, protocol, _, address in found:
        try:
            connection = socket.socket(family, kind, protocol)
        except OSError as error:
            failure = error
            continue
        try:
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE:
                connection.setsockopt(socket.IPPROTO_TCP, option, value)
            async with asyncio.timeout(CONNECT_S):
                await loop.sock_connect(connection, address)
        except OSError as error:  # TimeoutError is one.
            connection.close()
            failure = error
        except BaseException:
            connection.close()
            raise
        else:
            return connection
    raise failure
