"""Any order of events on any CPU: the promises of the tracker always hold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from stalld.records import LOOKBACK_SAMPLES, VEC_NONE, RecordType, Source, TickSample
from stalld.state import StallState
from stalld.track.model import Ended, Observation, Phase, Update
from stalld.track.stall import CLOSE_GRACE_NS, MAX_ONGOING, Tracker
from stalld.track.verdict import Verdict
from tests.unit.make import (
    MS,
    T0,
    THRESHOLD,
    TICK_NS,
    MadeHost,
    observation,
    recent,
    tick,
    waiters,
    waits,
)

CPUS = st.integers(0, 2)
STEPS = st.sampled_from([1, THRESHOLD, 4 * MS, 150 * MS, CLOSE_GRACE_NS])
WAITS = st.sampled_from([0, THRESHOLD - 1, THRESHOLD, 50 * MS])
MODES = st.sampled_from(["kernel", "user", "softirq", "hardirq", "idle", None])


@dataclass
class KernelCpu:
    """What ``struct cpu_state`` of one CPU would say."""

    seq: int
    active: bool = False
    started_ns: int = 0
    ended_ns: int = 0
    sample_nr: int = 0
    switches: int = 0
    tid: int = 5
    waited_ns: dict[str, int] = field(default_factory=dict)
    late_ns: int = 0
    served_ns: int = 0
    steal_ns: int = 0
    packets: int = 0xFFFFFFF0
    ticks: list[TickSample] = field(default_factory=list)


class Machine(MadeHost):
    """Keeps the rings of all CPUs."""

    def __init__(self, kernel: list[KernelCpu], inline: bool | None, tells_steal: bool) -> None:
        super().__init__(inline=inline, tells_steal=tells_steal)
        self.kernel = kernel

    def ticks(self, cpu: int) -> Sequence[TickSample]:
        """The ring as it is now."""
        return self.kernel[cpu].ticks[-LOOKBACK_SAMPLES:]

    def recent(self, cpu: int, since_ns: int) -> Sequence[TickSample]:
        """Of these."""
        return recent(self.ticks(cpu), since_ns)


class TrackerMachine(RuleBasedStateMachine):
    """A kernel with three CPUs, a perf buffer that loses records, and a daemon."""

    @initialize(
        first=st.sampled_from([0, 1, 0x7FFFFFFE, 0xFFFFFFFD, 0xFFFFFFFF]),
        inline=st.sampled_from([None, False, True]),
        tells_steal=st.booleans(),
    )
    def start(self, first: int, inline: bool | None, tells_steal: bool) -> None:
        self.now_ns = T0
        self.kernel = [KernelCpu(first) for _ in range(3)]
        host = Machine(self.kernel, inline, tells_steal)
        self.tracker = Tracker(THRESHOLD, TICK_NS, host)
        self.updates: dict[tuple[int, int], list[Update]] = defaultdict(list)
        self.delivered: dict[tuple[int, int], int] = defaultdict(int)
        self.overflowed: set[tuple[int, int]] = set()
        self.seen: set[tuple[int, int]] = set()

    @rule(step=STEPS)
    def time_passes(self, step: int) -> None:
        """The clock moves on."""
        self.now_ns += step

    @rule(cpu=CPUS, others=st.booleans())
    def switch(self, cpu: int, others: bool) -> None:
        """Another task gets the CPU."""
        self.kernel[cpu].switches += 1
        self.kernel[cpu].tid += others

    @rule(cpu=CPUS, count=st.sampled_from([1, 3, 70]), stolen=st.sampled_from([0, MS, THRESHOLD]))
    def ticks(self, cpu: int, count: int, stolen: int) -> None:
        """Ticks come and are kept."""
        known = self.kernel[cpu]
        for _ in range(count):
            self.now_ns += TICK_NS
            known.steal_ns += stolen
            known.packets = (known.packets + 3) & 0xFFFFFFFF
            at_ms = (self.now_ns - T0) / MS
            known.ticks.append(
                tick(at_ms, tid=known.tid, steal_ns=known.steal_ns, processed=known.packets)
            )

    @rule(cpu=CPUS, late=st.sampled_from([THRESHOLD, 60 * MS]))
    def late_tick(self, cpu: int, late: int) -> None:
        """A tick of the stall comes too late."""
        known = self.kernel[cpu]
        self.now_ns += late
        known.late_ns = max(known.late_ns, late) if known.active else 0

    @rule(cpu=CPUS, served=st.sampled_from([THRESHOLD, 60 * MS]))
    def handler(self, cpu: int, served: int) -> None:
        """A handler runs for long."""
        known = self.kernel[cpu]
        self.now_ns += served
        known.served_ns = max(known.served_ns, served) if known.active else 0

    @rule(
        cpu=CPUS,
        arrives=st.booleans(),
        source=st.sampled_from([Source.TICK, Source.SWITCH, Source.NMI]),
        mode=MODES,
        wait=WAITS,
        jitter=st.sampled_from([0, -1, -3 * MS]),
    )
    def sample(
        self, cpu: int, arrives: bool, source: Source, mode: str | None, wait: int, jitter: int
    ) -> None:
        """The kernel samples: it begins a stall, or goes on with one."""
        known = self._active(cpu)
        known.sample_nr += 1
        if not arrives:
            return
        record = self._observation(cpu, RecordType.SAMPLE, source, mode, wait, jitter)
        self._deliver(cpu, record, sample=True)

    @rule(cpu=CPUS, arrives=st.booleans(), enabled=st.booleans(), wait=WAITS, late=st.booleans())
    def close(self, cpu: int, arrives: bool, enabled: bool, wait: int, late: bool) -> None:
        """The kernel closes the stall; without a sample it begins and ends it at once."""
        known = self._active(cpu)
        known.waited_ns = {"NET_RX": wait}
        known.active = False
        known.ended_ns = self.now_ns - 2 * late
        if not arrives:
            return
        record = self._observation(
            cpu, RecordType.CLOSE, Source.ENTRY, "kernel", wait, -2 * late, enabled
        )
        updates = self._deliver(cpu, record, sample=False)
        last = self.updates[cpu, known.seq][-1]
        assert last.phase is Phase.RESOLVED
        if updates and updates[-1] is last:
            assert last.ended is Ended.RECORD
            if (cpu, known.seq) not in self.overflowed:
                assert last.lost == known.sample_nr - self.delivered[cpu, known.seq]

    @rule(cpu=CPUS, count=st.integers(1, 5))
    def overflow(self, cpu: int, count: int) -> None:
        """The perf buffer says how many records had no room."""
        self.overflowed.add((cpu, self.kernel[cpu].seq))
        self.overflowed |= {key for key in self.updates if key[0] == cpu}
        self.tracker.lost(cpu, count)

    @rule(torn=st.booleans())
    def expire(self, torn: bool) -> None:
        """The daemon looks for lost closing records; the words it reads may not fit together."""
        for update in self._take(
            self.tracker.expire(self.now_ns, lambda cpu: self._state(cpu, torn))
        ):
            assert update.phase is Phase.RESOLVED
            assert update.ended in (Ended.STATE, Ended.LOST)
            known = self.kernel[update.cpu]
            assert torn or known.seq != update.seq or not known.active

    @rule()
    def expire_for_long(self) -> None:
        """Twice the grace time is enough: then only what goes on is open."""
        for _ in range(2):
            self._take(self.tracker.expire(self.now_ns, lambda cpu: self._state(cpu, False)))
            self.now_ns += CLOSE_GRACE_NS
        self._take(self.tracker.expire(self.now_ns, lambda cpu: self._state(cpu, False)))
        for cpu, seq in self._open():
            assert self.kernel[cpu].active
            assert self.kernel[cpu].seq == seq

    @rule()
    def finish(self) -> None:
        """The daemon stops; what the kernel still writes changes nothing any more."""
        open_before = self._open()
        lines = self._take(self.tracker.finish(self.now_ns))
        assert {(u.cpu, u.seq) for u in lines} == open_before
        assert all(u.ended is Ended.SHUTDOWN for u in lines)
        assert not self.tracker.open

    @invariant()
    def promises(self) -> None:
        """What every consumer of the events may rely on."""
        if not hasattr(self, "updates"):
            return
        per_cpu: dict[int, int] = defaultdict(int)
        for (cpu, _), lines in self.updates.items():
            phases = [line.phase for line in lines]
            assert phases.count(Phase.ONGOING) <= MAX_ONGOING
            assert Phase.RESOLVED not in phases[:-1]
            durations = [line.duration_ns for line in lines]
            assert durations[0] >= 0
            assert durations == sorted(durations)
            assert [line.lookback is None for line in lines] == [
                n == 0 and line.phase is Phase.ONGOING for n, line in enumerate(lines)
            ]
            for line in lines:
                assert all(wait >= THRESHOLD for wait in line.starved.values())
                assert (line.ended is None) == (line.phase is Phase.ONGOING)
                assert line.samples <= line.expected
                assert line.lost >= 0
                self._consistent(line)
            per_cpu[cpu] += Phase.RESOLVED not in phases
        assert set(self.updates) == self.seen
        assert self.tracker.open == any(per_cpu.values())
        assert all(count <= 1 for count in per_cpu.values())

    def _consistent(self, line: Update) -> None:
        assert line.stolen_ns is None or 0 <= line.stolen_ns <= line.duration_ns
        assert (line.verdict is Verdict.VCPU_PREEMPTED) <= (line.blocker is None)
        assert (line.blocker is None) <= (line.kernel_stack == () and line.captured == "none")
        assert all(wait >= THRESHOLD for wait in line.waiting.values())
        assert line.handler is None or line.handler.service_ns >= THRESHOLD
        assert min(line.net.runs, line.net.service_ns, line.net.packets or 0) >= 0
        if line.lookback is not None:
            times = [each.sample.time_ns for each in line.lookback]
            assert times == sorted(times)
            assert all(at_ns <= line.started_ns for at_ns in times)

    def teardown(self) -> None:
        """At the end each stall that was ever seen is resolved, once."""
        if not hasattr(self, "updates"):
            return
        self._take(self.tracker.finish(self.now_ns))
        for lines in self.updates.values():
            assert [line.phase for line in lines].count(Phase.RESOLVED) == 1

    def _active(self, cpu: int) -> KernelCpu:
        old = self.kernel[cpu]
        if old.active:
            return old
        self.kernel[cpu] = KernelCpu(
            (old.seq + 1) & 0xFFFFFFFF,
            active=True,
            started_ns=self.now_ns - THRESHOLD,
            ended_ns=old.ended_ns,
            tid=old.tid,
            steal_ns=old.steal_ns,
            packets=old.packets,
            ticks=old.ticks,
        )
        return self.kernel[cpu]

    def _observation(
        self,
        cpu: int,
        kind: RecordType,
        source: Source,
        mode: str | None,
        wait: int,
        jitter: int,
        enabled: bool = False,
    ) -> Observation:
        known = self.kernel[cpu]
        return observation(
            mode,
            enabled=enabled,
            type=kind,
            source=source,
            cpu=cpu,
            seq=known.seq,
            time_ns=self.now_ns + jitter,
            started_ns=known.started_ns,
            wait_ns=waits(NET_RX=wait),
            waiter_ns=waiters(wait // 2, wait),
            waiter_pid=waiters(16, 40 + known.switches),
            late_ns=known.late_ns,
            served_ns=known.served_ns,
            served_vec=3 if known.served_ns else VEC_NONE,
            steal_ns=known.steal_ns,
            processed=known.packets,
            switches=known.switches,
            sample_nr=known.sample_nr,
            tid=known.tid,
        )

    def _deliver(self, cpu: int, record: Observation, sample: bool) -> list[Update]:
        key = (cpu, record.record.seq)
        first = key not in self.seen
        self.seen.add(key)
        self.delivered[key] += sample
        updates = self._take(self.tracker.observe(record))
        if first and sample:
            assert updates
            assert updates[-1].phase is Phase.ONGOING
        return updates

    def _take(self, updates: list[Update]) -> list[Update]:
        for update in updates:
            self.updates[update.cpu, update.seq].append(update)
        return updates

    def _open(self) -> set[tuple[int, int]]:
        return {key for key, lines in self.updates.items() if lines[-1].phase is Phase.ONGOING}

    def _state(self, cpu: int, torn: bool) -> StallState:
        known = self.kernel[cpu]
        ended_ns = 0 if torn else known.ended_ns
        return StallState(
            known.seq,
            known.active and not torn,
            ended_ns,
            waits(**known.waited_ns),
            waiters(),
            waiters(),
        )


TestTracker = TrackerMachine.TestCase
TestTracker.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
