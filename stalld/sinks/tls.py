"""TLS on a connection that never blocks. Imported only where it is wanted: it takes memory."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from stalld import config
from stalld.errors import no_thread
from stalld.sinks.connection import CONNECT_S, LostError
from stalld.sinks.outbox import Outbox

_RECORD_BYTES = 16_384
"""The most that one TLS record holds (RFC 8446, section 5.1)."""
_RECEIVE_BYTES = 4096

# X509_V_ERR_* of OpenSSL's x509_vfy.h.
_NOT_YET_VALID, _EXPIRED = 9, 10
_NO_ISSUER = (2, 18, 19, 20, 21)
_OTHER_NAME = (62, 64)
_OURS_REFUSED = "our certificate is refused: is tls_cert issued by a CA that it trusts?"
_TOO_OLD = "it offers nothing newer than TLS 1.1: can it be updated?"
_ALERTS = {
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it wants our certificate: are tls_cert and tls_key set?",
    "SSLV3_ALERT_BAD_CERTIFICATE": _OURS_REFUSED,
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": _OURS_REFUSED,
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "our certificate has expired: is there a new tls_cert?",
    "TLSV1_ALERT_UNKNOWN_CA": _OURS_REFUSED,
    "TLSV1_ALERT_DECRYPT_ERROR": _OURS_REFUSED,
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "it refuses the handshake: does it want our certificate?",
    "WRONG_VERSION_NUMBER": "it does not speak TLS: is this the right port?",
    "RECORD_LAYER_FAILURE": "it does not speak TLS: is this the right port?",
    "UNSUPPORTED_PROTOCOL": _TOO_OLD,
    "TLSV1_ALERT_PROTOCOL_VERSION": _TOO_OLD,
}


class Tls:
    """What a sink does otherwise when its connection is encrypted.

    Files are read for each connection: new ones are taken up.

    Args:
        host: of the address; the certificate must be for it, unless ``tls_name`` names another.
    """

    def __init__(self, settings: config.TcpSink, host: str) -> None:
        self._settings = settings
        self._name = settings.tls_name or host
        self._place = settings.address

    async def secure(self, connection: socket.socket) -> socket.socket:
        """Encrypt the connection, which is closed when that fails.

        Raises:
            OSError, LostError: it cannot be, or the other side is not the one it should be.
        """
        secured = connection
        try:
            with self._told():
                self._check_name()
                # Reads files, which takes tens of milliseconds for a system's certificates.
                context = await self._context_read()
                secured = context.wrap_socket(
                    connection, server_hostname=self._name, do_handshake_on_connect=False
                )
                async with asyncio.timeout(CONNECT_S):
                    await _shake_hands(secured)
        except TimeoutError:
            secured.close()
            raise LostError(
                f"{self._place} does not answer the TLS handshake: is this the right port?"
            ) from None
        except BaseException:
            secured.close()
            raise
        return secured

    def send(self, connection: socket.socket, outbox: Outbox) -> None:
        """As :meth:`ConnectionSink.send`.

        The kernel counts encrypted bytes, which are more than ours: what it calls outstanding is
        never less of ours than is outstanding.
        """
        with self._told():
            count = connection.send(outbox.chunk(_RECORD_BYTES))
        outbox.hand_over(count, whole=True)

    def receive(self, connection: socket.socket) -> bool:
        """As :meth:`ConnectionSink.receive`."""
        with self._told():
            return bool(connection.recv(_RECEIVE_BYTES))

    def hang_up(self, connection: socket.socket) -> None:
        """Say in TLS that no more will come."""
        assert isinstance(connection, ssl.SSLSocket)
        with suppress(OSError, ValueError):
            connection.unwrap()

    def _check_name(self) -> None:
        # Told by wrap_socket() too, which forgets to close the connection then.
        try:
            self._name.encode("idna")
        except UnicodeError as error:
            raise LostError(f"{self._place}: is {self._name} a host name? {error}.") from None

    async def _context_read(self) -> ssl.SSLContext:
        try:
            return await asyncio.to_thread(self._context)
        except RuntimeError as error:
            raise no_thread(error) from error

    def _context(self) -> ssl.SSLContext:
        settings = self._settings
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # Verifies certificate and name.
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # To write shall never mean to wait for what the other side says.
        context.options |= ssl.OP_NO_RENEGOTIATION
        if settings.tls_ca:
            with _readable(settings.tls_ca, "tls_ca: is it a file of certificates in PEM?"):
                context.load_verify_locations(settings.tls_ca)
        else:
            context.set_default_verify_paths()
        if settings.tls_cert:
            files = f"{settings.tls_cert} and {settings.tls_key}"
            with _readable(files, "tls_cert and tls_key: do they fit, in PEM, without password?"):
                # A password given is one that is not asked for at the terminal.
                context.load_cert_chain(settings.tls_cert, settings.tls_key, password="")
        return context

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Make errors of TLS those of a connection."""
        try:
            yield
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None
        except ssl.SSLCertVerificationError as error:
            raise LostError(f"{self._place}: {self._fault(error)}") from None
        except ssl.SSLEOFError:
            raise LostError(
                f"{self._place} closed the connection: does it take TLS at this port?"
            ) from None
        except ssl.SSLError as error:
            told = _ALERTS.get(error.reason or "", f"TLS fails: {error.reason or error}.")
            raise LostError(f"{self._place}: {told}") from None

    def _fault(self, error: ssl.SSLCertVerificationError) -> str:
        code = error.verify_code
        if code in _OTHER_NAME:
            return f"its certificate is not for {self._name}: is tls_name a name that it has?"
        if code in _NO_ISSUER:
            return (
                f"its certificate is not trusted ({error.verify_message}): "
                "is the CA that issued it in tls_ca?"
            )
        if code == _EXPIRED:
            return "its certificate has expired: does it get a new one?"
        if code == _NOT_YET_VALID:
            return "its certificate is not yet valid: is our clock right?"
        return f"its certificate is not accepted: {error.verify_message}."


async def _shake_hands(connection: ssl.SSLSocket) -> None:
    while True:
        try:
            connection.do_handshake()
        except ssl.SSLWantReadError:
            await _ready(connection.fileno(), to_write=False)
        except ssl.SSLWantWriteError:
            await _ready(connection.fileno(), to_write=True)
        else:
            return


async def _ready(fd: int, *, to_write: bool) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    (loop.add_writer if to_write else loop.add_reader)(fd, ready.set)
    try:
        await ready.wait()
    finally:
        (loop.remove_writer if to_write else loop.remove_reader)(fd)


@contextmanager
def _readable(files: str, question: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # ssl.SSLError is one.
        reason = getattr(error, "reason", None) or error.strerror or str(error)
        raise LostError(f"{files}: {reason}: {question}") from None
