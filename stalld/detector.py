"""What was attached, joined: the shared maps, what reads and judges them, what counts.

The service owns the process, its descriptors and its clock; this owns the
rest, and does nothing by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from stalld import bookends, events
from stalld.config import Settings
from stalld.counters import Counters
from stalld.enrich.asking import Asking
from stalld.enrich.kallsyms import Kallsyms
from stalld.enrich.ksymbols import KsymbolFeed
from stalld.enrich.nic import Inventory
from stalld.enrich.symbols import SymbolTable
from stalld.errors import DecodeError
from stalld.host import LocalHost, is_virtual, threads_softirqs
from stalld.kthreads import Watched, iterate_tasks, ksoftirqd_pids
from stalld.pipeline import Pipeline
from stalld.probe.client import Probes, possible_cpus
from stalld.records import VECTORS, TaskEntry
from stalld.rings import Rings
from stalld.sinks.emitter import Emitter
from stalld.state import Maps, offsets
from stalld.track.fold import Folder
from stalld.track.stall import Tracker

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


class Detector:
    """One run of detection. Every method wants the reader's lock, once that reads.

    Args:
        kallsyms: the kernel's symbols, just read.
        feed: what tells of symbols that come and go, or None.
        started_ns: CLOCK_MONOTONIC; makes stall ids unique.
        on_bad_record: see :class:`Pipeline`.
        on_hotplug: likewise.
        inventory: likewise.
    """

    def __init__(
        self,
        probes: Probes,
        kallsyms: Kallsyms,
        feed: KsymbolFeed | None,
        settings: Settings,
        emitter: Emitter,
        *,
        started_ns: int,
        on_bad_record: Callable[[DecodeError], None],
        on_hotplug: Callable[[int], None],
        inventory: Callable[[], Inventory | None],
    ) -> None:
        self._probes = probes
        self._settings = settings
        self._emitter = emitter
        self._started_ns = started_ns
        self._hidden = kallsyms.hidden
        self._tick_functions = [kallsyms.address(name) for name in TICK_FUNCTIONS]
        fds, cpus = probes.fds, possible_cpus()
        config = settings.config
        self.maps = Maps(fds["map:cpus"], fds["map:config"], cpus)
        self.rings = Rings(fds["map:rings"], fds["map:napis"], self.maps)
        self.counters = Counters(self.maps, started_ns)
        self.watched = Watched(fds["map:watched"], self.maps, config.detect.kthreads)
        self.symbols = SymbolTable(kallsyms, feed)
        host = LocalHost(
            self.maps,
            self.rings,
            self.symbols,
            is_virtual(),
            probes.description.percpu,
            threaded=threads_softirqs(),
        )
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
        self.instance = f"{boot_id}-{started_ns:x}"
        """Unlike any other run's, across boots."""
        self._asking = Asking()
        self.pipeline = Pipeline(
            Tracker(settings.threshold_ns, tick_ns(), host),
            Folder(config.storm.identical_per_minute, settings.threshold_ns),
            self.symbols,
            emitter,
            self._asking,
            names=self.watched.names,
            id_prefix=self.instance,
            sampler="tick" if "link:hrtimer_expire_entry" in fds else "none",
            clocks_ns=clocks_ns,
            on_bad_record=on_bad_record,
            on_hotplug=on_hotplug,
            inventory=inventory,
        )

    def close(self) -> None:
        """End its thread."""
        self._asking.close()

    def start(self, missing: list[events.Event], sinks: list[str]) -> None:
        """Have the kernel detect, and say so.

        Args:
            missing: what the service does without.
            sinks: where events go.
        """
        cpus = self.learn(self.tasks())
        self._watch()
        fields = bookends.started(
            self._settings,
            self._probes.description,
            self.maps,
            cpus=len(cpus),
            kthreads=len(self.watched.names),
            tick_ns=tick_ns(),
            hidden=self._hidden,
            missing=missing,
            sinks=sinks,
        )
        self._emitter.emit("started", "info", fields)

    def apply(self, settings: Settings) -> None:
        """Go by other settings from now on. Nothing is detached, so nothing is missed."""
        self._settings = settings
        config = settings.config
        self.watched.want(config.detect.kthreads)
        self.learn(self.tasks())
        self.pipeline.apply(settings.threshold_ns, config.storm.identical_per_minute)
        self._watch()

    def _watch(self) -> None:
        config, places = self._settings.config, self._probes.description.percpu
        self.maps.watch(
            self._settings.threshold_ns,
            tick_ns=tick_ns(),
            vec_mask=sum(1 << VECTORS.index(name) for name in config.detect.vectors),
            max_samples=config.detect.max_samples,
            max_stalls=config.storm.stalls_per_second,
            lookback=config.detect.lookback,
            tick_function=self._tick_functions,
            **offsets(places),
        )

    def tasks(self) -> list[TaskEntry] | dict[int, int]:
        """The kernel threads there are, or, where no iterator tells, each ksoftirqd's pid by CPU.

        Raises:
            OSError, StalldError: they cannot be listed now.
        """
        link = self._probes.fds.get("iter:task")
        return ksoftirqd_pids() if link is None else list(iterate_tasks(link))

    def learn(self, tasks: list[TaskEntry] | dict[int, int]) -> dict[int, int]:
        """Watch those that are wanted, new or restarted ones too; CPU → pid of each ksoftirqd."""
        if isinstance(tasks, list):
            return self.watched.learn(tasks)
        self.watched.learn_pids(tasks)
        return tasks

    def report(self) -> None:
        """Tell what the kernel counted, and of folded stalls whose minute is over."""
        for cpu, count in self.counters.lost():
            self.pipeline.take_lost(cpu, count)
        for muted in self.counters.muted(time.monotonic_ns()):
            self.pipeline.take_suppressed(*muted)
        self.pipeline.flush()

    def finish(self, sinks: Callable[[], list[events.Event]], faults: Mapping[str, int]) -> None:
        """Close what is open, tell what is left, say goodbye.

        Args:
            faults: what could not be found out besides, and how often.
            sinks: what became of all events until then.
        """
        self.report()
        self.pipeline.finish()
        uptime_ns = time.monotonic_ns() - self._started_ns
        fields = bookends.stopped(
            self.pipeline, self._asking, self.maps, self.rings, uptime_ns, sinks(), faults
        )
        self._emitter.emit("stopped", "info", fields)
