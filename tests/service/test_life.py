"""The daemon's life: start, reload, watchdog, stop, and what goes wrong meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.injector import Injector, Kind, Mode, Pressure
from tests.injector.records import RecordSource
from tests.kernel.daemon import COMMAND, Daemon, bpf_objects, bpf_objects_of, children
from tests.kernel.daemon import STALLED_CPU as CPU
from tests.service.surroundings import until

pytestmark = pytest.mark.kernel

STOP_S = 2.0


class Files:
    """A configuration and a file of events in a directory of the test's own."""

    def __init__(self, directory: Path) -> None:
        self.config = directory / "config.toml"
        self.events = directory / "events.jsonl"

    def write(self, text: str = "", *, threshold_ms: float = 10, file: bool = True) -> None:
        """Write the configuration."""
        sink = f"[[sinks.file]]\npath = '{self.events}'\n" if file else ""
        self.config.write_text(
            f"detect.threshold_ms = {threshold_ms}\nlive.enabled = false\n"
            f"storm.stalls_per_second = 1000\nstorm.identical_per_minute = 10000\n{text}\n{sink}"
        )

    def wait_for_start(self, process: subprocess.Popen[bytes]) -> None:
        """Wait until the file says that everything is attached."""
        until(lambda: self.events.exists() or process.poll() is not None, 60)
        until(lambda: process.poll() is not None or self.told("started"))
        assert process.poll() is None

    def told(self, event: str) -> list[dict[str, Any]]:
        """Events of that name in the file so far."""
        lines = self.events.read_bytes().split(b"\n")[:-1]
        return [told for line in lines if (told := json.loads(line))["event"] == event]


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


def started(arguments: list[str], **settings: Any) -> subprocess.Popen[bytes]:
    """A daemon, without a wait for its first event."""
    return subprocess.Popen([COMMAND, "run", *arguments], **settings)


def test_stops_while_it_starts(files: Files) -> None:
    """SIGTERM during the start ends it soon and without an event."""
    for delay_s in (0.3, 0.45):
        process = started(["--config", str(files.config)], stdout=subprocess.PIPE)
        time.sleep(delay_s)
        process.terminate()
        asked = time.monotonic()
        out, _ = process.communicate(timeout=10)
        assert time.monotonic() - asked < STOP_S
        assert (process.returncode, out) in ((0, b""), (-signal.SIGTERM, b""))
        assert not Path(f"/proc/{process.pid}").exists()


def full_pipe() -> tuple[int, int]:
    """A pipe without room for one more byte."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    try:
        while True:
            os.write(writing, b"\n" * 4096)
    except BlockingIOError:
        os.set_blocking(writing, True)
    return reading, writing


def test_reader_that_never_reads(files: Files, stalls: tuple[Injector, Pressure]) -> None:
    """It detects on, stops in time, and says how many events nobody took."""
    injector, pressure = stalls
    reading, writing = full_pipe()
    process = started(["--config", str(files.config)], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
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
    os.close(reading)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_forces(files: Files, number: signal.Signals) -> None:
    """While it waits for a reader that never reads, a second signal ends it at once."""
    reading, writing = full_pipe()
    process = started(["--config", str(files.config)], stdout=writing)
    os.close(writing)
    files.wait_for_start(process)
    loaded = bpf_objects_of(process.pid)
    assert {kind for kind, _ in loaded} == {"prog", "map", "link"}
    process.send_signal(number)
    until(lambda: files.told("stopped"))
    process.send_signal(number)
    asked = time.monotonic()
    assert process.wait(5) == -number
    assert time.monotonic() - asked < 0.3
    os.close(reading)
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
        assert [e for e in daemon.stalls() if e["blocker"]["comm"] == "inj-bh-off"] == lines
        files.write(threshold_ms=100)
        reload(daemon, "event='reloaded'")
        injector.inject(Kind.BH_OFF, 50, pressure=pressure)
        time.sleep(0.3)
        assert [e for e in daemon.stalls() if e["blocker"]["comm"] == "inj-bh-off"] == lines
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
        assert told[-1]["blocker"]["comm"] == "inj-bh-off"
    ours = [json.loads(line) for line in daemon.lines]
    theirs = [json.loads(line) for line in files.events.read_text().splitlines()]
    assert ours == theirs
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


def test_command_line_stays_over_the_file(files: Files) -> None:
    """--threshold-ms outlives a reload; the kernel goes by it."""
    files.write(threshold_ms=77)
    with Daemon("--config", str(files.config), "--threshold-ms", "5") as daemon:
        assert daemon.started["threshold_ms"] == 5
        files.write(threshold_ms=88, file=False)
        reload(daemon, "event='reloaded'")
        assert daemon.stop() == 0


def test_sinks_come_and_go(files: Files, stalls: tuple[Injector, Pressure]) -> None:
    """A sink that is added gets what comes from then on, one that is taken away no more."""
    injector, pressure = stalls
    files.write(file=False)
    with Daemon("--config", str(files.config)) as daemon:
        assert daemon.started["sinks"] == ["stdout"]
        injector.inject(Kind.BH_OFF, 50, pressure=pressure)
        files.write()
        reload(daemon, "event='reloaded'")
        daemon.of(injector.inject(Kind.BH_OFF, 50, pressure=pressure))
        moved = files.events.rename(files.events.with_suffix(".1"))
        reload(daemon, "event='reloaded'")
        daemon.of(injector.inject(Kind.BH_OFF, 50, pressure=pressure))
        files.write(file=False)
        reload(daemon, "event='reloaded'")
        daemon.of(injector.inject(Kind.BH_OFF, 50, pressure=pressure))
        assert daemon.stop() == 0
    resolved = [e["stall_id"] for e in daemon.stalls("resolved")]
    kept = [json.loads(line) for line in moved.read_text().splitlines()]
    assert [e["stall_id"] for e in kept if e.get("phase") == "resolved"] == resolved[1:2]
    assert [e["stall_id"] for e in files.told("stall") if e["phase"] == "resolved"] == resolved[2:3]
    sinks = {sink["name"]: sink for sink in daemon.events[-1]["sinks"]}
    assert sinks[f"file {files.events}"]["delivered"] == len(kept) + len(files.told("stall"))


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
    command = ["--config", str(files.config), "--duration", "1"]
    process = started(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    files.wait_for_start(process)
    until(lambda: files.told("stopped"))
    process.send_signal(signal.SIGHUP)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 0
    assert b"reloaded" not in said
    assert json.loads(files.events.read_bytes().splitlines()[-1])["event"] == "stopped"


def test_live_client_that_never_reads(files: Files, tmp_path: Path) -> None:
    """What it did not take is told of at the end."""
    socket_path = tmp_path / "live.sock"
    files.write(f"[live]\nsocket = '{socket_path}'\ngroup = ''")
    text = files.config.read_text().replace("live.enabled = false\n", "")
    files.config.write_text(text)
    with (
        Daemon("--config", str(files.config)) as daemon,
        socket.socket(socket.AF_UNIX) as client,
        RecordSource(daemon.pid, CPU) as source,
    ):
        client.connect(str(socket_path))
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
    process = started(["--config", str(files.config)], stdout=writing)
    os.close(writing)
    assert b"started" in os.read(reading, 1 << 16)
    os.close(reading)
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
    command = [COMMAND, "run", "--config", str(files.config), "--duration", "0.1"]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command], capture_output=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(files.told("started")) == len(files.told("stopped")) == 1


def test_killed_child() -> None:
    """A probe child that is killed is named, and the daemon ends with status 1."""
    with subprocess.Popen(
        [COMMAND, "run"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        until(lambda: children(process.pid))
        os.kill(children(process.pid)[0], signal.SIGKILL)
        out, said = process.communicate(timeout=20)
    assert (process.returncode, out) == (1, "")
    assert "the probe child ended with status -9 before it answered" in said
    assert "Traceback" not in said


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
        ["unshare", "--mount", "sh", "-c", f"{binds} exec {COMMAND} run"],
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
    manager = Manager(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "600000")
    with Daemon("--config", str(files.config)) as daemon:
        ready = manager.heard("READY=1")
        # The probe child could have said so before.
        assert len(manager.said) == 1
        assert "STATUS=2 CPUs, threshold 10 ms; 0 stalls" in ready
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
    manager.socket.close()
