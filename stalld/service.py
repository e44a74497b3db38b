"""The life of ``softirq-stalld run``: start, detect, reload, stop."""

from __future__ import annotations

import asyncio
import gc
import os
import platform
import resource
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

from structlog.typing import FilteringBoundLogger

from stalld import __version__, degraded, events, liveness
from stalld.config import Settings
from stalld.detector import Detector, clocks_ns
from stalld.enrich.cpus import list_of
from stalld.enrich.kallsyms import Kallsyms
from stalld.enrich.ksymbols import KsymbolError, KsymbolFeed
from stalld.errors import ConfigError, DecodeError, ProbeError, StalldError
from stalld.host import NO_TICK, nohz_full
from stalld.memory import one_arena, return_memory
from stalld.netwatch import NetWatch
from stalld.notify import Notifier
from stalld.output import Output
from stalld.perf import NMI_HZ, NmiSampler, SamplerError
from stalld.probe.client import ProbeChild, Probes
from stalld.probe.protocol import NMI_SAMPLER, NO_NMI
from stalld.reader import PerfReader, online_cpus
from stalld.upkeep import Upkeep, load_kallsyms

ERRORS_LOGGED = 20
"""Of a bad configuration file; `check --config` tells all."""
STATUS_EVERY_S = 1.0
"""The service manager is told no more often how it goes."""


class Service:
    """Detects until a signal, the end of its time or a fault stops it.

    Args:
        child: compiles already.
        settings: to begin with.
        read_settings: reads them anew; raises ConfigError.
        stdout_fd: where events go that are for standard output; -1: it is closed.
        log: the daemon's own.
    """

    def __init__(
        self,
        child: ProbeChild,
        settings: Settings,
        read_settings: Callable[[], Settings],
        stdout_fd: int,
        log: FilteringBoundLogger,
    ) -> None:
        self._child = child
        self._settings = settings
        self._read_settings = read_settings
        self._stdout_fd = stdout_fd
        self._log = log
        self._stopped = asyncio.Event()
        self._reload_asked = asyncio.Event()
        self._reloading = asyncio.Lock()
        self._failure: BaseException | None = None
        self._misconfigured = False
        self._told_status_s = 0.0
        self._resources = ExitStack()
        self._lock = threading.RLock()
        self._started_ns = time.monotonic_ns()

    async def run(self) -> None:
        """Everything from start-up to the ``stopped`` event.

        Raises:
            StalldError: it cannot start or go on; the message says why.
        """
        one_arena()
        self._notifier = Notifier.from_environment(os.environ, os.getpid())
        self._listen_to_signals()
        with self._resources:
            self._resources.callback(self._notifier.close)
            probes = await self._load()
            if probes is not None:
                await self._detect(*probes)

    def _listen_to_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        loop.add_signal_handler(signal.SIGHUP, self._reload_asked.set)

    def _stop(self) -> None:
        self._stopped.set()
        # A second one ends us at once, whatever we wait for: the kernel cleans up.
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    async def _load(self) -> tuple[Probes, Kallsyms] | None:
        """What the kernel gives us; None: told to stop before it was there."""
        # Some descriptors for each CPU: more than 1024 on a large machine.
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        # While the child compiles, so that what it loads then is announced; the symbols are read
        # meanwhile too.
        self._feed = self._open_feed()
        # Threads of their own, which end: of the loop's, all that sleep are woken for any work.
        loop, threads = asyncio.get_running_loop(), ThreadPoolExecutor(2, "stalld-start")
        loading = asyncio.gather(
            loop.run_in_executor(threads, self._child.result),
            loop.run_in_executor(threads, load_kallsyms),
        )
        threads.shutdown(wait=False)
        if await self._stops_before(loading):
            await self._abandon(loading)
            return None
        probes, kallsyms = await loading
        self._resources.callback(probes.close)
        return probes, kallsyms

    async def _stops_before(self, work: asyncio.Future[tuple[Probes, Kallsyms]]) -> bool:
        stopped = asyncio.ensure_future(self._stopped.wait())
        either: set[asyncio.Future[Any]] = {stopped, work}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        return not work.done()

    async def _abandon(self, loading: asyncio.Future[tuple[Probes, Kallsyms]]) -> None:
        self._child.kill()
        with suppress(ProbeError):  # It is not there while it compiles.
            (await loading)[0].close()

    async def _detect(self, probes: Probes, kallsyms: Kallsyms) -> None:
        output = self._output = Output(
            self._stdout_fd,
            self._settings.style,
            self._lock,
            self._log,
            on_dead=lambda: self._fail(
                StalldError("nobody reads standard output any more: stopping")
            ),
            hello=self._hello,
        )
        try:
            await output.apply(self._settings.config)
            self._attach(probes, kallsyms)
            del kallsyms
            return_memory()
            self._notifier.ready(self._status())
            # What there is now stays: no garbage collection need walk through it any more.
            gc.freeze()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.duration_s):
                    await self._stopped.wait()
            self._stopped.set()
            self._notifier.stopping("stopping: what is left is being delivered")
            async with self._reloading:
                pass  # One that is under way ends first; no other begins.
            self._detector.maps.stop()
            if self._failure is not None:
                raise self._failure
            with self._lock:
                self._reader.consume()
                self._detector.finish(output.sinks, self._netwatch.faults)
        finally:
            # Before anything is detached: the kernel takes its time while a CPU is stuck.
            await output.close()

    def _attach(self, probes: Probes, kallsyms: Kallsyms) -> None:
        netwatch = NetWatch(self._settings.config, self._output.emit, clocks_ns)
        self._netwatch = netwatch
        self._detector = Detector(
            probes,
            kallsyms,
            self._feed,
            self._settings,
            self._output.emitter,
            started_ns=self._started_ns,
            on_bad_record=self._log_bad_record,
            # Called where the record is read; looked at where the loop follows up.
            on_hotplug=lambda cpu: self._upkeep.hotplugged.add(cpu),
            inventory=netwatch.lookup,
        )
        self._resources.callback(self._detector.close)
        reader = PerfReader(
            probes.fds["map:events"],
            self._detector.pipeline.take,
            lock=self._lock,
            together=self._output.hub.together,
        )
        self._reader = reader
        self._resources.callback(reader.close)
        self._upkeep = Upkeep(
            self._detector,
            reader,
            self._feed,
            self._log,
            fail=self._fail,
            on_report=self._tell_status,
        )
        # Last of all said and done, since the CPU of its thread may be stuck.
        self._resources.callback(self._upkeep.reading.close)
        missing = [*self._open_sampler(probes), *_without_tick()]
        # The lock keeps every record back until `started` is written.
        with self._lock:
            self._upkeep.reading.start()
            self._detector.start(missing, self._output.hub.names)
            self._output.begin()
        self._resources.callback(self._upkeep.cancel)
        self._upkeep.start()
        self._upkeep.keep(self._reload_when_asked())
        self._upkeep.keep(netwatch.run())
        reading = self._upkeep.reading
        self._upkeep.keep(liveness.feed(self._notifier, reading.moves, reading.read))

    def _open_sampler(self, probes: Probes) -> list[events.Event]:
        """Attach the NMI sampler where there is one; what cannot be had, for ``started``."""
        program = probes.fds.get("prog:nmi")
        if program is None:
            return []
        try:
            sampler = NmiSampler.open(program, self._reader.cpus, NMI_HZ)
        except SamplerError as error:
            return [{"ability": NMI_SAMPLER, "reason": str(error), "effect": NO_NMI}]
        self._upkeep.sampler = sampler
        self._resources.callback(sampler.close)
        return []

    async def _reload_when_asked(self) -> None:
        while True:
            await self._reload_asked.wait()
            self._reload_asked.clear()
            if self._stopped.is_set():
                return
            self._notifier.reloading()
            found = await asyncio.to_thread(self._read)
            # Not held before: a file that cannot be read to its end must not keep us from stopping.
            async with self._reloading:
                if self._stopped.is_set():
                    return
                await self._reload(found)
                if not self._stopped.is_set():
                    self._notifier.ready(self._status())

    def _read(self) -> Settings | ConfigError:
        try:
            return self._read_settings()
        except ConfigError as error:
            return error

    async def _reload(self, settings: Settings | ConfigError) -> None:
        """Take up what the configuration says now; what it has wrong changes nothing."""
        name = self._settings.source
        if isinstance(settings, ConfigError):
            self._misconfigured = True
            for line in settings.args[:ERRORS_LOGGED]:
                self._log.error("not reloaded", reason=line)
            self._output.emit("degraded", *degraded.configuration(name, settings.args))
            return
        before, self._settings = self._settings, settings
        with self._lock:
            self._detector.apply(settings)
        sampler = self._upkeep.sampler
        if sampler is not None and not settings.config.detect.nmi_sampler:
            sampler.close()
            self._upkeep.sampler = None
        elif settings.config.detect.nmi_sampler and not before.config.detect.nmi_sampler:
            self._log.warning("detect.nmi_sampler = true takes effect at the next start")
        self._netwatch.apply(settings.config)
        await self._output.apply(settings.config)
        self._log.info("reloaded", configuration=name)
        if self._misconfigured:
            self._misconfigured = False
            self._output.emit("degraded", *degraded.configuration(name, ()))

    def _fail(self, error: BaseException | None) -> None:
        self._failure = self._failure or error
        self._stopped.set()

    def _hello(self) -> events.Event:
        """What each client of the live socket is told first."""
        return {
            "run": self._detector.instance,
            "version": __version__,
            "kernel": platform.release(),
            "threshold_ms": self._settings.threshold_ms,
            "uptime_ms": events.milliseconds(time.monotonic_ns() - self._started_ns),
            "stalls": self._detector.pipeline.stalls,
            "records_lost": self._detector.pipeline.lost,
            "sinks": self._output.sinks(),
        }

    def _status(self) -> str:
        pipeline = self._detector.pipeline
        last = f", the last {pipeline.last}" if pipeline.last else ""
        lost = f"; {pipeline.lost} records lost" if pipeline.lost else ""
        wrong = "; the configuration file has errors" if self._misconfigured else ""
        return (
            f"{len(self._reader.cpus)} CPUs, threshold {self._settings.threshold_ms:g} ms; "
            f"{pipeline.stalls} stalls{last}{lost}{wrong}; events: {self._output.summary()}"
        )

    def _tell_status(self) -> None:
        now_s = time.monotonic()
        if now_s - self._told_status_s >= STATUS_EVERY_S:
            self._told_status_s = now_s
            self._notifier.status(self._status())

    def _open_feed(self) -> KsymbolFeed | None:
        try:
            return self._resources.enter_context(KsymbolFeed.open(online_cpus()))
        except KsymbolError as error:
            self._log.info("new BPF programs are named only after a reload", reason=str(error))
            return None

    def _log_bad_record(self, error: DecodeError) -> None:
        self._log.error("undecodable record", reason=str(error))


def _without_tick() -> list[events.Event]:
    """For ``started``: CPUs that stop their tick."""
    stopped = nohz_full()
    if not stopped:
        return []
    reason = f"nohz_full: CPUs {list_of(stopped)} stop their tick while a single task runs there"
    return [{"ability": "tick on every CPU", "reason": reason, "effect": NO_TICK}]
