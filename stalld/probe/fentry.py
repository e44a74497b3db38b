"""Does this kernel let a BPF program trace a function's entry (kfunc)?

Tried for real with a two-instruction program, since neither a version nor a
symbol tells: the trampoline may be compiled in and still be refused.
"""

from __future__ import annotations

import os

from stalld.probe import libbpf
from stalld.probe.btf import Btf


def fentry_error(btf: Btf, function: str) -> str | None:
    """Why ``function`` cannot be traced, or None where it can.

    Attaches and detaches a program that does nothing.
    """
    btf_id = btf.function_id(function)
    if btf_id is None:
        return f"{function} is not in {btf.path}"
    kind = libbpf.Kind(libbpf.TRACING, libbpf.TRACE_FENTRY, btf_id)
    try:
        program = libbpf.load_program("fentry_trial", kind, libbpf.RETURN_ZERO)
    except libbpf.RefusedError as error:
        return f"loading: {error}"
    try:
        os.close(libbpf.attach_raw_tracepoint(None, program))
    except libbpf.RefusedError as error:
        return f"attaching: {error}"
    finally:
        os.close(program)
    return None
