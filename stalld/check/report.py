"""What ``check`` found, as data, as JSON and for people. Pure."""

from __future__ import annotations

import enum
import json
import textwrap
from dataclasses import asdict, dataclass

from stalld.sinks.text import escaped, safe

SCHEMA = "softirq-stalld-check/1"
_COLUMNS = 110


class State(enum.StrEnum):
    """How far this host has an ability."""

    OK = "ok"
    DEGRADED = "degraded"
    MISSING = "missing"


@dataclass(frozen=True)
class Item:
    """One ability of this host.

    Attributes:
        name: the ability.
        state: whether it is there.
        detail: what was found.
        effect: what that means for detection; "" where nothing follows.
        remedy: what to do about it; "" where there is nothing to do.
        required: when it is missing, the service cannot run.
    """

    name: str
    state: State
    detail: str
    effect: str = ""
    remedy: str = ""
    required: bool = False


@dataclass(frozen=True)
class Report:
    """All items, causes before what follows from them.

    Attributes:
        kernel: release of the running kernel.
        serves_inline: softirqs run while ksoftirqd is runnable; None: not observed.
    """

    version: str
    kernel: str
    items: tuple[Item, ...]
    serves_inline: bool | None = None

    @property
    def blockers(self) -> list[Item]:
        """What the service cannot do without and does not have."""
        return [item for item in self.items if item.required and item.state is State.MISSING]

    @property
    def can_run(self) -> bool:
        """Whether the service can run, fully or degraded."""
        return not self.blockers

    @property
    def verdict(self) -> str:
        """``full``, ``degraded`` or ``cannot run``."""
        if self.blockers:
            return "cannot run"
        return "full" if all(item.state is State.OK for item in self.items) else "degraded"

    @property
    def summary(self) -> str:
        """The verdict in one line, with the reasons."""
        if self.blockers:
            # The first blocker is the cause of the ones after it.
            return f"cannot run: {_with_remedy(self.blockers[0])}"
        less = [f"{i.name} ({i.state})" for i in self.items if i.state is not State.OK]
        return f"degraded: {', '.join(less)}" if less else "full"

    def to_json(self) -> str:
        """One object on one line."""
        report = json.dumps(
            {
                "schema": SCHEMA,
                "version": self.version,
                "kernel": self.kernel,
                "verdict": self.verdict,
                "can_run": self.can_run,
                "summary": self.summary,
                "serves_inline": self.serves_inline,
                "items": [asdict(item) for item in self.items],
            }
        )
        return escaped(report.encode()).decode()


def _with_remedy(item: Item) -> str:
    first = item.detail.partition("\n")[0]
    # Errors carry their remedy; items that were only looked up do not.
    return f"{first}; {item.remedy}" if item.remedy and item.remedy not in first else first


def render(report: Report) -> str:
    """An aligned table; the last line is the verdict.

    What is not ``ok`` is followed by what to do.
    """
    width = max((len(item.name) for item in report.items), default=0)
    margin = " " * (len(State.DEGRADED) + width + 4)
    lines = [f"softirq-stalld {report.version} on Linux {report.kernel}", ""]
    for item in report.items:
        lines += _wrapped(item.detail, f"{item.state:<8}  {item.name:<{width}}  ", margin)
        if item.effect:
            lines += _wrapped(item.effect, f"{margin}means: ", f"{margin}       ")
        if item.remedy and item.state is not State.OK:
            lines += _wrapped(item.remedy, f"{margin}do:    ", f"{margin}       ")
    return "\n".join([*lines, "", safe(report.summary)])


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    # Names of devices, for one, are anybody's choice.
    printable = [safe(line.expandtabs()) for line in text.split("\n")]
    if len(printable) > 1:
        # What a compiler or the verifier said stays as it is.
        return [f"{lead}{line}" for lead, line in _led(printable, first, rest)]
    return textwrap.wrap(
        printable[0],
        max(_COLUMNS, len(rest) + 40),
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [first.rstrip()]


def _led(lines: list[str], first: str, rest: str) -> list[tuple[str, str]]:
    return [(rest if number else first, line) for number, line in enumerate(lines)]
