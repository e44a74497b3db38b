"""The life of ``softirq-stalld run``: start, detect, stop."""

from __future__ import annotations

import asyncio
import ctypes
import resource
import signal
import time
from collections.abc import Collection
from contextlib import ExitStack, suppress

from structlog.typing import FilteringBoundLogger

from stalld import events
from stalld.config import Settings
from stalld.detector import Detector
from stalld.enrich.kallsyms import Kallsyms
from stalld.enrich.ksymbols import KsymbolError, KsymbolFeed
from stalld.errors import DecodeError, StalldError
from stalld.perf import NMI_HZ, NmiSampler, SamplerError
from stalld.probe.client import Probes, load_probes
from stalld.probe.protocol import NMI_SAMPLER, NO_NMI
from stalld.reader import PerfReader, online_cpus
from stalld.reading import Reading
from stalld.sinks.emitter import Emitter

EXPIRE_EVERY_S = 0.1
"""How often to look for lost closing records, while a stall is open."""
LEARN_EVERY_S = 30.0
"""How often to look for new or restarted kernel threads."""
RELOAD_EVERY_S = 5.0
"""The kernel's symbols are not read again sooner."""
COUNTED_AFTER_NS = 1_100_000_000
"""The kernel limits stalls by the second: what it kept back is counted by then."""
HOTPLUG_LOOKS_S = (0.05, 0.2, 0.5, 1.0, 3.0)
"""When to look again, each after the one before: the kernel tells of the first step only."""


class Service:
    """Detects until a signal, the end of its time or a fault stops it."""

    def __init__(self, settings: Settings, emitter: Emitter, log: FilteringBoundLogger) -> None:
        self._settings = settings
        self._emitter = emitter
        self._log = log
        self._stopped = asyncio.Event()
        self._news = asyncio.Event()
        self._failure: BaseException | None = None
        self._resources = ExitStack()
        self._tasks: set[asyncio.Task[None]] = set()
        self._reloading: asyncio.Task[None] | None = None
        self._settling: asyncio.Task[None] | None = None
        self._hotplugged: set[int] = set()
        self._sampler: NmiSampler | None = None

    async def run(self) -> None:
        """Everything from start-up to the ``stopped`` event.

        Raises:
            StalldError: it cannot start or go on; the message says why.
        """
        try:
            with self._resources:
                await self._run()
        except BrokenPipeError:
            raise StalldError("nobody reads standard output any more: stopping") from None

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        # Some descriptors for each CPU: more than 1024 on a large machine.
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopped.set)
        started_ns = time.monotonic_ns()
        # Before the child: what it loads is announced too.
        self._feed = self._open_feed()
        child = load_probes("auto" if self._settings.config.detect.nmi_sampler else "never")
        # The kernel's symbols are read while the child compiles.
        kallsyms, probes = await asyncio.gather(
            asyncio.to_thread(_load_kallsyms), asyncio.to_thread(child.result)
        )
        self._resources.callback(probes.close)
        self._attach(probes, kallsyms, started_ns)
        del kallsyms
        _return_memory()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.duration_s):
                await self._stopped.wait()
        self._detector.maps.stop()
        if self._failure is not None:
            raise self._failure
        with self._reader.lock:
            self._reader.consume()
            self._detector.finish()

    def _attach(self, probes: Probes, kallsyms: Kallsyms, started_ns: int) -> None:
        self._detector = Detector(
            probes,
            kallsyms,
            self._feed,
            self._settings,
            self._emitter,
            started_ns=started_ns,
            on_bad_record=self._log_bad_record,
            # Called where the record is read; looked at where the loop follows up.
            on_hotplug=self._hotplugged.add,
        )
        self._reader = PerfReader(probes.fds["map:events"], self._detector.pipeline.take)
        self._resources.callback(self._reader.close)
        self._reading = Reading(self._reader, self._follow_up, self._fail)
        # Last of all said and done, since the CPU of its thread may be stuck.
        self._resources.callback(self._reading.close)
        missing = self._open_sampler(probes)
        # The lock keeps every record back until `started` is written.
        with self._reader.lock:
            self._reading.start()
            self._detector.start(missing)
        self._resources.callback(self._cancel_tasks)
        self._keep(asyncio.create_task(self._relearn()))
        self._keep(asyncio.create_task(self._report()))

    def _open_sampler(self, probes: Probes) -> list[events.Event]:
        """Attach the NMI sampler where there is one; what cannot be had, for ``started``."""
        program = probes.fds.get("prog:nmi")
        if program is None:
            return []
        try:
            self._sampler = NmiSampler.open(program, self._reader.cpus, NMI_HZ)
        except SamplerError as error:
            return [{"ability": NMI_SAMPLER, "reason": str(error), "effect": NO_NMI}]
        self._resources.callback(self._sampler.close)
        return []

    def _fail(self, error: BaseException | None) -> None:
        self._failure = self._failure or error
        self._stopped.set()

    def _follow_up(self) -> None:
        """Start what the records just read ask for."""
        self._news.set()
        if self._detector.symbols.needs_reload and _is_over(self._reloading):
            self._reloading = self._keep(asyncio.create_task(self._reload()))
        if self._hotplugged and _is_over(self._settling):
            self._settling = self._keep(asyncio.create_task(self._follow_hotplug()))

    def _keep(self, task: asyncio.Task[None]) -> asyncio.Task[None]:
        """A task that ends with the service, and ends it when it fails."""
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._fail(task.exception())

    def _cancel_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _report(self) -> None:
        """After news, as long as a stall is open, and when sums are due."""
        pipeline = self._detector.pipeline
        counted_ns = 0
        while True:
            now_ns = time.monotonic_ns()
            due_ns = [counted_ns] if counted_ns > now_ns else []
            if pipeline.folder.next_flush_ns is not None:
                due_ns.append(pipeline.folder.next_flush_ns)
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

    async def _reload(self) -> None:
        """Read the kernel's symbols again, then rest."""
        kallsyms = await asyncio.to_thread(_load_kallsyms)
        with self._reader.lock:
            self._detector.symbols.replace(kallsyms)
        del kallsyms
        _return_memory()
        await asyncio.sleep(RELOAD_EVERY_S)

    async def _relearn(self) -> None:
        """Kernel threads come with new CPUs, and may be restarted."""
        while True:
            await asyncio.sleep(LEARN_EVERY_S)
            self._look_at_cpus(())
            with self._reader.lock:
                self._detector.learn()
                self._detector.report()

    async def _follow_hotplug(self) -> None:
        """CPUs go down or come up: read those that are there as soon as they are."""
        while self._hotplugged:
            suspects: set[int] = set()
            for pause in HOTPLUG_LOOKS_S:
                suspects |= self._hotplugged
                self._hotplugged.clear()
                await asyncio.sleep(pause)
                self._look_at_cpus(suspects)
                with self._reader.lock:
                    self._detector.learn()

    def _look_at_cpus(self, suspects: Collection[int]) -> None:
        changed = self._reading.refresh(suspects)
        if not any(changed):
            return
        self._log.info(
            "online CPUs changed", gained=sorted(changed.gained), lost=sorted(changed.lost)
        )
        cpus = self._reader.cpus
        try:
            with self._reader.lock:
                if self._feed is not None:
                    self._feed.refresh(cpus, suspects)
            if self._sampler is not None:
                self._sampler.refresh(cpus, suspects)
        except (KsymbolError, SamplerError) as error:
            self._log.warning("not everything follows these CPUs", reason=str(error))

    def _open_feed(self) -> KsymbolFeed | None:
        try:
            return self._resources.enter_context(KsymbolFeed.open(online_cpus()))
        except KsymbolError as error:
            self._log.info("new BPF programs are named only after a reload", reason=str(error))
            return None

    def _log_bad_record(self, error: DecodeError) -> None:
        self._log.error("undecodable record", reason=str(error))


def _is_over(task: asyncio.Task[None] | None) -> bool:
    return task is None or task.done()


def _return_memory() -> None:
    """Hand what reading the symbols left free back to the kernel, where libc can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _load_kallsyms() -> Kallsyms:
    try:
        return Kallsyms.load()
    except OSError as error:
        raise StalldError(
            f"cannot read the kernel's symbols: {error}; "
            "mount /proc and use a kernel with CONFIG_KALLSYMS=y"
        ) from error
