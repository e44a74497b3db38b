"""Events for people at a terminal. Nothing a task is called can control it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TOP_FRAMES = 8
TOP_QUEUES = 4


def safe(value: object) -> str:
    """Printable text: control and formatting characters stand as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))


def escaped(line: bytes) -> bytes:
    """JSON in which what terminals obey stands as JSON's own escapes: it means the same.

    In JSON without white space only strings can hold any.
    """
    # String by string: few hold any, and to go through all characters takes milliseconds.
    strings = line.decode("utf-8", "replace").split('"')
    return '"'.join(s if s.isprintable() else _units(s) for s in strings).encode()


def _units(text: str) -> str:
    return "".join(c if c.isprintable() else _unit(c) for c in text)


def _unit(character: str) -> str:
    units = character.encode("utf-16-be")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))


def render(event: Mapping[str, Any]) -> str:
    """One event as one or more lines, without the last newline."""
    head = f"{event['timestamp']} {event['level']:<7} {event['event']}"
    if event["event"] == "stall":
        return "\n".join([head + _summary(event), *_details(event)])
    if event["event"] in ("softnet", "nic"):
        of = _softnet(event) if event["event"] == "softnet" else _nic(event)
        return "\n".join([head + of, *_hint(event)])
    if event["event"] == "suppressed":
        return "\n".join([head + _suppressed(event), *_frames(event["stack"])])
    rest = " ".join(
        f"{key}={safe(value)}"
        for key, value in event.items()
        if key not in ("timestamp", "level", "event", "schema", "host")
    )
    return f"{head} {rest}".rstrip()


def _summary(event: Mapping[str, Any]) -> str:
    starved = ", ".join(f"{vec} {ms:.1f} ms" for vec, ms in event["starved"].items())
    grows = "" if event["phase"] == "resolved" else " so far"
    return (
        f" cpu {event['cpu']}: {event['duration_ms']:.1f} ms{grows}, {event['verdict']}; "
        f"starved: {starved or 'nothing'}"
    )


def _suppressed(event: Mapping[str, Any]) -> str:
    cpus = ", ".join(map(str, event["cpus"]))
    whose = f" of {safe(event['blocker']['comm'])}" if event["blocker"] else ""
    return (
        f" cpu {cpus}: {event['count']} more stalls{whose}, {event['total_ms']:.1f} ms in all "
        f"({event['reason']})"
    )


def _softnet(event: Mapping[str, Any]) -> str:
    return (
        f" cpu {event['cpu']}: {event['dropped']} packets dropped, budget used up "
        f"{event['time_squeeze']} times ({event['phase']}; {event['packets']} packets since "
        f"{event['since']})"
    )


def _nic(event: Mapping[str, Any]) -> str:
    queues = ", ".join(
        f"{safe(queue['counter'])} {queue['drops']}" for queue in event["queues"][:TOP_QUEUES]
    )
    return (
        f" {safe(event['device'])}: {event['drops']} packets dropped"
        + (f" ({queues})" if queues else "")
        + f" ({event['phase']}; {event['packets']} packets since {event['since']})"
    )


def _network(net: Mapping[str, Any]) -> list[str]:
    """What its packets had to suffer, and where they come from; nothing where none came."""
    told = [f"{net['dropped']} packets dropped"] if net["dropped"] else []
    if net["time_squeeze"]:
        told.append(f"budget used up {net['time_squeeze']} times")
    places = dict.fromkeys(_queue(queue) for queue in net["queues"] or ())
    if places:
        shown = [safe(place) for place in places][:TOP_QUEUES]
        more = [f"{len(places) - TOP_QUEUES} more"] if len(places) > TOP_QUEUES else []
        told.append(f"it serves {', '.join([*shown, *more])}")
    return [f"    network: {'; '.join(told)}"] if told else []


def _queue(queue: Mapping[str, Any]) -> str:
    number = "" if queue["queue"] is None else f" rx queue {queue['queue']}"
    return f"{queue['device']}{number}{' (RPS)' if queue['rps'] else ''}"


def _hint(event: Mapping[str, Any]) -> list[str]:
    return [f"    hint: {safe(event['hint'])}"] if event["hint"] else []


def _details(event: Mapping[str, Any]) -> list[str]:
    lines = []
    blocker, handler, evidence = event["blocker"], event["handler"], event["evidence"]
    if blocker:
        priority = f" {blocker['rt_priority']}" if blocker["rt_priority"] is not None else ""
        lines.append(
            f"    {safe(blocker['comm'])} pid {blocker['pid']} tid {blocker['tid']} "
            f"in {blocker['mode'] or 'unknown'} mode, policy {blocker['policy']}{priority}"
        )
        lines += [f"    {safe(line)}" for line in _who(blocker) if line]
    waiting = [{"comm": "ksoftirqd", **event["ksoftirqd"]}] if event["ksoftirqd"] else []
    for thread in (*waiting, *event["waiting"]):
        whose = f"{safe(thread['comm'] or 'a thread')} pid {thread['pid']}"
        lines.append(f"    {whose} waited {thread['runnable_ms']:.1f} ms")
    if handler:
        device = f", polling {safe(handler['device'])}" if handler["device"] else ""
        lines.append(
            f"    the {handler['vector']} handler ran {handler['service_ms']:.1f} ms{device}"
        )
    if evidence["late_ms"]:
        lines.append(f"    the timer interrupt came {evidence['late_ms']:.1f} ms late")
    if evidence["stolen_ms"] and evidence["stolen_ms"] >= 1:
        lines.append(f"    the hypervisor took {evidence['stolen_ms']:.1f} ms")
    lines += _frames(event["stack"]["kernel"], " (after)" * (event["stack"]["captured"] == "after"))
    return lines + _network(event["net"]) + _hint(event)


def _who(blocker: Mapping[str, Any]) -> list[str]:
    """Where it belongs, what it was called with, what it does: as far as that is known."""
    container = blocker.get("container_id")
    places = {
        "unit": blocker.get("unit"),
        "container": container and f"{blocker.get('runtime') or ''} {container}".lstrip(),
        "pod": blocker.get("pod_uid"),
    }
    call, file = blocker.get("syscall"), blocker.get("file")
    return [
        ", ".join(f"{name} {value}" for name, value in places.items() if value),
        f"command: {blocker['cmdline']}" if blocker.get("cmdline") else "",
        (f"in {call}()" + (f" on {file}" if file else "")) if call else "",
    ]


def _frames(frames: list[str], note: str = "") -> list[str]:
    lines = [f"      {safe(frame)}{note}" for frame in frames[:TOP_FRAMES]]
    if len(frames) > TOP_FRAMES:
        lines.append(f"      … {len(frames) - TOP_FRAMES} more")
    return lines
