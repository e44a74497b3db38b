"""libbpf's calls that make maps, load programs and attach them, for the probe child."""

from __future__ import annotations

import ctypes
import os
import struct
from typing import NamedTuple

from stalld.errors import MissingAbilityError

# include/uapi/linux/bpf.h: enum bpf_map_type, enum bpf_prog_type, enum bpf_attach_type
ARRAY = 2

KPROBE = 2
PERF_EVENT = 7
RAW_TRACEPOINT = 17
TRACING = 26

TRACE_FENTRY = 24
TRACE_FEXIT = 25
TRACE_ITER = 28

RETURN_ZERO = struct.pack("=BBhi", 0xB7, 0, 0, 0) + struct.pack("=BBhi", 0x95, 0, 0, 0)
"""The smallest program: r0 = 0; exit."""

_LOG_SIZE = 4 << 20
"""Of the verifier's words, which old kernels make an error of when they do not fit."""


class _MapCreateOpts(ctypes.Structure):
    """``struct bpf_map_create_opts``; ``sz`` tells libbpf where ours ends."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("btf_fd", ctypes.c_uint32),
        ("btf_key_type_id", ctypes.c_uint32),
        ("btf_value_type_id", ctypes.c_uint32),
        ("btf_vmlinux_value_type_id", ctypes.c_uint32),
        ("inner_map_fd", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
        ("map_extra", ctypes.c_uint64),
    )


class _ProgLoadOpts(ctypes.Structure):
    """``struct bpf_prog_load_opts``, likewise."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("attempts", ctypes.c_int),
        ("expected_attach_type", ctypes.c_int),
        ("prog_btf_fd", ctypes.c_uint32),
        ("prog_flags", ctypes.c_uint32),
        ("prog_ifindex", ctypes.c_uint32),
        ("kern_version", ctypes.c_uint32),
        ("attach_btf_id", ctypes.c_uint32),
        ("attach_prog_fd", ctypes.c_uint32),
        ("attach_btf_obj_fd", ctypes.c_uint32),
        ("fd_array", ctypes.c_void_p),
        ("func_info", ctypes.c_void_p),
        ("func_info_cnt", ctypes.c_uint32),
        ("func_info_rec_size", ctypes.c_uint32),
        ("line_info", ctypes.c_void_p),
        ("line_info_cnt", ctypes.c_uint32),
        ("line_info_rec_size", ctypes.c_uint32),
        ("log_level", ctypes.c_uint32),
        ("log_size", ctypes.c_uint32),
        ("log_buf", ctypes.c_char_p),
    )


class RefusedError(Exception):
    """The kernel's answer.

    Attributes:
        number: its errno.
        log: what the verifier said; "" where it said nothing.
    """

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.number = number
        self.log = ""


class MapSpec(NamedTuple):
    """What makes a map; ``kind`` is its ``enum bpf_map_type``, sizes are in bytes."""

    name: str
    kind: int
    key_size: int
    value_size: int
    entries: int
    flags: int


class Kind(NamedTuple):
    """Of a program: its ``enum bpf_prog_type``; of TRACING what it is for, and on what."""

    program: int
    attach: int = 0
    btf_id: int = 0


def load_libbpf() -> ctypes.CDLL:
    """libbpf.

    Raises:
        MissingAbilityError: it is not installed.
    """
    try:
        return ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise MissingAbilityError(
            f"cannot load libbpf.so.1: {error}; install it: apt install libbpf1"
        ) from error


def create_map(spec: MapSpec) -> int:
    """A new map's descriptor.

    Raises:
        RefusedError: by the kernel.
    """
    options = _MapCreateOpts(sz=ctypes.sizeof(_MapCreateOpts), map_flags=spec.flags)
    return _made(
        load_libbpf().bpf_map_create(
            spec.kind,
            spec.name.encode(),
            spec.key_size,
            spec.value_size,
            ctypes.c_uint32(spec.entries),
            ctypes.byref(options),
        )
    )


def load_program(
    name: str, kind: Kind, code: bytes, license_: str = "GPL", kern_version: int = 0
) -> int:
    """A loaded program's descriptor.

    Args:
        name: the kernel keeps 15 bytes of it.
        code: instructions of 8 bytes.
        kern_version: wanted by kernels before 5.0 only.

    Raises:
        RefusedError: by the kernel.
    """
    options = _ProgLoadOpts(
        sz=ctypes.sizeof(_ProgLoadOpts),
        expected_attach_type=kind.attach,
        attach_btf_id=kind.btf_id,
        kern_version=kern_version,
    )

    def load() -> int:
        return int(
            load_libbpf().bpf_prog_load(
                kind.program,
                name.encode(),
                license_.encode(),
                code,
                ctypes.c_size_t(len(code) // 8),
                ctypes.byref(options),
            )
        )

    try:
        return _made(load())
    except RefusedError as error:
        # Once more for the reason, if it is not taken after all.
        log = ctypes.create_string_buffer(_LOG_SIZE)
        options.log_level, options.log_size = 1, _LOG_SIZE
        options.log_buf = ctypes.cast(log, ctypes.c_char_p)
        fd = load()
        if fd >= 0:
            return fd
        error.log = log.value.decode("utf-8", "replace")
        raise


def put(map_fd: int, key: int, value: int) -> None:
    """Write one element of 32 bits into an array of such.

    Raises:
        RefusedError: by the kernel.
    """
    words = ctypes.c_uint32(key), ctypes.c_uint32(value)
    _made(load_libbpf().bpf_map_update_elem(map_fd, *map(ctypes.byref, words), ctypes.c_uint64(0)))


def attach_raw_tracepoint(hook: str | None, program: int) -> int:
    """The link; without a hook, of an fentry or fexit program, which know theirs.

    Raises:
        RefusedError: by the kernel.
    """
    name = None if hook is None else hook.encode()
    return _made(load_libbpf().bpf_raw_tracepoint_open(name, program))


def link_iterator(program: int) -> int:
    """The link whose every iterator runs the program anew.

    Raises:
        RefusedError: by the kernel.
    """
    return _made(load_libbpf().bpf_link_create(program, 0, TRACE_ITER, None))


def _made(result: int) -> int:
    if result >= 0:
        return result
    raise RefusedError(ctypes.get_errno())
