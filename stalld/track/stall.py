"""Joins the records of one CPU into one stall.

Guarantees: ``ongoing`` updates are few and come first, then exactly one
``resolved``, also when the closing record is lost or the daemon stops.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from stalld.records import LOOKBACK_SAMPLES, VECTORS, RecordType, Source, TaskRecord
from stalld.state import StallState
from stalld.track import evidence
from stalld.track.gather import Stall
from stalld.track.lookback import Lookback
from stalld.track.model import SERIOUS_FACTOR, Blocker, Ended, Host, Observation, Phase, Update
from stalld.track.verdict import decide

MAX_ONGOING = 4
"""``ongoing`` updates of one stall."""
ONGOING_GROWTH = 4
"""A further one when the stall is this many times longer than at the last, or serious."""
RING_PERIOD_NS = 3_500_000
"""Ticks sooner than this after the last one kept are not kept (``bpf/lookback.c``)."""
CLOSE_GRACE_NS = 200_000_000
"""How long to wait for a closing record once the kernel says the stall is over."""


class Tracker:
    """The open stalls, at most one a CPU.

    Args:
        threshold_ns: a wait at or over it counts as starved.
        tick_ns: period of the scheduler tick.
        host: answers what the records do not tell.
    """

    def __init__(self, threshold_ns: int, tick_ns: int, host: Host) -> None:
        self.threshold_ns = threshold_ns
        # An idle CPU stops its tick, so its ring goes back further than that.
        self._reach_ns = 2 * LOOKBACK_SAMPLES * max(tick_ns, RING_PERIOD_NS)
        self._near_ns = 2 * tick_ns
        self._host = host
        self._open: dict[int, Stall] = {}
        self._last_seq: dict[int, int] = {}
        # By CPU those of its newest stall; the first comes before the stall's first record.
        self._tasks: dict[int, list[TaskRecord]] = {}

    @property
    def open(self) -> bool:
        """Whether a stall goes on anywhere: :meth:`expire` is then due."""
        return bool(self._open)

    def observe(self, observation: Observation) -> list[Update]:
        """Take one record in, in the order its CPU wrote them."""
        record = observation.record
        updates: list[Update] = []
        stall = self._open.get(record.cpu)
        if stall and stall.seq != record.seq:
            if not _is_later(record.seq, stall.seq):
                return updates
            updates.append(self._resolve(stall, Ended.LOST, stall.last_ns, record.time_ns))
            stall = None
        if stall is None:
            if not self._is_new(record.cpu, record.seq):
                return updates
            stall = Stall(record.cpu, record.seq, record.started_ns)
            self._open[record.cpu] = stall
        stall.take(observation)
        if stall.looked_since_ns != stall.started_ns:
            # A later record may date the begin earlier.
            stall.looked_since_ns = stall.started_ns
            stall.before = self._host.recent(stall.cpu, stall.started_ns)
        if record.type is RecordType.CLOSE:
            # Not the record's own time: a tick may have sampled while it was written.
            updates.append(self._resolve(stall, Ended.RECORD, stall.last_ns, 0))
        elif self._worth_a_line(stall):
            stall.ongoing += 1
            stall.reported_ns = stall.last_ns - stall.started_ns
            updates.append(self._update(stall, Phase.ONGOING, None))
        return updates

    def look_back(self, cpu: int) -> Lookback | None:
        """What ran before the stall that goes on there, which its last line will want.

        Whoever reads it has it looked at. None: no stall goes on there.
        """
        stall = self._open.get(cpu)
        return None if stall is None else self._lookback(stall)

    def take_task(self, task: TaskRecord) -> None:
        """Remember who a task is that the next records are about."""
        # It comes before the first record of its stall, when the one before may not be closed yet.
        stall = self._open.get(task.cpu)
        of = {task.seq} if stall is None else {task.seq, stall.seq}
        known = [one for one in self._tasks.get(task.cpu, ()) if one.seq in of]
        self._tasks[task.cpu] = [*known, task]

    def lost(self, cpu: int, count: int) -> None:
        """The perf buffer of ``cpu`` dropped ``count`` records."""
        if cpu in self._open:
            self._open[cpu].lost += count

    def expire(self, now_ns: int, state: Callable[[int], StallState]) -> list[Update]:
        """Resolve what is over although no closing record came.

        Args:
            now_ns: CLOCK_MONOTONIC.
            state: the kernel's own view of the newest stall of a CPU.
        """
        updates = []
        for stall in list(self._open.values()):
            known = state(stall.cpu)
            if known.seq == stall.seq and known.active:
                stall.over_since_ns = 0
                continue
            if not stall.over_since_ns:
                stall.over_since_ns = now_ns
            if now_ns - stall.over_since_ns < CLOSE_GRACE_NS:
                continue
            if known.seq == stall.seq and known.ended_ns >= stall.started_ns:
                stall.take_state(known)
                end_ns = max(known.ended_ns, stall.last_ns)
                updates.append(self._resolve(stall, Ended.STATE, end_ns, 0))
            else:
                updates.append(self._resolve(stall, Ended.LOST, stall.last_ns, 0))
        return updates

    def finish(self, now_ns: int) -> list[Update]:
        """Resolve everything: the daemon stops."""
        return [
            self._resolve(stall, Ended.SHUTDOWN, max(now_ns, stall.last_ns), 0)
            for stall in list(self._open.values())
        ]

    def _is_new(self, cpu: int, seq: int) -> bool:
        last = self._last_seq.get(cpu)
        return last is None or _is_later(seq, last)

    def _worth_a_line(self, stall: Stall) -> bool:
        if stall.ongoing >= MAX_ONGOING:
            return False
        grown = stall.duration_ns >= ONGOING_GROWTH * stall.reported_ns
        serious_ns = SERIOUS_FACTOR * self.threshold_ns
        if not stall.ongoing or grown or stall.reported_ns < serious_ns <= stall.duration_ns:
            return True
        # Told was a stack whose walk ended early, in a retpoline say: is there a whole one now?
        return not evidence.is_whole(stall.reported_stack) and evidence.shows_whole_stack(stall)

    def _resolve(self, stall: Stall, ended: Ended, end_ns: int, next_ns: int) -> Update:
        del self._open[stall.cpu]
        self._last_seq[stall.cpu] = stall.seq
        stall.last_ns = end_ns
        if ended is Ended.LOST:
            stall.lost = max(stall.lost, 1)
        record_ns = next_ns or (end_ns if ended is Ended.RECORD else 0)
        return self._update(stall, Phase.RESOLVED, ended, record_ns)

    def _lookback(self, stall: Stall) -> Lookback:
        known = stall.lookback
        if known is None or known.started_ns != stall.started_ns:
            ticks = partial(self._host.ticks, stall.cpu)
            known = Lookback(ticks, stall.started_ns, self._host.explain, self._reach_ns)
            stall.lookback = known
        return known

    def _task(self, stall: Stall, blocker: Blocker | None) -> TaskRecord | None:
        if blocker is None:
            return None
        told = self._tasks.get(stall.cpu, ())
        return next((t for t in told if (t.seq, t.tid) == (stall.seq, blocker.tid)), None)

    def _update(
        self, stall: Stall, phase: Phase, ended: Ended | None, record_ns: int | None = None
    ) -> Update:
        host = self._host
        first = phase is Phase.ONGOING and stall.ongoing == 1
        if not first:
            # What one record opened and closed has just been looked at.
            opened_now = stall.closing is not None and not stall.observations
            stall.meanwhile = (
                stall.before if opened_now else host.recent(stall.cpu, stall.started_ns)
            )
        stall.polled = host.polled(stall.cpu, stall.seq)
        serves_inline = host.serves_inline()
        verdict = decide(
            evidence.weigh(
                stall,
                self.threshold_ns,
                serves_inline,
                host.tells_steal(stall.cpu),
                threaded=host.threaded,
            )
        )
        culprit = evidence.culprit_of(stall, verdict, host.explain)
        stall.reported_stack = culprit.frames
        return Update(
            phase=phase,
            cpu=stall.cpu,
            seq=stall.seq,
            started_ns=stall.started_ns,
            duration_ns=stall.duration_ns,
            verdict=verdict,
            starved={
                VECTORS[vec]: wait
                for vec, wait in enumerate(stall.wait_ns)
                if wait >= self.threshold_ns
            },
            ksoftirqd_pid=stall.ksoftirqd_pid if stall.ksoftirqd_wait_ns else 0,
            ksoftirqd_wait_ns=stall.ksoftirqd_wait_ns,
            waiting={pid: wait for pid, wait in stall.waiting.items() if wait >= self.threshold_ns},
            late_ns=stall.late_ns,
            stolen_ns=stall.stolen_ns(),
            handler=evidence.longest_handler(stall, self.threshold_ns),
            blocker=culprit.blocker,
            task=self._task(stall, culprit.blocker),
            kernel_stack=culprit.frames,
            user_stack=culprit.user_stack,
            captured=culprit.captured,
            lookback=None if first else self._lookback(stall),
            net=evidence.net_of(stall, self._near_ns, host.counts()),
            nmi=culprit.seen is not None and culprit.seen.record.source is Source.NMI,
            samples=len(stall.observations),
            expected=max(stall.expected, len(stall.observations)),
            lost=stall.lost,
            switches=stall.switches,
            serves_inline=serves_inline,
            ended=ended,
            record_ns=stall.last_ns if record_ns is None else record_ns,
        )


def _is_later(seq: int, than: int) -> bool:
    """Numbers of 32 bits wrap."""
    return 0 < (seq - than) & 0xFFFFFFFF < 1 << 31
