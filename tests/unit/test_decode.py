"""Bytes to records: everything the kernel can write, and everything it cannot."""

from __future__ import annotations

import struct
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stalld.decode import HEAD, TASK, TICK, decode, decode_tasks, decode_tick
from stalld.errors import DecodeError
from stalld.records import (
    COMM_LEN,
    KERNEL_STACK_DEPTH,
    LOOKBACK_DEPTH,
    USER_STACK_DEPTH,
    VECTORS,
    WAITERS,
    RecordType,
    Source,
    StallRecord,
    TaskEntry,
    TickKind,
    TickSample,
)
from tests.unit.make import encode, encode_tick, record, tick

U32 = st.integers(0, 0xFFFFFFFF)
U64 = st.integers(0, 0xFFFFFFFFFFFFFFFF)
COMM = st.binary(max_size=COMM_LEN).map(lambda raw: raw.split(b"\0", 1)[0])
# Offsets from the head's start, as bpf/records.h lays them out.
KERNEL_BYTES, USER_BYTES = 352, 356
TICK_KIND, TICK_STACK_BYTES = 68, 76

STACKS = {
    "kernel_stack": st.lists(U64, max_size=KERNEL_STACK_DEPTH).map(tuple),
    "user_stack": st.lists(U64, max_size=USER_STACK_DEPTH).map(tuple),
}
WIDE = "time_ns started_ns late_ns served_ns steal_ns net_rx_ns switched_ns cgroup_id"
NARROW = (
    "cpu seq tgid tid task_flags policy prio serving_vec served_vec switches sample_nr lost "
    "net_rx_runs processed squeezed dropped received_rps flow_limit backlog napi_ifindex "
    "napi_work napi_budget"
)
WORDS = dict.fromkeys(WIDE.split(), U64) | dict.fromkeys(NARROW.split(), U32)
RECORDS = st.builds(
    StallRecord,
    type=st.sampled_from([t for t in RecordType if t is not RecordType.TASK]),
    source=st.sampled_from(Source),
    wait_ns=st.tuples(*[U64] * len(VECTORS)),
    waiter_ns=st.tuples(*[U64] * WAITERS),
    waiter_pid=st.tuples(*[U32] * WAITERS),
    napi_name=COMM,
    comm=COMM,
    **WORDS,
    **STACKS,
)


@given(RECORDS, st.integers(0, 15), st.sampled_from([bytes, memoryview]))
def test_round_trip(wanted: StallRecord, padding: int, kind: type[Any]) -> None:
    """What the kernel writes comes back field by field, whatever the perf buffer pads."""
    assert decode(kind(encode(wanted, padding))) == wanted


def test_every_field_has_its_own_place() -> None:
    """No two fields are mixed up: each takes a change alone."""
    base = record(kernel_stack=(1, 2), user_stack=(3,), serving_vec=3, served_vec=3)
    for name, value in base._asdict().items():
        changed = base._replace(**{name: _other(value)})
        assert decode(encode(changed))._asdict() == base._asdict() | {name: _other(value)}


def _other(value: Any) -> Any:
    match value:
        case RecordType():
            return RecordType.CLOSE
        case Source():
            return Source.ENTRY
        case int():
            return value + 1
        case bytes():
            return b"another"
        case _:
            return tuple(n + 9 for n in value)


@pytest.mark.parametrize("depth", [0, 1, KERNEL_STACK_DEPTH])
def test_every_truncation_is_refused(depth: int) -> None:
    """A record cut anywhere is an error, never a shorter stack."""
    whole = encode(record(kernel_stack=tuple(range(depth)), user_stack=(1, 2)))
    assert decode(whole).kernel_stack == tuple(range(depth))
    for size in range(len(whole)):
        with pytest.raises(DecodeError, match=f"record of {size} bytes"):
            decode(whole[:size])


@pytest.mark.parametrize("value", [0, len(RecordType) + 1, 0xFFFFFFFF])
def test_unknown_type(value: int) -> None:
    """A type that the header does not know is refused and named."""
    with pytest.raises(DecodeError, match=rf"unknown type of record: {value}$"):
        decode(struct.pack("=I", value) + encode(record())[4:])


@pytest.mark.parametrize("value", [len(Source), 0xFFFFFFFF])
def test_unknown_source(value: int) -> None:
    """A source that the header does not know is refused and named."""
    raw = encode(record())
    with pytest.raises(DecodeError, match=rf"unknown source of a record: {value}$"):
        decode(raw[:4] + struct.pack("=I", value) + raw[8:])


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (KERNEL_BYTES, 4),
        (KERNEL_BYTES, KERNEL_STACK_DEPTH * 8 + 8),
        (KERNEL_BYTES, 0xFFFFFFF8),
        (USER_BYTES, 12),
        (USER_BYTES, USER_STACK_DEPTH * 8 + 8),
        (USER_BYTES, 0xFFFFFFF8),
    ],
)
def test_impossible_stack_sizes(offset: int, size: int) -> None:
    """Stacks deeper than the header allows, or of half a frame, are refused and named."""
    raw = bytearray(encode(record(), padding=2048))
    struct.pack_into("=I", raw, offset, size)
    with pytest.raises(DecodeError, match=rf"impossible stack sizes .*\b{size}\b"):
        decode(bytes(raw))


def test_a_full_name_has_no_end() -> None:
    """All 16 bytes of a name count, and nothing behind a zero does."""
    assert decode(encode(record(comm=b"0123456789abcdef"))).comm == b"0123456789abcdef"
    assert decode(encode(record(comm=b"ab\0leftover"))).comm == b"ab"
    assert decode(encode(record(napi_name=b"eth0\0leftover"))).napi_name == b"eth0"
    assert decode_tick(encode_tick(tick(0, comm=b"ab\0leftover"))).comm == b"ab"


@given(st.binary(max_size=HEAD.size + 64))
@example(bytes(HEAD.size))
@example(b"\xff" * (HEAD.size + 64))
def test_arbitrary_bytes(data: bytes) -> None:
    """Whatever arrives is a record or a DecodeError, nothing else."""
    with suppress(DecodeError):
        assert isinstance(decode(data), StallRecord)


@given(st.sampled_from(RecordType), st.sampled_from(Source), st.binary(min_size=HEAD.size))
def test_arbitrary_bytes_behind_a_good_start(kind: RecordType, source: Source, rest: bytes) -> None:
    """The same with a head that reaches the later checks."""
    with suppress(DecodeError):
        assert decode(struct.pack("=II", kind, source) + rest).type is kind


TASKS = st.lists(
    st.builds(TaskEntry, task=U64, pid=U32, flags=U32, cpus_allowed=U32, cpu=U32, comm=COMM),
    max_size=20,
)


@given(TASKS)
def test_tasks_round_trip(tasks: list[TaskEntry]) -> None:
    """Every task that the iterator wrote comes back, in its order."""
    assert list(decode_tasks(b"".join(TASK.pack(*task) for task in tasks))) == tasks


@pytest.mark.parametrize("size", [1, TASK.size - 1, TASK.size + 1])
def test_half_a_task(size: int) -> None:
    """An entry that was cut is an error."""
    with pytest.raises(DecodeError, match=f"{size} bytes"):
        list(decode_tasks(bytes(size)))


TICKS = st.builds(
    TickSample,
    stack=st.lists(U64, max_size=LOOKBACK_DEPTH).map(tuple),
    comm=COMM,
    **dict.fromkeys(("time_ns", "steal_ns", "net_rx_ns"), U64),
    **dict.fromkeys(("net_rx_runs", "processed", "squeezed", "dropped"), U32),
    **dict.fromkeys(("received_rps", "flow_limit", "backlog"), U32),
    **dict.fromkeys(("tgid", "tid", "policy", "prio", "serving"), U32),
    kind=st.sampled_from(TickKind),
)


@given(TICKS)
def test_ticks_round_trip(wanted: TickSample) -> None:
    """A tick comes back field by field, without what an older one left behind its stack."""
    assert decode_tick(encode_tick(wanted)) == wanted


@pytest.mark.parametrize("size", [0, TICK.size - 1, TICK.size + 1])
def test_a_tick_of_another_size(size: int) -> None:
    """An entry that is cut or too long is an error."""
    with pytest.raises(DecodeError, match=rf"of {size} bytes is not {TICK.size}"):
        decode_tick(bytes(size))


def test_the_deepest_tick() -> None:
    """A stack that fills the entry comes back whole."""
    deepest = tick(0, stack=tuple(range(1, LOOKBACK_DEPTH + 1)))
    assert decode_tick(encode_tick(deepest)) == deepest


@pytest.mark.parametrize("size", [4, LOOKBACK_DEPTH * 8 + 8, 0xFFFFFFF8])
def test_impossible_tick_stacks(size: int) -> None:
    """Stacks deeper than the ring has room for, or of half a frame, are refused and named."""
    raw = bytearray(encode_tick(tick(0)))
    struct.pack_into("=I", raw, TICK_STACK_BYTES, size)
    with pytest.raises(DecodeError, match=f"impossible stack size of {size} bytes"):
        decode_tick(bytes(raw))


def test_unknown_kind_of_tick() -> None:
    """A kind that bpf/records.h does not know is refused and named."""
    raw = bytearray(encode_tick(tick(0)))
    struct.pack_into("=I", raw, TICK_KIND, 9)
    with pytest.raises(DecodeError, match=r"unknown kind of tick sample: 9$"):
        decode_tick(bytes(raw))


@given(st.binary(min_size=TICK.size, max_size=TICK.size))
def test_arbitrary_ticks(data: bytes) -> None:
    """Whatever the memory holds is a tick or a DecodeError, nothing else."""
    with suppress(DecodeError):
        assert isinstance(decode_tick(data), TickSample)
