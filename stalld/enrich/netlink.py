"""Links by routing netlink: their statistics, and news of them.

Written out by hand, since pyroute2 costs the daemon 10 MB of memory, for good, and this is read
every few seconds: one request, one answer of 240 bytes a link (rtnetlink(7)).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import NamedTuple, Self

_NLMSG = struct.Struct("=IHHII")
_ATTR = struct.Struct("=HH")
_STATS_MSG = struct.Struct("=BBHII")
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_RTM_NEWSTATS, _RTM_GETSTATS = 92, 94
_REQUEST_DUMP = 0x301
_RTMGRP_LINK = 1
_IFLA_STATS_LINK_64 = 1
_COUNTERS = 24
# struct rtnl_link_stats64; the last of these came with Linux 4.6.
_STATS = struct.Struct(f"={_COUNTERS}Q")
_RX_PACKETS, _RX_DROPPED, _RX_OVER, _RX_FIFO, _RX_MISSED, _RX_NOHANDLER = 0, 6, 11, 14, 15, 23
_TIMEOUT_S = 5.0
_BUFFER = 1 << 16


class LinkStats(NamedTuple):
    """Of received packets, since the link was made: 64 bits each.

    ``dropped``: by the kernel, for want of room in a CPU's backlog for instance. ``missed``: by
    the device, for want of room in its ring. ``over`` and ``fifo`` are older names that drivers
    use for the latter. ``nohandler``: nobody wanted them, as on the idle side of a bond.
    """

    packets: int
    dropped: int
    missed: int
    over: int
    fifo: int
    nohandler: int


def messages(data: bytes) -> list[tuple[int, bytes]]:
    """Type and body of each netlink message; what is cut off at the end is left out."""
    found = []
    at = 0
    while at + _NLMSG.size <= len(data):
        length, kind, _, _, _ = _NLMSG.unpack_from(data, at)
        if length < _NLMSG.size or at + length > len(data):
            break
        found.append((kind, data[at + _NLMSG.size : at + length]))
        at += (length + 3) & ~3
    return found


def stats_of(body: bytes) -> tuple[int, LinkStats] | None:
    """Index and statistics of one link, from a message RTM_NEWSTATS; None: it has none."""
    if len(body) < _STATS_MSG.size:
        return None
    index = _STATS_MSG.unpack_from(body)[3]
    at = _STATS_MSG.size
    while at + _ATTR.size <= len(body):
        length, kind = _ATTR.unpack_from(body, at)
        if length < _ATTR.size:
            break
        if kind & 0x3FFF == _IFLA_STATS_LINK_64 and at + length <= len(body):
            raw = body[at + _ATTR.size : at + length]
            # Of an older kernel shorter, of a newer one longer.
            counters = _STATS.unpack(raw[: _STATS.size].ljust(_STATS.size, b"\0"))
            return index, LinkStats(
                counters[_RX_PACKETS],
                counters[_RX_DROPPED],
                counters[_RX_MISSED],
                counters[_RX_OVER],
                counters[_RX_FIFO],
                counters[_RX_NOHANDLER],
            )
        at += (length + 3) & ~3
    return None


def route_socket() -> socket.socket:
    """To ask through with :func:`link_stats`.

    Raises:
        OSError: no netlink.
    """
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    sock.settimeout(_TIMEOUT_S)
    return sock


def link_stats(sock: socket.socket) -> dict[int, LinkStats]:
    """The statistics of all links of our network namespace, by index.

    Args:
        sock: of :func:`route_socket`; after an error answers may still come to it.

    Raises:
        OSError: no answer, or a kernel that does not know the request (before 4.7).
    """
    found: dict[int, LinkStats] = {}
    body = _STATS_MSG.pack(0, 0, 0, 0, 1 << _IFLA_STATS_LINK_64 - 1)
    size = _NLMSG.size + len(body)
    sock.send(_NLMSG.pack(size, _RTM_GETSTATS, _REQUEST_DUMP, 1, 0) + body)
    while True:
        for kind, answer in messages(sock.recv(_BUFFER)):
            if kind == _NLMSG_DONE:
                return found
            if kind == _NLMSG_ERROR:
                (code,) = struct.unpack_from("=i", answer)
                raise OSError(-code, os.strerror(-code))
            told = stats_of(answer) if kind == _RTM_NEWSTATS else None
            if told is not None:
                found[told[0]] = told[1]


class LinkNews:
    """Tells that links changed, came or went. A socket to wait for, then to :meth:`drain`."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    @classmethod
    def open(cls) -> Self:
        """Ask for news from now on.

        Raises:
            OSError: no netlink.
        """
        sock = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE
        )
        try:
            sock.bind((0, _RTMGRP_LINK))
        except OSError:
            sock.close()
            raise
        return cls(sock)

    def fileno(self) -> int:
        """The descriptor."""
        return self._socket.fileno()

    def drain(self) -> None:
        """Take what there is, also that there was more than the socket had room for."""
        while True:
            try:
                self._socket.recv(_BUFFER)
            except BlockingIOError:
                return
            except OSError as error:
                # Told once, of what we do not see: a want of room, or what became of a request
                # that was to be made known. Links may have changed.
                if error.errno == errno.EBADF:
                    raise

    def close(self) -> None:
        """No more news."""
        self._socket.close()
