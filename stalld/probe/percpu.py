"""Where per-CPU variables lie, on kernels whose BTF tells the structs and not the variables.

pahole 1.18 to 1.21 encoded such variables wrongly, so the kernel's build leaves them out with
these (scripts/link-vmlinux.sh, --skip_encoding_btf_vars: commit a0b8200d06ad in 5.13, also in
5.10.y). Debian's 5.10 is such a kernel. Its symbol table still has their places.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from stalld.probe.btf import Btf

STRUCTS = {
    "tick_cpu_sched": "tick_sched",
    "steal_time": "kvm_steal_time",
    "kernel_cpustat": "kernel_cpustat",
    "softnet_data": "softnet_data",
    "__irq_regs": None,
}
"""Variable → its struct, or None for a pointer."""

_DATA_TYPES = "AaBbDdVv"


class Places(Protocol):
    """What :func:`stalld.probe.loader.percpu_places` asks."""

    def percpu_offset(self, variable: str, *members: str) -> int | None:
        """See :meth:`stalld.probe.btf.Btf.percpu_offset`."""


class PercpuSymbols:
    """Places from the symbol table, offsets of members from BTF."""

    def __init__(self, btf: Btf, symbols: dict[str, int]) -> None:
        self._btf = btf
        self._symbols = symbols

    def percpu_offset(self, variable: str, *members: str) -> int | None:
        """See :meth:`stalld.probe.btf.Btf.percpu_offset`."""
        place = self._symbols.get(variable)
        struct = STRUCTS.get(variable)
        if place is None:
            return None
        if not members:
            return place
        inside = self._btf.member_offset(struct, *members) if struct else None
        return None if inside is None else place + inside


def read_symbols(lines: Iterable[str]) -> dict[str, int]:
    """The variables' places from lines of /proc/kallsyms.

    A name that stands there twice is left out, and so are all where the addresses are hidden.
    """
    found: dict[str, list[int]] = {}
    for line in lines:
        address, kind, name = line.split(maxsplit=2)
        if kind in _DATA_TYPES and (name := name.rstrip()) in STRUCTS:
            found.setdefault(name, []).append(int(address, 16))
    places = {name: at[0] for name, at in found.items() if len(at) == 1}
    return places if any(places.values()) else {}


def places(btf: Btf, symbols: str = "/proc/kallsyms") -> Places:
    """BTF itself where it lists such variables, else the symbol table."""
    if btf.lists_percpu_variables:
        return btf
    try:
        with open(symbols, encoding="ascii", errors="replace") as lines:
            return PercpuSymbols(btf, read_symbols(lines))
    except OSError:
        return btf
