"""The life of ``softirq-stalld run``: start, detect, stop."""

from __future__ import annotations

import asyncio
import ctypes
import os
import platform
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from structlog.typing import FilteringBoundLogger

from stalld import __version__, events
from stalld.config import Settings
from stalld.enrich.kallsyms import Kallsyms
from stalld.enrich.ksymbols import KsymbolError, KsymbolFeed
from stalld.enrich.symbols import SymbolTable
from stalld.errors import DecodeError, StalldError
from stalld.host import LocalHost, is_virtual
from stalld.kthreads import Watched, iterate_tasks, ksoftirqd_pids
from stalld.pipeline import Pipeline
from stalld.probe.client import load_probes, possible_cpus
from stalld.reader import PerfReader, ReaderThread, online_cpus, split
from stalld.records import VECTORS
from stalld.rings import Rings
from stalld.sinks.emitter import Emitter
from stalld.state import Maps
from stalld.track.fold import Folder
from stalld.track.stall import Tracker

EXPIRE_EVERY_S = 0.1
"""How often to look for lost closing records, while a stall is open."""
LEARN_EVERY_S = 30.0
"""How often to look for new or restarted kernel threads."""
RELOAD_EVERY_S = 5.0
"""The kernel's symbols are not read again sooner."""

# include/uapi/linux/time.h; Python has no name for it.
_CLOCK_MONOTONIC_COARSE = 6

TICK_FUNCTIONS = (b"tick_nohz_handler", b"tick_sched_timer")
"""What the tick's hrtimer calls: today, and on older kernels."""


def tick_ns() -> int:
    """The scheduler tick's period in ns: the coarse clock moves once a tick."""
    return round(time.clock_getres(_CLOCK_MONOTONIC_COARSE) * 1e9)


def clocks_ns() -> tuple[int, int]:
    """CLOCK_MONOTONIC and CLOCK_REALTIME, read one after the other."""
    return time.monotonic_ns(), time.time_ns()


class Service:
    """Detects until a signal, the end of its time or a fault stops it."""

    def __init__(self, settings: Settings, emitter: Emitter, log: FilteringBoundLogger) -> None:
        self._settings = settings
        self._emitter = emitter
        self._log = log
        self._stopped = asyncio.Event()
        self._failure: BaseException | None = None
        self._resources = ExitStack()
        self._tasks: set[asyncio.Task[None]] = set()
        self._expiring: asyncio.Task[None] | None = None
        self._reloading: asyncio.Task[None] | None = None
        self._lost: dict[int, int] = {}
        self._feed_error = ""

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
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._interrupt)
        started_ns = time.monotonic_ns()
        # Before the child: what it loads is announced too.
        self._feed = self._open_feed()
        child = load_probes()
        # The kernel's symbols are read while the child compiles.
        kallsyms, self._probes = await asyncio.gather(
            asyncio.to_thread(_load_kallsyms), asyncio.to_thread(child.result)
        )
        self._resources.callback(self._probes.close)
        self._attach(kallsyms, started_ns)
        del kallsyms
        _return_memory()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.duration_s):
                await self._stopped.wait()
        self._maps.stop()
        if self._failure is not None:
            raise self._failure
        self._finish(started_ns)

    def _attach(self, kallsyms: Kallsyms, started_ns: int) -> None:
        fds = self._probes.fds
        config = self._settings.config
        cpus = possible_cpus()
        self._maps = Maps(fds["map:cpus"], fds["map:config"], cpus)
        self._watched = Watched(fds["map:watched"], self._maps, config.detect.kthreads)
        ksoftirqd = self._learn()
        self._rings = Rings(fds["map:rings"], fds["map:napis"], cpus)
        symbols = SymbolTable(kallsyms, self._feed)
        host = LocalHost(self._maps, self._rings, symbols, is_virtual())
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
        self._pipeline = Pipeline(
            Tracker(self._settings.threshold_ns, tick_ns(), host),
            Folder(config.storm.identical_per_minute, self._settings.threshold_ns),
            symbols,
            self._emitter,
            names=self._watched.names,
            id_prefix=f"{boot_id}-{started_ns:x}",
            sampler="tick" if "link:hrtimer_expire_entry" in fds else "none",
            clocks_ns=clocks_ns,
            on_bad_record=self._log_bad_record,
            on_hotplug=self._hotplug,
        )
        self._reader = PerfReader(fds["map:events"], self._pipeline.take)
        self._resources.callback(self._reader.close)
        # The lock keeps every record back until `started` is written.
        with self._reader.lock:
            self._start_reading()
            percpu = self._probes.description.percpu
            self._maps.watch(
                self._settings.threshold_ns,
                tick_ns=tick_ns(),
                vec_mask=sum(1 << VECTORS.index(name) for name in config.detect.vectors),
                max_samples=config.detect.max_samples,
                max_stalls=config.storm.stalls_per_second,
                lookback=config.detect.lookback,
                steal_offset=percpu.get("steal", 0),
                cpustat_offset=percpu.get("cpustat", 0),
                softnet_offset=percpu.get("softnet", 0),
                tick_function=[kallsyms.address(name) for name in TICK_FUNCTIONS],
            )
            self._emit_started(ksoftirqd, kallsyms.hidden)
        if self._feed_error:
            self._log.info(
                "new BPF programs are named only after a reload", reason=self._feed_error
            )
        self._resources.callback(self._cancel_tasks)
        self._keep(asyncio.create_task(self._relearn()))

    def _finish(self, started_ns: int) -> None:
        """Read what is left, close what is open, say goodbye."""
        with self._reader.lock:
            self._reader.consume()
            self._report_lost()
            self._pipeline.finish()
            self._emit_stopped(started_ns)

    def _start_reading(self) -> None:
        """Each half of the CPUs is read from the other half, never from itself."""
        loop = asyncio.get_running_loop()
        here, there = split(self._reader.cpus, os.sched_getaffinity(0))
        far = [cpu for cpu in self._reader.cpus if cpu in here] if there else []
        if there:
            os.sched_setaffinity(0, here)
            thread = ReaderThread(
                self._reader,
                far,
                there,
                lambda: _from_thread(loop, self._follow_up),
                lambda error: _from_thread(loop, self._fail, error),
            )
            # Last of all said and done, since its CPU may be stuck.
            self._resources.callback(thread.stop)
        # One by one: a perf buffer tells only once that it is readable, which
        # is lost on the way through a second epoll descriptor.
        for cpu in self._reader.cpus:
            if cpu not in far:
                fd = self._reader.fd(cpu)
                loop.add_reader(fd, self._read, [cpu])
                self._resources.callback(loop.remove_reader, fd)

    def _interrupt(self) -> None:
        self._stopped.set()

    def _fail(self, error: BaseException | None) -> None:
        self._failure = self._failure or error
        self._stopped.set()

    def _read(self, cpus: list[int] | None = None) -> None:
        """The perf buffers have something; all of them where none is named."""
        try:
            self._reader.consume(cpus)
        except Exception as error:  # noqa: BLE001 - run() raises it again
            self._fail(error)
        self._follow_up()

    def _follow_up(self) -> None:
        """Start what the records just read ask for."""
        try:
            self._report_lost()
        except Exception as error:  # noqa: BLE001 - run() raises it again
            self._fail(error)
        if self._pipeline.tracker.open and (self._expiring is None or self._expiring.done()):
            self._expiring = self._keep(asyncio.create_task(self._expire()))
        if self._pipeline.symbols.needs_reload and (
            self._reloading is None or self._reloading.done()
        ):
            self._reloading = self._keep(asyncio.create_task(self._reload()))

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

    def _report_lost(self) -> None:
        """Say what the perf buffers had no room for since the last time."""
        with self._reader.lock:
            for cpu, known in enumerate(self._maps.cpus):
                count = (known.lost - self._lost.get(cpu, 0)) & 0xFFFFFFFF
                if count:
                    self._lost[cpu] = known.lost
                    self._pipeline.take_lost(cpu, count)

    async def _expire(self) -> None:
        """Look for lost closing records as long as a stall is open."""
        while self._pipeline.tracker.open:
            await asyncio.sleep(EXPIRE_EVERY_S)
            self._read()
            with self._reader.lock:
                self._pipeline.expire(self._maps.stall)

    async def _reload(self) -> None:
        """Read the kernel's symbols again, then rest."""
        kallsyms = await asyncio.to_thread(_load_kallsyms)
        with self._reader.lock:
            self._pipeline.symbols.replace(kallsyms)
        del kallsyms
        _return_memory()
        await asyncio.sleep(RELOAD_EVERY_S)

    async def _relearn(self) -> None:
        """Kernel threads come with new CPUs, and may be restarted."""
        while True:
            await asyncio.sleep(LEARN_EVERY_S)
            self._learn()
            self._report_lost()

    def _learn(self) -> dict[int, int]:
        link = self._probes.fds.get("iter:task")
        if link is not None:
            return self._watched.learn(iterate_tasks(link))
        pids = ksoftirqd_pids()
        self._watched.learn_pids(pids)
        return pids

    def _hotplug(self, cpu: int) -> None:
        self._log.info("CPU goes down or comes up", cpu=cpu)

    def _open_feed(self) -> KsymbolFeed | None:
        try:
            return self._resources.enter_context(KsymbolFeed.open(online_cpus()))
        except KsymbolError as error:
            self._feed_error = str(error)
            return None

    def _log_bad_record(self, error: DecodeError) -> None:
        self._log.error("undecodable record", reason=str(error))

    def _emit_started(self, ksoftirqd: dict[int, int], hidden: bool) -> None:
        description = self._probes.description
        missing = events.missing(description.missing)
        if hidden:
            missing.append(
                {
                    "ability": "kernel symbols",
                    "reason": "the kernel hides its addresses (CAP_SYSLOG is missing, or "
                    "kernel.kptr_restrict is 2)",
                    "effect": "stacks are bare addresses; modes and verdicts are unknown",
                }
            )
        self._emitter.emit(
            "started",
            "info",
            {
                "version": __version__,
                "kernel": platform.release(),
                "threshold_ms": self._settings.threshold_ms,
                "tick_ms": events.milliseconds(tick_ns()),
                "vectors": list(self._settings.config.detect.vectors),
                "cpus": len(ksoftirqd),
                "kthreads": len(self._watched.names),
                "sampler": "tick" if "link:hrtimer_expire_entry" in self._probes.fds else "none",
                "lookback": self._looks_back(),
                "net_rx_action": description.net_rx_action,
                "structs": description.structs,
                "attached": [f"{item.hook} ({item.how})" for item in description.attached],
                "missing": missing,
                "serves_inline": self._maps.serves_inline(),
            },
        )

    def _emit_stopped(self, started_ns: int) -> None:
        maps, pipeline = self._maps, self._pipeline
        self._emitter.emit(
            "stopped",
            "info",
            {
                "uptime_ms": events.milliseconds(time.monotonic_ns() - started_ns),
                "stalls": pipeline.stalls,
                "records": pipeline.records,
                "records_lost": pipeline.lost,
                "records_undecodable": pipeline.undecodable,
                "stale_tasks": maps.total("stale"),
                "missed_services": maps.total("missed"),
                "unwatched_wakeups": maps.total("unwatched"),
                "suppressed": pipeline.suppressed,
                "net_rx_runs": maps.total("net_rx_runs"),
                "net_rx_ms": events.milliseconds(maps.total("net_rx_ns")),
                "net_rx_max_ms": events.milliseconds(max(s.net_rx_max_ns for s in maps.cpus)),
                "napi": events.napi(self._rings.napi_totals()),
                "serves_inline": maps.serves_inline(),
            },
        )

    def _looks_back(self) -> bool:
        return bool(
            "link:lookback" in self._probes.fds
            and self._maps.config.lookback
            and any(self._maps.config.tick_function)
        )


def _return_memory() -> None:
    """Hand what reading the symbols left free back to the kernel, where libc can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _from_thread(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *args: Any) -> None:
    """Have the loop call; a loop that is closed already has nothing to do."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(call, *args)


def _load_kallsyms() -> Kallsyms:
    try:
        return Kallsyms.load()
    except OSError as error:
        raise StalldError(
            f"cannot read the kernel's symbols: {error}; "
            "mount /proc and use a kernel with CONFIG_KALLSYMS=y"
        ) from error
