"""Bytes from the perf buffer to frozen records. Pure; no kernel needed."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from stalld.errors import DecodeError
from stalld.records import (
    COMM_LEN,
    KERNEL_STACK_DEPTH,
    USER_STACK_DEPTH,
    VECTORS,
    RecordType,
    Source,
    StallRecord,
    TaskEntry,
)

# struct stall_record up to its kernel stack, which is sent only as far as filled.
HEAD = struct.Struct(f"=4I5Q{len(VECTORS)}Q12I{COMM_LEN}s{USER_STACK_DEPTH}Q")
_FIRST_WAIT = 9
_AFTER_WAITS = _FIRST_WAIT + len(VECTORS)
# The two stack sizes and the name, before the user stack.
_SIZES = _AFTER_WAITS + 10
_USER_STACK = _SIZES + 3
TASK = struct.Struct(f"=QII{COMM_LEN}s")


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
    kernel_bytes, user_bytes, comm = head[_SIZES:_USER_STACK]
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
            *head[2:_FIRST_WAIT],
            head[_FIRST_WAIT:_AFTER_WAITS],
            *head[_AFTER_WAITS:_SIZES],
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
    for task, pid, flags, comm in TASK.iter_unpack(data):
        yield TaskEntry(task, pid, flags, comm.split(b"\0", 1)[0])
