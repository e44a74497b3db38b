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
STUCK_PART = 3
"""A task is stuck in the kernel when it was there for this part of the stall."""
CLOSE_GRACE_NS = 200_000_000
"""How long to wait for a closing record once the kernel says the stall is over."""


class Observation(NamedTuple):
    """A record and what its kernel stack says (see ``enrich.stack``).

    ``mode``: what the stack interrupted: kernel, user, softirq, hardirq, idle
    or None. ``frames``: the culprit's frames, innermost first.
    ``bottom_halves_enabled``: the record was written when the task enabled
    bottom halves again, so it had held them off. ``below``: in softirq or
    hardirq mode what that came over: kernel, user or idle.
    """

    record: StallRecord
    mode: str | None
    frames: tuple[str, ...]
    bottom_halves_enabled: bool = False
    below: str | None = None

    @property
    def task_mode(self) -> str | None:
        """Where the task itself was, whatever interrupted it."""
        return self.below if self.mode in ("softirq", "hardirq") else self.mode


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
            # Not the record's own time: a tick may have sampled while it was written.
            updates.append(self._resolve(stall, Ended.RECORD, stall.last_ns, 0))
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
        seen = during or stall.observations or _let_go(stall.closing)
        culprit = _most_seen(seen)
        starved = {
            VECTORS[vec]: wait
            for vec, wait in enumerate(stall.wait_ns)
            if wait >= self.threshold_ns
        }
        evidence = self._evidence(stall, during, bool(starved))
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
            captured=("during" if during else "after")
            if culprit and (culprit.record.kernel_stack or culprit.frames)
            else "none",
            samples=len(stall.observations),
            expected=max(stall.expected, len(stall.observations)),
            lost=stall.lost,
            switches=stall.switches,
            ended=ended,
            record_ns=stall.last_ns if record_ns is None else record_ns,
        )

    def _evidence(self, stall: _Stall, during: list[Observation], starved: bool) -> Evidence:
        late = [o for o in during if max(o.record.wait_ns) >= self.threshold_ns]
        stuck_ns = longest_in_kernel_ns(during, stall.closing)
        duration_ns = stall.last_ns - stall.started_ns
        closing = stall.closing
        gave_way = [closing] if closing and closing.record.source is Source.SWITCH else []
        return Evidence(
            starved=starved,
            starved_modes=frozenset(o.mode for o in late),
            handler_ran=any(o.record.serving_vec != VEC_NONE for o in late),
            enabled_late=closing is not None and closing.bottom_halves_enabled,
            ksoftirqd_waited=stall.ksoftirqd_wait_ns >= self.threshold_ns,
            ksoftirqd_runnable=stall.ksoftirqd_seen,
            serves_inline=self._serves_inline(),
            stuck=stuck_ns >= max(self.threshold_ns, duration_ns / STUCK_PART),
            user=any(o.task_mode == "user" for o in (*stall.observations, *gave_way)),
            others=stall.switches > 0 or len({o.record.tid for o in during}) > 1,
        )


def longest_in_kernel_ns(during: list[Observation], closing: Observation | None) -> int:
    """How long one task stayed in the kernel, for all that the samples show.

    Two samples of one task with no context switch between them show that it had
    the CPU all the time; before the first switch it had it since the stall began.
    """
    longest = 0
    since = 0
    before: Observation | None = None
    for now in during:
        record = now.record
        same = before is not None and (
            before.record.tid == record.tid and before.record.switches == record.switches
        )
        if now.task_mode != "kernel":
            before = None
            continue
        if not same:
            since = record.time_ns if record.switches else record.started_ns
        longest = max(longest, record.time_ns - since)
        before = now
    if before and closing and closing.record.switches == before.record.switches:
        longest = max(longest, closing.record.time_ns - since)
    return longest


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
    """The first sample of the task, and of its stack, that had the CPU longest.

    A sample stands for the time since the one before, as their spacing grows.
    """
    if not observations:
        return None
    tasks: Counter[int] = Counter()
    paths: Counter[tuple[int, tuple[str, ...]]] = Counter()
    before_ns = observations[0].record.started_ns
    for observation in observations:
        record = observation.record
        spent_ns = max(1, record.time_ns - before_ns)
        before_ns = record.time_ns
        tasks[record.tid] += spent_ns
        paths[record.tid, _path(observation)] += spent_ns
    tid = tasks.most_common(1)[0][0]
    longest = max((key for key in paths if key[0] == tid), key=paths.__getitem__)
    return next(o for o in observations if (o.record.tid, _path(o)) == longest)


def _let_go(closing: Observation | None) -> list[Observation]:
    """The closing record, unless ksoftirqd wrote it, who did not stand in its own way."""
    if closing is None or closing.record.tid == closing.record.ksoftirqd_pid:
        return []
    return [closing]


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
