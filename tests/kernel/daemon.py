"""A real ``softirq-stalld run`` and what it said."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from tests.injector import Truth
from tests.slowness import slow
from tests.unit import schema

Event = dict[str, Any]

COMMAND = str(Path(sys.executable).with_name("softirq-stalld"))
UNLIMITED = str(Path(__file__).with_name("unlimited.toml"))
THRESHOLD_MS = 10.0
STALLED_CPU = 1
START_S = 90.0
START_TIMEOUT_S = slow(START_S)


class Daemon:
    """Started in ``with``, ready once it said so, stopped at the end.

    Nothing is folded: a test wants to see each stall.

    Args:
        arguments: of ``softirq-stalld run``; with ``--config`` among them its limits count.
    """

    def __init__(self, *arguments: str) -> None:
        self._arguments = arguments or ("--threshold-ms", str(THRESHOLD_MS))
        if "--config" not in self._arguments:
            self._arguments += ("--config", UNLIMITED)
        self.events: list[Event] = []
        self.lines: list[str] = []
        self.said = ""
        self._told_to_stop = False
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - stop() closes it
        self._news = threading.Condition()
        self._unparsed: queue.SimpleQueue[tuple[int, str] | None] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            [COMMAND, "run", *self._arguments],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._parser = threading.Thread(target=self._parse, daemon=True)
        self._parser.start()
        try:
            self.wait_for(lambda e: e["event"] == "started", START_S)
        except BaseException:
            self.stop(signal.SIGKILL)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._told_to_stop:
            self.stop()
            return
        status = self.stop()
        # One that has ended before its time tells nothing, and nothing is what some tests expect.
        assert kind is not None or status == 0, f"exit status {status}: {self.said}"

    @property
    def pid(self) -> int:
        """Of the daemon's process."""
        return self.process.pid

    @property
    def started(self) -> Event:
        """Its first event."""
        return self.events[0]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it; returns its exit status."""
        self._told_to_stop = True
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(number)
        try:
            return self.process.wait(slow(10))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self._reader.join(slow(10))
            self._parser.join(slow(10))
            if not self._log.closed:
                self.said = self.log()
                self._log.close()
            if self.process.stdout is not None:
                self.process.stdout.close()

    def log(self) -> str:
        """What it has said on standard error so far."""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode()

    def wait_for(self, wanted: Callable[[Event], bool], timeout_s: float = 5.0) -> Event:
        """The first event, old or new, for which ``wanted`` holds."""
        deadline = time.monotonic() + slow(timeout_s)
        with self._news:
            while True:
                for event in self.events:
                    if wanted(event):
                        return event
                left = deadline - time.monotonic()
                if left <= 0 or (self.process.poll() is not None and not self._parser.is_alive()):
                    raise AssertionError(
                        f"no such event within {timeout_s} s; exit status "
                        f"{self.process.poll()}; the last of {len(self.events)} events: "
                        f"{self.lines[-3:]}"
                    )
                self._news.wait(min(left, 0.2))

    def stalls(self, phase: str | None = None) -> list[Event]:
        """Stall events so far."""
        return [e for e in self.events if e["event"] == "stall" and phase in (None, e["phase"])]

    def of(self, truth: Truth, timeout_s: float = 5.0) -> list[Event]:
        """The lines of the stall that overlaps an injected one most, up to its end."""
        self.wait_for(
            lambda e: e["event"] == "stall" and e["phase"] == "resolved" and overlap(e, truth) > 0,
            timeout_s,
        )
        resolved = max(self.stalls("resolved"), key=lambda e: overlap(e, truth))
        return [e for e in self.stalls() if e["stall_id"] == resolved["stall_id"]]

    def parse(self, line: bytes) -> Event:
        """A line as an event; it is held against the schema."""
        return schema.parse(line)

    def _read(self) -> None:
        assert self.process.stdout is not None
        # Not where the stalls are: we want to know when a line came, not when we could look.
        os.sched_setaffinity(0, os.sched_getaffinity(0) - {STALLED_CPU} or {STALLED_CPU})
        # A line takes longer to check than to make: done here, the daemon would wait for us.
        for line in self.process.stdout:
            self._unparsed.put((time.monotonic_ns(), line))
        self._unparsed.put(None)

    def _parse(self) -> None:
        while (arrived := self._unparsed.get()) is not None:
            read_ns, line = arrived
            event = self.parse(line.encode())
            event["read_ns"] = read_ns
            with self._news:
                self.lines.append(line)
                self.events.append(event)
                self._news.notify_all()


def monotonic_ns(timestamp: str) -> int:
    """An event's RFC 3339 time on CLOCK_MONOTONIC."""
    wall = datetime.fromisoformat(timestamp)
    wall_ns = int(wall.timestamp()) * 1_000_000_000 + wall.microsecond * 1000
    return wall_ns - (time.time_ns() - time.monotonic_ns())


def overlap(event: Event, truth: Truth) -> int:
    """How many ns of an injected stall a resolved one covers; 0 on another CPU."""
    if event["cpu"] != truth.cpu:
        return 0
    start = monotonic_ns(event["started_at"])
    end = start + int(event["duration_ms"] * 1e6)
    return max(0, min(end, truth.end_ns) - max(start, truth.start_ns))


def bpf_objects() -> set[tuple[str, int]]:
    """Kind and id of every BPF program, map and link in the kernel."""
    found = set()
    for kind in ("prog", "map", "link"):
        listed = subprocess.run(
            ["bpftool", "--json", kind, "show"], capture_output=True, text=True, check=True
        )
        found |= {(kind, item["id"]) for item in json.loads(listed.stdout)}
    return found


def bpf_objects_of(pid: int) -> set[tuple[str, int]]:
    """Those that a process holds a descriptor of."""
    found = set()
    for path in Path(f"/proc/{pid}/fdinfo").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            for line in path.read_text().splitlines():
                name, _, value = line.partition(":\t")
                if name in ("prog_id", "map_id", "link_id"):
                    found.add((name.removesuffix("_id"), int(value)))
    return found


def descriptors_of(pid: int | str) -> list[str]:
    """What each descriptor of a process (or of ``self``) leads to, but for those just closed."""
    found = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(os.readlink(path))
    return found


def wakeups(pid: int) -> int:
    """How often a process's threads went to sleep so far, and so were woken."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError):  # The thread has ended.
            status = (task / "status").read_text()
            found = re.search(r"^voluntary_ctxt_switches:\s+(\d+)$", status, re.MULTILINE)
            total += int(found[1]) if found else 0
    return total


def children(pid: int) -> list[int]:
    """Processes whose parent is ``pid``."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            found += map(int, path.read_text().split())
    return found
