"""Tells the service manager how it goes: the datagrams of sd_notify(3).

Nothing here raises or waits: a service that detects must not suffer from a manager that does
not listen. Without a manager every call does nothing.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping

MANAGERS_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
"""What of the environment concerns only this process, and none that it starts."""
_STATUS_CHARACTERS = 400
"""systemd takes at most 4096 bytes in a datagram, and a character may have four."""


def watchdog_period_s(environ: Mapping[str, str], pid: int) -> float | None:
    """Within which time the manager wants to be fed, in seconds, as sd_watchdog_enabled(3).

    None: not at all, or another process, or the variables make no sense.
    """
    if environ.get("WATCHDOG_PID", str(pid)) != str(pid):
        return None
    period = environ.get("WATCHDOG_USEC", "")
    # isdigit alone also takes digits of other scripts.
    if not (period.isascii() and period.isdigit()) or len(period) > 20 or not int(period):
        return None
    return int(period) / 1e6


class Notifier:
    """Speaks to the service manager.

    Args:
        address: a path, or ``@`` and a name in the abstract namespace; "": there is no manager.
        watchdog_s: feed it with :meth:`alive` within this time, best in half of it; None: no need.
        monotonic_ns: CLOCK_MONOTONIC in ns.

    Attributes:
        failures: how many datagrams could not be sent.
        fault: why the last of them could not, "" as long as all could.
    """

    def __init__(
        self,
        address: str,
        watchdog_s: float | None = None,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.watchdog_s = watchdog_s
        self.failures = 0
        self.fault = ""
        self._monotonic_ns = monotonic_ns
        self._address = b""
        self._socket: socket.socket | None = None
        self._owed = ""
        if address:
            self._open(address)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str], pid: int) -> Notifier:
        """As the manager's variables say; ``pid`` is ours."""
        address = environ.get("NOTIFY_SOCKET", "")
        return cls(address, watchdog_period_s(environ, pid) if address else None)

    def ready(self, status: str) -> None:
        """Started, or reloaded."""
        self._tell("READY=1", status)

    def status(self, text: str) -> None:
        """One line for people, shown by ``systemctl status``."""
        self._send(_status(text))

    def reloading(self) -> None:
        """A reload has begun; :meth:`ready` ends it."""
        self._tell(f"RELOADING=1\nMONOTONIC_USEC={self._monotonic_ns() // 1000}")

    def stopping(self, status: str) -> None:
        """On the way down."""
        self._tell("STOPPING=1", status)

    def alive(self) -> None:
        """Feed the watchdog."""
        self._send("WATCHDOG=1")

    def close(self) -> None:
        """Say nothing more; may be called twice."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _open(self, address: str) -> None:
        if address[0] not in "/@" or len(address) == 1:
            self._failed(f"NOTIFY_SOCKET={address!r} is neither a path nor an abstract name")
            return
        self._address = os.fsencode(address)
        if address[0] == "@":
            self._address = b"\0" + self._address[1:]
        try:
            self._socket = socket.socket(
                socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
            )
        except OSError as error:
            self._failed(str(error))

    def _tell(self, state: str, status: str | None = None) -> None:
        """A change of state, which the manager waits for: sent again with whatever comes next."""
        self._owed = state if status is None else f"{state}\n{_status(status)}"
        self._send("")

    def _send(self, text: str) -> None:
        if self._socket is None:
            return
        message = "\n".join(filter(None, (self._owed, text)))
        try:
            # Not connected: after its re-execution the manager has a new socket at the old place.
            self._socket.sendto(message.encode(), self._address)
        except OSError as error:
            self._failed(str(error))
        else:
            self._owed = ""

    def _failed(self, fault: str) -> None:
        self.failures += 1
        self.fault = fault


def _status(text: str) -> str:
    """One assignment: a line end in it would begin the next one."""
    line = "".join(c if c.isprintable() else " " for c in text)
    return f"STATUS={line[:_STATUS_CHARACTERS]}"
