"""All sinks of a run: each gets every event, whatever becomes of the others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager

from stalld import config
from stalld.events import Event
from stalld.sinks.file import FileSink
from stalld.sinks.outbox import Stats
from stalld.sinks.sink import Context, Sink
from stalld.sinks.stdout import open_stdout

CLOSE_S = 1.0
"""So long a sink may take to deliver what waits when it goes."""
BATCH_LINES = 8
"""That are written at once where records come faster than they are told: a millisecond's."""


class Hub:
    """Belongs to the loop's thread, but for :meth:`publish`.

    Args:
        stdout_fd: our standard output.
        style: how events are written there: ``json`` or ``text``.
        hello: what the live socket tells each client first.
        lock: the one that is held while an event is published.
    """

    def __init__(
        self,
        context: Context,
        *,
        stdout_fd: int,
        style: str,
        hello: Callable[[], Event],
        lock: AbstractContextManager[object, None],
    ) -> None:
        self._context = context
        self._lock = lock
        self._stdout_fd = stdout_fd
        self._style = style
        self._hello = hello
        self._sinks: dict[Hashable, Sink] = {}
        # Replaced as a whole, and under the lock: whoever walks through it has come to its end by
        # then, so that no line goes to a sink that is being closed.
        self._all: tuple[Sink, ...] = ()
        self._past: dict[str, Stats] = {}
        self._unwritten = 0
        self._held = 0

    def publish(self, line: bytes, event: Event) -> None:
        """Hand an event to every sink; waits for none. With the reader's lock held.

        It is written now, within :meth:`together` perhaps with the next ones.
        """
        for sink in self._all:
            sink.put(line, event)
        self._unwritten += 1
        if not self._held or self._unwritten >= BATCH_LINES:
            self.flush()

    def flush(self) -> None:
        """Write what was published. With the reader's lock held."""
        if self._unwritten:
            self._unwritten = 0
            for sink in self._all:
                sink.flush()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Events of records that wait together: to write one costs as much as half of all else."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            if not self._held:
                self.flush()

    async def apply(self, sinks: config.Sinks, live: config.Live) -> dict[str, int]:
        """Have these sinks. Those that are there already go on; files are opened again.

        No event is lost on the way: a new sink takes events from the start, and delivers them
        once that one is gone which may have its place.

        Returns:
            How many events those that are gone could not deliver, by name.
        """
        wanted = dict(self._wanted(sinks, live))
        gone = [self._sinks.pop(key) for key in list(self._sinks) if key not in wanted]
        kept = list(self._sinks.values())
        fresh = {key: make() for key, make in wanted.items() if key not in self._sinks}
        self._sinks |= fresh
        with self._lock:
            self._all = tuple(self._sinks[key] for key in wanted)
        for sink in kept:
            sink.reopen()
        left = await self._close(gone)
        for sink in fresh.values():
            sink.open()
        return left

    async def close(self) -> dict[str, int]:
        """Deliver what waits, within a time, and let go; what could not be delivered, by name."""
        sinks = list(self._sinks.values())
        self._sinks.clear()
        with self._lock:
            self._all = ()
        return await self._close(sinks)

    @property
    def names(self) -> list[str]:
        """Where events go now."""
        return [sink.name for sink in self._all]

    @property
    def dead(self) -> bool:
        """Whether nothing that lasts takes events any more."""
        lasting = [sink for key, sink in self._sinks.items() if not isinstance(key, config.Live)]
        return bool(lasting) and all(sink.fatal for sink in lasting)

    def stats(self) -> list[Stats]:
        """What became of the lines, those of sinks that are gone included."""
        found = dict(self._past)
        for sink in self._all:
            _add(found, sink.stats())
        return list(found.values())

    def _wanted(
        self, sinks: config.Sinks, live: config.Live
    ) -> Iterator[tuple[Hashable, Callable[[], Sink]]]:
        """Settings, which are what makes a sink the same as before, and how to make it."""
        context = self._context
        if sinks.stdout.enabled:
            size = sinks.stdout.queue_kib * 1024
            yield (
                sinks.stdout,
                lambda: open_stdout(self._stdout_fd, self._style, size, context),
            )
        for file in sinks.file:
            yield file, lambda file=file: FileSink(file, context)  # type: ignore[misc]
        for tcp in sinks.tcp:
            from stalld.sinks.tcp import TcpSink

            yield tcp, lambda tcp=tcp: TcpSink(tcp, context)  # type: ignore[misc]
        for syslog in sinks.syslog:
            from stalld.sinks.syslog import SyslogSink

            yield syslog, lambda syslog=syslog: SyslogSink(syslog, context)  # type: ignore[misc]
        if live.enabled:
            from stalld.sinks.live import LiveSink

            yield live, lambda: LiveSink(live, context, self._hello)

    async def _close(self, sinks: list[Sink]) -> dict[str, int]:
        deadline = self._context.loop.time() + CLOSE_S
        # Nothing is put any more: whatever is dropped from now on was left.
        before = {sink: sink.stats().dropped for sink in sinks}
        # All at once: one that cannot deliver takes no time from the others.
        await asyncio.gather(*(sink.close(deadline) for sink in sinks))
        left: dict[str, int] = {}
        for sink in sinks:
            sink.give_up()
            stats = sink.stats()
            _add(self._past, stats)
            if stats.dropped > before[sink]:
                left[stats.name] = left.get(stats.name, 0) + stats.dropped - before[sink]
        return left


def _add(found: dict[str, Stats], stats: Stats) -> None:
    known = found.get(stats.name, Stats(stats.name, 0, 0, 0))
    found[stats.name] = Stats(stats.name, *map(sum, zip(known[1:], stats[1:], strict=True)))
