"""One sentence for each line: what to look at, in the words of the case."""

from __future__ import annotations

from typing import Any

import pytest

from stalld.track.hints import hint
from stalld.track.model import Blocker, Handler, Update
from stalld.track.verdict import Verdict
from tests.unit.make import MS


def update(verdict: Verdict, **changes: Any) -> Update:
    """A line with this verdict, 30 ms long."""
    # Nothing else of an update matters here.
    fields: dict[str, Any] = dict.fromkeys(Update._fields)
    fields |= {
        "verdict": verdict,
        "duration_ns": 30 * MS,
        "late_ns": 0,
        "captured": "during",
        "blocker": blocker(),
    }
    return Update(**fields | changes)


def blocker(mode: str = "kernel", policy: int = 0) -> Blocker:
    """A task."""
    return Blocker(100, 101, b"spinner", mode, policy, 120, 77)


def said(verdict: Verdict, **changes: Any) -> str:
    """The hint."""
    found = hint(update(verdict, **changes))
    assert found
    return found


@pytest.mark.parametrize("verdict", [verdict for verdict in Verdict if verdict != "unknown"])
@pytest.mark.parametrize("captured", ["during", "after", "none"])
@pytest.mark.parametrize("whom", [blocker(), None])
def test_every_verdict_has_one(verdict: Verdict, captured: str, whom: Blocker | None) -> None:
    """Whatever is concluded comes with what to do: one sentence, also if nobody is blamed."""
    text = said(verdict, captured=captured, blocker=whom)
    assert "\n" not in text
    assert text[0].islower()
    assert text[-1] != "."


@pytest.mark.parametrize("verdict", [verdict for verdict in Verdict if verdict != "unknown"])
def test_each_ends_with_its_pointer(verdict: Verdict) -> None:
    """Where the runbook tells more: in the section of the verdict, unless the case has its own."""
    assert said(verdict).endswith(f"; see docs/runbook.md#{verdict}")


STAT_FRAMES = [
    "memcg_stat_show+0x1a",
    "memory_stat_show+0x1a",
    "mem_cgroup_flush_stats+0x10",
    "mem_cgroup_flush_stats.part.0+0x10",
    "cgroup_rstat_flush_locked+0x99",
    "css_rstat_flush+0x2",
]


@pytest.mark.parametrize("frame", STAT_FRAMES)
@pytest.mark.parametrize("verdict", [Verdict.STUCK_IN_KERNEL, Verdict.CPU_CONTENTION])
def test_readers_of_memory_stat(frame: str, verdict: Verdict) -> None:
    """The best known culprit has its own remedy."""
    text = said(verdict, kernel_stack=("number+0x5", frame, "seq_read_iter+0x1"))
    assert "cadvisor" in text
    assert text.endswith("#memcg-stat-readers")


@pytest.mark.parametrize(
    ("verdict", "changes"),
    [
        (Verdict.STUCK_IN_KERNEL, {"kernel_stack": ("not_memcg_stat_show+0x1",)}),
        (Verdict.STUCK_IN_KERNEL, {"kernel_stack": ("memcg_stat_show+0x1",), "captured": "none"}),
        (Verdict.SOFTIRQ_HOG, {"kernel_stack": ("cgroup_rstat_flush+0x1",)}),
    ],
)
def test_no_readers_of_memory_stat(verdict: Verdict, changes: dict[str, Any]) -> None:
    """Another function, no stack of the culprit's, another cause."""
    assert "memory.stat" not in said(verdict, **changes)


def test_they_differ() -> None:
    """Each verdict has its own."""
    verdicts = [verdict for verdict in Verdict if verdict is not Verdict.UNKNOWN]
    assert len({said(verdict) for verdict in verdicts}) == len(verdicts)


@pytest.mark.parametrize(
    ("policy", "name"), [(1, "SCHED_FIFO"), (2, "SCHED_RR"), (6, "SCHED_DEADLINE")]
)
def test_real_time(policy: int, name: str) -> None:
    """A real-time task that has the CPU is named as one; it matters only where tasks compete."""
    whom = blocker("user", policy)
    assert f"real-time task ({name})" in said(Verdict.CPU_CONTENTION, blocker=whom)
    for verdict in (Verdict.STUCK_IN_KERNEL, Verdict.SOFTIRQS_DISABLED):
        assert "real-time" not in said(verdict, blocker=whom)


@pytest.mark.parametrize("policy", [0, 3, 5, 7, 99])
def test_not_real_time(policy: int) -> None:
    """Other policies get no such advice."""
    assert "real-time" not in said(Verdict.CPU_CONTENTION, blocker=blocker("user", policy))


class TestInterruptsOff:
    """What the stack means depends on when it was taken."""

    def test_during(self) -> None:
        """An NMI's stack is the culprit's."""
        assert "spin_lock_irqsave() section in the stack" in said(Verdict.IRQS_DISABLED)

    def test_after(self) -> None:
        """The first stack after begins where interrupts were enabled, if a task had them off."""
        text = said(Verdict.IRQS_DISABLED, captured="after")
        assert "innermost frames are where they were enabled again" in text

    def test_an_interrupt_handler(self) -> None:
        """Over user code it was no task."""
        text = said(Verdict.IRQS_DISABLED, captured="after", blocker=blocker("hardirq"))
        assert text.startswith("an interrupt handler, or firmware")
        assert "/proc/interrupts" in text


@pytest.mark.parametrize(
    ("handler", "words"),
    [
        (Handler(3, 30 * MS, b"eth0", 64, 64), "NAPI poll"),
        (Handler(3, 30 * MS, None, None, None), "softirq handler"),
        (Handler(1, 30 * MS, None, None, None), "softirq handler"),
        (None, "softirq handler"),
    ],
)
def test_hogs(handler: Handler | None, words: str) -> None:
    """A poll leads to its driver, another handler to its stack."""
    assert f"one {words} " in said(Verdict.SOFTIRQ_HOG, handler=handler)


@pytest.mark.parametrize(
    ("late_ms", "told"), [(0, False), (10, False), (14.9, False), (15, True), (30, True)]
)
def test_unknown(late_ms: float, told: bool) -> None:
    """Nothing is said of the unknown, but where the tick was late for half of it or more."""
    text = hint(update(Verdict.UNKNOWN, late_ns=round(late_ms * MS)))
    assert (text is not None) is told
    if text:
        assert "hypervisor" in text


@pytest.mark.parametrize(
    "verdict",
    [Verdict.STUCK_IN_KERNEL, Verdict.SOFTIRQS_DISABLED, Verdict.IRQS_DISABLED, Verdict.UNKNOWN],
)
@pytest.mark.parametrize(
    "function",
    [
        "smp_call_function_many_cond+0x2b4",
        "native_queued_spin_lock_slowpath.part.0+0x1",
        "multi_cpu_stop+0x8",
    ],
)
def test_who_waits_is_a_victim(verdict: Verdict, function: str) -> None:
    """Whoever spins for another CPU is not accused of it; what it did below is not asked."""
    frames = (function, "flush_tlb_mm_range+0x1", "memcg_stat_show+0x1")
    assert said(verdict, kernel_stack=frames).endswith("#waits-for-another-cpu")
    assert not said(Verdict.CPU_CONTENTION, kernel_stack=frames).endswith("#waits-for-another-cpu")
    deeper = ("spin+0x1", function)
    if verdict is not Verdict.UNKNOWN:
        assert not said(verdict, kernel_stack=deeper).endswith("#waits-for-another-cpu")
