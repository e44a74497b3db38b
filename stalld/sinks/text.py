"""Events for people at a terminal. Nothing a task is called can control it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TOP_FRAMES = 8


def safe(value: object) -> str:
    """Printable text: control and formatting characters stand as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))


def render(event: Mapping[str, Any]) -> str:
    """One event as one or more lines, without the last newline."""
    head = f"{event['timestamp']} {event['level']:<7} {event['event']}"
    if event["event"] != "stall":
        rest = " ".join(
            f"{key}={safe(value)}"
            for key, value in event.items()
            if key not in ("timestamp", "level", "event", "schema", "host")
        )
        return f"{head} {rest}".rstrip()
    return "\n".join([head + _summary(event), *_details(event)])


def _summary(event: Mapping[str, Any]) -> str:
    starved = ", ".join(f"{vec} {ms:.1f} ms" for vec, ms in event["starved"].items())
    grows = "" if event["phase"] == "resolved" else " so far"
    return (
        f" cpu {event['cpu']}: {event['duration_ms']:.1f} ms{grows}, {event['verdict']}; "
        f"starved: {starved or 'nothing'}"
    )


def _details(event: Mapping[str, Any]) -> list[str]:
    lines = []
    blocker, ksoftirqd = event["blocker"], event["ksoftirqd"]
    if blocker:
        lines.append(
            f"    {safe(blocker['comm'])} pid {blocker['pid']} tid {blocker['tid']} "
            f"in {blocker['mode'] or 'unknown'} mode, policy {blocker['policy']}"
        )
    if ksoftirqd:
        lines.append(
            f"    ksoftirqd pid {ksoftirqd['pid']} waited {ksoftirqd['runnable_ms']:.1f} ms"
        )
    frames = event["stack"]["kernel"]
    lines += [f"      {safe(frame)}" for frame in frames[:TOP_FRAMES]]
    if len(frames) > TOP_FRAMES:
        lines.append(f"      … {len(frames) - TOP_FRAMES} more")
    return lines
