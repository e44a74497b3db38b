"""bcc: the one place that imports it, and with it LLVM."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stalld.errors import MissingAbilityError, ProbeError
from stalld.probe.compiled import with_maps
from stalld.probe.libbpf import MapSpec

if TYPE_CHECKING:
    from bcc import BPF

SOURCES = (
    "records.h",
    "state.h",
    "softirq.c",
    "record.c",
    "task.c",
    "sched.c",
    "lookback.c",
    "tick.c",
    "napi.c",
    "nmi.c",
    "hotplug.c",
    "tasks.c",
)
"""One translation unit, in this order: bcc rewrites only its main file."""


class Module(NamedTuple):
    """What bcc made of the sources; see :class:`Compiled`."""

    bcc_version: str
    license: str
    kern_version: int
    maps: list[MapSpec]
    programs: dict[str, bytes]


def require_bcc() -> None:
    """Is it there?

    Raises:
        MissingAbilityError: no.
    """
    try:
        from bcc import BPF
    except (ImportError, OSError) as error:
        # OSError: bcc is there, its libbcc.so.0 is not.
        raise MissingAbilityError(
            f"cannot import BPF from bcc: {error}; install it: apt install python3-bpfcc, and use "
            "the distribution's python3 (the package bcc of PyPI is something else)"
        ) from error
    assert BPF


def compile_sources(bpf_dir: Path, flags: list[str]) -> Module:
    """Compile everything in ``bpf_dir``.

    Raises:
        ProbeError: what the compiler says is on stderr.
    """
    from bcc import BPF, __version__
    from bcc.libbcc import lib

    # -O1: bcc runs LLVM's own passes after clang's; unrolling in both costs time and size.
    flags = [*flags, "-O1", "-Wno-duplicate-decl-specifier"]
    try:
        bpf = BPF(text=_text(bpf_dir).encode(), cflags=flags)
    except Exception as error:
        # bcc raises bare Exception for everything.
        raise ProbeError(f"the BPF programs were not compiled: {error}") from error
    try:
        # It has made the maps too, and put their descriptors into the code.
        maps = dict(_maps(bpf))
        number = {fd: place for place, fd in enumerate(maps)}
        return Module(
            str(__version__),
            lib.bpf_module_license(bpf.module).decode(),
            int(lib.bpf_module_kern_version(bpf.module)),
            list(maps.values()),
            {name: with_maps(code, number.__getitem__) for name, code in _programs(bpf)},
        )
    finally:
        bpf.cleanup()


def attach_kprobe(program: int, function: str, *, on_return: bool) -> int:
    """The perf event.

    Raises:
        OSError: the kernel refused it.
    """
    from bcc.libbcc import lib

    event = f"{'r' if on_return else 'p'}_{function}".encode()
    fd = int(lib.bpf_attach_kprobe(program, int(on_return), event, function.encode(), 0, 0))
    if fd < 0:
        raise OSError(ctypes.get_errno(), f"attaching a kprobe to {function}")
    return fd


def _text(bpf_dir: Path) -> str:
    """All sources as one text, with lines that keep the compiler's messages true."""
    parts = [
        "#include <linux/types.h>\n#ifdef STALLD_STRUCTS_FROM_BTF\n"
        "#include <stalld_structs.h>\n#else\n#include <linux/sched.h>\n"
        "#include <linux/netdevice.h>\n#endif\n"
    ]
    for name in SOURCES:
        try:
            parts.append(f'#line 1 "bpf/{name}"\n{(bpf_dir / name).read_text()}')
        except OSError as error:
            raise ProbeError(f"cannot read the BPF source {bpf_dir / name}: {error}") from error
    return "\n".join(parts)


def _maps(bpf: BPF) -> Iterator[tuple[int, MapSpec]]:
    """Each with bcc's descriptor of it."""
    from bcc.libbcc import lib

    name_of = lib.bpf_table_name
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.c_void_p, ctypes.c_size_t]
    count = lib.bpf_num_tables
    count.restype, count.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
    for place in range(count(bpf.module)):
        name = name_of(bpf.module, place)
        fd = int(lib.bpf_table_fd(bpf.module, name))
        about = Path(f"/proc/self/fdinfo/{fd}").read_text()
        facts = dict(re.findall(r"^(\w+):\s*(\w+)$", about, re.MULTILINE))
        yield (
            fd,
            MapSpec(
                name.decode(),
                *(
                    int(facts[fact], 0)
                    for fact in ("map_type", "key_size", "value_size", "max_entries", "map_flags")
                ),
            ),
        )


def _programs(bpf: BPF) -> Iterator[tuple[str, bytes]]:
    from bcc.libbcc import lib

    for place in range(lib.bpf_num_functions(bpf.module)):
        name = lib.bpf_function_name(bpf.module, place)
        start = lib.bpf_function_start(bpf.module, name)
        yield name.decode(), ctypes.string_at(start, lib.bpf_function_size(bpf.module, name))
