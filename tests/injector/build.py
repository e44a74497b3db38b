"""Compile the BPF programs once per source text, into a private directory of temporary files."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from tests.injector.kinds import InjectorError, UnsupportedError

SOURCES = Path(__file__).parent
COMPILERS = ("clang-14", "clang", "clang-15", "clang-16", "clang-17", "clang-18", "clang-19")
FLAGS = ("-target", "bpf", "-O2", "-g", "-Wall", "-Werror")


def compiled(name: str) -> Path:
    """Compile ``<name>.bpf.c`` unless its object is at hand; return the object's path.

    Raises:
        UnsupportedError: no clang.
        InjectorError: the compiler's message.
    """
    source = SOURCES / f"{name}.bpf.c"
    command = [_compiler(), *FLAGS, "-idirafter", _system_headers(), "-c", str(source)]
    key = hashlib.sha256("\0".join(command).encode() + source.read_bytes()).hexdigest()[:16]
    target = _cache() / f"{name}-{key}.o"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}")
        result = subprocess.run(
            [*command, "-o", str(partial)], capture_output=True, text=True, check=False
        )
        if result.returncode != 0:
            raise InjectorError(f"cannot compile {source.name}:\n{result.stderr}")
        partial.rename(target)
    return target


def _compiler() -> str:
    for name in COMPILERS:
        if path := shutil.which(name):
            return path
    raise UnsupportedError("clang is missing: install clang-14 and libbpf-dev")


def _system_headers() -> str:
    """Where Debian keeps asm/types.h, which -target bpf does not search."""
    return f"/usr/include/{sysconfig.get_config_var('MULTIARCH') or 'x86_64-linux-gnu'}"


def _cache() -> Path:
    path = Path(tempfile.gettempdir()) / f"softirq-injector-{os.geteuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    status = path.lstat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise InjectorError(f"{path} is not ours alone: remove it")
    return path
