"""Bytes from the perf buffer to frozen records. Pure; no kernel needed."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from stalld.errors import DecodeError
from stalld.records import (
    ARGS_LEN,
    COMM_LEN,
    KERNEL_STACK_DEPTH,
    LOOKBACK_DEPTH,
    NAMES_LEN,
    PATH_COUNT,
    USER_STACK_DEPTH,
    VECTORS,
    WAITERS,
    Known,
    NamePath,
    RecordType,
    Source,
    StallRecord,
    TaskEntry,
    TaskRecord,
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
# struct task_record up to its names, which are sent only as far as filled.
WHO = struct.Struct(f"=4I2Q10I{PATH_COUNT}I2I{COMM_LEN}s{COMM_LEN}s{ARGS_LEN}s")
_TYPE = struct.Struct("=I")
TASK = struct.Struct(f"=QIIII{COMM_LEN}s")
TICK = struct.Struct(f"=3Q14I{COMM_LEN}s{LOOKBACK_DEPTH}Q")

# A look-up is several times faster than the call of an enumeration.
_TYPES = {int(member): member for member in RecordType}
_SOURCES = {int(member): member for member in Source}
_TICK_KINDS = {int(member): member for member in TickKind}


def is_task(data: bytes) -> bool:
    """Whether a perf-buffer record is one for :func:`decode_who`."""
    return len(data) >= _TYPE.size and _TYPE.unpack_from(data)[0] == RecordType.TASK


def decode(data: bytes | memoryview) -> StallRecord:
    """Decode one perf-buffer record about a stall.

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
    record_type, source = _TYPES.get(head[0]), _SOURCES.get(head[1])
    if record_type is None:
        raise DecodeError(f"unknown type of record: {head[0]}")
    if source is None:
        raise DecodeError(f"unknown source of a record: {head[1]}")
    if record_type is RecordType.TASK:
        raise DecodeError("a task is not a stall")
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


def decode_who(data: bytes) -> TaskRecord:
    """Decode one perf-buffer record about a task.

    Raises:
        DecodeError: too short, or with a source or sizes that ``bpf/records.h`` does not know.
    """
    if len(data) < WHO.size:
        raise DecodeError(f"task of {len(data)} bytes is shorter than its head ({WHO.size})")
    head = WHO.unpack_from(data)
    *numbers, args_bytes = head[2:16]
    counts, (cut, names_bytes) = head[16 : 16 + PATH_COUNT], head[16 + PATH_COUNT : 18 + PATH_COUNT]
    parent_comm, file_system, args = head[18 + PATH_COUNT :]
    names = data[WHO.size : WHO.size + names_bytes]
    if len(names) != names_bytes or names_bytes > NAMES_LEN or args_bytes > ARGS_LEN:
        raise DecodeError(f"impossible sizes of {args_bytes} and {names_bytes} bytes in a task")
    found = names.split(b"\0")
    if sum(counts) > len(found) - 1:
        raise DecodeError(f"impossible numbers of names in a task: {counts} in {names_bytes} bytes")
    paths = []
    for number, count in enumerate(counts):
        paths.append(NamePath(tuple(found[:count]), bool(cut >> number & 1)))
        del found[:count]
    source = _SOURCES.get(head[1])
    if source is None:
        raise DecodeError(f"unknown source of a task: {head[1]}")
    *first, known, flags, tgid, tid, uid, parent, ns_pid, syscall, total = numbers
    return TaskRecord._make(
        (
            RecordType.TASK,
            source,
            *first,
            Known(known & 0x7),
            *(flags, tgid, tid, uid, parent, ns_pid, syscall, total),
            parent_comm.split(b"\0", 1)[0],
            file_system.split(b"\0", 1)[0],
            args[:args_bytes],
            *paths,
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
    known = _TICK_KINDS.get(kind)
    if known is None:
        raise DecodeError(f"unknown kind of tick sample: {kind}")
    stack = head[18 : 18 + stack_bytes // 8]
    return TickSample._make((*numbers, known, serving, comm.split(b"\0", 1)[0], stack))
