"""Events as lines for people. Pure.

An event may be anything: what is missing or of another type is left out. Its strings must be
:func:`clean`.
"""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Mapping
from datetime import datetime, tzinfo
from typing import Any, NamedTuple

from stalld.sinks.text import TOP_QUEUES, safe

TOP_FRAMES = 6
TEXT_LINES = 3
MAX_TEXT = 1000
_LABEL = 11
_INDENT = 2

_VERDICTS = {
    "stuck_in_kernel": "a task stayed in the kernel",
    "softirqs_disabled": "softirqs were disabled",
    "irqs_disabled": "interrupts were disabled",
    "softirq_hog": "one softirq handler ran on",
    "cpu_contention": "other tasks had the CPU",
    "vcpu_preempted": "the hypervisor took the CPU",
    "unknown": "cause unknown",
}
_MODES = {"kernel": "in the kernel", "user": "in user code", "idle": "idle"}
_SGR = {"bold": "1", "dim": "2", "red": "1;31", "yellow": "1;33", "green": "32", "cyan": "36"}
_LEVELS = {"error": "red", "warning": "yellow"}


class Span(NamedTuple):
    """Text in one style; "" is plain."""

    text: str
    style: str = ""


Line = tuple[Span, ...]


def clean(value: Any) -> Any:
    """The same with all strings made safe for a terminal."""
    if isinstance(value, str):
        return safe(value)
    if isinstance(value, list):
        return [clean(item) for item in value]
    if isinstance(value, dict):
        return {safe(key): clean(item) for key, item in value.items()}
    return value


def columns(text: str) -> int:
    """How many columns of a terminal printable text takes."""
    if text.isascii():
        return len(text)
    return sum(_columns(c) for c in text)


def _columns(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def fit(line: Line, width: int) -> Line:
    """The line, cut to ``width`` columns; what is cut ends in an ellipsis."""
    # However long it is, no more than that can be seen: combining characters take no column.
    line = tuple(Span(text[: 4 * width + 1], style) for text, style in line)
    if sum(columns(span.text) for span in line) <= width:
        return line
    left = width - 1
    kept: list[Span] = []
    for text, style in line:
        taken = ""
        for character in text:
            left -= _columns(character)
            if left < 0:
                break
            taken += character
        kept.append(Span(taken, style))
        if left < 0:
            break
    return (*kept, Span("…"))


def paint(line: Line, *, colour: bool) -> str:
    """The line as a terminal takes it."""
    if not colour:
        return "".join(span.text for span in line)
    return "".join(
        f"\x1b[{_SGR[style]}m{text}\x1b[0m" if style and text else text for text, style in line
    )


def moment(event: Mapping[str, Any], zone: tzinfo | None) -> datetime | None:
    """When it was: a stall's begin, else when it was written. ``zone`` None: the local one."""
    key = "started_at" if event.get("event") == "stall" else "timestamp"
    return when(event.get(key), zone)


def when(text: Any, zone: tzinfo | None) -> datetime | None:
    """A time of the contract; None: it is none."""
    try:
        return datetime.fromisoformat(text).astimezone(zone)
    except (TypeError, ValueError, OverflowError):
        return None


def event_lines(
    event: Mapping[str, Any],
    *,
    width: int,
    zone: tzinfo | None = None,
    so_far_ms: float | None = None,
) -> list[Line]:
    """All lines of one event, each at most ``width`` columns.

    Args:
        so_far_ms: how long an ongoing stall has lasted by now; None: as long as the event says.
    """
    if event.get("event") == "stall":
        lines = [_head(event, zone, so_far_ms), *_details(event, width)]
    else:
        lines = _other_event(event, width, zone)
    return [fit(line, width) for line in lines]


def short_id(stall_id: Any) -> str:
    """Of a stall id what tells stalls of one run apart: ``#CPU-NUMBER``."""
    return "#" + "-".join(_text(stall_id).split("-")[-2:]) if stall_id else ""


def duration(ms: float) -> str:
    """For people."""
    return f"{ms:.1f} ms" if ms < 10_000 else f"{ms / 1000:.1f} s"


def _head(event: Mapping[str, Any], zone: tzinfo | None, so_far_ms: float | None) -> Line:
    ongoing = event.get("phase") == "ongoing"
    ms = _number(event.get("duration_ms")) if so_far_ms is None else so_far_ms
    verdict = _text(event.get("verdict"))
    return (
        *_when(event, zone),
        Span(f"cpu {_text(event.get('cpu'))}", "bold"),
        Span("  "),
        Span(duration(ms) + (" so far" if ongoing else ""), _level(event)),
        Span("  "),
        Span(_VERDICTS.get(verdict, verdict.replace("_", " ")), "bold"),
        Span(f"  {short_id(event.get('stall_id'))}", "dim"),
    )


def _details(event: Mapping[str, Any], width: int) -> list[Line]:
    blocker = _map(event.get("blocker"))
    stack = _map(event.get("stack"))
    starved = _map(event.get("starved"))
    told = ", ".join(f"{vec} {duration(_number(wait))}" for vec, wait in starved.items())
    lines = [_row("starved", told or "nothing")]
    lines += _blocker(blocker) if blocker else [_row("blocker", "no task")]
    lines += [_row("waited", text) for text in _waits(event)]
    lines += [_row("also", text) for text in _also(event)]
    frames = [_text(frame) for frame in _list(stack.get("kernel"))]
    after = "  (when it was over)" if stack.get("captured") == "after" else ""
    for number, frame in enumerate(frames[:TOP_FRAMES]):
        label = "" if number else "stack"
        lines.append((*_label(label), Span(frame, "cyan"), Span("" if number else after, "dim")))
    if len(frames) > TOP_FRAMES:
        lines.append(_row("", f"… {len(frames) - TOP_FRAMES} more", "dim"))
    lines += [_row("net", text) for text in _network(_map(event.get("net")))]
    hint = _text(event.get("hint"))[:MAX_TEXT]
    folded = textwrap.wrap(
        hint, max(width - _INDENT - _LABEL, 20), max_lines=TEXT_LINES, placeholder=" …"
    )
    lines += [_row("" if number else "hint", text) for number, text in enumerate(folded)]
    return lines


def _blocker(blocker: Mapping[str, Any]) -> list[Line]:
    pid, tid = blocker.get("pid"), blocker.get("tid")
    mode = _text(blocker.get("mode"))
    parts = [
        f"pid {_text(pid)}" + (f" tid {_text(tid)}" if tid != pid else ""),
        _MODES.get(mode, f"in a {mode}" if mode else ""),
        _priority(blocker),
    ]
    rest = "".join(f", {part}" for part in parts if part)
    lines: list[Line] = [(*_label("blocker"), Span(_text(blocker.get("comm")), "bold"), Span(rest))]
    container, pod, unit = (_text(blocker.get(k)) for k in ("container_id", "pod_uid", "unit"))
    if container:
        lines.append(_row("container", container[:12] + (f", pod {pod}" if pod else "")))
    elif pod:
        lines.append(_row("pod", pod))
    if unit and not container:
        lines.append(_row("unit", unit))
    if blocker.get("cmdline"):
        lines.append(_row("command", _text(blocker["cmdline"])))
    call, file = _text(blocker.get("syscall")), _text(blocker.get("file"))
    if call:
        lines.append(_row("call", f"{call}()" + (f" on {file}" if file else "")))
    return lines


def _priority(blocker: Mapping[str, Any]) -> str:
    policy = _text(blocker.get("policy"))
    if blocker.get("rt_priority") is not None:
        return f"policy {policy} {_text(blocker['rt_priority'])}"
    nice = blocker.get("nice")
    return (f"policy {policy}" if policy else "") + (f" nice {_text(nice)}" if nice else "")


def _waits(event: Mapping[str, Any]) -> list[str]:
    ksoftirqd = _map(event.get("ksoftirqd"))
    threads: list[Mapping[str, Any]] = []
    if ksoftirqd:
        threads.append({**ksoftirqd, "comm": "ksoftirqd"})
    threads += [_map(thread) for thread in _list(event.get("waiting"))]
    return [
        f"{_text(t.get('comm')) or 'a thread'}, pid {_text(t.get('pid'))}, "
        f"{duration(_number(t.get('runnable_ms')))} for the CPU"
        for t in threads
    ]


def _also(event: Mapping[str, Any]) -> list[str]:
    told = []
    handler, evidence = _map(event.get("handler")), _map(event.get("evidence"))
    if handler:
        device = _text(handler.get("device"))
        told.append(
            f"the {_text(handler.get('vector'))} handler ran "
            f"{duration(_number(handler.get('service_ms')))}"
            + (f", polling {device}" if device else "")
        )
    if _number(evidence.get("late_ms")):
        told.append(f"the timer interrupt came {duration(_number(evidence['late_ms']))} late")
    if _number(evidence.get("stolen_ms")) >= 1:
        told.append(f"the hypervisor took {duration(_number(evidence['stolen_ms']))}")
    return told


def _network(net: Mapping[str, Any]) -> list[str]:
    """What became of packets, and which queues the CPU serves; nothing where neither is known."""
    told = []
    if _number(net.get("dropped")):
        told.append(f"{_text(net['dropped'])} packets dropped")
    if _number(net.get("time_squeeze")):
        told.append(f"budget used up {_text(net['time_squeeze'])} times")
    queues = dict.fromkeys(_queue(_map(queue)) for queue in _list(net.get("queues")))
    if queues:
        more = [f"{len(queues) - TOP_QUEUES} more"] if len(queues) > TOP_QUEUES else []
        told.append(f"serves {', '.join([*list(queues)[:TOP_QUEUES], *more])}")
    return ["; ".join(told)] if told else []


def _queue(queue: Mapping[str, Any]) -> str:
    number = _text(queue.get("queue"))
    return (
        _text(queue.get("device"))
        + (f" rx queue {number}" if number else "")
        + (" (RPS)" if queue.get("rps") else "")
    )


def _other_event(event: Mapping[str, Any], width: int, zone: tzinfo | None) -> list[Line]:
    """One line, folded where it is too long: nobody draws over it, and reasons are for reading."""
    kind = _text(event.get("event"))
    told = {
        "started": _started,
        "stopped": _stopped,
        "suppressed": _suppressed,
        "records_lost": _records_lost,
        "degraded": _degraded,
        "softnet": _softnet,
        "nic": _nic,
    }.get(kind, _other)(event)
    head: Line = (*_when(event, zone), Span(kind, _level(event) or "bold"), Span("  "))
    first, *more = textwrap.wrap(
        told[:MAX_TEXT],
        max(width, 40),
        initial_indent=" " * sum(columns(span.text) for span in head),
        subsequent_indent=" " * (_INDENT + _LABEL),
        max_lines=TEXT_LINES,
        placeholder=" …",
    ) or [""]
    return [(*head, Span(first.lstrip())), *((Span(line),) for line in more)]


def _started(event: Mapping[str, Any]) -> str:
    missing = _list(event.get("missing"))
    lacks = ", ".join(_text(_map(item).get("ability")) for item in missing)
    return (
        f"softirq-stalld {_text(event.get('version'))} on {_text(event.get('host'))}, "
        f"Linux {_text(event.get('kernel'))}, "
        f"threshold {_number(event.get('threshold_ms')):g} ms"
        + (f"; does without: {lacks}" if lacks else "")
    )


def _stopped(event: Mapping[str, Any]) -> str:
    return (
        f"after {_number(event.get('uptime_ms')) / 1000:.1f} s, {_text(event.get('stalls'))} "
        f"stalls, {_text(event.get('records_lost'))} records lost"
    )


def _suppressed(event: Mapping[str, Any]) -> str:
    cpus = ", ".join(_text(cpu) for cpu in _list(event.get("cpus")))
    comm = _text(_map(event.get("blocker")).get("comm"))
    like = short_id(event.get("like"))
    return (
        f"cpu {cpus}: {_text(event.get('count'))} more stalls"
        + (f" of {comm}" if comm else "")
        + (f" like {like}" if like else "")
        + f", {duration(_number(event.get('total_ms')))} in all ({_text(event.get('reason'))})"
    )


def _softnet(event: Mapping[str, Any]) -> str:
    return (
        f"cpu {_text(event.get('cpu'))}: {_text(event.get('dropped'))} packets dropped, budget "
        f"used up {_text(event.get('time_squeeze'))} times{_episode(event)}"
    )


def _nic(event: Mapping[str, Any]) -> str:
    queues = [_map(queue) for queue in _list(event.get("queues"))[:TOP_QUEUES]]
    told = ", ".join(f"{_text(q.get('counter'))} {_text(q.get('drops'))}" for q in queues)
    return (
        f"{_text(event.get('device'))}: {_text(event.get('drops'))} packets dropped"
        + (f", {told}" if told else "")
        + _episode(event)
    )


def _episode(event: Mapping[str, Any]) -> str:
    return f" ({_text(event.get('phase'))}; {_text(event.get('packets'))} received)"


def _records_lost(event: Mapping[str, Any]) -> str:
    return f"cpu {_text(event.get('cpu'))}: the kernel had no room for {_text(event.get('count'))}"


def _degraded(event: Mapping[str, Any]) -> str:
    if event.get("state") == "gap":
        return (
            f"{_text(event.get('dropped'))} events are missing here: "
            f"{_text(event.get('name'))}: {_text(event.get('reason'))}"
        )
    over = "over: " if event.get("state") == "ended" else ""
    return f"{over}{_text(event.get('name'))}: {_text(event.get('reason'))}"


def _other(event: Mapping[str, Any]) -> str:
    common = ("timestamp", "level", "event", "schema", "host")
    return " ".join(f"{key}={value}" for key, value in event.items() if key not in common)


def _when(event: Mapping[str, Any], zone: tzinfo | None) -> Line:
    at = moment(event, zone)
    text = at.isoformat(timespec="milliseconds")[11:23] if at else "--:--:--.---"
    return (Span(text, "dim"), Span("  "))


def _level(event: Mapping[str, Any]) -> str:
    level = event.get("level")
    return _LEVELS.get(level, "") if isinstance(level, str) else ""


def _label(label: str) -> Line:
    return (Span(" " * _INDENT + label.ljust(_LABEL), "dim"),)


def _row(label: str, text: str, style: str = "") -> Line:
    return (*_label(label), Span(text, style))


def _text(value: Any) -> str:
    if value is None or isinstance(value, dict | list):
        return ""
    return str(value)


def _number(value: Any) -> float:
    return value if type(value) in (int, float) else 0.0


def _map(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
