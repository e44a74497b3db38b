"""A driver's own counters of lost packets, as ``ethtool -S`` shows them."""

from __future__ import annotations

import errno
import struct
from typing import NamedTuple

from stalld.enrich.driver_counters import counter
from stalld.enrich.ethtool import Ethtool

_GSTRINGS, _GSTATS, _GSSET_INFO = 0x1B, 0x1D, 0x37
_SS_STATS = 1
_STRING, _VALUE = 32, 8
_MAX_COUNTERS = 1 << 14
_MAX_LOST = 1024
_HEAD = struct.Struct("=II")
_STRINGS_HEAD = struct.Struct("=III")
# struct ethtool_sset_info: cmd, reserved, a bit per set, the length of each that was there.
_SSET_INFO = struct.Struct("=IIQI")


class Lost(NamedTuple):
    """One counter: the driver's name for it, its queue (None: the device's) and its place."""

    name: str
    queue: int | None
    place: int


class DriverStats:
    """One driver's counters. Its names are read once, and again when their number changes.

    Args:
        device: the link's name.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.lost: tuple[Lost, ...] = ()
        self._count = -1

    def read(self, ethtool: Ethtool) -> dict[Lost, int]:
        """Each counter of lost packets; {}: the driver has none.

        Raises:
            OSError: no such device, or the kernel refused.
        """
        count = self._number(ethtool)
        if count != self._count:
            self.lost = self._names(ethtool, count)
            self._count = count
        if not self.lost:
            return {}
        head = _HEAD.pack(_GSTATS, count)
        data = ethtool.call(self.device, head, _VALUE * _MAX_COUNTERS, _VALUE * count)
        _same(_HEAD.unpack_from(data)[1], count)
        values = struct.unpack_from(f"={count}Q", data, _HEAD.size)
        return {lost: values[lost.place] for lost in self.lost}

    def _number(self, ethtool: Ethtool) -> int:
        data = ethtool.call(self.device, _SSET_INFO.pack(_GSSET_INFO, 0, 1 << _SS_STATS, 0))
        _, _, there, count = _SSET_INFO.unpack_from(data)
        # So many are no counters of packets.
        return count if there and count <= _MAX_COUNTERS else 0

    def _names(self, ethtool: Ethtool, count: int) -> tuple[Lost, ...]:
        if not count:
            return ()
        head = _STRINGS_HEAD.pack(_GSTRINGS, _SS_STATS, count)
        data = ethtool.call(self.device, head, _STRING * _MAX_COUNTERS, _STRING * count)
        _same(_STRINGS_HEAD.unpack_from(data)[2], count)
        return lost_counters(data[_STRINGS_HEAD.size :])


def _same(answered: int, count: int) -> None:
    """Queues may come and go between two questions, and counters with them."""
    if answered != count:
        raise OSError(errno.EAGAIN, "the counters of the driver have just changed")


def lost_counters(names: bytes) -> tuple[Lost, ...]:
    """The counters of lost packets among the driver's names, of 32 bytes each."""
    found: list[Lost] = []
    for place in range(len(names) // _STRING):
        raw = names[place * _STRING : (place + 1) * _STRING].split(b"\0", 1)[0]
        name = raw.decode("utf-8", "backslashreplace")
        told = counter(name)
        if told is not None and len(found) < _MAX_LOST:
            found.append(Lost(name, told.queue, place))
    return tuple(found)
