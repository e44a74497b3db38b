"""All that is said: events to every sink, and what happens to the sinks as events again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from structlog.typing import FilteringBoundLogger

from stalld import degraded
from stalld.config import Config
from stalld.events import Event
from stalld.sinks.emitter import Emitter
from stalld.sinks.hub import Hub
from stalld.sinks.outbox import Gap
from stalld.sinks.sink import Context, Trouble


class Output:
    """Emitter and sinks of one run. Belongs to the loop's thread, but for ``emitter``.

    Args:
        style: of standard output: ``json`` or ``text``.
        lock: held while an event is emitted, by whomever.
        log: the daemon's own log.
        on_dead: told when nothing takes events any more.
        hello: what the live socket tells each client first.
    """

    def __init__(
        self,
        stdout_fd: int,
        style: str,
        lock: AbstractContextManager[object, None],
        log: FilteringBoundLogger,
        *,
        on_dead: Callable[[], None],
        hello: Callable[[], Event],
    ) -> None:
        self._lock = lock
        self._log = log
        self._on_dead = on_dead
        self._begun = False
        self._early: list[Trouble] = []
        context = Context(
            asyncio.get_running_loop(), self._take_trouble, self._gap_line, time.time_ns
        )
        self.hub = Hub(context, stdout_fd=stdout_fd, style=style, hello=hello, lock=lock)
        self.emitter = Emitter(self.hub.publish, time.time_ns, flush=self.hub.flush)

    async def apply(self, config: Config) -> None:
        """Have the sinks that the configuration names."""
        self._tell_left(await self.hub.apply(config.sinks, config.live))

    def begin(self) -> None:
        """``started`` is written: now other events may be."""
        self._begun = True
        for trouble in self._early:
            self._take_trouble(trouble)
        self._early.clear()

    def emit(self, event: str, level: str, fields: Event) -> None:
        """Emit an event that no record brought about."""
        with self._lock:
            self.emitter.emit(event, level, fields)

    async def close(self) -> None:
        """Deliver what waits, within a time; say what could not be."""
        self._tell_left(await self.hub.close())

    def sinks(self) -> list[Event]:
        """What became of the events so far, for events and clients."""
        return [stats._asdict() for stats in self.hub.stats()]

    def summary(self) -> str:
        """The same in a few words."""
        told = []
        for stats in self.hub.stats():
            less = [f"{stats.queued} queued"] if stats.queued else []
            less += [f"{stats.dropped} dropped"] if stats.dropped else []
            told.append(
                f"{stats.name} {stats.delivered}" + (f" ({', '.join(less)})" if less else "")
            )
        return ", ".join(told)

    def _tell_left(self, left: Mapping[str, int]) -> None:
        for name, events in left.items():
            self._log.warning("events could not be delivered", sink=name, events=events)

    def _take_trouble(self, trouble: Trouble) -> None:
        if not self._begun:
            self._early.append(trouble)
            return
        if trouble.over:
            self._log.info("a sink delivers again", sink=trouble.sink, reason=trouble.reason)
        else:
            self._log.warning("a sink is in trouble", sink=trouble.sink, reason=trouble.reason)
        self.emit("degraded", *degraded.sink(trouble))
        if self.hub.dead:
            self._on_dead()

    def _gap_line(self, sink: str, gap: Gap) -> bytes:
        return self.emitter.line("degraded", *degraded.gap(sink, gap))
