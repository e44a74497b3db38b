"""A record's whole way without a kernel and without sinks: bytes in, lines out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from stalld.enrich.asking import Answer, Unknown
from stalld.enrich.identity import Asked
from stalld.enrich.kallsyms import Kallsyms
from stalld.enrich.symbols import SymbolTable
from stalld.host import LocalHost
from stalld.pipeline import Pipeline
from stalld.records import TickKind
from stalld.sinks.emitter import Emitter
from stalld.track.fold import Folder
from stalld.track.stall import Tracker
from tests.unit import make
from tests.unit.make import MS, T0, THRESHOLD, TICK_NS

CPU = 1
TEXT = 0xFFFFFFFF81000000
FUNCTIONS = 64
FUNCTION_BYTES = 0x100
DEPTH = 14
TICKS = 32
"""In the ring before each stall: an eighth of a second."""
WALL = 1_700_000_000_000_000_000
APART_NS = 500 * MS
_ENTRY = {FUNCTIONS: "do_syscall_64", FUNCTIONS + 1: "entry_SYSCALL_64_after_hwframe"}


class WholePath:
    """Decoder, symbols, tracker, look-back, folder and emitter, as the service joins them.

    Args:
        work: a directory for the symbols of a made kernel.
    """

    def __init__(self, work: Path) -> None:
        self.lines: list[bytes] = []
        self._now_ns = T0
        maps = make.maps(2)
        self._state = maps.cpus[CPU]
        self._rings = make.rings(maps)
        symbols = SymbolTable(_kallsyms(work))
        asking: Any = SimpleNamespace(answer=lambda question: Answer(Asked(), Unknown.GONE))
        self.pipeline = Pipeline(
            Tracker(
                THRESHOLD,
                TICK_NS,
                LocalHost(maps, self._rings, symbols, False, (), threaded=False),
            ),
            Folder(10_000, THRESHOLD),
            symbols,
            Emitter(lambda line, _: self.lines.append(line), lambda: WALL, "host"),
            asking,
            names={},
            id_prefix="boot-1",
            sampler="tick",
            clocks_ns=lambda: (self._now_ns, WALL),
            on_bad_record=_refuse,
            on_hotplug=_refuse,
        )

    def stall(self, number: int) -> tuple[bytes, bytes]:
        """The two records of a stall that none was like: a sample, the end. Fills the ring."""
        began = T0 + number * APART_NS
        self._now_ns = began + 31 * MS
        self._state.seq = number
        for at in range(TICKS):
            # What ran changes now and then; one tick in four has a stack.
            stack = _stack(1 + at // 8, 8) if at % 4 == 0 else _stack(1 + at // 8, 1)
            kind = TickKind.STACK if at % 4 == 0 else TickKind.ADDRESS
            time_ns = began - (TICKS - at) * TICK_NS
            tick = make.tick(0, stack=stack, kind=kind)._replace(time_ns=time_ns)
            make.keep(self._rings, CPU, tick)
        common = {
            "cpu": CPU,
            "seq": number,
            "started_ns": began,
            "tgid": 5000 + number,
            "tid": 5000 + number,
            "kernel_stack": _stack(20, DEPTH),
        }
        sample = make.record(**common, time_ns=began + 12 * MS, wait_ns=make.waits(NET_RX=12 * MS))
        end = make.close(1, 0, **common, wait_ns=make.waits(NET_RX=30 * MS)).record
        return make.encode(sample), make.encode(end._replace(time_ns=began + 30 * MS))


def _refuse(what: object) -> None:
    raise AssertionError(f"nothing of the kind was made: {what}")


def _stack(first: int, depth: int) -> tuple[int, ...]:
    """That many functions; where there are several the last ones are a system call's."""
    numbers = [first, *range(first + 1, first + depth - len(_ENTRY)), *_ENTRY][:depth]
    return tuple(TEXT + n * FUNCTION_BYTES + 0x10 for n in numbers)


def _kallsyms(work: Path) -> Kallsyms:
    names = ["_stext", *(f"function_{n}" for n in range(1, FUNCTIONS)), *_ENTRY.values(), "_etext"]
    lines = (f"{TEXT + n * FUNCTION_BYTES:016x} T {name}\n" for n, name in enumerate(names))
    file = work / "kallsyms"
    file.write_text("".join(lines))
    return Kallsyms.load(str(file))
