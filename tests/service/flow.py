"""A flow of real records through a real daemon into four sinks at once, and what came of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from tests.injector.records import RecordSource, Sent
from tests.kernel.daemon import COMMAND, START_S
from tests.service.rsyslog import Rsyslog
from tests.service.surroundings import status_of, until

CPU = 1
QUIET_S = 0.5
"""A file that has not grown for so long has all that will come."""


class Counted(NamedTuple):
    """One sink's stream: lines of synthetic stalls, and how many events its gaps tell of.

    ``all`` are all lines but those of gaps.
    """

    stalls: int
    all: int
    missing: int


class Result(NamedTuple):
    """What came of a flow.

    Attributes:
        sent: records that the kernel took, and those that found the buffer full.
        sinks: by name: what arrived.
        told: by name: what the ``stopped`` event says became of all events before it.
        lost: records lost, as the daemon says at its end.
        latency_ms: of each line on standard output: from the record until it was made.
        rss_kib: of the daemon, at the end.
    """

    sent: Sent
    sinks: dict[str, Counted]
    told: dict[str, dict[str, int]]
    lost: int
    latency_ms: list[float]
    rss_kib: int


class Flow:
    """The daemon and its four readers: a pipe, a file, rsyslog behind TCP, a ``tail``.

    Args:
        work: a directory for all of it.
        settings: further lines of the configuration, before any section.
    """

    def __init__(self, work: Path, settings: str = "") -> None:
        self._work = work
        self._settings = settings
        self._stack = ExitStack()

    def __enter__(self) -> Flow:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        work = self._work
        self.rsyslog = self._stack.enter_context(Rsyslog(work))
        live = work / "live.sock"
        config = work / "config.toml"
        config.write_text(
            f"{self._settings}\n"
            "storm.stalls_per_second = 1000\nstorm.identical_per_minute = 10000\n"
            f"[live]\nsocket = '{live}'\ngroup = ''\nqueue_kib = 4096\n"
            f"[[sinks.file]]\npath = '{work / 'file'}'\nqueue_kib = 4096\n"
            f"[[sinks.tcp]]\naddress = '{self.rsyslog.address}'\n"
        )
        self.daemon = self._process([COMMAND, "run", "--config", str(config)], subprocess.PIPE)
        with (work / "stdout").open("wb") as out:
            self.cat = self._process(["cat"], out, stdin=self.daemon.stdout)
        assert self.daemon.stdout is not None
        self.daemon.stdout.close()
        until(lambda: _has_started(work / "stdout"), START_S)
        with (work / "live").open("wb") as out:
            tail = [COMMAND, "tail", "--json", "--since-start", "--socket", str(live)]
            self.tail = self._process(tail, out)
        until(lambda: _has_started(work / "live"), 20)

    def _process(
        self, command: list[str], stdout: Any, stdin: Any = subprocess.DEVNULL
    ) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, stdin=stdin, stdout=stdout)
        self._stack.callback(_end, process)
        return process

    def source(self) -> RecordSource:
        """What makes the records."""
        return RecordSource(self.daemon.pid, CPU)

    @contextmanager
    def stopped(self, *which: str) -> Iterator[None]:
        """SIGSTOP these readers meanwhile: ``tail``, ``rsyslog``."""
        signals: dict[str, Callable[[int], None]] = {
            "tail": self.tail.send_signal,
            "rsyslog": self.rsyslog.kill,
        }
        for name in which:
            signals[name](signal.SIGSTOP)
        try:
            yield
        finally:
            for name in which:
                signals[name](signal.SIGCONT)

    def finish(self, sent: Sent) -> Result:
        """Let everything arrive, stop, and count."""
        files = {"stdout": "stdout", "file": "file", "tcp": "out.json", "live": "live"}
        paths = {name: self._work / file for name, file in files.items()}
        # The collector makes its file with the first line, and may have been stopped until now.
        until(lambda: all(path.exists() for path in paths.values()), 30)
        _until_quiet(paths.values())
        rss_kib = int(status_of(self.daemon.pid)["VmRSS"].split()[0])
        self.daemon.terminate()
        assert self.daemon.wait(10) == 0
        _until_quiet(paths.values())
        self.rsyslog.stop()
        events = list(_events(paths["stdout"]))
        told = {sink["name"].split()[0]: sink for sink in events[-1]["sinks"]}
        return Result(
            sent,
            {name: _counted(path) for name, path in paths.items()},
            told,
            events[-1]["records_lost"],
            [_latency_ms(event) for event in events if _is_ours(event)],
            rss_kib,
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGCONT)
        process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _until_quiet(paths: Any, timeout_s: float = 120.0) -> None:
    sizes: list[int] = []
    deadline = time.monotonic() + timeout_s
    while sizes != (sizes := [os.stat(path).st_size for path in paths]):
        assert time.monotonic() < deadline
        time.sleep(QUIET_S)


def _has_started(path: Path) -> bool:
    return b'"event":"started"' in path.read_bytes()


def _events(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as lines:
        for line in lines:
            assert line.endswith(b"\n")
            yield json.loads(line)


def _counted(path: Path) -> Counted:
    stalls = lines = missing = 0
    for event in _events(path):
        if event["event"] == "degraded" and event["state"] == "gap":
            missing += event["dropped"]
            continue
        lines += 1
        stalls += _is_ours(event)
    return Counted(stalls, lines, missing)


def _is_ours(event: dict[str, Any]) -> bool:
    # A busy machine has stalls of its own meanwhile.
    return event["event"] == "stall" and (event["blocker"] or {}).get("comm") == "synthetic"


def _latency_ms(event: dict[str, Any]) -> float:
    begun, made = (datetime.fromisoformat(event[key]) for key in ("started_at", "timestamp"))
    return (made - begun).total_seconds() * 1e3 - float(event["duration_ms"])
