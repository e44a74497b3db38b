"""Does this kernel let a BPF program trace a function's entry (kfunc)?

Tried for real with a two-instruction program, since neither a version nor a
symbol tells: the trampoline may be compiled in and still be refused.
"""

from __future__ import annotations

import ctypes
import os
import struct

from stalld.probe.btf import Btf

_BPF_PROG_TYPE_TRACING = 26
_BPF_TRACE_FENTRY = 24
RETURN_ZERO = struct.pack("=BBhi", 0xB7, 0, 0, 0) + struct.pack("=BBhi", 0x95, 0, 0, 0)
"""The smallest program: r0 = 0; exit."""


class _ProgLoadOpts(ctypes.Structure):
    """Head of ``struct bpf_prog_load_opts``; ``sz`` tells libbpf where it ends."""

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
    )


def fentry_error(btf: Btf, function: str) -> str | None:
    """Why ``function`` cannot be traced, or None where it can.

    Attaches and detaches a program that does nothing.
    """
    attach_btf_id = btf.function_id(function)
    if attach_btf_id is None:
        return f"{function} is not in {btf.path}"
    lib = ctypes.CDLL("libbpf.so.1", use_errno=True)
    options = _ProgLoadOpts(
        sz=ctypes.sizeof(_ProgLoadOpts),
        expected_attach_type=_BPF_TRACE_FENTRY,
        attach_btf_id=attach_btf_id,
    )
    program = lib.bpf_prog_load(
        _BPF_PROG_TYPE_TRACING,
        b"fentry_trial",
        b"GPL",
        RETURN_ZERO,
        ctypes.c_size_t(len(RETURN_ZERO) // 8),
        ctypes.byref(options),
    )
    if program < 0:
        return f"loading: {os.strerror(ctypes.get_errno())}"
    try:
        link = lib.bpf_raw_tracepoint_open(None, program)
        if link < 0:
            return f"attaching: {os.strerror(ctypes.get_errno())}"
        os.close(link)
    finally:
        os.close(program)
    return None
