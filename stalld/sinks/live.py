"""The live socket: any number of clients get events as they come, each by its own filter.

A client connects and sends one JSON object in a line, its request. It is answered with one JSON
object in a line, the hello, or with ``{"error": "…"}`` and the end. After the hello come events,
one a line, as everywhere else. docs/live.md tells all of it for programs; the request is read in
``stalld/live_request.py``.

Nobody waits for a client. Events are written in the thread that has them; what a client does not
take waits in its own queue, and when that is full, further ones are dropped, counted, and told
of in its stream.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import threading
from asyncio import TimerHandle, gather
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import orjson

from stalld import config
from stalld.events import Event
from stalld.live_filter import Facts, Filter
from stalld.live_request import MAX_HISTORY, MAX_REQUEST_BYTES, PROTOCOL, Request, error_line, parse
from stalld.sinks.live_socket import Listener, SocketError, listen
from stalld.sinks.outbox import Stats
from stalld.sinks.sink import Context, DescriptorSink, Sink
from stalld.sinks.text import escaped

REQUEST_S = 5.0
"""So long a client may take to say what it wants."""
RETRY_S = 10.0
"""How often to try again where the socket cannot be had."""
REST_S = 1.0
"""Accept nobody for so long when there are no descriptors left."""
HISTORY_BYTES = 2 << 20
_ACCEPTS = 16  # at a time, then it is the turn of others
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class _Kept(NamedTuple):
    line: bytes
    facts: Facts


class _History:
    """The last events, and ``started``."""

    def __init__(self) -> None:
        self._kept: deque[_Kept] = deque()
        self._bytes = 0
        self._forgotten = 0
        self._started: _Kept | None = None

    def add(self, line: bytes, facts: Facts) -> None:
        """Keep an event, forget the oldest ones."""
        self._kept.append(_Kept(line, facts))
        self._bytes += len(line)
        while len(self._kept) > MAX_HISTORY or self._bytes > HISTORY_BYTES:
            oldest = self._kept.popleft()
            self._bytes -= len(oldest.line)
            if oldest.facts.event == "started":
                self._started = oldest
            else:
                self._forgotten += 1

    def last(self, count: int | None, wanted: Filter) -> tuple[list[bytes], int]:
        """Lines that pass, and how many events before them are forgotten.

        Args:
            count: at most; None: all since the start.
        """
        if count == 0:
            return [], 0
        kept = [*([self._started] if self._started and count is None else []), *self._kept]
        lines = [line for line, facts in kept if wanted.passes(facts)]
        return (lines, self._forgotten) if count is None else (lines[-count:], 0)


class _Visitor:
    """Who is connected and has not said yet what it wants."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.said = b""


class _Client(DescriptorSink):
    """Who gets events."""

    def __init__(
        self,
        connection: socket.socket,
        wanted: Filter,
        max_bytes: int,
        context: Context,
        on_gone: Callable[[_Client], None],
    ) -> None:
        super().__init__(f"live pid {_peer_pid(connection)}", max_bytes, context)
        self.wanted = wanted
        self._connection = connection
        self._fd = connection.fileno()
        self._on_gone = on_gone

    def hold(self) -> None:
        """Nothing is written before :meth:`greet` is called."""
        self._io.acquire()

    def greet(self, hello: bytes) -> None:
        """Write the hello, then what has come meanwhile."""
        try:
            # A socket that is new has room for it.
            whole = _send(self._connection, hello)
        finally:
            self._io.release()
        if whole:
            self.flush()
        else:
            self._on_gone(self)

    def fileno(self) -> int:
        """The connection, or -1 once that is closed."""
        return self._fd

    def write_some(self) -> bool:
        """Write once."""
        try:
            self.outbox.advance(self._connection.send(self.outbox.chunk(), _FLAGS))
        except OSError as error:
            if not isinstance(error, BlockingIOError):
                # False all the same: nothing is to be written until the loop has seen to it.
                self.in_loop(self._on_gone, self)
            return False
        return True

    async def close(self, deadline: float) -> None:
        """Write what waits."""
        await self.drain(deadline)
        self._on_gone(self)

    def hang_up(self) -> None:
        """Close the connection; what waits is dropped."""
        self.stop_waiting()
        # Another thread may be writing: its descriptor must not become another file's.
        with self._io:
            self._fd = -1
            self._connection.close()
        self.give_up()


class LiveSink(Sink):
    """Serves the events at a unix socket.

    Args:
        live: where, for whom, for how many.
        hello: what the daemon tells each client of itself; called in the loop's thread.
    """

    def __init__(self, live: config.Live, context: Context, hello: Callable[[], Event]) -> None:
        super().__init__(f"live {live.socket}", 0, context)
        self._live = live
        self._hello = hello
        # Of this sink, not of the daemon: with other settings there is a new one, and a history
        # that begins where the old one ended.
        self._instance = os.urandom(8).hex()
        self._history = _History()
        # Held for moments: between history and live lines nothing may slip through.
        self._mutex = threading.Lock()
        self._clients: tuple[_Client, ...] = ()
        self._past = Stats(self.name, 0, 0, 0)
        self._visitors: dict[_Visitor, TimerHandle] = {}
        self._listener: Listener | None = None
        self._timer: TimerHandle | None = None
        # All descriptors are watched in one of ours: only that tells of a hang-up alone. What a
        # client says after its request is never read, so it costs us nothing.
        self._watch: select.epoll | None = None
        self._on_event: dict[int, Callable[[], None]] = {}

    @property
    def clients(self) -> int:
        """How many get events now."""
        return len(self._clients)

    def put(self, line: bytes, event: Event) -> None:
        """Give an event to those who want it; waits for none."""
        facts = Facts.of(event)
        with self._mutex:
            self._history.add(line, facts)
            for client in self._clients:
                if client.wanted.passes(facts):
                    client.outbox.put(line)

    def flush(self) -> None:
        """Write what can be written without waiting."""
        for client in self._clients:
            client.flush()

    def stats(self) -> Stats:
        """Of all clients, past and present; an event counts once for each that wanted it."""
        past = self._past
        counts = [client.stats() for client in self._clients]
        return Stats(
            self.name,
            past.delivered + sum(c.delivered for c in counts),
            sum(c.queued for c in counts),
            past.dropped + sum(c.dropped for c in counts),
        )

    def open(self) -> None:
        """Listen, or try to until it can be."""
        self._timer = None
        try:
            if self._watch is None:
                self._watch = select.epoll()
                self.context.loop.add_reader(self._watch.fileno(), self._look)
            self._listener = listen(self._live.socket, self._live.group)
            self._watch.register(self._listener.socket, select.EPOLLIN)
        except (OSError, SocketError) as error:
            self.in_trouble(f"{error}; `softirq-stalld tail` has nothing to connect to")
            self._timer = self.context.loop.call_later(RETRY_S, self.open)
        else:
            self.recovered(f"it listens at {self._live.socket}")

    def reopen(self) -> None:
        """Listen again where somebody removed the socket."""
        if self._listener is not None and self._listener.is_in_place():
            return
        self._stop_listening()
        self.open()

    async def close(self, deadline: float) -> None:
        """Let no one in any more, deliver what waits, hang up."""
        self._stop_listening()
        for visitor in tuple(self._visitors):
            self._dismiss(visitor)
        await gather(*(client.close(deadline) for client in self._clients))
        if self._watch is not None:
            self.context.loop.remove_reader(self._watch.fileno())
            self._watch.close()
            self._watch = None

    def _stop_listening(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._listener is not None:
            self._listener.close()  # The kernel forgets that it is watched.
            self._listener = None

    def _look(self) -> None:
        """Something happened to some of our descriptors."""
        assert self._watch is not None
        new = False
        for fd, _ in self._watch.poll(0):
            if self._listener is not None and fd == self._listener.socket.fileno():
                new = True
            elif fd in self._on_event:
                self._on_event[fd]()
        # Last: who comes in may get the descriptor of one who went.
        if new:
            self._accept()

    def _accept(self) -> None:
        for _ in range(_ACCEPTS):
            if self._listener is None:
                return
            try:
                connection, _ = self._listener.socket.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _NO_ROOM:
                    self._rest(error)
                    return
                continue  # It is gone again.
            connection.setblocking(False)
            self._let_in(connection)

    def _rest(self, error: OSError) -> None:
        assert self._listener is not None
        assert self._watch is not None
        self._watch.unregister(self._listener.socket)
        self._timer = self.context.loop.call_later(REST_S, self._wake)
        self.in_trouble(f"no more clients can be let in: {error.strerror}; raise LimitNOFILE=")

    def _wake(self) -> None:
        self._timer = None
        if self._listener is not None and self._watch is not None:
            self._watch.register(self._listener.socket, select.EPOLLIN)

    def _let_in(self, connection: socket.socket) -> None:
        assert self._watch is not None
        self.recovered("clients are let in again")
        most = self._live.max_clients
        if len(self._clients) + len(self._visitors) >= most:
            _send(
                connection,
                error_line(f"{most} clients are connected already, more than live.max_clients"),
            )
            connection.close()
            return
        try:
            self._watch.register(connection, select.EPOLLIN)
        except OSError:  # No memory, or more watched than the user may.
            connection.close()
            return
        visitor = _Visitor(connection)
        self._visitors[visitor] = self.context.loop.call_later(REQUEST_S, self._dismiss, visitor)
        self._on_event[connection.fileno()] = partial(self._listen_to, visitor)

    def _dismiss(self, visitor: _Visitor) -> None:
        self._forget(visitor)
        visitor.connection.close()

    def _forget(self, visitor: _Visitor) -> None:
        self._visitors.pop(visitor).cancel()
        del self._on_event[visitor.connection.fileno()]

    def _listen_to(self, visitor: _Visitor) -> None:
        try:
            data = visitor.connection.recv(MAX_REQUEST_BYTES + 2 - len(visitor.said))
        except BlockingIOError:
            return
        except OSError:
            data = b""
            visitor.said = b""
        visitor.said += data
        line, end, _ = visitor.said.partition(b"\n")
        if data and not end and len(line) <= MAX_REQUEST_BYTES:
            return
        if not visitor.said:
            self._dismiss(visitor)
            return
        try:
            if len(line) > MAX_REQUEST_BYTES:
                raise ValueError(f"the request has more than {MAX_REQUEST_BYTES} bytes")
            request = parse(line)
        except ValueError as error:
            _send(visitor.connection, error_line(str(error)))
            self._dismiss(visitor)
            return
        if request.stats:
            _send(visitor.connection, self._greeting(0, 0))
            self._dismiss(visitor)
            return
        self._forget(visitor)
        self._serve(visitor.connection, request)

    def _serve(self, connection: socket.socket, request: Request) -> None:
        assert self._watch is not None
        known = request.instance in (None, self._instance)
        with self._mutex:
            lines, forgotten = self._history.last(
                request.history if known else None, request.filter
            )
            # The lines are shared with the history: they shall not fill the client's queue.
            size = self._live.queue_kib * 1024 + sum(map(len, lines))
            client = _Client(connection, request.filter, size, self.context, self._drop)
            for line in lines:
                client.outbox.put(line)
            client.hold()
            self._clients = (*self._clients, client)
        self._on_event[connection.fileno()] = partial(self._drop, client)
        self._watch.modify(connection, 0)  # Tells of a hang-up all the same.
        client.greet(self._greeting(len(lines), forgotten))

    def _greeting(self, replayed: int, forgotten: int) -> bytes:
        hello = {"live": PROTOCOL, **self._hello(), "instance": self._instance}
        hello |= {"clients": self.clients, "replayed": replayed, "forgotten": forgotten}
        # A file sink is called by its path.
        return escaped(orjson.dumps(hello)) + b"\n"

    def _drop(self, client: _Client) -> None:
        """A client is gone, or has to."""
        fd = client.fileno()
        if fd < 0:
            return
        del self._on_event[fd]
        with self._mutex:
            self._clients = tuple(c for c in self._clients if c is not client)
        client.hang_up()
        past, gone = self._past, client.stats()
        self._past = Stats(
            self.name, past.delivered + gone.delivered, 0, past.dropped + gone.dropped
        )


def _send(connection: socket.socket, line: bytes) -> bool:
    """Write a short line to a new connection; False: it could not be written whole."""
    try:
        return connection.send(line, _FLAGS) == len(line)
    except OSError:
        return False


def _peer_pid(connection: socket.socket) -> int:
    size = struct.calcsize("3i")  # struct ucred: pid, uid, gid
    return int(
        struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))[0]
    )
