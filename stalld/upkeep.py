"""What is done beside reading: sums told when due, symbols, threads and CPUs kept current."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from structlog.typing import FilteringBoundLogger

from stalld.detector import Detector
from stalld.enrich.kallsyms import Kallsyms
from stalld.enrich.ksymbols import KsymbolError, KsymbolFeed
from stalld.errors import StalldError
from stalld.host import preempts_all
from stalld.memory import return_memory
from stalld.perf import NmiSampler, SamplerError
from stalld.reader import PerfReader
from stalld.reading import Reading
from stalld.state import words

EXPIRE_EVERY_S = 0.1
"""How often to look for lost closing records, while a stall is open."""
LOOK_EVERY_S = 0.05
"""How often to look whether a stall goes on, where nobody tells in time."""
LEARN_EVERY_S = 30.0
"""How often to look for new or restarted kernel threads."""
RELOAD_EVERY_S = 5.0
"""The kernel's symbols are not read again sooner."""
COUNTED_AFTER_NS = 1_100_000_000
"""The kernel limits stalls by the second: what it kept back is counted by then."""
HOTPLUG_LOOKS_S = (0.05, 0.2, 0.5, 1.0, 3.0)
"""When to look again, each after the one before: the kernel tells of the first step only. All
anew when it tells of another."""
_FEED, _SAMPLER = "news of symbols", "the NMI sampler"


class Upkeep:
    """Tasks of the loop. They end with :meth:`cancel`, or all together when one fails.

    Args:
        fail: told why a task ended before its time.
        on_report: called after each look at what there is to tell.
    """

    def __init__(
        self,
        detector: Detector,
        reader: PerfReader,
        feed: KsymbolFeed | None,
        log: FilteringBoundLogger,
        *,
        fail: Callable[[BaseException | None], None],
        on_report: Callable[[], None],
    ) -> None:
        cpus = detector.maps.cpus
        self.reading = Reading(
            reader, self._follow_up, fail, is_stuck=lambda cpu: bool(cpus[cpu].active)
        )
        self.sampler: NmiSampler | None = None
        self.hotplugged: set[int] = set()
        """CPUs that records told of, which may be going or coming."""
        self._wanting: dict[str, str] = {}
        """What could not be brought up to date, and why."""
        self._detector = detector
        self._reader = reader
        self._feed = feed
        self._log = log
        self._fail = fail
        self._on_report = on_report
        self._news = asyncio.Event()
        self._replugged = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._reloading: asyncio.Task[None] | None = None
        self._settling: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin with what goes on for ever."""
        if preempts_all():
            self.keep(self._look_for_stalls())
        self.keep(self._relearn())
        self.keep(self._report())

    def keep(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that ends with the others."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def cancel(self) -> None:
        """End all tasks."""
        for task in self._tasks:
            task.cancel()

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._fail(task.exception())

    def _follow_up(self) -> None:
        """Start what the records just read ask for."""
        self._news.set()
        if self._detector.symbols.needs_reload and _is_over(self._reloading):
            self._reloading = self.keep(self._reload())
        if self.hotplugged:
            self._replugged.set()
            if _is_over(self._settling):
                self._settling = self.keep(self._follow_hotplug())

    async def _report(self) -> None:
        """After news, as long as a stall is open, and when sums are due."""
        pipeline = self._detector.pipeline
        counted_ns = 0
        while True:
            now_ns = time.monotonic_ns()
            due_ns = [counted_ns] if counted_ns > now_ns else []
            with self._reader.lock:
                flush_ns = pipeline.folder.next_flush_ns
            if flush_ns is not None:
                due_ns.append(flush_ns)
            if not pipeline.tracker.open:
                with suppress(TimeoutError):
                    async with asyncio.timeout((min(due_ns) - now_ns) / 1e9 if due_ns else None):
                        await self._news.wait()
            if self._news.is_set():
                self._news.clear()
                counted_ns = time.monotonic_ns() + COUNTED_AFTER_NS
            if pipeline.tracker.open or counted_ns > now_ns:
                # Records come in bursts: one look for all of them.
                await asyncio.sleep(EXPIRE_EVERY_S)
            with self._reader.lock:
                if pipeline.tracker.open:
                    self._reader.consume()
                    pipeline.expire(self._detector.maps.stall)
                self._detector.report()
            self._on_report()

    async def _look_for_stalls(self) -> None:
        """With PREEMPT_RT the kernel wakes us by a thread on the CPU that wrote: the stuck one."""
        active = words(self._detector.maps.cpus, "active")
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if any(active):
                self.reading.read()

    async def _reload(self) -> None:
        """Read the kernel's symbols again, then rest."""
        with self._tried("the kernel's symbols"):
            kallsyms = await asyncio.to_thread(load_kallsyms)
            with self._reader.lock:
                self._detector.symbols.replace(kallsyms)
            del kallsyms
        return_memory()
        await asyncio.sleep(RELOAD_EVERY_S)

    async def _relearn(self) -> None:
        """Kernel threads come with new CPUs, and may be restarted."""
        records = 0
        while True:
            await asyncio.sleep(LEARN_EVERY_S)
            self._look_at_cpus(())
            self._learn()
            with self._reader.lock:
                self._detector.report()
            if records != self._detector.pipeline.records:
                # Lines that had to wait have left holes.
                records = self._detector.pipeline.records
                return_memory()

    async def _follow_hotplug(self) -> None:
        """CPUs go down or come up: read those that are there as soon as they are."""
        suspects: set[int] = set()
        pauses: list[float] = []
        while self.hotplugged or pauses:
            self._replugged.clear()
            if self.hotplugged:
                suspects |= self.hotplugged
                self.hotplugged.clear()
                first, *pauses = HOTPLUG_LOOKS_S
                await asyncio.sleep(first)
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(pauses.pop(0)):
                        await self._replugged.wait()
            self._look_at_cpus(suspects)
            self._learn()

    def _learn(self) -> None:
        with self._tried("kernel threads"):
            # Not under the lock: there may be thousands.
            tasks = self._detector.tasks()
            with self._reader.lock:
                self._detector.learn(tasks)

    def _look_at_cpus(self, suspects: Collection[int]) -> None:
        changed = None
        with self._tried("the CPUs"):
            changed = self.reading.refresh(suspects)
        if changed is not None:
            if any(changed):
                self._log.info(
                    "online CPUs changed", gained=sorted(changed.gained), lost=sorted(changed.lost)
                )
            elif not self._wanting.keys() & {_FEED, _SAMPLER}:
                return
        cpus = self._reader.cpus
        if self._feed is not None:
            with self._tried(_FEED), self._reader.lock:
                self._feed.refresh(cpus, suspects)
        if self.sampler is not None:
            with self._tried(_SAMPLER):
                self.sampler.refresh(cpus, suspects)

    @contextmanager
    def _tried(self, what: str) -> Iterator[None]:
        """What cannot be had just now (descriptors, memory) is told once, and tried again."""
        try:
            yield
        except (OSError, StalldError, KsymbolError, SamplerError) as error:
            reason = str(error)
            if self._wanting.get(what) != reason:
                self._log.warning("not brought up to date; tried again", what=what, reason=reason)
            self._wanting[what] = reason
        else:
            self._wanting.pop(what, None)


def _is_over(task: asyncio.Task[None] | None) -> bool:
    return task is None or task.done()


def load_kallsyms() -> Kallsyms:
    """The kernel's symbols.

    Raises:
        StalldError: they cannot be read.
    """
    try:
        return Kallsyms.load()
    except OSError as error:
        raise StalldError(
            f"cannot read the kernel's symbols: {error}; "
            "mount /proc and use a kernel with CONFIG_KALLSYMS=y"
        ) from error
