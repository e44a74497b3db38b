"""A run as text for people and as one object for programs. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from bench.fidelity.judge import Judgement, complaints, judge
from bench.fidelity.metrics import MISSED, Figures, Share, Spread, by_kind, figures
from bench.fidelity.precision import Reason, Standing, stand, to_read
from bench.fidelity.truth import EXPECTED, Run, Said
from stalld.track.verdict import Verdict

GOALS = {"recall": 100.0, "blame": 99.0, "function": 99.0, "verdict": 97.0}
"""Percent of the counted stalls."""
_FRAMES_SHOWN = 4
_COLUMNS = (*(verdict.value for verdict in Verdict), MISSED)
_METRICS = (
    *("kind", "injected", "counted", "recall", "blame", "verdict", "function"),
    *("split", "hasty", "error p50", "p99", "max", "line p50", "p99", "max", "during", "steal"),
)


class Report(NamedTuple):
    """A judged run."""

    run: Run
    judged: list[Judgement]
    standings: list[Standing]

    @property
    def figures(self) -> Figures:
        """Of all kinds together."""
        return figures(self.run.injected, self.judged)

    @property
    def precision(self) -> Share:
        """Share of the stalls told on the stalled CPU that someone else saw as well."""
        believed = sum(one.reason is not Reason.NONE for one in self.standings)
        return Share(believed, len(self.standings))

    @property
    def missed_goals(self) -> list[str]:
        """What was not reached, one line each."""
        missed = []
        if len(self.judged) < self.run.wanted:
            missed.append(f"counted stalls: {len(self.judged)} of {self.run.wanted}")
        for name, goal in GOALS.items():
            share: Share = getattr(self.figures, name)
            if name == "function" and self.judged and not share.whole:
                continue  # Of none of these kinds can it be in the stack.
            if not share.reaches(goal):
                missed.append(f"{name}: {_percent(share)} %, goal {goal:g} %")
        if wrong := to_read(self.standings):
            missed.append(f"possible false accusations: {len(wrong)}, goal 0")
        return missed


def report(run: Run) -> Report:
    """Judge a run."""
    judged = judge(run)
    return Report(run, judged, stand(run, judged))


def text(given: Report) -> str:
    """All tables and every miss."""
    parts = (_head, _confusion, _metrics, _precision, _misses, _goals)
    return "\n\n".join("\n".join(part(given)) for part in parts)


def _head(given: Report) -> Iterator[str]:
    run = given.run
    kinds = {one.truth.kind for one in run.injected}
    yield (
        f"Linux {run.started['kernel']}, tick {run.started['tick_ms']:g} ms, threshold "
        f"{run.threshold_ms:g} ms, CPU {run.cpu}, seed {run.seed}: {len(run.injected)} stalls of "
        f"{len(kinds)} kinds in {run.span.length_ns / 1e9:.0f} s, {len(given.judged)} counted "
        f"({run.wanted} wanted)"
    )
    for count in ("records_lost", "records_undecodable", "suppressed"):
        if run.stopped[count]:
            yield f"{count}: {run.stopped[count]}"
    for kind, reason in run.unsupported.items():
        yield f"not made here: {kind}: {reason}"
    for message, times in Counter(run.failed).items():
        yield f"could not be made, {times} times: {message}"


def _confusion(given: Report) -> Iterator[str]:
    yield "Verdicts given to the counted stalls of each kind; the right one in brackets"
    rows: list[Sequence[str]] = [("kind", *_COLUMNS)]
    for kind, (_, counts) in by_kind(given.run.injected, given.judged).items():
        right = EXPECTED[kind].value
        cells = (f"[{counts[c]}]" if c == right else f"{counts[c] or '.'}" for c in _COLUMNS)
        rows.append((kind.value, *cells))
    yield from _table(rows)


def _metrics(given: Report) -> Iterator[str]:
    yield "Percent of the counted stalls; times in ms"
    rows: list[Sequence[str]] = [_METRICS]
    for kind, (kinds, _) in by_kind(given.run.injected, given.judged).items():
        rows.append(_row(kind.value, kinds))
    rows.append(_row("all", given.figures))
    yield from _table(rows)


def _row(name: str, of: Figures) -> tuple[str, ...]:
    return (
        name,
        *(str(of.injected), str(of.counted)),
        *(_percent(share) for share in (of.recall, of.blame, of.verdict, of.function)),
        *(str(of.split), str(of.hasty)),
        *(*_spread(of.duration_error_ms), *_spread(of.first_line_ms)),
        *(_percent(of.during), f"{of.steal_ms:g}"),
    )


def _percent(share: Share) -> str:
    return "-" if share.percent is None else f"{share.percent:.1f}"


def _spread(given: Spread | None) -> list[str]:
    return ["-"] * len(Spread._fields) if given is None else [f"{n:.2f}" for n in given]


def _precision(given: Report) -> Iterator[str]:
    counts = Counter(one.reason for one in given.standings)
    told = ", ".join(f"{counts[reason]} {reason}" for reason in Reason)
    share = given.precision
    yield f"Stalls told on CPU {given.run.cpu}: {told}; precision {_percent(share)} %"
    elsewhere = sum(one.resolved["cpu"] != given.run.cpu for one in given.run.said)
    yield f"Stalls told on other CPUs, not judged: {elsewhere}"
    for one in to_read(given.standings):
        why = "nobody else saw it" if one.reason is Reason.NONE else "another was injected"
        beside = f", beside #{one.stall.number} {one.stall.truth.kind}" if one.stall else ""
        yield f"  {why}{beside}: {_brief(one.said)}"


def _misses(given: Report) -> Iterator[str]:
    wrong = [(one, list(complaints(one))) for one in given.judged]
    wrong = [(one, what) for one, what in wrong if what]
    yield f"Not as it should be: {len(wrong)} of {len(given.judged)}"
    for one, what in wrong:
        stall = one.stall
        yield (
            f"  #{stall.number} {stall.truth.kind} {stall.truth.duration_ms:.1f} ms, "
            f"hypervisor took {stall.steal_ms:g} ms: {'; '.join(what)}"
        )
        if one.said is not None:
            yield f"      {_brief(one.said)}"


def _goals(given: Report) -> Iterator[str]:
    missed = given.missed_goals
    yield "Goals: " + ("NOT reached: " + "; ".join(missed) if missed else "all reached")


def _brief(said: Said) -> str:
    """What the daemon said and on what evidence."""
    line = said.resolved
    evidence, stack, blocker = line["evidence"], line["stack"], line["blocker"]
    starved = ", ".join(f"{vec} {ms:g}" for vec, ms in line["starved"].items()) or "nothing"
    waited = f", ksoftirqd waited {line['ksoftirqd']['runnable_ms']:g}" if line["ksoftirqd"] else ""
    who = f"{blocker['comm']} ({blocker['tid']}, {blocker['mode']})" if blocker else "nobody"
    return (
        f"{line['started_at']} {line['duration_ms']:g} ms {line['verdict']}, blocker {who}; "
        f"starved {starved}{waited}; {evidence['samples']} of {evidence['expected']} samples, "
        f"{evidence['switches']} switches, ended by {evidence['ended']}; "
        f"stack {stack['captured']}: {' < '.join(stack['kernel'][:_FRAMES_SHOWN]) or 'none'}"
    )


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        yield "  ".join([first.ljust(widths[0]), *cells]).rstrip()


def to_json(given: Report) -> dict[str, Any]:
    """Everything: figures, every stall with what was said about it, all that was told besides."""
    run = given.run
    judged = {one.stall.number: one for one in given.judged}
    kinds = by_kind(run.injected, given.judged)
    return {
        "seed": run.seed,
        "wanted": run.wanted,
        "cpu": run.cpu,
        "threshold_ms": run.threshold_ms,
        "started": run.started,
        "stopped": run.stopped,
        "figures": {
            "all": _plain(given.figures),
            **{kind.value: _plain(of) for kind, (of, _) in kinds.items()},
        },
        "confusion": {kind.value: dict(counts) for kind, (_, counts) in kinds.items()},
        "precision": _plain(given.precision),
        "missed_goals": given.missed_goals,
        "unsupported": {kind.value: why for kind, why in run.unsupported.items()},
        "failed": list(run.failed),
        "stalls": [
            {
                "number": stall.number,
                "truth": stall.truth._asdict(),
                "ksoftirqd_waits": [wait._asdict() for wait in stall.waits],
                "steal_ms": stall.steal_ms,
                **_judgement(judged.get(stall.number)),
            }
            for stall in run.injected
        ],
        "told": [
            {
                "reason": one.reason.value,
                "accused": one.accused,
                "beside": one.stall.number if one.stall else None,
                "resolved": one.said.resolved,
            }
            for one in given.standings
            if one.reason is not Reason.COUNTED
        ],
    }


def _judgement(one: Judgement | None) -> dict[str, Any]:
    if one is None:
        return {"counted": False}
    return {
        "counted": True,
        "reference": one.reference._asdict(),
        "complaints": list(complaints(one)),
        "duration_error_ms": one.duration_error_ms,
        "first_line_ms": one.first_line_ms,
        "lines": [*one.said.ongoing, one.said.resolved] if one.said else [],
    }


def _plain(given: Any) -> Any:
    """Named tuples as objects."""
    if hasattr(given, "_asdict"):
        return {key: _plain(value) for key, value in given._asdict().items()}
    return given
