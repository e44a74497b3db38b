"""The ``degraded`` event: what works less well than asked for, and when it does again. Pure."""

from __future__ import annotations

from stalld import events
from stalld.sinks.outbox import Gap
from stalld.sinks.sink import Trouble

Told = tuple[str, events.Event]
"""Level, and the fields of the event."""

ERRORS_TOLD = 10
"""Of a bad configuration file; `check --config` tells all."""
_WAIT = "events wait in its queue; when that is full, new ones are dropped and counted"
_DEAD = "events do not reach it any more"
_CLOSED = "nobody new can watch live events"


def sink(trouble: Trouble) -> Told:
    """A sink cannot deliver, or can again."""
    if trouble.over:
        return _told("info", "sink", trouble.sink, "ended", trouble.reason, "none any more")
    effect = {"stdout": _DEAD, "live": _CLOSED}.get(trouble.sink.split()[0], _WAIT)
    return _told("warning", "sink", trouble.sink, "begun", trouble.reason, effect)


def gap(name: str, lost: Gap) -> Told:
    """What stands in a stream where events are missing."""
    reason = "it took events more slowly than they came"
    level, fields = _told("warning", "sink", name, "gap", reason, "events are missing here")
    fields["dropped"] = lost.dropped
    fields["since"] = events.rfc3339(lost.since_ns)
    fields["until"] = events.rfc3339(lost.until_ns)
    return level, fields


def configuration(name: str, errors: tuple[str, ...]) -> Told:
    """A file was to be read again, and has errors; without errors: it has none any more."""
    if not errors:
        return _told("info", "configuration", name, "ended", "it is valid", "none any more")
    more = len(errors) - ERRORS_TOLD
    reason = "; ".join(errors[:ERRORS_TOLD]) + (f"; and {more} more" if more > 0 else "")
    return _told(
        "warning", "configuration", name, "begun", reason, "the settings of before stay in force"
    )


def _told(level: str, what: str, name: str, state: str, reason: str, effect: str) -> Told:
    return level, {
        "what": what,
        "name": name,
        "state": state,
        "reason": reason,
        "effect": effect,
        "dropped": None,
        "since": None,
        "until": None,
    }
