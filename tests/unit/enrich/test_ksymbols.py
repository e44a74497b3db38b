"""Decoding of PERF_RECORD_KSYMBOL and what it takes to say that something was missed."""

import errno
import os
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stalld import perf
from stalld.enrich import ksymbols
from stalld.enrich.ksymbols import Drained, Ksymbol, KsymbolError, KsymbolFeed, decode
from stalld.errors import DecodeError

# Taken from a ring on 6.18, x86-64: a program of two instructions is loaded, then unloaded.
NAME = b"bpf_prog_59f4a931744dcdc6_probe_me"
LOADED = bytes.fromhex(
    "1100000000004800182102c0ffffffff1400000001000000"
    "6270665f70726f675f353966346139333137343464636463365f70726f62655f6d65"
    "000000000000f61462e18b040000"
)
UNLOADED = bytes.fromhex(
    "1100000000004800182102c0ffffffff1400000001000100"
    "6270665f70726f675f353966346139333137343464636463365f70726f62655f6d65"
    "000000000000087962e18b040000"
)


def ksymbol(address: int, length: int, kind: int, flags: int, name: bytes, time_ns: int) -> bytes:
    """A record as the kernel writes it: the name ends with zeros, to a multiple of 8."""
    name += b"\0" * (8 - len(name) % 8)
    body = struct.pack("=QIHH", address, length, kind, flags) + name + struct.pack("=Q", time_ns)
    return struct.pack("=IHH", 17, 0, 8 + len(body)) + body


def test_real_records() -> None:
    """Records of a real kernel give address, length, name, time and what happened."""
    address = 0xFFFFFFFFC0022118
    assert decode(LOADED + UNLOADED) == Drained(
        (
            Ksymbol(4998828266742, address, 20, NAME, bpf=True, removed=False),
            Ksymbol(4998828292360, address, 20, NAME, bpf=True, removed=True),
        ),
        lost=False,
    )


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 2**64 - 1),
            st.integers(0, 2**32 - 1),
            st.integers(0, 3),
            st.integers(0, 3),
            st.binary(max_size=512).filter(lambda name: b"\0" not in name),
            st.integers(0, 2**64 - 1),
        )
    )
)
def test_any_records(records: list[tuple[int, int, int, int, bytes, int]]) -> None:
    """Records in a row come out one by one as they were put in."""
    drained = decode(b"".join(ksymbol(*record) for record in records))
    assert not drained.lost
    assert drained.events == tuple(
        Ksymbol(time_ns, address, length, name, kind == 1, bool(flags & 1))
        for address, length, kind, flags, name, time_ns in records
    )


def test_lost_and_other_records() -> None:
    """A LOST record is reported, records of other types are passed over."""
    lost = struct.pack("=IHHQQQ", 2, 0, 32, 1, 42, 99)
    throttle = struct.pack("=IHHQQQ", 5, 0, 32, 1, 2, 3)
    drained = decode(throttle + lost + LOADED)
    assert drained.lost
    assert len(drained.events) == 1
    assert decode(throttle) == ((), False)
    assert decode(b"") == ((), False)


@pytest.mark.parametrize(
    "data",
    [
        LOADED[:-1],
        LOADED[:7],
        LOADED + b"\0",
        struct.pack("=IHH", 17, 0, 0),
        struct.pack("=IHH", 17, 0, 7) + bytes(16),
        struct.pack("=IHH", 17, 0, 16) + bytes(8),
        struct.pack("=IHH", 17, 0, 31) + bytes(23),
    ],
)
def test_impossible_lengths(data: bytes) -> None:
    """Lengths that cannot be are refused and never read past the end."""
    with pytest.raises(DecodeError):
        decode(data)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    """Arbitrary bytes decode or are refused; nothing else happens."""
    try:
        drained = decode(data)
    except DecodeError:
        return
    assert len(drained.events) * 32 <= len(data)


class Rings:
    """Files of memory in place of perf events: the kernel's head, our tail, and the data."""

    def __init__(self) -> None:
        self.online = {0, 1}
        self.fds: dict[int, int] = {}
        self.dead: set[int] = set()
        self.error = 0

    def open_event(self, _: bytes, cpu: int) -> int:
        if cpu not in self.online:
            raise OSError(errno.ENODEV, "offline")
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        fd = os.memfd_create("ring")
        os.ftruncate(fd, 16 * os.sysconf("SC_PAGESIZE"))
        self.fds[cpu] = fd
        self.dead.discard(cpu)
        return fd

    def detached(self, fd: int) -> bool:
        return any(self.fds[cpu] == fd for cpu in self.dead)

    def announce(self, cpu: int, data: bytes) -> None:
        fd = self.fds[cpu]
        (head,) = struct.unpack("=Q", os.pread(fd, 8, 1024))
        os.pwrite(fd, data, os.sysconf("SC_PAGESIZE") + head)
        os.pwrite(fd, struct.pack("=Q", head + len(data)), 1024)


@pytest.fixture
def rings(monkeypatch: pytest.MonkeyPatch) -> Rings:
    played = Rings()
    monkeypatch.setattr(perf, "open_event", played.open_event)
    monkeypatch.setattr(perf, "detached", played.detached)
    return played


@pytest.fixture
def feed(rings: Rings) -> Iterator[KsymbolFeed]:
    with KsymbolFeed.open([0, 1]) as opened:
        yield opened


def test_a_new_feed_has_missed_nothing(rings: Rings, feed: KsymbolFeed) -> None:
    """Nothing is pending until something is announced, and once it is drained."""
    assert not feed.pending()
    rings.announce(1, LOADED)
    assert feed.pending()
    assert [event.name for event in feed.drain().events] == [NAME]
    assert not feed.pending()
    assert feed.drain() == ((), False)


def test_what_a_cpu_said_before_it_went(rings: Rings, feed: KsymbolFeed) -> None:
    """Announcements of a CPU that has gone are drained, in their order; nothing was missed."""
    rings.announce(0, UNLOADED)
    rings.announce(1, LOADED)
    feed.refresh([0])
    assert len(feed.fds) == 1
    assert feed.pending()
    drained = feed.drain()
    assert [event.removed for event in drained.events] == [False, True]
    assert not drained.lost
    assert not feed.pending()


def test_a_cpu_that_came_may_have_been_missed(rings: Rings, feed: KsymbolFeed) -> None:
    """The first drain after a CPU got a ring says that some are missing, also with none there."""
    rings.online.add(2)
    feed.refresh([0, 1, 2])
    assert feed.pending()
    assert feed.drain() == ((), True)
    assert not feed.pending()
    rings.announce(2, LOADED)
    assert not feed.drain().lost
    feed.refresh([0, 1, 2])
    assert not feed.pending()


def test_a_cpu_that_came_back_between_two_looks(rings: Rings, feed: KsymbolFeed) -> None:
    """A suspect that lives is left alone; one that is dead gets a new ring, and keeps its news."""
    rings.announce(1, LOADED)
    rings.dead = {1}
    feed.refresh([0, 1], suspects={0})
    assert not feed.drain().lost
    rings.announce(1, UNLOADED)
    feed.refresh([0, 1], suspects={0, 1})
    drained = feed.drain()
    assert len(drained.events) == 1
    assert drained.lost
    feed.refresh([0, 1], suspects={0, 1})
    assert not feed.pending()


def test_a_cpu_gone_meanwhile(feed: KsymbolFeed) -> None:
    """A CPU that is offline after all gets no ring, and nothing was missed yet."""
    feed.refresh([0, 1, 5])
    assert len(feed.fds) == 2
    assert not feed.pending()


def test_refused_ring(rings: Rings, feed: KsymbolFeed) -> None:
    """A CPU that cannot be listened to is an error, something is missing; the others go on."""
    rings.online.add(2)
    rings.error = errno.EPERM
    with pytest.raises(KsymbolError, match="CAP_PERFMON"):
        feed.refresh([0, 1, 2])
    assert feed.drain().lost
    rings.announce(1, LOADED)
    assert len(feed.drain().events) == 1
    with pytest.raises(KsymbolError):
        KsymbolFeed.open([0])


def test_nonsense_in_a_ring(rings: Rings, feed: KsymbolFeed) -> None:
    """What cannot be decoded counts as missed; the other rings are drained."""
    rings.announce(0, bytes(8))
    rings.announce(1, LOADED)
    drained = feed.drain()
    assert drained.lost
    assert len(drained.events) == 1


def test_nearly_full_ring(rings: Rings, feed: KsymbolFeed) -> None:
    """A ring so full that the kernel may have refused a record counts as missed."""
    other = struct.pack("=IHH", 5, 0, 1 << 15)
    rings.announce(0, other.ljust(ksymbols._RING_BYTES, b"\0"))
    assert feed.drain() == ((), True)
