"""What every sink is: takes lines at once, passes them on when it can, says when it cannot."""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from stalld.events import Event
from stalld.sinks.outbox import Gap, Outbox, Stats


class Trouble(NamedTuple):
    """A sink cannot deliver, or can again (``over``). ``reason`` says why and what to do."""

    sink: str
    reason: str
    over: bool = False


class Context(NamedTuple):
    """What a sink needs of its surroundings.

    Attributes:
        loop: whose thread looks after descriptors.
        trouble: told in the loop's thread, without the reader's lock.
        tell_gap: (name of the sink, gap) → the event's line that tells of it.
        now_ns: CLOCK_REALTIME.
    """

    loop: asyncio.AbstractEventLoop
    trouble: Callable[[Trouble], None]
    tell_gap: Callable[[str, Gap], bytes]
    now_ns: Callable[[], int]


class Sink(ABC):
    """One place that events go to.

    :meth:`put` and :meth:`flush` are called with the reader's lock held, in whichever thread read
    the record: they must never wait. All else is called in the loop's thread.

    Args:
        name: what operators know it by, such as ``tcp 127.0.0.1:6514``.
        max_bytes: that may wait.
    """

    def __init__(self, name: str, max_bytes: int, context: Context) -> None:
        self.name = name
        self.context = context
        self.outbox = Outbox(max_bytes, lambda gap: self.tell_gap(gap), context.now_ns)
        self._troubled = False

    def put(self, line: bytes, event: Event) -> None:
        """Take one event, which :meth:`flush` writes.

        Args:
            line: its JSON, with the newline.
            event: the same as a mapping, not to be changed.
        """
        self.outbox.put(self.encode(line, event))

    def encode(self, line: bytes, event: Event) -> bytes:
        """What to write for an event."""
        return line

    def tell_gap(self, gap: Gap) -> bytes:
        """What to write where lines were dropped."""
        return self.context.tell_gap(self.name, gap)

    @abstractmethod
    def flush(self) -> None:
        """Write what can be written without waiting. Called in any thread."""

    def open(self) -> None:  # noqa: B027
        """Begin to deliver; trouble is told, not raised. Events may have been put before."""

    def reopen(self) -> None:  # noqa: B027
        """SIGHUP: take up what has changed under the same name."""

    @abstractmethod
    async def close(self, deadline: float) -> None:
        """Deliver what waits until the loop's clock says ``deadline``, then let go."""

    @property
    def fatal(self) -> bool:
        """Whether nothing will ever be delivered any more."""
        return False

    def give_up(self) -> None:
        """After :meth:`close`: what still waits will not be delivered, so it counts as dropped."""
        self.outbox.give_up()

    def stats(self) -> Stats:
        """What became of the lines so far."""
        return self.outbox.stats(self.name)

    def in_trouble(self, reason: str) -> None:
        """Say that nothing can be delivered, once until :meth:`recovered`. In any thread."""
        if not self._troubled:
            self._troubled = True
            self.in_loop(self.context.trouble, Trouble(self.name, reason))

    def recovered(self, reason: str) -> None:
        """Say that it can be again, if :meth:`in_trouble` said it could not. In any thread."""
        if self._troubled:
            self._troubled = False
            self.in_loop(self.context.trouble, Trouble(self.name, reason, over=True))

    def in_loop(self, call: Callable[..., object], *arguments: object) -> None:
        """Have the loop call; a loop that is closed already has nothing to do."""
        with suppress(RuntimeError):
            self.context.loop.call_soon_threadsafe(call, *arguments)


class DescriptorSink(Sink):
    """Writes to a descriptor that never blocks, at once, in the thread that has the line.

    That thread is known not to be on the CPU that is stuck, the loop's may be
    (docs/decisions/0005-lines-leave-where-they-are-made.md). Only when the other side is slow
    does the loop wait for it.
    """

    def __init__(self, name: str, max_bytes: int, context: Context) -> None:
        super().__init__(name, max_bytes, context)
        self._io = threading.Lock()
        self._waits = False

    @abstractmethod
    def fileno(self) -> int:
        """The descriptor, or -1 while there is none."""

    @abstractmethod
    def write_some(self) -> bool:
        """Write once, advance the outbox; False: the other side takes no more now.

        Called by one thread at a time. Deals with all other errors itself; after one
        :meth:`fileno` may be -1, and True is to be returned.
        """

    def flush(self) -> None:
        """Write until all is written or the other side takes no more."""
        # Who finds the lock taken need not wait: its holder looks again after letting go.
        while self.outbox and not self._waits and self.fileno() >= 0:
            if not self._io.acquire(blocking=False):
                return
            try:
                while self.outbox and self.fileno() >= 0:
                    if not self.write_some():
                        self._waits = True
                        self.in_loop(self.wait)
                        break
            finally:
                self._io.release()

    def wait(self) -> None:
        """Have the loop say when the other side takes more. In the loop's thread."""
        fd = self.fileno()
        if fd >= 0 and self._waits:
            self.context.loop.add_writer(fd, self.go_on)

    def go_on(self) -> None:
        """Write on. In the loop's thread."""
        self.stop_waiting()
        self.flush()

    def stop_waiting(self) -> None:
        """No more wait for the descriptor: call it in the loop, before that is closed."""
        self._waits = False
        fd = self.fileno()
        if fd >= 0:
            self.context.loop.remove_writer(fd)

    async def drain(self, deadline: float) -> None:
        """Wait until all is written, at most until the loop's clock says ``deadline``."""
        while self.outbox and self.fileno() >= 0 and self.context.loop.time() < deadline:
            await asyncio.sleep(0.01)
            self.flush()
