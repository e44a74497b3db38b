"""One kind of stall after the other against one daemon: does this kernel let us tell each?

Only what follows from the kernel is asserted, of most stalls: an emulated CPU is taken away by
its host now and then, without a steal clock that would tell, and then a stall is longer or has
another reason than was injected.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from stalld.host import threads_softirqs
from tests.injector import Injector, Kind, KsoftirqdTruth, Mode, Pressure, Truth, UnsupportedError
from tests.kernel.daemon import STALLED_CPU as CPU
from tests.kernel.daemon import Daemon, Event, monotonic_ns
from tests.kernel.test_stalls import check_life, functions
from tests.vm.guest_tests.conftest import THRESHOLD_MS

pytestmark = pytest.mark.kernel

DURATION_MS = 450.0
"""From a record to its line an emulated CPU needs 100 ms, and more on a busy host."""
WANTED = 3
TRIES = 10


class Told(NamedTuple):
    """One injected stall and its lines."""

    truth: Truth
    lines: list[Event]

    @property
    def resolved(self) -> Event:
        return self.lines[-1]

    def right(self, verdict: str) -> bool:
        """The verdict, the task, and a line while it went on, with the function that spun."""
        event = self.resolved
        return (
            event["verdict"] == verdict
            and event["blocker"] is not None
            and event["blocker"]["tid"] == self.truth.tid
        )

    def sampled_during(self) -> bool:
        """A line has the stack of a sample that was taken while it went on."""
        return any(
            line["stack"]["captured"] == "during" and self.truth.symbol in functions(line)
            for line in self.lines
        )

    def shown_during(self) -> bool:
        """The first line has it, and was there while it went on."""
        first = self.lines[0]
        return (
            first["phase"] == "ongoing"
            and first["read_ns"] < self.truth.end_ns
            and first["stack"]["captured"] == "during"
            and self.truth.symbol in functions(first)
        )


def told(
    daemon: Daemon, kind: Kind, mode: Mode, enough: Callable[[list[Told]], bool]
) -> list[Told]:
    """Stalls of one kind until there are enough."""
    found: list[Told] = []
    with Injector(CPU) as injector, Pressure(CPU, mode) as pressure:
        try:
            injector.prepare(kind)
        except UnsupportedError as error:
            pytest.skip(f"this kernel cannot be stalled so: {error}")
        for _ in range(TRIES):
            truth = injector.inject(kind, DURATION_MS, pressure=pressure)
            try:
                lines = daemon.of(truth, timeout_s=1)
            except AssertionError:
                continue
            check_life(lines)
            found.append(Told(truth, lines))
            if enough(found):
                break
            time.sleep(0.2)
    return found


def summary(found: list[Told]) -> list[dict[str, Any]]:
    """For the message of a test that fails."""
    return [
        {key: told.resolved[key] for key in ("verdict", "duration_ms", "starved", "evidence")}
        for told in found
    ]


def check_kind(daemon: Daemon, kind: Kind, mode: Mode, verdict: str) -> list[Told]:
    """At least three of ten at most are told rightly, and one of those while it went on.

    How fast the line comes is for real hardware to show.
    """

    def right(found: list[Told]) -> list[Told]:
        return [one for one in found if one.right(verdict)]

    def enough(found: list[Told]) -> bool:
        return len(right(found)) >= WANTED and any(one.shown_during() for one in right(found))

    found = told(daemon, kind, mode, enough)
    assert enough(found), summary(found)
    return right(found)


def test_bottom_halves_off(daemon: Daemon) -> None:
    """Bottom halves off: seen while it lasts, with its function; NET_RX starves.

    Where only threads serve softirqs they wait for the task, whatever it holds off.
    """
    threaded = threads_softirqs()
    verdict = "stuck_in_kernel" if threaded else "softirqs_disabled"
    found = check_kind(daemon, Kind.BH_OFF, Mode.PING, verdict)
    assert all(one.sampled_during() for one in found)
    vector = "TIMER" if threaded else "NET_RX"
    assert all(vector in one.resolved["starved"] for one in found)


def test_softirq_hog(daemon: Daemon) -> None:
    """One long handler: seen while it runs, with its vector and function."""
    if threads_softirqs():
        pytest.skip("the injector has no handler that runs long where threads serve softirqs")
    found = check_kind(daemon, Kind.SOFTIRQ_HOG, Mode.PING, "softirq_hog")
    assert all(one.sampled_during() for one in found)
    assert {one.resolved["handler"]["vector"] for one in found} == {"NET_RX"}
    assert any(one.resolved["handler"]["device"] for one in found)


@pytest.mark.parametrize("kind", [Kind.IRQS_OFF, Kind.IRQS_OFF_TIMER])
def test_interrupts_off(daemon: Daemon, tick_ms: float, kind: Kind) -> None:
    """Interrupts off: told at the end, as far as a steal clock lets it be told from a theft."""

    def late(found: list[Told]) -> list[Told]:
        return [one for one in found if one.resolved["evidence"]["late_ms"] >= DURATION_MS / 2]

    found = late(told(daemon, kind, Mode.PING, lambda found: len(late(found)) >= WANTED))
    assert len(found) >= WANTED
    for one in found:
        event = one.resolved
        assert event["verdict"] in ("irqs_disabled", "unknown")
        if event["evidence"]["stolen_ms"] is not None:
            assert event["verdict"] == "irqs_disabled"
        assert event["duration_ms"] >= DURATION_MS - tick_ms - 1


def check_length(resolved: Event, ksoftirqd: KsoftirqdTruth) -> None:
    """The longest wait of ksoftirqd in a stall is as long as its witness saw it."""
    start_ns = monotonic_ns(resolved["started_at"])
    span = start_ns, start_ns + int(resolved["duration_ms"] * 1e6)
    seen_ms = [wait.waited_ms or 0 for wait in ksoftirqd.waits(*span) if wait.lies_in(*span)]
    assert resolved["ksoftirqd"]["runnable_ms"] == pytest.approx(max(seen_ms, default=0), abs=2)


def check_wait(
    daemon: Daemon, kind: Kind, mode: Mode, verdict: str, tries: int = 4 * TRIES
) -> list[Told]:
    """Stalls in which ksoftirqd waited, by its own witness: at least three are told rightly.

    Whether packets wake it is the kernel's choice: one that preempts lazily goes on serving
    softirqs where another has it take over. Where it is not woken nothing can be told.
    """
    waited: list[Told] = []
    right: list[Told] = []
    short_ms: list[int] = []
    with (
        KsoftirqdTruth(CPU) as ksoftirqd,
        Injector(CPU) as injector,
        Pressure(CPU, mode) as pressure,
    ):
        injector.prepare(kind)
        for _ in range(tries):
            truth = injector.inject(kind, DURATION_MS, pressure=pressure)
            time.sleep(0.3)
            # A flood may have had it wait before: what counts is that it did so mostly meanwhile.
            span = truth.start_ns, truth.end_ns
            waits = ksoftirqd.waits(*span)
            inside_ms = max((w.waited_ms or 0 for w in waits if w.lies_in(*span)), default=0)
            if inside_ms < 1.5 * THRESHOLD_MS:
                short_ms.append(round(max((w.overlap_ms(*span) for w in waits), default=0)))
                continue
            waited.append(Told(truth, daemon.of(truth)))
            check_life(waited[-1].lines)
            if waited[-1].right(verdict):
                check_length(waited[-1].resolved, ksoftirqd)
                right.append(waited[-1])
            if len(right) == WANTED:
                break
    if len(waited) < WANTED:
        pytest.skip(f"ksoftirqd waited in {len(waited)} of {tries} stalls only, else {short_ms} ms")
    assert len(right) >= WANTED, summary(waited)
    return right


def test_preemption_off(daemon: Daemon) -> None:
    """Preemption off while ksoftirqd is runnable: its wait is told, the task in the kernel blamed.

    Whether packets starve meanwhile is the kernel's mode, and that is learned by behaviour.
    """
    found = check_wait(daemon, Kind.PREEMPT_OFF, Mode.BURSTS, "stuck_in_kernel")
    # ksoftirqd may have been woken near the end.
    assert sum(one.sampled_during() for one in found) >= WANTED - 1


def test_contention(daemon: Daemon) -> None:
    """ksoftirqd behind a SCHED_FIFO task in user mode is contention, and the task is named."""
    found = check_wait(daemon, Kind.CPU_CONTENTION, Mode.FLOOD, "cpu_contention")
    assert {one.resolved["blocker"]["policy"] for one in found} == {"fifo"}
