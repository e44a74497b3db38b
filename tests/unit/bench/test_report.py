"""Figures, tables and goals."""

from __future__ import annotations

import json

import pytest

from bench.fidelity.metrics import Share, Spread, spread
from bench.fidelity.report import Report, report, text, to_json
from bench.fidelity.truth import Injected, Said
from bench.row import quantile
from tests.injector.kinds import Kind
from tests.unit.bench.make import MS, injected, line, run, said, wait


def mixed() -> Report:
    """Three stalls: one right, one missed, one without effect; and a false one."""
    stalls = [
        injected(number=1),
        injected(Kind.SOFTIRQ_HOG, 2000, 2050, number=2, steal_ms=20.0),
        injected(Kind.PREEMPT_OFF, 3000, 3050, wait(3010, 3020), number=3),
    ]
    told = [
        said(1001, 1050, line(read_ns=1014 * MS)),
        said(4000, 4030, verdict="stuck_in_kernel"),
        said(5000, 5030, cpu=0),
    ]
    return report(run(stalls, told))


def test_figures() -> None:
    """Shares are of the counted, errors and delays of the found."""
    figures = mixed().figures
    assert figures.injected == 3
    assert figures.counted == 2
    assert figures.recall == figures.verdict == figures.blame == figures.during == Share(1, 2)
    assert figures.function == Share(1, 2)
    assert figures.duration_error_ms == Spread(1.0, 1.0, 1.0)
    assert figures.first_line_ms == Spread(4.0, 4.0, 4.0)
    assert figures.steal_ms == 20


def test_precision() -> None:
    """Of the two stalls told on the CPU one is believed."""
    assert mixed().precision == Share(1, 2)


def test_text() -> None:
    """The tables hold each kind, every miss its reason, and the goals close it."""
    said_text = text(mixed())
    rows = {row.split()[0]: row.split() for row in said_text.splitlines() if row}
    table = said_text.split("\n\n")[1].splitlines()
    assert table[1].split() == [
        *("kind", "stuck_in_kernel", "softirqs_disabled", "irqs_disabled", "softirq_hog"),
        *("cpu_contention", "vcpu_preempted", "unknown", "missed"),
    ]
    assert table[2].split() == ["preempt_off", "[0]", *["."] * 7]
    assert table[3].split() == ["bh_off", ".", "[1]", *["."] * 6]
    assert table[4].split() == ["softirq_hog", *["."] * 3, "[0]", *["."] * 3, "1"]
    assert rows["all"][1:7] == ["3", "2", "50.0", "50.0", "50.0", "50.0"]
    assert "#2 softirq_hog 50.0 ms, hypervisor took 20 ms: missed" in said_text
    assert "nobody else saw it: 2026-01-02T03:04:05.678901Z 30 ms stuck_in_kernel" in said_text
    assert "Stalls told on other CPUs, not judged: 1" in said_text
    assert said_text.splitlines()[-1] == (
        "Goals: NOT reached: counted stalls: 2 of 3; recall: 50.0 %, goal 100 %; "
        "blame: 50.0 %, goal 99 %; function: 50.0 %, goal 99 %; verdict: 50.0 %, goal 97 %; "
        "possible false accusations: 1, goal 0"
    )


def test_all_goals_reached() -> None:
    """One stall, told rightly."""
    given = report(run([injected()], [said()]))
    assert given.missed_goals == []
    assert text(given).endswith("Goals: all reached")


def test_nothing_proves_nothing() -> None:
    """Without a single stall no goal is reached."""
    assert len(report(run([], [])).missed_goals) == 4
    assert text(report(run([], []))).splitlines()[-1].startswith("Goals: NOT reached")


@pytest.mark.parametrize("right", [96, 97])
def test_verdict_goal(right: int) -> None:
    """97 of 100 verdicts are enough."""
    stalls: list[Injected] = []
    told: list[Said] = []
    for n in range(100):
        stalls.append(injected(Kind.BH_OFF, 1000 + 70 * n, 1050 + 70 * n, number=n))
        verdict = "softirqs_disabled" if n < right else "unknown"
        told.append(said(1000 + 70 * n, 1050 + 70 * n, verdict=verdict))
    assert bool(report(run(stalls, told)).missed_goals) is (right < 97)


def test_what_could_not_be_made() -> None:
    """Kinds that this machine cannot make, failures and lost records are told."""
    given = run(
        [injected()],
        [said()],
        failed=["bh_off: did not run"] * 2,
        unsupported={Kind.IRQS_OFF_TIMER: "no such tracepoint"},
        stopped={"records_lost": 3, "records_undecodable": 0, "suppressed": 0},
    )
    said_text = text(report(given))
    assert "not made here: irqs_off_timer: no such tracepoint" in said_text
    assert "could not be made, 2 times: bh_off: did not run" in said_text
    assert "records_lost: 3" in said_text


def test_json() -> None:
    """Everything is there, with the whole lines."""
    given = json.loads(json.dumps(to_json(mixed())))
    assert given["figures"]["all"]["recall"] == {"part": 1, "whole": 2}
    assert given["confusion"]["softirq_hog"] == {"missed": 1}
    assert [stall["counted"] for stall in given["stalls"]] == [True, True, False]
    assert [entry["verdict"] for entry in given["stalls"][0]["lines"]] == ["softirqs_disabled"] * 2
    assert given["stalls"][1]["complaints"] == ["missed"]
    assert [entry["reason"] for entry in given["told"]] == ["unexplained"]


def test_quantiles() -> None:
    """Of a hundred numbers the 50th and the 99th; of one, that; of none, nothing."""
    assert spread([float(n) for n in range(100, 0, -1)]) == Spread(50.0, 99.0, 100.0)
    assert spread([3.0]) == Spread(3.0, 3.0, 3.0)
    assert spread([]) is None
    assert quantile([1.0, 2.0], 0.5) == 1.0
