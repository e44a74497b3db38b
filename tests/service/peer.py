"""The other side of a connection, in the hands of a test."""

from __future__ import annotations

import ctypes
import json
import socket
import ssl
import struct
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

TIMEOUT_S = 10.0
_SO_ATTACH_FILTER = 26  # asm-generic/socket.h


class Peer:
    """Listens in ``with``; a test takes connections one by one.

    Args:
        address: of the loopback, or the path of a unix socket.
        tls: what it speaks TLS with.
        receive_bytes: its kernel takes about so much for it that it does not read.
    """

    def __init__(
        self,
        address: str = "127.0.0.1",
        tls: ssl.SSLContext | None = None,
        receive_bytes: int | None = None,
    ) -> None:
        family = (
            socket.AF_UNIX
            if address.startswith("/")
            else socket.AF_INET6
            if ":" in address
            else socket.AF_INET
        )
        self._tls = tls
        self._listener = socket.socket(family, socket.SOCK_STREAM)
        self._listener.settimeout(TIMEOUT_S)
        if receive_bytes is not None:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        if family == socket.AF_UNIX:
            self._listener.bind(address)
            self.address = address
        else:
            self._listener.bind((address, 0))
            host = f"[{address}]" if family == socket.AF_INET6 else address
            self.address = f"{host}:{self._listener.getsockname()[1]}"
        self._listener.listen()
        self._taken: list[Connection] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        for connection in self._taken:
            connection.close()

    def accept(self, timeout_s: float = TIMEOUT_S) -> Connection:
        """The next connection, with TLS set up."""
        self._listener.settimeout(timeout_s)
        raw, _ = self._listener.accept()
        raw.settimeout(TIMEOUT_S)
        try:
            made = self._tls.wrap_socket(raw, server_side=True) if self._tls else raw
        except OSError:
            raw.close()
            raise
        connection = Connection(made)
        self._taken.append(connection)
        return connection

    def count(self, seconds: float) -> int:
        """Take connections for so long, hang up at once each time; how many there were."""
        count = 0
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            with suppress(TimeoutError):
                self.accept(left).close()
                count += 1
        return count


class Connection:
    """What came in on one connection."""

    def __init__(self, raw: socket.socket) -> None:
        self._raw = raw
        self.data = bytearray()
        self.ended = False

    def read(self, lines: int) -> list[dict[str, Any]]:
        """At least so many events, from the first on."""
        self._read_until(lambda: self.data.count(b"\n") >= lines)
        return self.events()

    def read_all(self) -> list[dict[str, Any]]:
        """All events, until the sink hangs up."""
        self._read_until(lambda: False)
        assert self.ended
        return self.events()

    def events(self) -> list[dict[str, Any]]:
        """Those that are whole."""
        return [json.loads(line) for line in bytes(self.data).split(b"\n")[:-1]]

    def read_frames(self, count: int) -> list[bytes]:
        """So many messages with their lengths before them."""
        self._read_until(lambda: len(self._frames()) >= count)
        return self._frames()

    def say(self, data: bytes) -> None:
        """Send what no sink wants to hear."""
        self._raw.sendall(data)

    def vanish(self) -> None:
        """Answer nothing more, as a host that lost its network: a filter drops all that comes."""
        program = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0))  # ret 0
        head = struct.pack("@HP", 1, ctypes.addressof(program))
        self._raw.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, head)

    def abort(self) -> None:
        """Break it, as the kernel does for a process that was killed with data unread."""
        self._raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._raw.close()

    def _read_until(self, enough: Any) -> None:
        while not enough():
            data = self._raw.recv(1 << 20)
            if not data:
                self.ended = True
                return
            self.data += data

    def _frames(self) -> list[bytes]:
        frames = []
        rest = bytes(self.data)
        while b" " in rest:
            length, _, rest = rest.partition(b" ")
            if len(rest) < int(length):
                break
            frames.append(rest[: int(length)])
            rest = rest[int(length) :]
        return frames


class Certificates:
    """A throw-away CA and what it issued, in ``work``."""

    def __init__(self, work: Path) -> None:
        self.work = work
        for name in ("ca", "other-ca"):
            self._openssl(
                *("req", "-x509", "-subj", f"/CN={name}", "-days", "2"),
                *("-keyout", f"{name}.key", "-out", f"{name}.pem"),
                *("-addext", "basicConstraints=critical,CA:TRUE"),
            )
        for name, subject in (
            ("server", "DNS:collector.example,IP:127.0.0.1"),
            ("client", "DNS:web-1.example"),
        ):
            (work / "extensions").write_text(f"subjectAltName={subject}\n")
            self._openssl(
                *("req", "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
            )
            self._openssl(
                *("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key"),
                *("-days", "2", "-out", f"{name}.pem", "-extfile", "extensions"),
            )

    def path(self, name: str) -> str:
        """Of a file, such as ``client.pem``."""
        return str(self.work / name)

    def server(self, *, client: bool = False) -> ssl.SSLContext:
        """What a server speaks TLS with.

        Args:
            client: it wants a certificate.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.path("server.pem"), self.path("server.key"))
        if client:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self.path("ca.pem"))
        return context

    def _openssl(self, command: str, *arguments: str) -> None:
        key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
        subprocess.run(
            ["openssl", command, *(key if command == "req" else ()), *arguments],
            cwd=self.work,
            check=True,
            capture_output=True,
        )
