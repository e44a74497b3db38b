"""``softirq-stalld check``: what this host supports, found by trying it."""

from __future__ import annotations

import os

from stalld import __version__
from stalld.check import host, kernel, nics
from stalld.check.probes import try_probes
from stalld.check.report import Item, Report, State, render
from stalld.detector import tick_ns
from stalld.probe import capabilities

__all__ = ["Item", "Report", "State", "check", "render"]


def check() -> Report:
    """Try everything the service needs; nothing stays attached.

    Loads one CPU for at most 0.3 s (see :mod:`stalld.check.stimulus`).
    """
    symbols = kernel.symbols()
    items = [
        host.kernel(),
        host.granted(capabilities.effective()),
        *host.perf_events(capabilities.effective()),
        host.libbpf(),
        host.bcc(),
        *host.types(),
        symbols.item,
        *kernel.tick(tick_ns()),
        kernel.preemption(),
        *nics.network(),
    ]
    trial = try_probes(tick_ns(), symbols)
    return Report(__version__, os.uname().release, (*items, *trial.items), trial.serves_inline)
