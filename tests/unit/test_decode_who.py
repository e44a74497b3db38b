"""Records of tasks: every byte of them, and what cannot be one."""

from __future__ import annotations

import struct
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stalld.decode import WHO, decode, decode_who, is_task
from stalld.errors import DecodeError
from stalld.records import (
    ARGS_LEN,
    NAMES_LEN,
    PATH_COUNT,
    Known,
    NamePath,
    RecordType,
    Source,
    TaskRecord,
)
from tests.unit.make import encode, encode_task, record, task

U32 = st.integers(0, 0xFFFFFFFF)
NAME = st.binary(max_size=40).filter(lambda name: b"\0" not in name)
PATH = st.builds(NamePath, st.lists(NAME, max_size=12).map(tuple), st.booleans())
COMM = st.binary(max_size=16).filter(lambda name: b"\0" not in name)
# type, source, cpu, seq, time, inode, then 32-bit words
ARGS_BYTES = 16 + 16 + 9 * 4
COUNTS = ARGS_BYTES + 4
NAMES_BYTES = COUNTS + PATH_COUNT * 4 + 4


@given(
    st.builds(
        TaskRecord,
        type=st.just(RecordType.TASK),
        source=st.sampled_from(Source),
        cpu=U32,
        seq=U32,
        time_ns=st.integers(0, 2**64 - 1),
        file_inode=st.integers(0, 2**64 - 1),
        known=st.integers(0, 7).map(Known),
        task_flags=U32,
        tgid=U32,
        tid=U32,
        uid=U32,
        parent_pid=U32,
        ns_pid=U32,
        syscall=U32,
        args_total=U32,
        parent_comm=COMM,
        file_system=COMM,
        args=st.binary(max_size=ARGS_LEN),
        cgroup=PATH,
        controller=PATH,
        exe=PATH,
        file=PATH,
    ),
    st.integers(0, 7),
)
def test_round_trip(given_task: TaskRecord, padding: int) -> None:
    """What the kernel wrote comes out, whatever the perf buffer adds."""
    raw = encode_task(given_task, padding)
    assert is_task(raw)
    paths = (given_task.cgroup, given_task.controller, given_task.exe, given_task.file)
    if sum(len(name) + 1 for path in paths for name in path.names) > NAMES_LEN:
        with pytest.raises(DecodeError):
            decode_who(raw)
    else:
        assert decode_who(raw) == given_task


def test_vector() -> None:
    """One record, byte by byte."""
    raw = struct.pack("=4I2Q", 4, 0, 3, 9, 1_000, 77)
    raw += struct.pack("=10I", 5, 0x400000, 10, 11, 1000, 1, 7, 0, 5, 5)
    raw += struct.pack("=6I", 2, 0, 1, 0, 0b100, 11)
    raw += b"init".ljust(16, b"\0") + b"proc".ljust(16, b"\0") + b"a\0-b\0".ljust(256, b"\0")
    raw += b"x.scope\0y\0z"[:11].ljust(11, b"\0")
    found = decode_who(raw[:-1] + b"\0")
    assert (found.cpu, found.seq, found.file_inode, found.tgid, found.tid) == (3, 9, 77, 10, 11)
    assert found.known == Known.ARGS | Known.CGROUP
    assert (found.args, found.args_total, found.parent_comm) == (b"a\0-b\0", 5, b"init")
    assert found.cgroup == NamePath((b"x.scope", b"y"), cut=False)
    assert found.exe == NamePath((b"",), cut=True)


def test_which_is_which() -> None:
    """A record of a stall is none of a task, and the other way round."""
    assert not is_task(encode(record()))
    assert not is_task(b"\4")
    with pytest.raises(DecodeError, match="a task is not a stall"):
        decode(encode_task(task(), padding=2048))


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (4, len(Source)),
        (ARGS_BYTES, ARGS_LEN + 1),
        (COUNTS, 1),
        (COUNTS + 8, 0xFFFFFFFF),
        (NAMES_BYTES, 2049),
        (NAMES_BYTES, 0xFFFFFFFF),
    ],
)
def test_impossible(offset: int, value: int) -> None:
    """Sizes and counts that do not fit are refused."""
    raw = bytearray(encode_task(task(exe=NamePath((), cut=False)), padding=2048 * (offset != 60)))
    struct.pack_into("=I", raw, offset, value)
    with pytest.raises(DecodeError):
        decode_who(bytes(raw))


@given(st.binary(max_size=WHO.size + 64))
@example(bytes(WHO.size))
def test_arbitrary_bytes(data: bytes) -> None:
    """Whatever arrives is a record or a DecodeError, nothing else."""
    with suppress(DecodeError):
        decode_who(struct.pack("=I", RecordType.TASK) + data)
