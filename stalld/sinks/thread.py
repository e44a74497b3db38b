"""A sink that writes from a thread of its own: for descriptors that may block."""

from __future__ import annotations

import asyncio
import threading
import time
from abc import abstractmethod

from stalld.sinks.sink import Context, Sink

RETRY_S = 1.0
"""After a failure it tries again this often."""
CHUNK_BYTES = 262_144
BATCH_S = 0.005
"""After a line that came alone it waits so long for company: a storm is written in few calls."""


class ThreadSink(Sink):
    """Lines are handed to a thread, which may wait for a disk as long as it likes.

    It sleeps while there is nothing to write.
    """

    def __init__(self, name: str, max_bytes: int, context: Context) -> None:
        super().__init__(name, max_bytes, context)
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="stalld-sink", daemon=True)

    def open(self) -> None:
        """Start the thread."""
        self._thread.start()

    def flush(self) -> None:
        """Wake the thread."""
        self._wake.set()

    @abstractmethod
    def write(self, data: bytes) -> int:
        """Write some of ``data``; how many bytes. In the sink's thread; may block.

        Raises:
            OSError: it could not; it is called again after a while.
        """

    @abstractmethod
    def explain(self, error: OSError) -> str:
        """What the failure means and what to do."""

    def prepare(self) -> None:
        """Called in the sink's thread whenever it has been woken, before it writes.

        Raises:
            OSError: as :meth:`write` does.
        """

    def release(self) -> None:
        """Called last of all in the sink's thread."""

    async def close(self, deadline: float) -> None:
        """Let the thread finish; one that hangs is left behind."""
        self._closing = True
        while self._thread.is_alive() and self.context.loop.time() < deadline:
            self._wake.set()
            await asyncio.sleep(0.01)

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            closing = self._closing
            ok = self._write_all()
            if closing:
                break
            if ok:
                time.sleep(BATCH_S)
            else:
                # Woken by lines meanwhile, it would try for each of them in vain.
                self._rest()
                self._wake.set()
        self.release()

    def _rest(self) -> None:
        waited = threading.Event()
        steps = 20
        for _ in range(steps):
            if self._closing or self.fatal:
                return
            waited.wait(RETRY_S / steps)

    def _write_all(self) -> bool:
        try:
            self.prepare()
            while data := self.outbox.chunk(CHUNK_BYTES):
                self.outbox.advance(self.write(data))
                self.recovered("events are written again")
        except OSError as error:
            self.in_trouble(self.explain(error))
            return False
        return True
