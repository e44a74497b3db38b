"""What the service tests share: an event loop for sinks, processes that end, and waiting.

Sinks are fed in it as the daemon feeds them: from another thread, under a lock.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import uvloop

from stalld import degraded
from stalld.events import Event
from stalld.sinks.emitter import Emitter
from stalld.sinks.sink import Context, Sink, Trouble
from tests.slowness import slow

MAX_PUT_S = 1.0
"""To give a sink an event takes less, whatever its reader does: whoever waited for one that stands
still would wait for ever. (A hypervisor may take the CPU meanwhile, for 100 ms or so.)"""


class Loop:
    """A loop in a thread of its own, and what a sink needs of its surroundings.

    Args:
        plain: asyncio's own loop, not uvloop.
    """

    def __init__(self, *, plain: bool = False) -> None:
        self._plain = plain

    def __enter__(self) -> Self:
        self.loop: asyncio.AbstractEventLoop = (
            asyncio.new_event_loop() if self._plain else uvloop.new_event_loop()
        )
        self.troubles: list[Trouble] = []
        self.emitter = Emitter(lambda line, event: self._publish(line, event), time.time_ns, "host")
        self._publish: Callable[[bytes, Event], None] = lambda line, event: None
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.context = Context(
            self.loop,
            self.troubles.append,
            lambda name, gap: self.emitter.line("degraded", *degraded.gap(name, gap)),
            time.time_ns,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.run(self.loop.shutdown_default_executor())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        assert not self._thread.is_alive()
        self.loop.close()

    def run(self, work: Coroutine[Any, Any, Any], timeout_s: float = 10.0) -> Any:
        """Run it in the loop and wait for what comes of it."""
        future: Future[Any] = asyncio.run_coroutine_threadsafe(work, self.loop)
        return future.result(timeout_s)

    def call(self, function: Callable[[], Any]) -> Any:
        """Call it in the loop."""

        async def call() -> Any:
            return function()

        return self.run(call())

    def close(self, sink: Sink, within_s: float = 1.0) -> None:
        """Close a sink as the hub does."""

        async def close() -> None:
            await sink.close(self.loop.time() + within_s)
            sink.give_up()

        self.run(close(), within_s + 5)

    def emit(self, sink: Sink, number: int, **fields: Any) -> float:
        """Give a sink one event; how long that took, in seconds."""

        def publish(line: bytes, event: Event) -> None:
            sink.put(line, event)
            sink.flush()

        self._publish = publish
        begun = time.perf_counter()
        self.emitter.emit("records_lost", "warning", {"cpu": 0, "count": number, **fields})
        return time.perf_counter() - begun


def until(condition: Callable[[], object], timeout_s: float = 10.0, what: str = "it") -> None:
    """Wait until it holds; fail when it does not in time, or in so much more on a slow machine."""
    deadline = time.monotonic() + slow(timeout_s)
    while not condition():
        assert time.monotonic() < deadline, f"not within {slow(timeout_s):g} s: {what}"
        time.sleep(0.005)


@contextmanager
def started(command: Sequence[str], **popen: Any) -> Iterator[subprocess.Popen[Any]]:
    """A process that at the end is killed, should it still be there, and whose pipes are closed.

    Args:
        command: what it runs; it is not waited for until that is ready.
        popen: further arguments of ``subprocess.Popen``.
    """
    process: subprocess.Popen[Any] = subprocess.Popen(command, **popen)
    try:
        yield process
    finally:
        process.kill()
        process.wait(slow(10))
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def status_of(pid: int) -> dict[str, str]:
    """/proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def numbers(lines: bytes | str) -> list[int]:
    """The numbers of the events in JSON lines; gaps are left out."""
    told = [json.loads(line) for line in lines.splitlines()]
    return [event["count"] for event in told if event["event"] == "records_lost"]


def missing(lines: bytes | str) -> int:
    """How many events the gaps in JSON lines say are missing."""
    told = [json.loads(line) for line in lines.splitlines()]
    return sum(event["dropped"] for event in told if event["event"] == "degraded")
