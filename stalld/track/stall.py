"""Joins the records of one CPU into one stall.

Guarantees: ``ongoing`` updates are few and come first, then exactly one
``resolved``, also when the closing record is lost or the daemon stops.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from stalld.records import VEC_NONE, VECTORS, RecordType, Source, StallRecord
from stalld.state import StallState
from stalld.track.verdict import Evidence, Verdict, decide

MAX_ONGOING = 4
"""``ongoing`` updates of one stall."""
ONGOING_GROWTH = 4
"""A further one when the stall is this many times longer than at the last."""
CLOSE_GRACE_NS = 200_000_000
"""How long to wait for a closing record once the kernel says the stall is over."""


class Observation(NamedTuple):
    """A record and what its kernel stack says (see ``enrich.stack``).

    ``mode``: what the stack interrupted: kernel, user, softirq, hardirq, idle
    or None. ``frames``: the culprit's frames, innermost first.
    ``bottom_halves_enabled``: the record was written when the task enabled
    bottom halves again, so it had held them off.
    """

    record: StallRecord
    mode: str | None
    frames: tuple[str, ...]
    bottom_halves_enabled: bool = False


class Phase(enum.StrEnum):
    """Contract values of ``phase``."""

    ONGOING = "ongoing"
    RESOLVED = "resolved"


class Ended(enum.StrEnum):
    """How the end became known.

    RECORD: the kernel's closing record. STATE: that record was lost, the
    shared state told. LOST: both were gone, the duration is what was seen.
    SHUTDOWN: the daemon stopped first.
    """

    RECORD = "record"
    STATE = "state"
    LOST = "lost"
    SHUTDOWN = "shutdown"


class Blocker(NamedTuple):
    """The task (or context) that had the CPU, as of its first sample."""

    tgid: int
    tid: int
    comm: bytes
    mode: str | None
    policy: int
    prio: int
    cgroup_id: int


class Update(NamedTuple):
    """One line about one stall. Durations in ns; see the contract for meanings."""

    phase: Phase
    cpu: int
    seq: int
    started_ns: int
    duration_ns: int
    verdict: Verdict
    starved: dict[str, int]
    ksoftirqd_pid: int
    ksoftirqd_wait_ns: int
    blocker: Blocker | None
    kernel_stack: tuple[str, ...]
    user_stack: tuple[int, ...]
    captured: str
    samples: int
    expected: int
    lost: int
    switches: int
    ended: Ended | None
    record_ns: int
    """When the kernel wrote the record behind this update; 0: none did."""


@dataclass
class _Stall:
    cpu: int
    seq: int
    started_ns: int
    last_ns: int = 0
    observations: list[Observation] = field(default_factory=list)
    closing: Observation | None = None
    wait_ns: list[int] = field(default_factory=lambda: [0] * len(VECTORS))
    ksoftirqd_pid: int = 0
    ksoftirqd_wait_ns: int = 0
    ksoftirqd_seen: bool = False
    expected: int = 0
    lost: int = 0
    switches: int = 0
    ongoing: int = 0
    reported_ns: int = 0
    over_since_ns: int = 0


class Tracker:
    """The open stalls, at most one a CPU.

    Args:
        threshold_ns: a wait at or over it counts as starved.
        serves_inline: asked at every verdict (see ``Maps.serves_inline``).
    """

    def __init__(self, threshold_ns: int, serves_inline: Callable[[], bool | None]) -> None:
        self.threshold_ns = threshold_ns
        self._serves_inline = serves_inline
        self._open: dict[int, _Stall] = {}
        self._last_seq: dict[int, int] = {}

    @property
    def open(self) -> bool:
        """Whether a stall goes on anywhere: :meth:`expire` is then due."""
        return bool(self._open)

    def observe(self, observation: Observation) -> list[Update]:
        """Take one record in, in the order its CPU wrote them."""
        record = observation.record
        updates = []
        stall = self._open.get(record.cpu)
        if stall and stall.seq != record.seq:
            updates.append(self._resolve(stall, Ended.LOST, stall.last_ns, record.time_ns))
            stall = None
        if stall is None:
            if not self._is_new(record.cpu, record.seq):
                return updates
            stall = _Stall(record.cpu, record.seq, record.started_ns)
            self._open[record.cpu] = stall
        _take(stall, observation)
        if record.type is RecordType.CLOSE:
            updates.append(
                self._resolve(stall, Ended.RECORD, max(record.time_ns, stall.started_ns), 0)
            )
        elif self._worth_a_line(stall):
            stall.ongoing += 1
            stall.reported_ns = stall.last_ns - stall.started_ns
            updates.append(self._update(stall, Phase.ONGOING, None))
        return updates

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
                _take_waits(stall, known.wait_ns, known.ksoftirqd_wait_ns)
                updates.append(self._resolve(stall, Ended.STATE, known.ended_ns, 0))
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
        # 32-bit numbers wrap.
        return last is None or 0 < (seq - last) & 0xFFFFFFFF < 1 << 31

    def _worth_a_line(self, stall: _Stall) -> bool:
        if stall.ongoing >= MAX_ONGOING:
            return False
        age_ns = stall.last_ns - stall.started_ns
        return not stall.ongoing or age_ns >= ONGOING_GROWTH * stall.reported_ns

    def _resolve(self, stall: _Stall, ended: Ended, end_ns: int, next_ns: int) -> Update:
        del self._open[stall.cpu]
        self._last_seq[stall.cpu] = stall.seq
        stall.last_ns = end_ns
        if ended is Ended.LOST:
            stall.lost = max(stall.lost, 1)
        record_ns = next_ns or (end_ns if ended is Ended.RECORD else 0)
        return self._update(stall, Phase.RESOLVED, ended, record_ns)

    def _update(
        self, stall: _Stall, phase: Phase, ended: Ended | None, record_ns: int | None = None
    ) -> Update:
        during = [o for o in stall.observations if o.record.source is Source.TICK]
        seen = during or stall.observations or ([stall.closing] if stall.closing else [])
        culprit = _most_seen(seen)
        starved = {
            VECTORS[vec]: wait
            for vec, wait in enumerate(stall.wait_ns)
            if wait >= self.threshold_ns
        }
        evidence = Evidence(
            starved=bool(starved),
            ksoftirqd_waited=stall.ksoftirqd_wait_ns >= self.threshold_ns,
            ksoftirqd_runnable=stall.ksoftirqd_seen,
            serves_inline=self._serves_inline(),
            modes=_modes(stall.observations),
            tasks=len({o.record.tid for o in seen}),
            switches=stall.switches,
            handler_ran=any(o.record.serving_vec != VEC_NONE for o in during),
            enabled_late=stall.closing is not None and stall.closing.bottom_halves_enabled,
        )
        record = culprit.record if culprit else None
        return Update(
            phase=phase,
            cpu=stall.cpu,
            seq=stall.seq,
            started_ns=stall.started_ns,
            duration_ns=max(0, stall.last_ns - stall.started_ns),
            verdict=decide(evidence),
            starved=starved,
            ksoftirqd_pid=stall.ksoftirqd_pid if stall.ksoftirqd_wait_ns else 0,
            ksoftirqd_wait_ns=stall.ksoftirqd_wait_ns,
            blocker=_blocker(culprit),
            kernel_stack=culprit.frames if culprit else (),
            # The walker may end on a null frame pointer.
            user_stack=tuple(a for a in record.user_stack if a) if record else (),
            captured=("during" if during else "after") if culprit else "none",
            samples=len(stall.observations),
            expected=max(stall.expected, len(stall.observations)),
            lost=stall.lost,
            switches=stall.switches,
            ended=ended,
            record_ns=stall.last_ns if record_ns is None else record_ns,
        )


def _take(stall: _Stall, observation: Observation) -> None:
    record = observation.record
    stall.last_ns = max(stall.last_ns, record.time_ns)
    stall.started_ns = min(stall.started_ns, record.started_ns)
    stall.expected = max(stall.expected, record.sample_nr)
    stall.switches = record.switches
    stall.ksoftirqd_pid = record.ksoftirqd_pid
    _take_waits(stall, record.wait_ns, record.ksoftirqd_wait_ns)
    if record.type is RecordType.CLOSE:
        stall.closing = observation
        # Numbered by the kernel: what is missing was lost on the way.
        stall.lost = max(stall.lost, record.sample_nr - len(stall.observations))
    else:
        stall.observations.append(observation)


def _take_waits(stall: _Stall, wait_ns: tuple[int, ...], ksoftirqd_wait_ns: int) -> None:
    stall.wait_ns = [max(pair) for pair in zip(stall.wait_ns, wait_ns, strict=True)]
    stall.ksoftirqd_wait_ns = max(stall.ksoftirqd_wait_ns, ksoftirqd_wait_ns)
    stall.ksoftirqd_seen |= ksoftirqd_wait_ns > 0


def _most_seen(observations: list[Observation]) -> Observation | None:
    """The first sample of the task and stack that were seen most often."""
    if not observations:
        return None
    tids = Counter(o.record.tid for o in observations)
    tid = tids.most_common(1)[0][0]
    own = [o for o in observations if o.record.tid == tid]
    paths = Counter(_path(o) for o in own)
    path = paths.most_common(1)[0][0]
    return next(o for o in own if _path(o) == path)


def _path(observation: Observation) -> tuple[str, ...]:
    """A stack without offsets: samples of one loop count as one."""
    return tuple(frame.partition("+0x")[0] for frame in observation.frames)


def _blocker(observation: Observation | None) -> Blocker | None:
    if observation is None:
        return None
    record = observation.record
    return Blocker(
        record.tgid,
        record.tid,
        record.comm,
        observation.mode,
        record.policy,
        record.prio,
        record.cgroup_id,
    )


def _modes(observations: list[Observation]) -> frozenset[str | None]:
    """What was interrupted. A task that gives way may just have entered the kernel to do so."""
    during = frozenset(o.mode for o in observations if o.record.source is Source.TICK)
    return during or frozenset(o.mode for o in observations if o.mode == "user")
