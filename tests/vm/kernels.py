"""The list of supported kernels, ``kernels.toml``."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import NamedTuple

LIST = Path(__file__).with_name("kernels.toml")
RUNNING = "running"


class Kernel(NamedTuple):
    """One entry; see the file for the meanings."""

    name: str
    suites: list[str]
    module: bool
    may_skip: list[str]
    why: str


class KernelsError(Exception):
    """A kernel could not be had or booted; the message says why."""


def supported() -> list[Kernel]:
    """All of them, in the order of the file."""
    return [Kernel(**entry) for entry in tomllib.loads(LIST.read_text())["kernel"]]


def chosen(names: list[str]) -> list[Kernel]:
    """Those of these names; all when there is none.

    Raises:
        KernelsError: a name is not in the list.
    """
    kernels = {kernel.name: kernel for kernel in supported()}
    unknown = [name for name in names if name not in kernels]
    if unknown:
        raise KernelsError(
            f"no kernel {', '.join(unknown)} in {LIST.name}; there are {', '.join(kernels)}"
        )
    return [kernels[name] for name in names] if names else list(kernels.values())


def cache_directory() -> Path:
    """Where kernels are kept, outside the checkout."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "softirq-stalld" / "kernels"
