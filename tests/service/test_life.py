"""The daemon's life: start, reload, watchdog, stop, and what goes wrong meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import pytest

from stalld.live_request import PROTOCOL
from stalld.records import LOOKBACK_SAMPLES
from tests.injector import Injector, Kind, Mode, Pressure, system
from tests.injector.records import RecordSource
from tests.kernel.daemon import (
    COMMAND,
    START_S,
    UNLIMITED,
    Daemon,
    Event,
    bpf_objects,
    bpf_objects_of,
    children,
)
from tests.kernel.daemon import STALLED_CPU as CPU
from tests.service.live import Client
from tests.service.surroundings import started, status_of, until

pytestmark = pytest.mark.kernel

STOP_S = 2.0
FORCED_S = 0.8
"""A second signal ends it within this time: it does not wait for its readers, who have a second."""


class Files:
    """A configuration, a file of events and a live socket in a directory of the test's own."""

    def __init__(self, directory: Path) -> None:
        self.config = directory / "config.toml"
        self.events = directory / "events.jsonl"
        self.socket = directory / "live.sock"
        self.command = [COMMAND, "run", "--config", str(self.config)]

    def write(
        self, text: str = "", *, threshold_ms: float = 10, file: bool = True, live: bool = False
    ) -> None:
        """Write the configuration."""
        sink = f"[[sinks.file]]\npath = '{self.events}'\n" if file else ""
        served = f"{{ socket = '{self.socket}', group = '' }}" if live else "{ enabled = false }"
        self.config.write_text(
            f"detect.threshold_ms = {threshold_ms}\nlive = {served}\n"
            f"storm.stalls_per_second = 1000\nstorm.identical_per_minute = 10000\n{text}\n{sink}"
        )

    def wait_for_start(self, process: subprocess.Popen[bytes]) -> None:
        """Wait until the file says that everything is attached."""
        until(lambda: self.events.exists() or process.poll() is not None, START_S)
        until(lambda: process.poll() is not None or self.told("started"))
        assert process.poll() is None

    def told(self, event: str) -> list[Event]:
        """Events of that name in the file so far."""
        return [told for told in events_of(self.events) if told["event"] == event]


def events_of(path: Path) -> list[Event]:
    """The whole lines of a file of events."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def resolved_in(path: Path) -> list[str]:
    """The ids of stalls whose last line is in a file of events."""
    return [event["stall_id"] for event in events_of(path) if event.get("phase") == "resolved"]


def blamed(event: Event) -> str | None:
    """Whom a stall names; None: nobody, as when the hypervisor had the CPU."""
    comm: str | None = (event["blocker"] or {}).get("comm")
    return comm


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """With a configuration that has a file sink."""
    made = Files(tmp_path)
    made.write()
    return made


@pytest.fixture
def stalls() -> Iterator[tuple[Injector, Pressure]]:
    """What makes stalls of bottom halves."""
    with Injector(CPU) as injector, Pressure(CPU, Mode.PING) as pressure:
        injector.prepare(Kind.BH_OFF)
        yield injector, pressure


def reload(daemon: Daemon, said: str) -> None:
    """Send SIGHUP and wait until the daemon's log says what came of it."""
    already = daemon.log().count(said)
    os.kill(daemon.pid, signal.SIGHUP)
    until(lambda: daemon.log().count(said) > already)


def command_line(pid: int) -> bytes:
    """Of a process; empty when it is over."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def probe_child(daemon: int) -> int:
    """Wait for a daemon's child to be a program of its own, which compiles; its pid."""

    def found() -> list[int]:
        return [pid for pid in children(daemon) if b"stalld.probe" in command_line(pid)]

    until(found, START_S, "a probe child")
    return found()[0]


def takes(pid: int, number: int) -> bool:
    """Whether a process handles a signal itself."""
    return bool(int(status_of(pid)["SigCgt"], 16) & 1 << (number - 1))


def test_stops_before_it_takes_signals(files: Files, tmp_path: Path) -> None:
    """SIGTERM so early ends it as any program, without an event, and its child with it."""
    # It is held where it would import its event loop.
    (tmp_path / "uvloop.py").write_text("import signal\nsignal.pause()\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    with started(files.command, stdout=subprocess.PIPE, env=environment) as process:
        child = probe_child(process.pid)
        process.terminate()
        out, _ = process.communicate(timeout=10)
        assert (process.returncode, out) == (-signal.SIGTERM, b"")
        until(lambda: not command_line(child))


def test_stops_while_it_compiles(files: Files) -> None:
    """SIGTERM ends it soon, in order and without an event, and its child with it."""
    with started(files.command, stdout=subprocess.PIPE) as process:
        child = probe_child(process.pid)
        # It is held: it would be done before long.
        os.kill(child, signal.SIGSTOP)
        until(lambda: takes(process.pid, signal.SIGTERM))
        process.terminate()
        asked = time.monotonic()
        out, _ = process.communicate(timeout=10)
        assert time.monotonic() - asked < STOP_S
        assert (process.returncode, out) == (0, b"")
        assert not command_line(child)


@contextmanager
def full_pipe() -> Iterator[int]:
    """The writing end of a pipe without room for one more byte, which nobody reads."""
    reading, writing = os.pipe()
    try:
        os.set_blocking(writing, False)
        with suppress(BlockingIOError):
            while True:
                os.write(writing, b"\n" * 4096)
        os.set_blocking(writing, True)
        yield writing
    finally:
        os.close(reading)
        os.close(writing)


def test_reader_that_never_reads(files: Files, stalls: tuple[Injector, Pressure]) -> None:
    """It detects on, stops in time, and says how many events nobody took."""
    injector, pressure = stalls
    with (
        full_pipe() as writing,
        started(files.command, stdout=writing, stderr=subprocess.PIPE) as process,
    ):
        files.wait_for_start(process)
        injector.inject(Kind.BH_OFF, 50, pressure=pressure)
        until(lambda: any(e["phase"] == "resolved" for e in files.told("stall")))
        process.terminate()
        asked = time.monotonic()
        _, said = process.communicate(timeout=10)
        assert time.monotonic() - asked < STOP_S
        assert process.returncode == 0
    assert b"events could not be delivered" in said
    (stopped,) = files.told("stopped")
    sinks = {sink["name"]: sink for sink in stopped["sinks"]}
    assert sinks["stdout"]["delivered"] == 0
    assert sinks["stdout"]["queued"] == sinks[f"file {files.events}"]["delivered"] >= 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_forces(files: Files, number: signal.Signals) -> None:
    """While it waits for a reader that never reads, a second signal ends it at once."""
    with full_pipe() as writing, started(files.command, stdout=writing) as process:
        files.wait_for_start(process)
        loaded = bpf_objects_of(process.pid)
        assert {kind for kind, _ in loaded} == {"prog", "map", "link"}
        process.send_signal(number)
        until(lambda: files.told("stopped"))
        process.send_signal(number)
        asked = time.monotonic()
        assert process.wait(5) == -number
        assert time.monotonic() - asked < FORCED_S
    # Not while the kernel empties the program array: docs/decisions/0004.
    time.sleep(1)
    until(lambda: not loaded & bpf_objects())


def test_reload_changes_the_threshold(files: Files, stalls: tuple[Injector, Pressure]) -> None:
    """After SIGHUP the new threshold counts, up and down, without a new start."""
    injector, pressure = stalls
    files.write(threshold_ms=100)
    with Daemon("--config", str(files.config)) as daemon:
        injector.inject(Kind.BH_OFF, 50, pressure=pressure)
        files.write(threshold_ms=10)
        reload(daemon, "event='reloaded'")
        truth = injector.inject(Kind.BH_OFF, 50, pressure=pressure)
        lines = daemon.of(truth)
        assert lines[-1]["verdict"] == "softirqs_disabled"
        assert [e for e in daemon.stalls() if blamed(e) == "inj-bh-off"] == lines
        files.write(threshold_ms=100)
        reload(daemon, "event='reloaded'")
        injector.inject(Kind.BH_OFF, 50, pressure=pressure)
        time.sleep(0.3)
        assert [e for e in daemon.stalls() if blamed(e) == "inj-bh-off"] == lines
        assert daemon.stop() == 0


@contextmanager
def timers() -> Iterator[None]:
    """On the stalled CPU one of the kernel's timers is always about to expire within 100 ms."""

    def wait() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as nobodys:
            # Not settimeout(): poll() waits with an hrtimer, which is none of the vector TIMER.
            within = struct.pack("ll", 0, 100_000)
            nobodys.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, within)
            while True:
                with suppress(BlockingIOError):
                    nobodys.recv(1)

    pid = system.fork_task("timers", CPU, wait)
    try:
        yield
    finally:
        system.end_task(pid)


TAKEN_UP: dict[str, Callable[[Event], bool]] = {
    "vectors = ['TIMER']": lambda stall: set(stall["starved"]) == {"TIMER"},
    "lookback = false": lambda stall: not stall["lookback"],
    "max_samples = 1": lambda stall: stall["evidence"]["samples"] <= 1,
}
"""Settings of ``[detect]``, and what shows in a long stall that one of them is in force."""


@pytest.mark.parametrize("setting", TAKEN_UP)
def test_reload_changes_what_is_seen(
    files: Files, stalls: tuple[Injector, Pressure], setting: str
) -> None:
    """After SIGHUP stalls are told by what then is watched, kept and sampled."""
    injector, pressure = stalls
    taken_up = TAKEN_UP[setting]
    with Daemon("--config", str(files.config)) as daemon, timers():

        def stall() -> Event:
            # The second: the first one's ticks are what it may look back on.
            injector.inject(Kind.BH_OFF, 200, pressure=pressure)
            return daemon.of(injector.inject(Kind.BH_OFF, 200, pressure=pressure))[-1]

        before = stall()
        assert "NET_RX" in before["starved"]
        assert not taken_up(before)
        files.write(f"detect.{setting}")
        reload(daemon, "event='reloaded'")
        # What was kept until then is soon too old.
        time.sleep(2 * LOOKBACK_SAMPLES * max(daemon.started["tick_ms"], 4) / 1000)
        after = stall()
        assert taken_up(after), after
        assert daemon.stop() == 0


def test_reloads_lose_nothing(files: Files, stalls: tuple[Injector, Pressure]) -> None:
    """Every stall is told exactly once, in every sink, while the configuration is reloaded."""
    injector, pressure = stalls
    with Daemon("--config", str(files.config)) as daemon:
        truths = []
        for turn in range(15):
            # A changed queue makes it a new sink, one that stays is opened again.
            files.write(f"sinks.stdout.queue_kib = {1000 + turn}", threshold_ms=10 + turn / 10)
            os.kill(daemon.pid, signal.SIGHUP)
            truths.append(injector.inject(Kind.BH_OFF, 40, pressure=pressure))
        lines = [daemon.of(truth) for truth in truths]
        assert daemon.stop() == 0
    ids = [told[0]["stall_id"] for told in lines]
    assert len(set(ids)) == len(truths)
    for told in lines:
        assert [e["phase"] for e in told].count("resolved") == 1
        assert blamed(told[-1]) in ("inj-bh-off", None)
    ours = [json.loads(line) for line in daemon.lines]
    assert ours == events_of(files.events)
    assert all(sink["dropped"] == 0 for sink in ours[-1]["sinks"])


def test_bad_file_changes_nothing(files: Files, stalls: tuple[Injector, Pressure]) -> None:
    """A file with errors is told of in full and leaves everything as it was, until mended."""
    injector, pressure = stalls
    with Daemon("--config", str(files.config)) as daemon:
        good = files.config.read_text()
        files.config.write_text("detect.threshold_ms = 'slow'\nfoo = 1\n")
        os.kill(daemon.pid, signal.SIGHUP)
        told = daemon.wait_for(lambda e: e["event"] == "degraded")
        assert (told["what"], told["state"], told["level"]) == ("configuration", "begun", "warning")
        assert told["name"] == str(files.config)
        for fault in ('detect.threshold_ms: "slow" is not a number', "foo: unknown key"):
            assert f"{files.config}: {fault}" in told["reason"]
        assert told["effect"] == "the settings of before stay in force"
        truth = injector.inject(Kind.BH_OFF, 50, pressure=pressure)
        assert daemon.of(truth)[-1]["verdict"] == "softirqs_disabled"
        files.config.unlink()
        os.kill(daemon.pid, signal.SIGHUP)
        daemon.wait_for(lambda e: e["event"] == "degraded" and "cannot be read" in e["reason"])
        files.config.write_text(good)
        reload(daemon, "event='reloaded'")
        daemon.wait_for(lambda e: e["event"] == "degraded" and e["state"] == "ended")
        assert daemon.stop() == 0
    assert [e["state"] for e in files.told("degraded")] == ["begun", "begun", "ended"]


def test_command_line_stays_over_the_file(files: Files, stalls: tuple[Injector, Pressure]) -> None:
    """--threshold-ms outlives a reload; the kernel goes by it."""
    injector, pressure = stalls
    files.write(threshold_ms=77)
    with Daemon("--config", str(files.config), "--threshold-ms", "5") as daemon:
        assert daemon.started["threshold_ms"] == 5
        files.write(threshold_ms=88, file=False)
        reload(daemon, "event='reloaded'")
        lines = daemon.of(injector.inject(Kind.BH_OFF, 30, pressure=pressure))
        assert "NET_RX" in lines[-1]["starved"]
        assert daemon.stop() == 0


def test_sinks_come_and_go(files: Files, stalls: tuple[Injector, Pressure]) -> None:
    """A sink that is added gets what comes from then on, one that is taken away no more."""
    injector, pressure = stalls
    files.write(file=False)
    with Daemon("--config", str(files.config)) as daemon:
        assert daemon.started["sinks"] == ["stdout"]

        def stall() -> str:
            # All its lines are there: what changes then changes after it.
            lines = daemon.of(injector.inject(Kind.BH_OFF, 50, pressure=pressure))
            return str(lines[-1]["stall_id"])

        early = stall()
        files.write()
        reload(daemon, "event='reloaded'")
        first = stall()
        # What its thread has not written when it opens the file anew goes there.
        until(lambda: first in resolved_in(files.events))
        moved = files.events.rename(files.events.with_suffix(".1"))
        reload(daemon, "event='reloaded'")
        second = stall()
        files.write(file=False)
        reload(daemon, "event='reloaded'")
        late = stall()
        assert daemon.stop() == 0
    ours = {early, first, second, late}
    assert len(ours) == 4
    # The machine may have stalls of its own besides.
    assert [one for one in resolved_in(moved) if one in ours] == [first]
    assert [one for one in resolved_in(files.events) if one in ours] == [second]
    lines = len(events_of(moved)) + len(events_of(files.events))
    sinks = {sink["name"]: sink for sink in daemon.events[-1]["sinks"]}
    assert sinks[f"file {files.events}"]["delivered"] == lines


def test_settings_that_cannot_be_read_to_their_end(files: Files) -> None:
    """Who waits for a file (a hung NFS, here a pipe) stops in time all the same."""
    with Daemon("--config", str(files.config)) as daemon:
        files.config.unlink()
        os.mkfifo(files.config)
        os.kill(daemon.pid, signal.SIGHUP)
        time.sleep(0.3)
        daemon.process.terminate()
        asked = time.monotonic()
        until(lambda: files.told("stopped"))
        assert time.monotonic() - asked < STOP_S
        with files.config.open("w") as config:
            config.write("detect.threshold_ms = 5\n")
        assert daemon.process.wait(STOP_S) == 0
    assert "event='reloaded'" not in daemon.said


def test_no_reload_after_the_end(files: Files) -> None:
    """While the last events are delivered no sink is opened any more."""
    files.write("[[sinks.tcp]]\naddress = '127.0.0.1:1'")
    command = [*files.command, "--duration", "1"]
    with started(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        files.wait_for_start(process)
        until(lambda: files.told("stopped"))
        process.send_signal(signal.SIGHUP)
        _, said = process.communicate(timeout=10)
        assert process.returncode == 0
    assert b"reloaded" not in said
    assert events_of(files.events)[-1]["event"] == "stopped"


def test_live_hello(files: Files, stalls: tuple[Injector, Pressure]) -> None:
    """Who connects is told first which run of which daemon it talks to, and how that does."""
    injector, pressure = stalls
    files.write(live=True)
    with Daemon("--config", str(files.config)) as daemon:
        lines = daemon.of(injector.inject(Kind.BH_OFF, 50, pressure=pressure))
        with Client(files.socket, {"stats": True}) as client:
            hello = client.line()
    assert hello is not None
    assert hello["live"] == PROTOCOL
    assert lines[0]["stall_id"].startswith(f"{hello['run']}-")
    for name in ("version", "kernel", "threshold_ms"):
        assert hello[name] == daemon.started[name], name
    assert hello["uptime_ms"] > 0
    assert hello["stalls"] >= 1
    assert hello["records_lost"] == 0
    assert [sink["name"] for sink in hello["sinks"]] == daemon.started["sinks"]
    assert len(hello["sinks"]) == 3
    # `started`, and this stall.
    assert hello["sinks"][0]["delivered"] >= 1 + len(lines)
    for sink in hello["sinks"]:
        assert sink.keys() == {"name", "delivered", "queued", "dropped"}


def test_live_client_that_never_reads(files: Files) -> None:
    """What it did not take is told of at the end."""
    files.write(live=True)
    with (
        Daemon("--config", str(files.config)) as daemon,
        socket.socket(socket.AF_UNIX) as client,
        RecordSource(daemon.pid, CPU) as source,
    ):
        client.connect(str(files.socket))
        client.sendall(b"{}\n")
        assert client.recv(1)
        source.flow(500, 1.0)
        assert daemon.stop() == 0
    assert "events could not be delivered" in daemon.said
    assert "sink=live" in daemon.said.replace("'", "")


def test_stdout_lost_and_a_file_left(files: Files, stalls: tuple[Injector, Pressure]) -> None:
    """Without a reader of standard output it goes on, and says so where it still can."""
    injector, pressure = stalls
    reading, writing = os.pipe()
    with started(files.command, stdout=writing) as process:
        os.close(writing)
        with os.fdopen(reading, "rb"):
            files.wait_for_start(process)
            assert b"started" in os.read(reading, 1 << 16)
        injector.inject(Kind.BH_OFF, 50, pressure=pressure)
        until(lambda: files.told("degraded"))
        (told,) = files.told("degraded")
        assert (told["name"], told["state"]) == ("stdout", "begun")
        process.terminate()
        assert process.wait(5) == 0
    assert files.told("stopped")


def test_stdout_not_wanted(files: Files) -> None:
    """Events that go elsewhere need no standard output: it may be closed."""
    files.write("sinks.stdout.enabled = false")
    command = [*files.command, "--duration", "0.1"]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command], capture_output=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(files.told("started")) == len(files.told("stopped")) == 1


def test_killed_child() -> None:
    """A probe child that is killed is named, and the daemon ends with status 1."""
    command = [COMMAND, "run", "--config", UNLIMITED]
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        os.kill(probe_child(process.pid), signal.SIGKILL)
        out, said = process.communicate(timeout=20)
    assert (process.returncode, out) == (1, b"")
    assert b"the probe child ended with status -9 before it answered" in said
    assert b"Traceback" not in said


@pytest.mark.parametrize(
    ("library", "named"), [("libbpf.so.1", "libbpf1"), ("libbcc.so.0", "python3-bpfcc")]
)
def test_missing_library(library: str, named: str) -> None:
    """A library that cannot be loaded is named with its package; exit status 1."""
    found = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=True).stdout
    paths = [
        line.split(" => ")[1] for line in found.splitlines() if line.strip().startswith(library)
    ]
    binds = "".join(f"mount --bind /dev/null {os.path.realpath(path)} && " for path in paths)
    assert binds
    assert shutil.which("unshare")
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", f"{binds} exec {COMMAND} run --config {UNLIMITED}"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert library in done.stderr
    assert f"{named}" in done.stderr
    assert "Traceback" not in done.stderr


class Manager:
    """The service manager's end of sd_notify."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.said: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def heard(self, wanted: str, timeout_s: float = 5.0) -> str:
        """Wait for a message that has this line, or a line that begins so."""
        deadline = time.monotonic() + timeout_s
        while True:
            self.socket.settimeout(max(0.01, deadline - time.monotonic()))
            message = self.socket.recv(4096).decode()
            self.said.append(message)
            if any(line.startswith(wanted) for line in message.splitlines()):
                return message

    def quiet(self, seconds: float) -> list[str]:
        """What comes within a time."""
        deadline = time.monotonic() + seconds
        came = []
        while (left := deadline - time.monotonic()) > 0:
            self.socket.settimeout(left)
            try:
                came.append(self.socket.recv(4096).decode())
            except TimeoutError:
                break
        return came


def test_service_manager(
    files: Files, tmp_path: Path, stalls: tuple[Injector, Pressure], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told when all is ready, how it goes, of reloads and the end, and fed meanwhile."""
    injector, pressure = stalls
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "600000")
    with (
        Manager(tmp_path / "notify") as manager,
        Daemon("--config", str(files.config)) as daemon,
    ):
        ready = manager.heard("READY=1")
        # The probe child could have said so before.
        assert len(manager.said) == 1
        assert f"STATUS={len(system.online_cpus())} CPUs, threshold 10 ms; " in ready
        for _ in range(3):
            manager.heard("WATCHDOG=1", 0.6)
        injector.inject(Kind.BH_OFF, 50, pressure=pressure)
        until(lambda: "softirqs_disabled by inj-bh-off" in manager.heard("STATUS="))
        os.kill(daemon.pid, signal.SIGSTOP)
        time.sleep(0.1)
        manager.quiet(0.1)
        assert manager.quiet(1.0) == []
        os.kill(daemon.pid, signal.SIGCONT)
        manager.heard("WATCHDOG=1", 1.0)
        os.kill(daemon.pid, signal.SIGHUP)
        assert "MONOTONIC_USEC=" in manager.heard("RELOADING=1")
        manager.heard("READY=1")
        files.config.write_text("foo = 1\n")
        os.kill(daemon.pid, signal.SIGHUP)
        manager.heard("RELOADING=1")
        assert "the configuration file has errors" in manager.heard("READY=1")
        assert daemon.stop() == 0
        manager.heard("STOPPING=1")
