"""Outcomes as text: a few lines on the terminal, and docs/support-matrix.md."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from stalld import __version__
from tests.vm.kernels import supported
from tests.vm.outcome import Case, Outcome

_KINDS = "tests.vm.guest_tests."
_LONGEST_REASON, _HEAD_LINES = 120, 2
_HEAD = """\
# Support matrix

Made by `make support-matrix` from a real run; do not edit. The kernels are those of
[tests/vm/kernels.toml](../tests/vm/kernels.toml), how they are run tells
[tests/vm/README.md](../tests/vm/README.md). Guests have two emulated CPUs: no PMU, and no
hypervisor that keeps a steal clock, which degrades the same two abilities on all of them and
says nothing about the kernels. Their prices are those of the emulation.
"""


def summary(outcome: Outcome) -> str:
    """For the terminal: what failed, and a line of figures."""
    lines = []
    for case in outcome.cases:
        if case.result != "passed":
            lines.append(f"    {case.result}: {case.name}: {case.reason}")
    if outcome.failed:
        lines.append(f"    {outcome.failed}")
    if outcome.check:
        lines.append(f"    check: {outcome.check['summary']}")
    counts = ", ".join(f"{outcome.count(r)} {r}" for r in ("passed", "failed", "skipped"))
    verdict = "good" if outcome.good else "NOT GOOD"
    lines.append(
        f"    {verdict}: {outcome.release or 'did not boot'}: {counts}; {outcome.wall_s:.0f} s, "
        f"of these check {outcome.check_s:.0f} s"
    )
    return "\n".join(lines)


def matrix(outcomes: Sequence[Outcome], suite: str) -> str:
    """The whole document, of a run of this suite, today."""
    order = [kernel.name for kernel in supported()]
    outcomes = sorted(outcomes, key=lambda outcome: order.index(outcome.name))
    others = _tests(outcomes, kinds=False)
    return "\n".join(
        [
            _HEAD,
            f"This run was of the suite `{suite}`, softirq-stalld {__version__}, "
            f"{datetime.now(UTC):%Y-%m-%d}.",
            "",
            *_kernels(outcomes),
            "",
            "## Abilities, as `softirq-stalld check` found them",
            "",
            *_abilities(outcomes),
            "",
            "## Stalls that were injected, as they were told",
            "",
            *_tests(outcomes, kinds=True),
            "",
            *(["## Other tests", "", *others] if len(others) > _HEAD_LINES else []),
            *_remarks(outcomes),
            "",
        ]
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        f"| {' | '.join(['---'] * len(head))} |",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def _kernels(outcomes: Sequence[Outcome]) -> list[str]:
    why = {kernel.name: kernel.why for kernel in supported()}
    rows = []
    for outcome in outcomes:
        check = outcome.check
        inline = {True: "inline", False: "deferred", None: "not seen"}
        rows.append(
            [
                outcome.release or outcome.name,
                why[outcome.name],
                check["verdict"] if check else outcome.failed or "no answer",
                inline[check["serves_inline"]] if check else "?",
                _detail(outcome, "preemption"),
                f"{outcome.count('passed')} / {outcome.count('failed')} / "
                f"{outcome.count('skipped')}",
                f"{outcome.wall_s:.0f} s" + (" (emulated)" if outcome.emulated else ""),
            ]
        )
    head = (
        *("kernel", "stands for", "check", "softirqs while ksoftirqd waits", "preemption"),
        *("tests passed / failed / skipped", "time"),
    )
    return _table(head, rows)


def _items(outcome: Outcome) -> dict[str, dict[str, str]]:
    return {item["name"]: item for item in (outcome.check or {"items": []})["items"]}


def _detail(outcome: Outcome, name: str) -> str:
    return _items(outcome).get(name, {}).get("detail", "?").replace("|", "/")


def _abilities(outcomes: Sequence[Outcome]) -> list[str]:
    names: dict[str, None] = {}
    for outcome in outcomes:
        names |= dict.fromkeys(_items(outcome))
    # Those have a column in the first table.
    names = {n: None for n in names if n not in ("kernel", "preemption")}
    rows = []
    for name in names:
        states = [_items(outcome).get(name, {}).get("state", "-") for outcome in outcomes]
        if name == "net_rx_action":
            states = [_detail(outcome, name) for outcome in outcomes]
        rows.append([name, *states])
    return _table(["ability", *(o.release or o.name for o in outcomes)], rows)


def _tests(outcomes: Sequence[Outcome], *, kinds: bool) -> list[str]:
    found: dict[str, dict[str, Case]] = {}
    for outcome in outcomes:
        for case in outcome.cases:
            if case.name.startswith(_KINDS) is kinds:
                name = case.name if kinds else _group(case)
                before = found.setdefault(name, {}).get(outcome.name)
                found[name][outcome.name] = case if before is None else _worse(before, case)
    rows = []
    for name, cases in found.items():
        told = [cases[o.name].result if o.name in cases else "-" for o in outcomes]
        rows.append([f"`{name.removeprefix(_KINDS)}`", *told])
    return _table(["test", *(o.release or o.name for o in outcomes)], rows)


def _group(case: Case) -> str:
    """Unit tests by their file: there are hundreds."""
    return case.name.partition("::")[0] if ".unit." in case.name else case.name


def _worse(one: Case, other: Case) -> Case:
    order = (
        ("failed", "skipped", "passed")
        if ".unit." not in one.name
        else ("failed", "passed", "skipped")
    )
    return min(one, other, key=lambda case: order.index(case.result))


def _first_words(reason: str) -> str:
    """Without the data that an assertion shows, which is of one machine."""
    return reason.partition("; ")[0][:_LONGEST_REASON]


def _remarks(outcomes: Sequence[Outcome]) -> list[str]:
    """Why something degrades, was skipped or failed."""
    lines = ["", "## Remarks", ""]
    for outcome in outcomes:
        said = [
            f"{item['name']}: {item['detail']}; {item['effect']}"
            for item in _items(outcome).values()
            if item["state"] != "ok"
        ]
        said += [
            f"`{case.name.removeprefix('tests.')}` {case.result}: {_first_words(case.reason)}"
            for case in outcome.cases
            if case.result != "passed"
        ]
        lines += [f"- {outcome.release or outcome.name}", *(f"  - {text}" for text in said)]
    return lines
