"""One record's way: bytes → record → observation → update → event."""

from __future__ import annotations

from collections.abc import Callable

from stalld import events
from stalld.decode import decode
from stalld.enrich.stack import Kind
from stalld.enrich.symbols import SymbolTable
from stalld.errors import DecodeError
from stalld.records import Source, StallRecord
from stalld.sinks.emitter import Emitter
from stalld.state import StallState
from stalld.track.stall import Observation, Phase, Tracker, Update

_KINDS: dict[Source, Kind] = {
    Source.TICK: "tick",
    Source.SWITCH: "switch",
    Source.ENTRY: "entry",
}
# How softirqs are served when a task enables bottom halves.
_BH_ENABLE = {"__local_bh_enable_ip", "do_softirq"}


class Pipeline:
    """Joins decoder, symbols, tracker and sink; counts what came through.

    Args:
        id_prefix: makes stall ids unique across daemons and boots.
        sampler: what takes the samples: ``tick`` or ``none``.
        clocks_ns: CLOCK_MONOTONIC and CLOCK_REALTIME, taken together.
        on_bad_record: told of a record that could not be decoded.
    """

    def __init__(
        self,
        tracker: Tracker,
        symbols: SymbolTable,
        emitter: Emitter,
        *,
        id_prefix: str,
        sampler: str,
        clocks_ns: Callable[[], tuple[int, int]],
        on_bad_record: Callable[[DecodeError], None],
    ) -> None:
        self.symbols = symbols
        self.tracker = tracker
        self.records = 0
        self.stalls = 0
        self.lost = 0
        self.undecodable = 0
        self._emitter = emitter
        self._id_prefix = id_prefix
        self._sampler = sampler
        self._clocks_ns = clocks_ns
        self._on_bad_record = on_bad_record

    def take(self, data: bytes) -> None:
        """Take one raw record in; emit what it brings about."""
        try:
            record = decode(data)
        except DecodeError as error:
            self.undecodable += 1
            self._on_bad_record(error)
            return
        self.records += 1
        self._emit(self.tracker.observe(self._observation(record)))

    def take_lost(self, cpu: int, count: int) -> None:
        """The kernel dropped ``count`` records of ``cpu``."""
        self.lost += count
        self.tracker.lost(cpu, count)
        self._emitter.emit("records_lost", "warning", {"cpu": cpu, "count": count})

    def expire(self, state: Callable[[int], StallState]) -> None:
        """Resolve stalls whose closing records were lost."""
        self._emit(self.tracker.expire(self._clocks_ns()[0], state))

    def finish(self) -> None:
        """Resolve every open stall: the daemon stops."""
        self._emit(self.tracker.finish(self._clocks_ns()[0]))

    def _observation(self, record: StallRecord) -> Observation:
        kind = _KINDS[record.source]
        stack = self.symbols.trimmed(record.kernel_stack, kind)
        cut = self.symbols.format_stack(record.kernel_stack)[: stack.cut]
        enabled = kind == "entry" and any(f.partition("+0x")[0] in _BH_ENABLE for f in cut)
        below = None
        if stack.mode in ("softirq", "hardirq"):
            below = "kernel" if len(stack.frames) > stack.own else "user"
            below = below if record.tid else "idle"
        return Observation(record, stack.mode, stack.frames, enabled, below)

    def _emit(self, updates: list[Update]) -> None:
        if not updates:
            return
        monotonic_ns, wall_ns = self._clocks_ns()
        for update in updates:
            self.stalls += update.phase is Phase.RESOLVED
            self._emitter.emit(
                "stall",
                events.stall_level(update, self.tracker.threshold_ns),
                events.stall(
                    update,
                    stall_id=f"{self._id_prefix}-{update.cpu}-{update.seq}",
                    boot_wall_ns=wall_ns - monotonic_ns,
                    sampler=self._sampler,
                ),
            )
