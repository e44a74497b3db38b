"""All that is known about one stall so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from stalld.records import (
    KSOFTIRQD,
    VECTORS,
    WAITERS,
    RecordType,
    Source,
    StallRecord,
    TickKind,
    TickSample,
)
from stalld.rings import Napi
from stalld.state import StallState
from stalld.track.lookback import Lookback
from stalld.track.model import Observation


@dataclass
class Stall:
    """One stall of one CPU; :meth:`take` adds a record to it.

    ``before`` are the CPU's ticks since the stall began and the last one until then, as of the
    first record, ``meanwhile`` as of the last look, and ``polled`` is what it polled until then.
    ``looked_since_ns``: which begin ``before`` goes by. ``during``: those observations that were
    made while it lasted.
    """

    cpu: int
    seq: int
    started_ns: int
    before: Sequence[TickSample] = ()
    looked_since_ns: int = -1
    lookback: Lookback | None = None
    last_ns: int = 0
    observations: list[Observation] = field(default_factory=list)
    during: list[Observation] = field(default_factory=list)
    closing: Observation | None = None
    meanwhile: Sequence[TickSample] = ()
    polled: Napi | None = None
    wait_ns: list[int] = field(default_factory=lambda: [0] * len(VECTORS))
    waiting: dict[int, int] = field(default_factory=dict)
    ksoftirqd_pid: int = 0
    ksoftirqd_wait_ns: int = 0
    late_ns: int = 0
    expected: int = 0
    lost: int = 0
    switches: int = 0
    ongoing: int = 0
    reported_ns: int = 0
    reported_stack: tuple[str, ...] = ()
    over_since_ns: int = 0

    @property
    def duration_ns(self) -> int:
        """So far, or in all."""
        return max(0, self.last_ns - self.started_ns)

    @property
    def last_record(self) -> StallRecord | None:
        """The newest one."""
        newest = self.closing or (self.observations[-1] if self.observations else None)
        return newest.record if newest else None

    def take(self, observation: Observation) -> None:
        """Add a record, in the order its CPU wrote them."""
        record = observation.record
        self.last_ns = max(self.last_ns, record.time_ns)
        self.started_ns = min(self.started_ns, record.started_ns)
        self.expected = max(self.expected, record.sample_nr)
        self.switches = record.switches
        self.late_ns = max(self.late_ns, record.late_ns)
        self.ksoftirqd_pid = record.waiter_pid[KSOFTIRQD] or self.ksoftirqd_pid
        self._take_waits(record.wait_ns, record.waiter_ns, record.waiter_pid)
        if record.type is RecordType.CLOSE:
            self.closing = observation
            # Numbered by the kernel: what is missing was lost on the way.
            self.lost = max(self.lost, record.sample_nr - len(self.observations))
        else:
            self.observations.append(observation)
            if record.source in (Source.TICK, Source.NMI):
                self.during.append(observation)

    def take_state(self, known: StallState) -> None:
        """Add what the shared state says of a stall whose closing record was lost."""
        self._take_waits(known.wait_ns, known.waiter_ns, known.waiter_pid)

    def _take_waits(
        self, wait_ns: tuple[int, ...], waiter_ns: tuple[int, ...], waiter_pid: tuple[int, ...]
    ) -> None:
        self.wait_ns = list(map(max, self.wait_ns, wait_ns))
        self.ksoftirqd_wait_ns = max(self.ksoftirqd_wait_ns, waiter_ns[KSOFTIRQD])
        for slot in range(KSOFTIRQD + 1, WAITERS):
            if waiter_ns[slot]:
                pid = waiter_pid[slot]
                self.waiting[pid] = max(self.waiting.get(pid, 0), waiter_ns[slot])

    def ticks_inside(self) -> list[TickSample]:
        """The ticks of the stall that the ring still held at the last look."""
        return [t for t in self.meanwhile if self.started_ns < t.time_ns <= self.last_ns]

    def user_ticks_ns(self) -> list[int]:
        """When ticks of the stall found user code, as far as the rings tell."""
        return [
            tick.time_ns
            for kept in (self.before, self.meanwhile)
            for tick in kept
            if tick.kind is TickKind.USER and tick.time_ns > self.started_ns
        ]

    def last_tick_before(self) -> TickSample | None:
        """The newest tick that came before the stall, if the ring still has it."""
        return next((t for t in reversed(self.before) if t.time_ns <= self.started_ns), None)

    def stolen_ns(self) -> int | None:
        """What the steal clock counted since the stall began; None: not known.

        The last tick before may be long ago, since an idle CPU stops it: up to the
        first one inside no more can have been stolen of the stall than went by.
        """
        last = self.last_record
        if last is None:
            return None
        base: TickSample | None = None
        first: TickSample | StallRecord = last
        for tick in reversed(self.before):
            if tick.time_ns > last.time_ns:
                continue
            base = tick
            if tick.time_ns <= self.started_ns:
                break
            first = tick
        if base is None or not last.steal_ns:
            return None  # Nothing to go by, or a clock that is not kept.
        at_first = min(_grown(base, first), max(0, first.time_ns - self.started_ns))
        return min(at_first + _grown(first, last), self.duration_ns)

    def keeps_steal(self) -> bool:
        """Whether the steal clock has counted anything yet."""
        last = self.last_record
        return last is not None and last.steal_ns > 0


def _grown(before: TickSample | StallRecord, after: TickSample | StallRecord) -> int:
    return max(0, after.steal_ns - before.steal_ns)
