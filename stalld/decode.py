"""Bytes from the perf buffer to frozen records. Pure; no kernel needed."""

from __future__ import annotations

import struct
from collections.abc import Iterator

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

# struct stall_record up to its kernel stack, which is sent only as far as filled.
HEAD = struct.Struct(
    f"=4I8Q{len(VECTORS)}Q{WAITERS}Q{WAITERS}I20I{COMM_LEN}s2I{COMM_LEN}s{USER_STACK_DEPTH}Q"
)
_WAIT_NS = 12
_WAITER_NS = _WAIT_NS + len(VECTORS)
_WAITER_PID = _WAITER_NS + WAITERS
_AFTER_WAITERS = _WAITER_PID + WAITERS
# The device's name, the two stack sizes and the task's name, before the user stack.
_NAPI_NAME = _AFTER_WAITERS + 20
_USER_STACK = _NAPI_NAME + 4
TASK = struct.Struct(f"=QIIII{COMM_LEN}s")
TICK = struct.Struct(f"=3Q14I{COMM_LEN}s{LOOKBACK_DEPTH}Q")


def decode(data: bytes | memoryview) -> StallRecord:
    """Decode one perf-buffer record.

    Args:
        data: the raw record; the perf buffer may have padded its end.

    Raises:
        DecodeError: too short, or a type, source or stack size that
            ``bpf/records.h`` does not know.
    """
    if len(data) < HEAD.size:
        raise DecodeError(f"record of {len(data)} bytes is shorter than its head ({HEAD.size})")
    head = HEAD.unpack_from(data)
    napi_name, kernel_bytes, user_bytes, comm = head[_NAPI_NAME:_USER_STACK]
    if (
        kernel_bytes % 8
        or kernel_bytes > KERNEL_STACK_DEPTH * 8
        or user_bytes % 8
        or user_bytes > USER_STACK_DEPTH * 8
    ):
        raise DecodeError(f"impossible stack sizes of {kernel_bytes} and {user_bytes} bytes")
    if HEAD.size + kernel_bytes > len(data):
        raise DecodeError(
            f"record of {len(data)} bytes ends before its stack of {kernel_bytes} bytes"
        )
    try:
        record_type, source = RecordType(head[0]), Source(head[1])
    except ValueError as error:
        raise DecodeError(f"unknown record: {error}") from None
    return StallRecord._make(
        (
            record_type,
            source,
            *head[2:_WAIT_NS],
            head[_WAIT_NS:_WAITER_NS],
            head[_WAITER_NS:_WAITER_PID],
            head[_WAITER_PID:_AFTER_WAITERS],
            *head[_AFTER_WAITERS:_NAPI_NAME],
            napi_name.split(b"\0", 1)[0],
            comm.split(b"\0", 1)[0],
            struct.unpack_from(f"={kernel_bytes // 8}Q", data, HEAD.size),
            head[_USER_STACK : _USER_STACK + user_bytes // 8],
        )
    )


def decode_tasks(data: bytes) -> Iterator[TaskEntry]:
    """Decode what the task iterator wrote.

    Raises:
        DecodeError: ``data`` does not end with a whole entry.
    """
    if len(data) % TASK.size:
        raise DecodeError(f"{len(data)} bytes of tasks are not a multiple of {TASK.size}")
    for *numbers, comm in TASK.iter_unpack(data):
        yield TaskEntry._make((*numbers, comm.split(b"\0", 1)[0]))


def decode_tick(data: bytes) -> TickSample:
    """Decode one entry of the look-back ring.

    Raises:
        DecodeError: it has another size, or an impossible stack.
    """
    if len(data) != TICK.size:
        raise DecodeError(f"tick sample of {len(data)} bytes is not {TICK.size}")
    head = TICK.unpack(data)
    *numbers, kind, serving, stack_bytes, comm = head[:18]
    if stack_bytes % 8 or stack_bytes > LOOKBACK_DEPTH * 8:
        raise DecodeError(f"impossible stack size of {stack_bytes} bytes in a tick sample")
    try:
        known = TickKind(kind)
    except ValueError as error:
        raise DecodeError(f"unknown tick sample: {error}") from None
    stack = head[18 : 18 + stack_bytes // 8]
    return TickSample._make((*numbers, known, serving, comm.split(b"\0", 1)[0], stack))
