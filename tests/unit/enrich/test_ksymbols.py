"""Decoding of PERF_RECORD_KSYMBOL and what it takes to say that something was missed."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stalld.enrich.ksymbols import Drained, Ksymbol, decode
from stalld.errors import DecodeError

# Taken from a ring on 6.18: a program is loaded and unloaded.
LOADED = bytes.fromhex(
    "11000000 0000 5000 58d204c0ffffffff 14000000 0100 0000"
    "6270665f70726f675f353966346139333137343464636463365f70726f62655f6d65 000000000000"
    "39c3ccff19020000"
)


def ksymbol(address: int, length: int, kind: int, flags: int, name: bytes, time_ns: int) -> bytes:
    """A record as the kernel writes it: the name ends with zeros, to a multiple of 8."""
    name += b"\0" * (8 - len(name) % 8)
    body = struct.pack("=QIHH", address, length, kind, flags) + name + struct.pack("=Q", time_ns)
    return struct.pack("=IHH", 17, 0, 8 + len(body)) + body


def test_real_record() -> None:
    """A record of a real kernel gives address, length, name and time."""
    assert decode(LOADED) == Drained(
        (
            Ksymbol(
                0x219FFCCC339,
                0xFFFFFFFFC004D258,
                20,
                b"bpf_prog_59f4a931744dcdc6_probe_me",
                bpf=True,
                removed=False,
            ),
        ),
        lost=False,
    )


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


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    """Arbitrary bytes decode or are refused; nothing else happens."""
    try:
        drained = decode(data)
    except DecodeError:
        return
    assert len(drained.events) * 32 <= len(data)
