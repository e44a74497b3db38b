"""Decoding of PERF_RECORD_KSYMBOL and what it takes to say that something was missed."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stalld.enrich.ksymbols import Drained, Ksymbol, decode
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
