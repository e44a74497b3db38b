"""Events as JSON lines over TCP, with TLS if wished: Vector, Fluent Bit, Logstash, rsyslog."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from stalld import config, values
from stalld.sinks.connection import ConnectionSink, dial_tcp
from stalld.sinks.resolve import Resolver
from stalld.sinks.sink import Context

if TYPE_CHECKING:
    from stalld.sinks.tls import Tls

LISTEN_S = 0.25
# A server that does not like our certificate may say so only when TLS 1.3 is set up already.
LISTEN_TLS_S = 0.5


class TcpSink(ConnectionSink):
    """Writes JSON lines to a collector."""

    def __init__(self, settings: config.TcpSink, context: Context) -> None:
        super().__init__(
            f"tcp {settings.address}",
            settings.address,
            settings.queue_kib * 1024,
            context,
            LISTEN_TLS_S if settings.tls else LISTEN_S,
        )
        host, port = values.split_address(settings.address)
        self._resolver = Resolver(host, port)
        self._tls: Tls | None = None
        if settings.tls:
            from stalld.sinks.tls import Tls

            self._tls = Tls(settings, host)

    async def dial(self) -> socket.socket:
        """Connect, and see that the collector is the right one."""
        connection = await dial_tcp(self._resolver, self.place)
        return await self._tls.secure(connection) if self._tls else connection

    def send(self, connection: socket.socket) -> None:
        """Write once and advance the outbox."""
        if self._tls:
            self._tls.send(connection, self.outbox)
        else:
            super().send(connection)

    def receive(self, connection: socket.socket) -> bool:
        """Take what the collector says and forget it; False: it has hung up."""
        return self._tls.receive(connection) if self._tls else super().receive(connection)

    def hang_up(self, connection: socket.socket) -> None:
        """Tell the collector that no more will come."""
        if self._tls:
            self._tls.hang_up(connection)
        super().hang_up(connection)
