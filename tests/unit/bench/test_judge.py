"""What counts, what is found, what is right."""

from __future__ import annotations

import pytest

from bench.fidelity.judge import Judgement, complaints, effect, judge
from bench.fidelity.truth import Injected, Said, Span
from stalld.track.verdict import Verdict
from tests.injector.kinds import Kind
from tests.injector.ksoftirqd import Wait
from tests.unit.bench.make import MS, THRESHOLD_MS, injected, line, run, said, span, wait


def one(stall: Injected, *told: Said) -> Judgement:
    """The judgement of the only stall."""
    [judgement] = judge(run([stall], list(told)))
    return judgement


@pytest.mark.parametrize("kind", [Kind.BH_OFF, Kind.IRQS_OFF_TIMER, Kind.SOFTIRQ_HOG])
def test_some_kinds_always_count(kind: Kind) -> None:
    """Where softirqs wait in any case, the injected time itself had to be seen."""
    assert effect(injected(kind), THRESHOLD_MS) == span(1000, 1050)


@pytest.mark.parametrize(
    ("waits", "seen"),
    [
        ([], None),
        ([wait(1010, 1029)], None),
        ([wait(1010, 1030)], span(1010, 1030)),
        ([wait(1005, 1052)], span(1005, 1052)),
        ([wait(1001, 1012), wait(1020, 1049)], span(1020, 1049)),
        ([wait(1010, None)], None),
        # 30 of 70 ms: somebody else's.
        ([wait(960, 1030)], None),
        ([wait(970, 1030)], span(970, 1030)),
    ],
)
def test_others_count_when_ksoftirqd_waited(waits: list[Wait], seen: Span | None) -> None:
    """Its longest wait, if two thresholds of it and half of it lie in the injected time."""
    for kind in (Kind.PREEMPT_OFF, Kind.CPU_CONTENTION, Kind.TASK_CONTENTION):
        assert effect(injected(kind, 1000, 1050, *waits), THRESHOLD_MS) == seen


def test_all_right() -> None:
    """A stall told as it was gives no complaint."""
    judgement = one(injected(), said(1001, 1051, line(read_ns=1015 * MS)))
    assert judgement.verdict_right
    assert judgement.blame_right
    assert judgement.function_right
    assert judgement.parts == 1
    assert judgement.duration_error_ms == 0
    assert judgement.first_line_ms == 5
    assert judgement.told_during
    assert not judgement.hasty
    assert list(complaints(judgement)) == []


def test_nothing_told() -> None:
    """A stall that nothing overlaps is missed, also when another CPU was told of."""
    judgement = one(injected(), said(1100, 1150), said(1000, 1050, cpu=0))
    assert judgement.said is None
    assert judgement.parts == 0
    assert not judgement.blame_right
    assert judgement.function_right is False
    assert judgement.duration_error_ms is None
    assert judgement.first_line_ms is None
    assert not judgement.told_during
    assert list(complaints(judgement)) == ["missed"]


def test_too_little_told() -> None:
    """Less than half of a stall is not enough; half is."""
    judgement = one(injected(), said(1000, 1024))
    assert judgement.said is None
    assert list(complaints(judgement)) == ["missed: less than half of it was told"]
    assert one(injected(), said(1000, 1025)).said is not None


def test_the_one_that_overlaps_most_is_judged() -> None:
    """A stall told in two parts is found once, and that is said."""
    judgement = one(injected(), said(1000, 1010, verdict="unknown"), said(1010, 1050))
    assert judgement.verdict_right
    assert list(complaints(judgement)) == ["told as 2 stalls"]


def test_wrong_verdict_and_blame() -> None:
    """Each error has its line."""
    judgement = one(injected(), said(verdict="cpu_contention", tid=7))
    assert not judgement.verdict_right
    assert not judgement.blame_right
    assert list(complaints(judgement)) == [
        "verdict cpu_contention instead of softirqs_disabled",
        "blames spinner (7) instead of inj-bh-off (101)",
    ]


def test_nobody_blamed() -> None:
    """A stall without a blocker is not blamed rightly."""
    complaint = "blames nobody instead of inj-bh-off (101)"
    assert list(complaints(one(injected(), said(tid=None)))) == [complaint]


def test_one_of_several_blamed() -> None:
    """Where tasks took turns, each of them may be blamed."""
    stall = injected(Kind.TASK_CONTENTION, 1000, 1050, wait(1000, 1050), others=(102, 103))
    assert one(stall, said(verdict="cpu_contention", tid=103)).blame_right
    assert not one(stall, said(verdict="cpu_contention", tid=104)).blame_right


@pytest.mark.parametrize(
    "kind", [Kind.IRQS_OFF, Kind.IRQS_OFF_TIMER, Kind.CPU_CONTENTION, Kind.TASK_CONTENTION]
)
def test_kinds_without_a_function(kind: Kind) -> None:
    """User code has none, and where no tick can come the stack is taken when it is gone."""
    assert one(injected(kind, 1000, 1050, wait(1000, 1050)), said()).function_right is None


def test_function_missing() -> None:
    """Another stack than the injected one is told."""
    judgement = one(injected(), said(stack={"kernel": ["schedule+0x1"], "captured": "after"}))
    assert list(complaints(judgement)) == ["injected_spin_bh_off is not in the stack"]


def test_duration_is_held_against_the_wait() -> None:
    """Where the stall is ksoftirqd's wait, that is its true length."""
    judgement = one(injected(Kind.PREEMPT_OFF, 1000, 1050, wait(1008, 1051)), said(1008, 1053))
    assert judgement.duration_error_ms == pytest.approx(2)


@pytest.mark.parametrize(
    ("verdict", "hasty"),
    [("unknown", False), ("vcpu_preempted", False), ("stuck_in_kernel", True)],
)
def test_hasty_lines(verdict: str, hasty: bool) -> None:
    """A wrong verdict of an ongoing line is told, unless it accuses nobody."""
    judgement = one(injected(), said(1000, 1050, line(verdict, read_ns=1015 * MS)))
    assert judgement.hasty is hasty
    assert judgement.expected is Verdict.SOFTIRQS_DISABLED


def test_line_after_the_end() -> None:
    """An ongoing line that came when the stall was over did not come during it."""
    assert not one(injected(), said(1000, 1050, line(read_ns=1051 * MS))).told_during
