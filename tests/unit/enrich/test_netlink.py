"""Statistics of links: this kernel's, with sysfs and pyroute2 as independent witnesses."""

from __future__ import annotations

import errno
import socket
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stalld.enrich.ethtool import Ethtool
from stalld.enrich.netlink import (
    LinkNews,
    LinkStats,
    link_stats,
    messages,
    route_socket,
    stats_of,
)

SYSFS = {"packets": "rx_packets", "dropped": "rx_dropped", "missed": "rx_missed_errors"}
HEADER = struct.Struct("=IHHII")


def message(kind: int, body: bytes) -> bytes:
    """A netlink message, padded."""
    raw = HEADER.pack(HEADER.size + len(body), kind, 0, 1, 0) + body
    return raw + bytes(-len(raw) % 4)


def stats(index: int, counters: list[int], before: bytes = b"") -> bytes:
    """The body of RTM_NEWSTATS, perhaps with another attribute before."""
    raw = struct.pack(f"={len(counters)}Q", *counters)
    return (
        struct.pack("=BBHII", 0, 0, 0, index, 1)
        + before
        + struct.pack("=HH", 4 + len(raw), 1)
        + raw
    )


def test_places_of_the_counters() -> None:
    """As in struct rtnl_link_stats64."""
    wanted = LinkStats(packets=0, dropped=6, missed=15, over=11, fifo=14, nohandler=23)
    assert stats_of(stats(7, list(range(25)))) == (7, wanted)


def test_older_kernels() -> None:
    """Before 4.6 there was no rx_nohandler."""
    assert stats_of(stats(7, list(range(23)))) == (7, LinkStats(0, 6, 15, 11, 14, 0))


def test_other_attributes() -> None:
    """They are passed over."""
    assert stats_of(stats(7, list(range(24)), struct.pack("=HHI", 8, 2, 9))) is not None
    assert stats_of(struct.pack("=BBHII", 0, 0, 0, 7, 1)) is None
    assert stats_of(b"short") is None


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    """Nothing that arrives ends the daemon."""
    for _, body in messages(data):
        stats_of(body)


def sysfs() -> dict[int, dict[str, int]]:
    """The same from files, by index."""
    found = {}
    for index, name in socket.if_nameindex():
        place = Path("/sys/class/net", name, "statistics")
        with suppress(OSError):
            found[index] = {f: int((place / file).read_text()) for f, file in SYSFS.items()}
    return found


def test_this_kernel() -> None:
    """Every link of this namespace has its statistics, and they are those of sysfs."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        out.sendto(b"one packet at least", ("127.0.0.1", 9))
    with route_socket() as sock:
        link_stats(sock)
        before, found, after = sysfs(), link_stats(sock), sysfs()
    # Links of a test before may still be going.
    lasting = before.keys() & after.keys()
    assert lasting <= found.keys()
    assert found[socket.if_nametoindex("lo")].packets > 0
    for index in lasting:
        for field in SYSFS:
            assert before[index][field] <= getattr(found[index], field) <= after[index][field]


@pytest.fixture
def rings() -> dict[str, tuple[int, int]]:
    """What pyroute2 finds of the rings of all devices, by ethtool's netlink."""
    from pyroute2.netlink.exceptions import NetlinkError
    from pyroute2.netlink.generic.ethtool import NlEthtool

    found = {}
    asked: Any = NlEthtool()
    try:
        for _, name in socket.if_nameindex():
            try:
                (answer,) = asked.get_rings(name)
            except NetlinkError:
                continue
            told = dict(attribute[:2] for attribute in answer["attrs"])
            if "ETHTOOL_A_RINGS_RX_MAX" in told:
                found[name] = (told["ETHTOOL_A_RINGS_RX"], told["ETHTOOL_A_RINGS_RX_MAX"])
    finally:
        asked.close()
    return found


def test_rings_of_this_machine(rings: dict[str, tuple[int, int]]) -> None:
    """Asked by ioctl they are the same."""
    with Ethtool() as ethtool:
        own = {name: ethtool.settings(name) for _, name in socket.if_nameindex()}
    assert {
        name: (told.ring, told.ring_max) for name, told in own.items() if told.ring_max
    } == rings


def test_errors_of_others() -> None:
    """The kernel tells all that listen of requests that failed: links may have changed."""

    told = [errno.EOPNOTSUPP, errno.ENOBUFS, errno.EMSGSIZE]

    class Refused(socket.socket):
        def recv(self, *_: Any) -> bytes:
            if told:
                raise OSError(told.pop(0), "of another's request")
            raise BlockingIOError

    with Refused(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        LinkNews(sock).drain()
        assert told == []
