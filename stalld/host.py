"""What the tracker asks about this machine: the shared maps, the symbols, the hypervisor."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from stalld.enrich.cpus import parse_list
from stalld.enrich.symbols import SymbolTable
from stalld.records import TickKind, TickSample
from stalld.rings import Napi, Rings
from stalld.state import Maps
from stalld.track.model import Tick

_MAX_EXPLAINED = 256


class LocalHost:
    """Answers as ``track.model.Host`` asks.

    Args:
        virtual: this machine is a guest (see :func:`is_virtual`).
        places: see ``Description.percpu``.
        threaded: see :func:`threads_softirqs`.
    """

    def __init__(
        self,
        maps: Maps,
        rings: Rings,
        symbols: SymbolTable,
        virtual: bool,
        places: Collection[str],
        *,
        threaded: bool,
    ) -> None:
        self.threaded = threaded
        self._counts = frozenset(places)
        self._maps = maps
        self._rings = rings
        self._symbols = symbols
        self._virtual = virtual
        # By their times the ticks that were named since the symbols last changed.
        self._explained: dict[int, Tick] = {}
        self._version = symbols.version

    def ticks(self, cpu: int) -> Sequence[TickSample]:
        """What ran on ``cpu`` at its last ticks, oldest first."""
        return self._rings.ticks(cpu)

    def recent(self, cpu: int, since_ns: int) -> Sequence[TickSample]:
        """Those after ``since_ns``, and the last one until then."""
        return self._rings.recent(cpu, since_ns)

    def polled(self, cpu: int, seq: int) -> Napi | None:
        """What ``cpu`` polled in its stall ``seq``; None: not known any more."""
        return self._rings.polled(cpu, seq)

    def explain(self, sample: TickSample) -> Tick:
        """Name the stack of a tick."""
        if self._version != self._symbols.version:
            self._explained.clear()
            self._version = self._symbols.version
        # Two CPUs' ticks may come at the same time.
        known = self._explained.get(sample.time_ns)
        if known is None or known.sample is not sample:
            known = self._explained[sample.time_ns] = self._explain(sample)
            if len(self._explained) > _MAX_EXPLAINED:
                del self._explained[next(iter(self._explained))]
        return known

    def counts(self) -> frozenset[str]:
        """Which of softnet_data's members the programs can read."""
        return self._counts

    def serves_inline(self) -> bool | None:
        """Whether this kernel serves softirqs while ksoftirqd is runnable."""
        return False if self.threaded else self._maps.serves_inline()

    def tells_steal(self, cpu: int) -> bool:
        """Whether a tick that comes late could be told from a CPU that was taken away.

        KVM counts its updates of the steal clock; other hypervisors' clocks are
        accounted too late, and some keep none.
        """
        return not self._virtual or self._maps.cpus[cpu].steal_version != 0

    def _explain(self, sample: TickSample) -> Tick:
        if sample.kind is TickKind.STACK:
            stack = self._symbols.trimmed(sample.stack, "tick")
            return Tick(sample, stack.mode, stack.frames)
        if sample.kind is TickKind.USER:
            return Tick(sample, "user", ())
        mode = "softirq" if sample.serving else "kernel" if sample.tid else "idle"
        frames = [self._symbols.format(address) for address in sample.stack]
        return Tick(sample, mode, tuple(frames))


def threads_softirqs(proc: str = "/proc") -> bool:
    """Whether an interrupt's end never serves softirqs: it only wakes a thread that does.

    So with PREEMPT_RT, and with ``threadirqs`` on the kernel's command line.
    """
    words = Path(proc, "cmdline").read_text(errors="replace").split()
    return preempts_all(proc) or "threadirqs" in words


def preempts_all(proc: str = "/proc") -> bool:
    """Whether this is a kernel with PREEMPT_RT."""
    return "PREEMPT_RT" in Path(proc, "version").read_text(errors="replace")


NO_TICK = "a stall there has no samples, and is told when it ends"
"""What that means where the tick is stopped."""


def nohz_full(sys: str = "/sys") -> frozenset[int]:
    """CPUs that stop their tick while a single task runs on them."""
    try:
        return parse_list(Path(sys, "devices/system/cpu/nohz_full").read_text())
    except (OSError, ValueError):
        return frozenset()  # Not built in; "(null)" where none is.


def is_virtual(proc: str = "/proc", sys: str = "/sys") -> bool:
    """Whether a hypervisor may take this machine's CPUs away.

    x86 tells by a CPU flag; elsewhere a device tree, or time stolen so far, does.
    """
    cpuinfo = Path(proc, "cpuinfo").read_text(errors="replace")
    if re.search(r"^flags\b.*\bhypervisor\b", cpuinfo, re.MULTILINE):
        return True
    if Path(sys, "hypervisor/type").exists() or Path(proc, "device-tree/hypervisor").exists():
        return True
    total = Path(proc, "stat").read_text().split("\n", 1)[0].split()
    return len(total) > 8 and int(total[8]) > 0
