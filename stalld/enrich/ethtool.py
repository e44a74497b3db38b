"""A device's rings, channels and coalescing, as ``ethtool -g``, ``-l`` and ``-c`` show them.

By ioctl: it asks for a socket of any family, also of netlink, which is all that the unit's sandbox
leaves, and reading wants no privilege. See docs/decisions/0007-nics-by-hand.md for why not through
pyroute2.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct
from typing import NamedTuple, Self

_NETLINK_GENERIC = 16
_SIOCETHTOOL = 0x8946
_GCOALESCE, _GRINGPARAM, _GCHANNELS = 0x0E, 0x10, 0x3C
_WORDS_OF_RINGS, _WORDS_OF_CHANNELS, _WORDS_OF_COALESCE = 9, 9, 23
# Newer kernels may answer with more than was asked for.
_SLACK = 4096
_IFREQ = struct.Struct(f"=16s{'Q' if ctypes.sizeof(ctypes.c_void_p) == 8 else 'I'}16x")
_NONE = (errno.EOPNOTSUPP, errno.ENODEV, errno.EINVAL)


class Settings(NamedTuple):
    """What a driver says of itself; None: it does not.

    ``ring`` and ``ring_max``: received packets that one queue has room for, and could have.
    ``channels`` and ``channels_max``: queues that receive. ``rx_usecs`` and ``rx_frames``: how
    long, and for how many packets, an interrupt is put off.
    """

    ring: int | None = None
    ring_max: int | None = None
    channels: int | None = None
    channels_max: int | None = None
    rx_usecs: int | None = None
    rx_frames: int | None = None
    adaptive_rx: bool | None = None


class Ethtool:
    """A socket to ask through. Use it in ``with``, or close it.

    Raises:
        OSError: there is no netlink.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_GENERIC)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ask no more."""
        self._socket.close()

    def call(self, device: str, head: bytes, size: int = 0, wanted: int = 0) -> bytes:
        """One request: ``head``, and room for ``size`` bytes of an answer behind it.

        The kernel may write more than it was asked for: give as much room as it ever could need.

        Returns:
            The head, as it was answered, and the first ``wanted`` bytes behind it.

        Raises:
            OSError: refused; EOPNOTSUPP where the driver does not have it.
        """
        buffer = ctypes.create_string_buffer(head, len(head) + size + _SLACK)
        request = _IFREQ.pack(os.fsencode(device)[:15], ctypes.addressof(buffer))
        fcntl.ioctl(self._socket, _SIOCETHTOOL, request)
        return bytes(memoryview(buffer)[: len(head) + wanted])

    def settings(self, device: str) -> Settings:
        """All that the driver tells.

        Raises:
            OSError: the kernel refused, for another reason than that the driver cannot tell.
        """
        rings = self._words(device, _GRINGPARAM, _WORDS_OF_RINGS)
        channels = self._words(device, _GCHANNELS, _WORDS_OF_CHANNELS)
        coalesce = self._words(device, _GCOALESCE, _WORDS_OF_COALESCE)
        return settings_of(rings, channels, coalesce)

    def _words(self, device: str, command: int, count: int) -> tuple[int, ...] | None:
        try:
            answer = self.call(device, struct.pack(f"={count}I", command, *[0] * (count - 1)))
        except OSError as error:
            if error.errno in _NONE:
                return None
            raise
        return struct.unpack_from(f"={count}I", answer)


def settings_of(
    rings: tuple[int, ...] | None,
    channels: tuple[int, ...] | None,
    coalesce: tuple[int, ...] | None,
) -> Settings:
    """From struct ethtool_ringparam, ethtool_channels and ethtool_coalesce."""
    told = Settings()
    if rings:
        # A maximum of 0: the driver has no ring of its own.
        told = told._replace(ring=rings[5] or None, ring_max=rings[1] or None)
    if channels:
        # Drivers that can have both kinds share the same queues out among them.
        told = told._replace(
            channels=channels[5] + channels[8], channels_max=max(channels[1], channels[4])
        )
    if coalesce:
        told = told._replace(
            rx_usecs=coalesce[1], rx_frames=coalesce[2], adaptive_rx=coalesce[10] != 0
        )
    return told
