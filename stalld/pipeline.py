"""One record's way: bytes → record → observation → update → folded or not → event."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from stalld import events
from stalld.decode import decode, decode_who, is_task
from stalld.enrich.asking import Asking, Question
from stalld.enrich.identity import Asked, Identity, identify, lacks
from stalld.enrich.nic import Inventory
from stalld.enrich.stack import Kind, below
from stalld.enrich.symbols import SymbolTable
from stalld.errors import DecodeError
from stalld.records import RecordType, Source, StallRecord
from stalld.sinks.emitter import Emitter
from stalld.state import StallState
from stalld.track.fold import Folder, Reason, Suppressed
from stalld.track.model import Observation, Phase, Update
from stalld.track.stall import Tracker

_KINDS: dict[Source, Kind] = {
    Source.TICK: "tick",
    Source.SWITCH: "switch",
    Source.ENTRY: "entry",
    Source.EXIT: "entry",
    Source.NMI: "tick",
}
# How softirqs are served when a task enables bottom halves.
_BH_ENABLE = {"__local_bh_enable_ip", "do_softirq"}


class Pipeline:
    """Joins decoder, symbols, tracker, folder and sink; counts what came through.

    Args:
        asking: asks /proc what the kernel's records do not tell of a task.
        names: pid → name of the watched threads, kept current by the caller.
        id_prefix: makes stall ids unique across daemons and boots.
        sampler: what takes the samples: ``tick`` or ``none``.
        clocks_ns: CLOCK_MONOTONIC and CLOCK_REALTIME, taken together.
        on_bad_record: told of a record that could not be decoded.
        on_hotplug: told of a CPU that goes down or comes up.
        inventory: which queues the CPUs serve, from memory; None: not known.
    """

    def __init__(
        self,
        tracker: Tracker,
        folder: Folder,
        symbols: SymbolTable,
        emitter: Emitter,
        asking: Asking,
        *,
        names: Mapping[int, bytes],
        id_prefix: str,
        sampler: str,
        clocks_ns: Callable[[], tuple[int, int]],
        on_bad_record: Callable[[DecodeError], None],
        on_hotplug: Callable[[int], None],
        inventory: Callable[[], Inventory | None] = lambda: None,
    ) -> None:
        self.symbols = symbols
        self.tracker = tracker
        self.folder = folder
        self.records = 0
        self.stalls = 0
        self.lost = 0
        self.undecodable = 0
        self.suppressed = 0
        self.last = ""
        """The last stall, in a few words."""
        self._names = names
        self._emitter = emitter
        self._asking = asking
        self._id_prefix = id_prefix
        self._sampler = sampler
        self._clocks_ns = clocks_ns
        self._on_bad_record = on_bad_record
        self._on_hotplug = on_hotplug
        self._inventory = inventory

    def apply(self, threshold_ns: int, per_minute: int) -> None:
        """Go by another threshold and another limit of identical stalls from now on."""
        self.tracker.threshold_ns = threshold_ns
        self.folder.threshold_ns = threshold_ns
        self.folder.per_minute = per_minute

    def take(self, data: bytes) -> None:
        """Take one raw record in; emit what it brings about."""
        try:
            if is_task(data):
                self.tracker.take_task(decode_who(data))
                return
            record = decode(data)
        except DecodeError as error:
            self.undecodable += 1
            self._on_bad_record(error)
            return
        if record.type is RecordType.HOTPLUG:
            self._on_hotplug(record.cpu)
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

    def take_suppressed(
        self, cpu: int, count: int, total_ns: int, since_ns: int, until_ns: int
    ) -> None:
        """The kernel kept ``count`` stalls of ``cpu`` to itself: too many in a second."""
        told = Suppressed(Reason.RATE, frozenset((cpu,)), count, total_ns, since_ns, until_ns)
        self._write([told])

    def flush(self) -> None:
        """Tell of folded stalls whose minute is over."""
        self._write(self.folder.flush(self._clocks_ns()[0]))

    def finish(self) -> None:
        """Resolve every open stall, and tell of all that was folded: the daemon stops."""
        self._emit(self.tracker.finish(self._clocks_ns()[0]))
        self._write(self.folder.finish())

    def _observation(self, record: StallRecord) -> Observation:
        kind = _KINDS[record.source]
        stack = self.symbols.trimmed(record.kernel_stack, kind)
        enabled = record.source is Source.ENTRY and any(
            frame.partition("+0x")[0] in _BH_ENABLE
            for frame in self.symbols.cut(record.kernel_stack, kind)
        )
        return Observation(record, stack.mode, stack.frames, enabled, below(stack, record.tid))

    def _emit(self, updates: list[Update]) -> None:
        for update in updates:
            if update.phase is Phase.RESOLVED:
                self.stalls += 1
                self.last = _in_a_few_words(update)
            lines = self.folder.take(update, self._clocks_ns()[0])
            self._write(lines)
            if update.phase is Phase.ONGOING and any(line is update for line in lines):
                # No line waits for it now.
                self._emitter.flush()
                before = self.tracker.look_back(update.cpu)
                if before is not None:
                    events.lookback(before, before.started_ns)

    def _write(self, lines: Sequence[Update | Suppressed]) -> None:
        if not lines:
            return
        monotonic_ns, wall_ns = self._clocks_ns()
        boot_wall_ns = wall_ns - monotonic_ns
        for line in lines:
            if isinstance(line, Suppressed):
                self.suppressed += line.stalls
                like = self._stall_id(*line.like) if line.like else None
                event = events.suppressed(line, boot_wall_ns=boot_wall_ns, like=like)
                self._emitter.emit("suppressed", line.level, event)
                continue
            event = events.stall(
                line,
                stall_id=self._stall_id(line.cpu, line.seq),
                boot_wall_ns=boot_wall_ns,
                sampler=self._sampler,
                names=self._names,
                inventory=self._inventory(),
                identity=self._identity(line),
            )
            self._emitter.emit("stall", events.stall_level(line, self.tracker.threshold_ns), event)

    def _identity(self, update: Update) -> Identity:
        blocker = update.blocker
        if blocker is None or not blocker.tid:
            return Identity()
        asked = Asked()
        if lacks(update.task):
            # Looked for among all cgroups only if the kernel did not tell where that is.
            told = update.task is not None and update.task.tells_cgroup
            cgroup_id = None if told else blocker.cgroup_id
            question = Question(
                update.cpu, update.seq, blocker.tgid, blocker.tid, blocker.comm, cgroup_id
            )
            asked = self._asking.answer(question).asked
        return identify(update.task, asked, update.kernel_stack, blocker.mode)

    def _stall_id(self, cpu: int, seq: int) -> str:
        return f"{self._id_prefix}-{cpu}-{seq}"


def _in_a_few_words(update: Update) -> str:
    whose = f" by {events.text(update.blocker.comm)}" if update.blocker else ""
    duration_ms = update.duration_ns / 1e6
    return f"{duration_ms:.0f} ms on CPU {update.cpu}, {update.verdict.value}{whose}"
