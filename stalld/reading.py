"""Which CPU reads whose perf buffer, also while CPUs come and go.

See docs/decisions/0001-read-from-another-cpu.md.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from stalld.reader import Changed, PerfReader, ReaderThread, cpu_list, online_cpus, split

SETTLE_S = 0.05
"""When to look whether the buffers are read as they should be; then at ever longer intervals."""
SETTLED_S = 10.0
"""A CPU on which no task may run by then is not ours to run on."""


class Reading:
    """Reads each half of the CPUs from the other half: one in the loop, one in a thread.

    Belongs to the loop's thread. Pins that to its half. The service's use::

        self._reader = PerfReader(fds["map:events"], self._pipeline.take)
        self._resources.callback(self._reader.close)
        self._reading = Reading(self._reader, self._follow_up, self._fail)
        self._resources.callback(self._reading.close)
        with self._reader.lock:
            self._reading.start()
            ...

    and when CPUs may have come or gone, `suspects` perhaps among them::

        changed = self._reading.refresh(suspects)
        with self._reader.lock:
            self._feed.refresh(self._reader.cpus, suspects)
        self._sampler.refresh(self._reader.cpus, suspects)

    The kernel takes some 50 ms and more for the steps between the first, when the hotplug
    record comes, and the last: look again a few times after it, with the same suspects.

    Args:
        reader: its buffers; open before `start` and after `close`.
        on_read: called in the loop after each reading, in whichever thread that was.
        on_error: told in the loop what made a reading fail.
        allowed: the CPUs to run on, also those that are offline; None: those the calling thread
            may run on at `start`.
        is_stuck: whether a stall goes on on a CPU.
        online: lists the CPUs online.
    """

    def __init__(
        self,
        reader: PerfReader,
        on_read: Callable[[], None],
        on_error: Callable[[BaseException], None],
        *,
        allowed: Collection[int] | None = None,
        is_stuck: Callable[[int], bool] = lambda _: False,
        online: Callable[[], Sequence[int]] = online_cpus,
    ) -> None:
        self._reader = reader
        self._on_read = on_read
        self._on_error = on_error
        self._allowed = allowed
        self._online = online
        self._is_stuck = is_stuck
        self._halves: set[int] = set()
        self._here: list[int] = []
        self._there: list[int] = []
        self._shared = False
        self._pinned_to: set[int] = set()
        self._thread: ReaderThread | None = None
        self._watched: list[int] = []
        self._later: list[asyncio.Handle] = []

    def start(self) -> None:
        """Begin; what waits in the buffers is read from the loop's next turn on."""
        self._loop = asyncio.get_running_loop()
        if self._allowed is None:
            self._allowed = allowed_cpus()
        self._share(self._usable())

    def refresh(self, suspects: Collection[int] = ()) -> Changed:
        """Look at the online CPUs again; read those that came, no more those that went.

        Not to be called under the reader's lock: the thread must get it once more to end.

        Args:
            suspects: CPUs that may have gone and come back since the last look. Asking after
                one that is online interrupts it, and waits while its interrupts are off.

        Raises:
            StalldError: a buffer cannot be opened. All others are read on.
        """
        online = self._online()
        dead = self._reader.detached(suspects)
        # Before 6.2 a change of the cpuset undoes where threads may run.
        moved = os.sched_getaffinity(0) != self._pinned_to
        if set(online) == set(self._reader.cpus) and not dead and self._shared and not moved:
            return Changed()
        self._stop()
        try:
            return self._reader.refresh(online, dead)
        finally:
            self._share(self._usable())

    def read(self, cpus: Collection[int] | None = None) -> None:
        """Hand over now what waits in these CPUs' buffers; None: in all."""
        try:
            self._reader.consume(cpus)
        except Exception as error:  # noqa: BLE001 - the owner decides
            self._on_error(error)
        self._on_read()

    def moves(self) -> Callable[[], bool]:
        """Ask the thread to answer; the function tells whether it has, or has been replaced."""
        thread = self._thread
        if thread is None:
            return lambda: True
        before = thread.answered
        thread.ask()

        def moved() -> bool:
            # Where all it may run on is stuck it cannot: that is what is to be told.
            return (
                thread is not self._thread
                or thread.answered > before
                or all(map(self._is_stuck, self._there))
            )

        return moved

    def close(self) -> None:
        """Stop reading. Waits for the thread, whose CPU may be stuck. May be called twice."""
        self._stop()
        if self._allowed:
            self._usable()

    def _usable(self) -> set[int]:
        """Where tasks of ours may run now; this one may run on all of them then."""
        assert self._allowed is not None
        try:
            os.sched_setaffinity(0, self._allowed)
        except OSError:
            return set()  # None is online: the kernel has put us elsewhere.
        return os.sched_getaffinity(0)

    def _share(self, usable: set[int]) -> None:
        # Without descriptors, say, it ends in the middle: then the next look begins anew.
        self._shared = False
        self._halves = usable
        cpus = self._reader.cpus
        here, there = split(cpus, usable)
        far = here if there else []
        self._here, self._there = far, there
        if there:
            # Begun before this thread narrows down, whose affinity it inherits.
            self._thread = ReaderThread(
                self._reader,
                far,
                there,
                lambda: self._from_thread(self._on_read),
                lambda error: self._from_thread(self._on_error, error),
            )
        self._pin()
        # One by one: a perf buffer tells only once that it is readable, which
        # is lost on the way through a second epoll descriptor.
        for cpu in cpus:
            if cpu not in far:
                fd = self._reader.fd(cpu)
                self._loop.add_reader(fd, self.read, [cpu])
                self._watched.append(fd)
        self._settle_in(SETTLE_S)
        self._later.append(self._loop.call_soon(self.read))
        self._shared = True

    def _pin(self) -> None:
        if self._here:
            with suppress(OSError):
                os.sched_setaffinity(0, self._here)
        self._pinned_to = os.sched_getaffinity(0)

    def _settle_in(self, delay_s: float) -> None:
        self._later = [self._loop.call_later(delay_s, self._settle, delay_s)]

    def _settle(self, waited_s: float) -> None:
        """Make up for what came too early for `_share`.

        A CPU is online some time before tasks may run on it. And to wait on a buffer takes
        the news of what is in there already, which uvloop does no sooner than in its next turn.
        """
        usable = self._usable()
        if usable != self._halves:
            self._stop()
            self._share(usable)
            return
        self._pin()
        self.read()
        assert self._allowed is not None
        if waited_s < SETTLED_S and not usable.issuperset(
            set(self._allowed).intersection(self._reader.cpus)
        ):
            self._settle_in(2 * waited_s)

    def _stop(self) -> None:
        for handle in self._later:
            handle.cancel()
        self._later.clear()
        for fd in self._watched:
            self._loop.remove_reader(fd)
        self._watched.clear()
        if self._thread is not None:
            self._thread.stop()
            self._thread = None

    def _from_thread(self, call: Callable[..., None], *args: Any) -> None:
        """Have the loop call; a loop that is closed already has nothing to do."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *args)


def allowed_cpus(path: str = "/proc/thread-self/status") -> frozenset[int]:
    """The CPUs this thread may run on, also those that are offline (sched_getaffinity: online)."""
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "Cpus_allowed_list":
            return frozenset(cpu_list(value))
    return frozenset(os.sched_getaffinity(0))
