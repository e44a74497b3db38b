"""Per-CPU variables from the symbol table."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from stalld.probe.loader import percpu_places
from stalld.probe.percpu import STRUCTS, PercpuSymbols, places, read_symbols

# As Debian's 5.10 has them.
KALLSYMS = """\
0000000000000000 A fixed_percpu_data
0000000000017480 A __irq_regs
000000000001a6c0 a kernel_cpustat
000000000001f1c0 a tick_cpu_sched
000000000002d5c0 a softnet_data
000000000002f380 a steal_time
ffffffff81000000 T _stext
ffffffff81234560 t steal_time_show
ffffffffc0000000 t tick_cpu_sched_of\t[module]
"""
INSIDE = {
    ("tick_sched", "sched_timer"): 0,
    ("kvm_steal_time", "steal"): 0,
    ("kernel_cpustat", "cpustat"): 0,
    ("softnet_data", "processed"): 16,
    ("softnet_data", "time_squeeze"): 20,
}


def btf(lists: bool = False) -> Any:
    """A kernel's BTF that tells structs only."""
    return SimpleNamespace(
        lists_percpu_variables=lists,
        member_offset=lambda *path: INSIDE.get(path),
        percpu_offset=lambda *path: None,
    )


def test_places_from_symbols() -> None:
    """The variables' places and their members' offsets add up, relative to the tick's timer."""
    found = percpu_places(PercpuSymbols(btf(), read_symbols(KALLSYMS.splitlines())), btf())
    timer = 0x1F1C0
    assert found == {
        "regs": 0x17480 - timer,
        "steal": 0x2F380 - timer,
        "cpustat": 0x1A6C0 + 7 * 8 - timer,
        "softnet": 0x2D5C0 + 16 - timer,
    }


def test_hidden_addresses_tell_nothing() -> None:
    """Without CAP_SYSLOG every address reads as zero: there are no places then."""
    lines = [f"{0:016x} {line[17:]}" for line in KALLSYMS.splitlines()]
    assert read_symbols(lines) == {}


def test_ambiguous_names_are_left_out() -> None:
    """A name that stands there twice may be somebody else's."""
    lines = [*KALLSYMS.splitlines(), "0000000000001000 d steal_time\t[module]"]
    found = read_symbols([*lines, "0000000000002000 d softnet_data"])
    assert "softnet_data" not in found
    assert set(found) == set(STRUCTS) - {"softnet_data"}


@pytest.mark.parametrize("path", [("jiffies",), ("steal_time", "no_such"), ("__irq_regs", "ip")])
def test_what_there_is_not(path: tuple[str, ...]) -> None:
    """A variable or member that is not known is none, not an error."""
    symbols = PercpuSymbols(btf(), read_symbols(KALLSYMS.splitlines()))
    assert symbols.percpu_offset(*path) is None


def test_btf_comes_first(tmp_path: Any) -> None:
    """Where BTF lists such variables, and where there is no symbol table, BTF is asked."""
    path = tmp_path / "kallsyms"
    listing: Any = btf(lists=True)
    silent: Any = btf()
    assert places(listing, str(path)) is listing
    assert places(silent, str(path)) is silent
    path.write_text(KALLSYMS)
    assert isinstance(places(btf(), str(path)), PercpuSymbols)
