"""Looks at CPUs and devices from time to time: what they drop, and which queues there are.

All that asks the kernel is done in a thread, which also waits by itself: the loop is woken only
when there is something to tell. What stalls are told of is the last inventory, from memory.
"""

from __future__ import annotations

import asyncio
import ctypes
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable

from stalld import events, net_events
from stalld.config import Config
from stalld.enrich import netlink, softnet
from stalld.enrich.driver_stats import DriverStats, Lost
from stalld.enrich.ethtool import Ethtool
from stalld.enrich.kept import Kept, read_again
from stalld.enrich.netlink import LinkNews
from stalld.enrich.nic import Inventory, Surveyor
from stalld.errors import reason_of
from stalld.reader import online_cpus
from stalld.track.rates import Rates

SURVEY_EVERY_S = 60.0
"""Affinities and RPS masks change without news."""
SURVEY_GAP_S = 2.0
"""Not sooner, however fast links change."""
SETTLE_S = 0.2
"""News of links come in bursts."""
LATE_S = 0.05
"""A look may come so late, if it then needs no interrupt of its own."""
_PR_SET_TIMERSLACK = 29
"""prctl.h"""
MAX_CPUS = 8192
MAX_LINKS = 4096

Emit = Callable[[str, str, events.Event], None]
_Told = tuple[str, str, events.Event]
_Link = tuple[int, str]


class NetWatch:
    """Belongs to the loop's thread, but for what is read of ``inventory``, and for its looks.

    Args:
        emit: an event, its level, its fields.
        clocks_ns: CLOCK_MONOTONIC and CLOCK_REALTIME, taken together.
    """

    def __init__(
        self, config: Config, emit: Emit, clocks_ns: Callable[[], tuple[int, int]]
    ) -> None:
        self.inventory: Inventory | None = None
        """As of the last survey; None: there was none yet, or it failed."""
        self.faults: Counter[str] = Counter()
        """What could not be read, and how often."""
        self._config = config
        self._emit = emit
        self._clocks_ns = clocks_ns
        self._surveyor = Surveyor(self.faults)
        self._cpus: Rates[int] = Rates({}, 32, MAX_CPUS)
        self._links: Rates[_Link] = Rates({}, 64, MAX_LINKS)
        self._drivers: dict[_Link, DriverStats] = {}
        self._softnet = Kept(lambda: open(softnet.PATH, "rb", buffering=0))  # noqa: SIM115
        self._route = Kept(netlink.route_socket)
        self._ethtool = Kept(Ethtool)
        self._wanted = threading.Event()
        self._ended = False
        self._news: LinkNews | None = None
        self._links_changed = False
        self._polled_s = self._surveyed_s = float("-inf")
        self.apply(config)

    def lookup(self) -> Inventory | None:
        """The inventory, for whoever has to do without if there is none: that is counted."""
        found = self.inventory
        if found is None:
            self.faults["queues of a stall: no inventory"] += 1
        return found

    def apply(self, config: Config) -> None:
        """Go by other settings from now on."""
        self._config = config
        self._cpus.limits = {
            "dropped": config.softnet.drops_per_s,
            "time_squeeze": config.softnet.squeezes_per_s,
        }
        self._links.limits = dict.fromkeys(("drops", "queue_drops"), config.nic.drops_per_s)
        self._wanted.set()

    async def run(self) -> None:
        """Look, tell, wait, for ever."""
        loop = asyncio.get_running_loop()
        self._news = self._listen()
        if self._news is not None:
            loop.add_reader(self._news, self._hear)
        try:
            await asyncio.to_thread(self._look_when_due, loop)
        finally:
            self._ended = True
            self._wanted.set()
            if self._news is not None:
                loop.remove_reader(self._news)
                self._news.close()

    def _listen(self) -> LinkNews | None:
        try:
            return LinkNews.open()
        except OSError as error:
            self.faults[f"news of links: {error.strerror}"] += 1
            return None

    def _hear(self) -> None:
        assert self._news is not None
        # Once is enough: what else comes until the survey waits in the socket.
        asyncio.get_running_loop().remove_reader(self._news)
        self._links_changed = True
        self._wanted.set()

    def _hear_again(self) -> None:
        if self._news is not None and not self._ended:
            asyncio.get_running_loop().add_reader(self._news, self._hear)

    def _tell(self, told: list[_Told]) -> None:
        if not self._ended:
            for each in told:
                self._emit(*each)

    def _look_when_due(self, loop: asyncio.AbstractEventLoop) -> None:
        """In a thread, until it is ended."""
        _wake_with_others()
        try:
            while not self._ended:
                now_s = time.monotonic()
                survey, poll = now_s >= self._survey_due_s(), now_s >= self._poll_due_s()
                if survey and self._links_changed:
                    time.sleep(SETTLE_S)
                    self._take_news(loop)
                told = self._look(survey, poll)
                if told:
                    loop.call_soon_threadsafe(self._tell, told)
                self._wait()
        finally:
            self.close()

    def close(self) -> None:
        """Close what is kept open for looks; in their thread."""
        for kept in (self._softnet, self._route, self._ethtool):
            kept.close()

    def _take_news(self, loop: asyncio.AbstractEventLoop) -> None:
        self._links_changed = False
        if self._news is not None and not self._ended:
            self._news.drain()
            loop.call_soon_threadsafe(self._hear_again)

    def _survey_due_s(self) -> float:
        return self._surveyed_s + (SURVEY_GAP_S if self._links_changed else SURVEY_EVERY_S)

    def _poll_due_s(self) -> float:
        if not (self._config.softnet.enabled or self._config.nic.enabled):
            return float("inf")
        return self._polled_s + self._config.softnet.interval_s

    def _wait(self) -> None:
        """Until something is due, or wanted."""
        self._wanted.clear()
        if not self._ended:
            due_s = min(self._survey_due_s(), self._poll_due_s())
            self._wanted.wait(max(0.0, due_s - time.monotonic()))

    def _look(self, survey: bool, poll: bool) -> list[_Told]:
        """What there is to tell."""
        told: list[_Told] = []
        if survey:
            # Also when it fails: no sooner again.
            self._surveyed_s = time.monotonic()
            self._survey()
        if poll:
            self._polled_s = time.monotonic()
            if self._config.softnet.enabled:
                told += self._look_at_cpus()
            if self._config.nic.enabled:
                told += self._look_at_links()
        return told

    def _survey(self) -> None:
        try:
            self.inventory = self._surveyor.survey()
        except (OSError, ValueError) as error:
            self.inventory = None
            self._count("links", error)

    def _look_at_cpus(self) -> list[_Told]:
        try:
            text = read_again(self._softnet.get().fileno()).decode()
            rows = softnet.parse(text, online_cpus)
        except (OSError, ValueError) as error:
            self._softnet.close()
            self._count("softnet_stat", error)
            return []
        now_ns, wall_ns = self._clocks_ns()
        told: list[_Told] = []
        for cpu, row in rows.items():
            episode = self._cpus.take(cpu, now_ns, net_events.softnet_counters(row))
            if episode is not None:
                fields = net_events.softnet(
                    cpu,
                    episode,
                    row.backlog,
                    self.inventory,
                    drops_per_s=self._config.softnet.drops_per_s,
                    boot_wall_ns=wall_ns - now_ns,
                )
                told.append(("softnet", *fields))
        return told

    def _look_at_links(self) -> list[_Told]:
        inventory = self.inventory
        if inventory is None:
            return []
        try:
            stats = netlink.link_stats(self._route.get())
        except (OSError, struct.error) as error:
            # An answer that comes late would be taken for that to the next question.
            self._route.close()
            self._count("link statistics", error)
            return []
        now_ns, wall_ns = self._clocks_ns()
        links = {(device.ifindex, device.name): device for device in inventory.devices.values()}
        self._links.keep(links.keys())
        self._drivers = {link: self._drivers[link] for link in self._drivers.keys() & links.keys()}
        told: list[_Told] = []
        for link, device in links.items():
            if device.ifindex not in stats:
                continue  # It has just gone.
            driver = self._drivers.setdefault(link, DriverStats(device.name))
            lost = self._lost(driver) if device.hardware else {}
            if lost is None:
                continue  # Without its counters what they tell of would seem to be over.
            counters = net_events.nic_counters(stats[device.ifindex], lost)
            episode = self._links.take(link, now_ns, counters)
            if episode is not None:
                fields = net_events.nic(
                    device.name,
                    device.ifindex,
                    episode,
                    driver.lost,
                    inventory,
                    boot_wall_ns=wall_ns - now_ns,
                )
                told.append(("nic", *fields))
        return told

    def _lost(self, driver: DriverStats) -> dict[Lost, int] | None:
        """None: it has counters, which cannot be read just now."""
        try:
            return driver.read(self._ethtool.get())
        except (OSError, struct.error) as error:
            self._count("a driver's counters", error)
            return None if driver.lost else {}

    def _count(self, what: str, error: Exception) -> None:
        self.faults[f"{what}: {reason_of(error)}"] += 1


def _wake_with_others() -> None:
    """Have the kernel wake this thread at the next interrupt that it has anyway, if that is soon.

    Where it refuses there is an interrupt more for each look.
    """
    slack_ns = ctypes.c_ulong(round(LATE_S * 1e9))
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, slack_ns, 0, 0, 0)
