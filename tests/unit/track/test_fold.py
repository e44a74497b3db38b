"""Storms: what is folded, what never is, and that nothing goes missing."""

from __future__ import annotations

from collections import defaultdict
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from stalld.track import fold
from stalld.track.fold import MAX_KEYS, MINUTE_NS, Folder, Reason, Suppressed
from stalld.track.model import Blocker, Phase, Update
from stalld.track.verdict import Verdict
from tests.unit.make import MS, T0, THRESHOLD

SHOWN = 3
STACK = ("spin+0x10", "do_syscall_64+0x5 [kernel]")


def blocker(tgid: int = 100, comm: bytes = b"spinner", tid: int = 101) -> Blocker:
    """A task."""
    return Blocker(tgid, tid, comm, "kernel", 0, 120, 77)


def line(seq: int, **changes: Any) -> Update:
    """The only line of a stall of 15 ms."""
    # Nothing else of an update matters here.
    fields: dict[str, Any] = dict.fromkeys(Update._fields)
    fields |= {
        "phase": Phase.RESOLVED,
        "cpu": 0,
        "seq": seq,
        "started_ns": T0 + seq * MS,
        "duration_ns": 15 * MS,
        "verdict": Verdict.STUCK_IN_KERNEL,
        "starved": {},
        "late_ns": 0,
        "blocker": blocker(),
        "kernel_stack": STACK,
    }
    return Update(**fields | changes)


def ongoing(seq: int, **changes: Any) -> Update:
    """A line of a stall that goes on, 12 ms so far."""
    return line(seq, **{"phase": Phase.ONGOING, "duration_ns": 12 * MS, **changes})


def stormy(**changes: Any) -> Folder:
    """A folder that has shown of one key what it may."""
    given = Folder(SHOWN, THRESHOLD)
    for seq in range(SHOWN):
        given.take(line(seq, **changes), T0)
    return given


def only(lines: list[Any]) -> Suppressed:
    """The one sum."""
    (suppressed,) = lines
    assert isinstance(suppressed, Suppressed)
    return suppressed


class TestWhatIsShown:
    """The first few of a key in its minute."""

    def test_the_first_few_pass_with_all_their_lines(self) -> None:
        """As many as allowed come out unchanged, the rest not at all."""
        given = Folder(SHOWN, THRESHOLD)
        for seq in range(2 * SHOWN):
            lines = [ongoing(seq), line(seq)]
            taken = [out for each in lines for out in given.take(each, T0)]
            assert taken == (lines if seq < SHOWN else [])

    def test_a_stall_without_an_ongoing_line(self) -> None:
        """It counts like any other."""
        assert stormy().take(line(9), T0) == []

    def test_the_decision_at_the_first_line_stays(self) -> None:
        """A stall that has begun to be shown is shown to its end, whatever came between."""
        given = Folder(1, THRESHOLD)
        given.take(ongoing(1, cpu=1), T0)
        assert given.take(line(2, cpu=2), T0) == []
        assert given.take(line(1, cpu=1), T0) == [line(1, cpu=1)]

    @pytest.mark.parametrize(
        "changes",
        [
            {"blocker": blocker(tgid=200)},
            {"blocker": blocker(comm=b"other")},
            {"blocker": blocker(comm=b"spinner\n")},
            {"blocker": None},
            {"kernel_stack": STACK[:1]},
            {"kernel_stack": ("spin_other+0x10", STACK[1])},
            {"kernel_stack": ()},
            {"blocker": None, "kernel_stack": ()},
        ],
    )
    def test_others_are_shown(self, changes: dict[str, Any]) -> None:
        """Another process or another path through the kernel is not identical."""
        assert stormy().take(line(9, **changes), T0) == [line(9, **changes)]

    @pytest.mark.parametrize(
        "changes",
        [
            {"blocker": blocker(tid=102)},
            {"kernel_stack": ("spin+0x44", "do_syscall_64+0x5")},
            {"verdict": Verdict.UNKNOWN},
            {"cpu": 7},
            {"starved": {"NET_RX": 11 * MS}},
        ],
    )
    def test_the_same_are_not(self, changes: dict[str, Any]) -> None:
        """Thread, offsets, verdict, CPU and what starved make no difference."""
        assert stormy().take(line(9, **changes), T0) == []

    def test_without_a_blocker(self) -> None:
        """Stalls without a blocker are folded by their stack, also by none."""
        for stack in (STACK, ()):
            assert (
                stormy(blocker=None, kernel_stack=stack).take(
                    line(9, blocker=None, kernel_stack=stack), T0
                )
                == []
            )

    def test_addresses_without_names(self) -> None:
        """Bare addresses are compared as they are."""
        given = stormy(kernel_stack=("0xffff800000001234",))
        assert given.take(line(9, kernel_stack=("0xffff800000001234",)), T0) == []
        assert given.take(line(10, kernel_stack=("0xffff800000001235",)), T0) != []


class TestWhatIsNeverHidden:
    """What stands out is let through, with what was held back of it."""

    @pytest.mark.parametrize(
        ("changes", "passes"),
        [
            ({"duration_ns": 10 * THRESHOLD}, True),
            ({"duration_ns": 10 * THRESHOLD - 1}, False),
            ({"starved": {"TIMER": 10 * THRESHOLD, "NET_RX": THRESHOLD}}, True),
            ({"starved": {"TIMER": 10 * THRESHOLD - 1}}, False),
            ({"late_ns": 10 * THRESHOLD}, True),
            ({"late_ns": 10 * THRESHOLD - 1, "starved": {"TIMER": THRESHOLD}}, False),
        ],
    )
    @pytest.mark.parametrize("last", [ongoing, line])
    def test_ten_times_the_threshold(
        self, changes: dict[str, Any], passes: bool, last: Any
    ) -> None:
        """A duration or a starved wait ten times the threshold is shown at once."""
        given = stormy(duration_ns=10 * THRESHOLD - 1)
        assert given.take(ongoing(9), T0) == []
        assert given.take(last(9, **changes), T0) == [ongoing(9), last(9, **changes)] * passes

    @pytest.mark.parametrize(("duration_ns", "passes"), [(60 * MS, True), (60 * MS - 1, False)])
    def test_four_times_what_was_shown(self, duration_ns: int, passes: bool) -> None:
        """Far longer than all examples of its key is shown."""
        lines = [line(9, duration_ns=duration_ns)]
        assert stormy().take(lines[0], T0) == lines * passes

    def test_the_longest_example_counts(self) -> None:
        """Not the last one."""
        given = Folder(2, THRESHOLD)
        given.take(line(1, duration_ns=20 * MS), T0)
        given.take(line(2, duration_ns=11 * MS), T0)
        assert given.take(line(3, duration_ns=79 * MS), T0) == []

    def test_no_length_is_not_long(self) -> None:
        """Stalls whose end nobody saw may have none; they are folded too."""
        assert stormy(duration_ns=0).take(line(9, duration_ns=0), T0) == []

    def test_what_was_let_through_is_the_new_measure(self) -> None:
        """The next one must be four times longer again, also while the first still goes on."""
        given = stormy(duration_ns=5 * MS)
        assert given.take(ongoing(9, cpu=1, duration_ns=20 * MS), T0) != []
        assert given.take(line(10, duration_ns=79 * MS), T0) == []
        assert given.take(line(11, duration_ns=80 * MS), T0) != []

    def test_its_other_lines_follow(self) -> None:
        """Once let through, a stall is shown to its end, and all its lines were."""
        given = stormy()
        lines = [
            ongoing(9),
            ongoing(9, duration_ns=48 * MS),
            ongoing(9, duration_ns=100 * MS),
            ongoing(9, duration_ns=400 * MS),
            line(9, duration_ns=401 * MS),
        ]
        assert [given.take(each, T0) for each in lines] == [
            [],
            [],
            lines[:3],
            [lines[3]],
            [lines[4]],
        ]
        assert given.finish() == []

    def test_a_key_of_which_none_was_shown(self) -> None:
        """A stall that turns out to be another one than those shown is shown."""
        given = stormy()
        other = line(9, blocker=blocker(tgid=200))
        assert given.take(ongoing(9), T0) == []
        assert given.take(other, T0) == [ongoing(9), other]
        assert given.finish() == []


class TestTheSum:
    """What is told of the stalls that were held back."""

    def test_all_of_it(self) -> None:
        """Count, sums, extremes, CPUs, the first one's stack and the last one shown."""
        given = stormy()
        one = line(
            10, cpu=3, started_ns=T0, duration_ns=20 * MS, kernel_stack=("spin+0x1", STACK[1])
        )
        two = line(11, cpu=1, started_ns=T0 - MS, duration_ns=12 * MS, starved={"NET_RX": 11 * MS})
        assert given.take(ongoing(10, cpu=3, started_ns=T0), T0) == []
        assert given.take(two, T0) == []
        assert given.take(one, T0) == []
        assert given.take(line(12, cpu=1, started_ns=T0), T0) == []
        assert only(given.flush(T0 + MINUTE_NS)) == Suppressed(
            reason=Reason.IDENTICAL,
            cpus=frozenset({1, 3}),
            stalls=3,
            total_ns=47 * MS,
            since_ns=T0 - MS,
            until_ns=T0 + 20 * MS,
            longest_ns=20 * MS,
            starved_ns=11 * MS,
            verdict=Verdict.STUCK_IN_KERNEL,
            blocker=blocker(),
            kernel_stack=STACK,
            like=(0, SHOWN - 1),
        )

    @pytest.mark.parametrize("last", [Verdict.STUCK_IN_KERNEL, Verdict.UNKNOWN])
    def test_mixed_verdicts(self, last: Verdict) -> None:
        """Different verdicts are none, also when the first one comes again."""
        given = stormy()
        for seq, verdict in enumerate([Verdict.STUCK_IN_KERNEL, Verdict.UNKNOWN, last], SHOWN):
            given.take(line(seq, verdict=verdict), T0)
        assert only(given.finish()).verdict is None

    @pytest.mark.parametrize(
        ("changes", "level"),
        [
            ({}, "info"),
            ({"starved": {"NET_RX": THRESHOLD}}, "warning"),
            ({"late_ns": THRESHOLD}, "warning"),
        ],
    )
    def test_level(self, changes: dict[str, Any], level: str) -> None:
        """One that starved something makes it a warning."""
        given = stormy()
        given.take(line(9, **changes), T0)
        given.take(line(10), T0)
        assert only(given.finish()).level == level

    def test_counted_when_resolved(self) -> None:
        """A stall that still goes on is in no sum yet, and in the next minute is an example."""
        given = stormy()
        given.take(ongoing(9), T0)
        assert given.flush(T0 + MINUTE_NS) == []
        assert given.take(line(9), T0 + MINUTE_NS) == [ongoing(9), line(9)]

    def test_counted_under_the_last_key(self) -> None:
        """The resolved line says whose it was."""
        given = stormy()
        given.take(line(8, blocker=blocker(tgid=200)), T0)
        given.take(ongoing(9), T0)
        assert given.take(line(9, blocker=blocker(tgid=200)), T0) == []
        suppressed = only(given.finish())
        assert suppressed.blocker == blocker(tgid=200)
        assert suppressed.like == (0, 8)

    def test_like_is_the_last_shown(self) -> None:
        """A stall that was let through is the best example."""
        given = stormy()
        given.take(line(9), T0)
        given.take(line(10, cpu=5, duration_ns=500 * MS), T0)
        assert only(given.finish()).like == (5, 10)


class TestMinutes:
    """Each key's minute begins with its first stall and ends by itself."""

    def test_nothing_to_wait_for(self) -> None:
        """Without stalls nothing is due."""
        given = Folder(SHOWN, THRESHOLD)
        assert (given.pending, given.next_flush_ns, given.flush(T0), given.finish()) == (
            False,
            None,
            [],
            [],
        )

    def test_the_end(self) -> None:
        """The sum comes when the minute is over, once, and then nothing is due."""
        given = stormy()
        given.take(line(9), T0 + MINUTE_NS - 1)
        assert (given.pending, given.next_flush_ns) == (True, T0 + MINUTE_NS)
        assert given.flush(T0 + MINUTE_NS - 1) == []
        assert only(given.flush(T0 + MINUTE_NS)).stalls == 1
        assert (given.pending, given.next_flush_ns) == (False, None)
        assert given.flush(T0 + 9 * MINUTE_NS) == []

    def test_the_next_minute(self) -> None:
        """A storm that goes on is told of every minute, with new examples first."""
        given = stormy()
        given.take(line(9), T0)
        lines = given.take(line(10), T0 + MINUTE_NS)
        assert only(lines[:1]).stalls == 1
        assert lines[1:] == [line(10)]
        for seq in range(11, 10 + SHOWN):
            assert given.take(line(seq), T0 + MINUTE_NS) == [line(seq)]
        assert given.take(line(99), T0 + 2 * MINUTE_NS - 1) == []

    def test_each_key_has_its_own(self) -> None:
        """The minute that ends first is the one to wait for; any stall brings its sum out."""
        given = stormy()
        given.take(line(9), T0)
        other = {"blocker": blocker(tgid=200)}
        given.take(line(10, **other), T0 + MS)
        assert given.next_flush_ns == T0 + MINUTE_NS
        lines = given.take(line(11, **other), T0 + MINUTE_NS)
        assert [type(each) for each in lines] == [Suppressed, Update]
        assert given.next_flush_ns == T0 + MS + MINUTE_NS

    def test_finish(self) -> None:
        """At the end all sums are told, once."""
        given = stormy()
        given.take(line(9), T0)
        assert only(given.finish()).stalls == 1
        assert given.finish() == []
        assert not given.pending


class TestMemory:
    """However many kinds of stalls there are."""

    def test_many_keys(self) -> None:
        """A process that renames itself for each stall makes no more keys than allowed."""
        given = Folder(SHOWN, THRESHOLD)
        for seq in range(3 * MAX_KEYS):
            given.take(line(seq, blocker=blocker(comm=b"%d" % seq)), T0)
        assert len(given._minutes) == MAX_KEYS

    def test_a_key_without_a_sum_goes_first(self) -> None:
        """The oldest key with nothing to tell makes room; one with a sum stays."""
        given = stormy()
        given.take(line(9), T0)
        for seq in range(10, 2 * MAX_KEYS):
            lines = given.take(line(seq, blocker=blocker(comm=b"%d" % seq)), T0)
            assert [type(each) for each in lines] == [Update]
        assert only(given.finish()).stalls == 1

    def test_a_sum_is_told_before_its_key_goes(self) -> None:
        """When all keys have sums the oldest one is told early."""
        given = Folder(1, THRESHOLD)
        for seq in range(2 * MAX_KEYS):
            given.take(line(seq, blocker=blocker(tgid=seq // 2)), T0)
        early, new = given.take(line(9999, blocker=blocker(tgid=9999)), T0)
        assert isinstance(early, Suppressed)
        assert (early.blocker, early.stalls) == (blocker(tgid=0), 1)
        assert new == line(9999, blocker=blocker(tgid=9999))
        assert len(given.finish()) == MAX_KEYS - 1

    def test_finished_stalls_are_forgotten(self) -> None:
        """Nothing is kept of a stall that is over."""
        given = stormy()
        for seq in range(10, 20):
            given.take(ongoing(seq), T0)
            given.take(line(seq), T0)
        assert not given._open


class FolderMachine(RuleBasedStateMachine):
    """Any order of lines, keys and times, with room for few keys."""

    @initialize(per_minute=st.integers(1, 3), keys=st.integers(1, 4))
    def start(self, per_minute: int, keys: int) -> None:
        self.few = patch.object(fold, "MAX_KEYS", keys)
        self.few.start()
        self.keys = keys
        self.folder = Folder(per_minute, THRESHOLD)
        self.now_ns = T0
        self.seq = 0
        self.open: dict[int, list[Update]] = {}
        self.done: list[list[Update]] = []
        self.shown: dict[tuple[int, int], list[Update]] = defaultdict(list)
        self.sums: list[Suppressed] = []
        self.shown_at: dict[Any, dict[tuple[int, int], int]] = defaultdict(dict)

    @rule(
        cpu=st.integers(0, 2),
        resolved=st.booleans(),
        tgid=st.sampled_from([None, 1, 2]),
        path=st.sampled_from(["a", "b"]),
        offset=st.integers(0, 3),
        longer_ns=st.sampled_from([0, MS, 11 * MS, 50 * MS, 200 * MS]),
        starved_ns=st.sampled_from([0, THRESHOLD, 10 * THRESHOLD]),
        verdict=st.sampled_from(Verdict),
    )
    def say(
        self,
        cpu: int,
        resolved: bool,
        tgid: int | None,
        path: str,
        offset: int,
        longer_ns: int,
        starved_ns: int,
        verdict: Verdict,
    ) -> None:
        """The tracker has a line, of a new stall or of the one that goes on."""
        lines = self.open.setdefault(cpu, [])
        if not lines:
            self.seq += 1
        update = line(
            lines[-1].seq if lines else self.seq,
            cpu=cpu,
            phase=Phase.RESOLVED if resolved else Phase.ONGOING,
            started_ns=lines[-1].started_ns if lines else self.now_ns - longer_ns,
            duration_ns=(lines[-1].duration_ns if lines else 0) + longer_ns,
            starved={"NET_RX": starved_ns} if starved_ns else {},
            blocker=None if tgid is None else blocker(tgid=tgid),
            kernel_stack=(f"{path}+{offset:#x}",),
            verdict=verdict,
        )
        lines.append(update)
        if resolved:
            self.done.append(self.open.pop(cpu))
        self._write(self.folder.take(update, self.now_ns))
        if update.duration_ns >= 10 * THRESHOLD or starved_ns >= 10 * THRESHOLD:
            assert self.shown[cpu, update.seq][-1] == update
        if not self.shown[cpu, update.seq]:
            self._was_held(update, first=len(lines) == 1)

    @rule(step=st.sampled_from([1, MS, MINUTE_NS // 2, MINUTE_NS]), flush=st.booleans())
    def time_passes(self, step: int, flush: bool) -> None:
        """The clock moves on; the caller may be late."""
        self.now_ns += step
        if flush:
            self._write(self.folder.flush(self.now_ns))
            next_ns = self.folder.next_flush_ns
            assert next_ns is None or self.now_ns < next_ns <= self.now_ns + MINUTE_NS

    @precondition(lambda self: hasattr(self, "folder"))
    @invariant()
    def promises(self) -> None:
        """All or nothing of each stall in order; few keys; what is open has no sum."""
        for lines in [*self.done, *self.open.values()]:
            if lines:
                shown = self.shown[lines[0].cpu, lines[0].seq]
                assert shown in ([], lines)
        assert len(self.folder._minutes) <= self.keys
        assert self.folder.pending == (self.folder.next_flush_ns is not None)
        hidden = [lines for lines in self.done if not self.shown[lines[0].cpu, lines[0].seq]]
        assert sum(each.stalls for each in self.sums) <= len(hidden)
        assert self.folder.pending or sum(each.stalls for each in self.sums) == len(hidden)

    def teardown(self) -> None:
        """Shown stalls and told ones are all there were; so are their times."""
        if not hasattr(self, "folder"):
            return
        self._write(self.folder.finish())
        self.few.stop()
        hidden = [lines[-1] for lines in self.done if not self.shown[lines[0].cpu, lines[0].seq]]
        assert sum(each.stalls for each in self.sums) == len(hidden)
        assert sum(each.total_ns for each in self.sums) == sum(u.duration_ns for u in hidden)
        assert {cpu for each in self.sums for cpu in each.cpus} == {u.cpu for u in hidden}
        for each in self.sums:
            assert each.since_ns + each.longest_ns <= each.until_ns
            assert each.longest_ns <= each.total_ns <= each.stalls * each.longest_ns
            assert each.like in self.shown
        assert {_kind(each) for each in self.sums} == {_kind(update) for update in hidden}

    def _was_held(self, update: Update, first: bool) -> None:
        """Enough of its kind were shown within a minute, and one at least a quarter as long."""
        since_ns = self.now_ns - MINUTE_NS
        examples = [
            stall for stall, at_ns in self.shown_at[_kind(update)].items() if at_ns > since_ns
        ]
        assert len(examples) >= (self.folder.per_minute if first else 1)
        longest_ns = max(each.duration_ns for stall in examples for each in self.shown[stall])
        assert update.duration_ns < 4 * max(1, longest_ns)

    def _write(self, lines: Any) -> None:
        for each in lines:
            if isinstance(each, Suppressed):
                self.sums.append(each)
            else:
                self.shown[each.cpu, each.seq].append(each)
                self.shown_at[_kind(each)][each.cpu, each.seq] = self.now_ns


def _kind(given: Update | Suppressed) -> tuple[int | None, str]:
    """A key as the machine makes it."""
    return given.blocker.tgid if given.blocker else None, given.kernel_stack[0][0]


TestFolder = FolderMachine.TestCase
TestFolder.settings = settings(
    max_examples=150,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
