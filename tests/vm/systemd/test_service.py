"""The installed service under a systemd that is process 1: from boot to stop, as shipped.

The tests run in this order against one service; each daemon that has to start anew costs an
emulated CPU half a minute.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.injector import Injector, Kind, Mode, Pressure
from tests.kernel.daemon import STALLED_CPU as CPU
from tests.kernel.daemon import Event, bpf_objects, bpf_objects_of
from tests.unit import schema

pytestmark = pytest.mark.kernel

NAME = "softirq-stalld"
UNIT = f"{NAME}.service"
PROGRAM = f"/usr/bin/{NAME}"
CONFIG = Path(f"/etc/{NAME}/config.toml")
KEPT = Path(f"/var/cache/{NAME}/programs")
EVENTS = Path(f"/var/log/{NAME}/events.jsonl")
ROTATED = EVENTS.with_suffix(".jsonl.1")
CAPABILITIES = ("bpf", "perfmon", "syslog")
MASK = 1 << 39 | 1 << 38 | 1 << 34
START_S = 180.0
WATCHDOG_S = 30.0
STOP_S = 2.0
STALL_MS = 300
TRIES = 10
SLOW = Path("/proc/stalld_slow/slow_bh")
DURATION = Path("/sys/module/stalld_slow/parameters/duration_ms")
PARANOID = Path("/proc/sys/kernel/perf_event_paranoid")
OPEN_EVENT = """
from stalld import perf
perf.open_event(perf.attribute(perf.TYPE_SOFTWARE, perf.SW_DUMMY), 0)
"""


def run(*command: str | Path, check: bool = True) -> str:
    """What a command said in all; it must succeed."""
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0 or not check, (command, done.stdout)
    return done.stdout


def show(name: str, unit: str = UNIT) -> str:
    """A property of a unit."""
    return run("systemctl", "show", "--value", f"--property={name}", unit).strip()


def monotonic_s(name: str, unit: str = UNIT) -> float:
    """When a unit was last in a state, in seconds since boot."""
    return int(show(f"{name}TimestampMonotonic", unit)) / 1e6


def wait_until(holds: Callable[[], object], otherwise: str, timeout_s: float = 60) -> None:
    """Until it holds; what the service said is in the message if it never does."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            said = run("journalctl", "--unit", NAME, "--lines=20", "--no-pager", check=False)
            raise AssertionError(f"{otherwise} within {timeout_s} s\n{said}")
        time.sleep(0.5)


def wait_active() -> int:
    """Until the service has said that it is ready: its pid."""
    wait_until(lambda: show("ActiveState") == "active", "the service is not active", START_S)
    return int(show("MainPID"))


def entries(pid: int) -> list[dict[str, str]]:
    """What the journal holds of a process of the service, oldest first."""
    said = run("journalctl", "--output=json", "--all", f"_PID={pid}", f"_SYSTEMD_UNIT={UNIT}")
    return [json.loads(line) for line in said.splitlines()]


def events(pid: int) -> list[Event]:
    """The events in the journal."""
    messages = [entry["MESSAGE"] for entry in entries(pid)]
    return [json.loads(message) for message in messages if message.startswith("{")]


def events_in(path: Path) -> list[Event]:
    """The events in a file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Stalled(NamedTuple):
    """A stall that was made."""

    pid: int
    symbol: str


def receive(end: socket.socket) -> None:
    """Wait until the socket's time is over."""
    with suppress(BlockingIOError):
        end.recv(1)


def slow_read() -> Stalled:
    """Read a file of the test module, which holds bottom halves off, while a timer expires."""
    affinity = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {CPU})
    try:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 0, 100_000))
            # A timer of the kernel's wheel, on this CPU.
            waiter = threading.Thread(target=receive, args=(ours,))
            waiter.start()
            time.sleep(0.02)
            SLOW.read_bytes()
            waiter.join()
    finally:
        os.sched_setaffinity(0, affinity)
    return Stalled(os.getpid(), "stalld_slow_bh_show")


@contextmanager
def stalls() -> Iterator[Callable[[], Stalled]]:
    """Makes stalls: with the test module where it is built, which costs an emulated CPU least."""
    if SLOW.exists():
        DURATION.write_text(str(STALL_MS))
        yield slow_read
        return
    with Injector(CPU) as injector, Pressure(CPU, Mode.PING) as pressure:

        def inject() -> Stalled:
            truth = injector.inject(Kind.BH_OFF, STALL_MS, pressure=pressure)
            assert truth.symbol is not None
            return Stalled(truth.pid, truth.symbol)

        yield inject


def told_rightly(make: Callable[[], Stalled], told: Callable[[], list[Event]]) -> Event:
    """Make stalls until one is told rightly, by what ``told`` reads: its last line.

    Not the first, maybe: the host takes emulated CPUs away, and nothing tells which stall that is.
    """
    before = {event["timestamp"] for event in told()}
    for _ in range(TRIES):
        made = make()
        time.sleep(0.5)
        for event in told():
            if (
                event["timestamp"] not in before
                and event.get("phase") == "resolved"
                and event["verdict"] == "softirqs_disabled"
                and (event["blocker"] or {}).get("pid") == made.pid
                and any(made.symbol in frame for frame in event["stack"]["kernel"])
            ):
                return event
    raise AssertionError(f"none of {TRIES} stalls is told rightly; the last: {told()[-1:]}")


def mode(path: Path) -> str:
    """Owner, group and permissions."""
    return run("stat", "-c", "%U:%G %a", path).strip()


def user(name: str, *groups: str) -> Sequence[str]:
    """A new user; what runs a command as that one."""
    run("useradd", "--no-create-home", f"--groups={','.join(groups)}", name)
    return ("setpriv", f"--reuid={name}", f"--regid={name}", "--init-groups")


def test_starts_at_boot_before_the_network() -> None:
    """Enabled, it is ready while the network is not there yet, and does not mind when it comes."""
    pid = wait_active()
    assert show("ActiveState", "network-online.target") == "inactive"
    assert show("SubState", "slow-network.service") == "start"
    assert events(pid)[0]["event"] == "started"
    Path("/run/slow-network").write_text("up\n")
    run("ip", "link", "add", "late0", "type", "veth", "peer", "name", "late1")
    run("ip", "link", "set", "late0", "up")
    wait_until(lambda: show("ActiveState", "network-online.target") == "active", "no network comes")
    assert monotonic_s("ActiveEnter") < monotonic_s("ActiveEnter", "network.target")
    wait_until(
        lambda: show("ActiveState", "multi-user.target") == "active", "the boot does not end"
    )
    assert show("NRestarts") == "0"
    assert int(show("MainPID")) == pid


def test_runs_in_its_sandbox() -> None:
    """Its own user that systemd-sysusers made at boot, three capabilities, the filter on."""
    pid = wait_active()
    status = Path(f"/proc/{pid}/status").read_text()
    uid = int(run("id", "--user", NAME))
    assert 0 < uid < 1000
    assert re.search(rf"^Uid:(?:\s+{uid}){{4}}$", status, re.MULTILINE), status
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert re.search(rf"^{name}:\s+{MASK:016x}$", status, re.MULTILINE), status
    assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE)
    assert re.search(r"^Seccomp:\s+2$", status, re.MULTILINE)
    mounts = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    roots = [line.split()[5] for line in mounts if line.split()[4] == "/"]
    assert roots
    assert roots[-1].startswith("ro")
    for path, wanted in (
        (Path(f"/run/{NAME}"), "750"),
        (Path(f"/run/{NAME}/{NAME}.sock"), "660"),
        (KEPT.parent, "700"),
        (KEPT, "600"),
    ):
        assert mode(path) == f"{NAME}:{NAME} {wanted}", path
    (started,) = [event for event in events(pid) if event["event"] == "started"]
    # An emulated CPU has no counters; all else is there as it is for root.
    assert {lack["ability"] for lack in started["missing"]} <= {"NMI sampler"}


def test_perf_events() -> None:
    """Why kernel.perf_event_paranoid is 2 here: above, kernels of Debian's ask for more."""
    caps = ",".join(f"+{name}" for name in CAPABILITIES)
    as_service = (
        *("setpriv", f"--reuid={NAME}", f"--regid={NAME}", "--clear-groups"),
        *(f"--inh-caps=-all,{caps}", f"--ambient-caps=-all,{caps}"),
        *("/usr/bin/python3", "-P", "-c", f"import sys; sys.path.insert(0, '/usr/lib/{NAME}')"),
    )
    command = (*as_service[:-1], f"{as_service[-1]}{OPEN_EVENT}")
    assert PARANOID.read_text() == "2\n"
    run(*command)
    PARANOID.write_text("3")
    try:
        refused = run(*command, check=False)
    finally:
        PARANOID.write_text("2")
    if not refused:
        pytest.skip("CAP_PERFMON is enough on this kernel, whatever the level")
    assert "Permission denied" in refused


def test_events_are_in_the_journal() -> None:
    """A stall is one entry whose MESSAGE is the event, under the unit's name; so is the status."""
    pid = wait_active()
    with stalls() as make:
        told = told_rightly(make, lambda: events(pid))
    (entry,) = [
        entry
        for entry in entries(pid)
        if f'"{told["stall_id"]}"' in entry["MESSAGE"] and '"resolved"' in entry["MESSAGE"]
    ]
    assert schema.parse(f"{entry['MESSAGE']}\n".encode()) == told
    assert entry["_SYSTEMD_UNIT"] == UNIT
    assert entry["SYSLOG_IDENTIFIER"] == NAME
    assert entry["_TRANSPORT"] == "stdout"
    assert entry["PRIORITY"] == "6"
    assert entry["_UID"] == run("id", "--user", NAME).strip()
    assert told["host"] == entry["_HOSTNAME"]
    said = run("systemctl", "status", "--no-pager", "--full", NAME)
    assert "Active: active (running)" in said
    assert re.search(r"^ +Loaded: loaded \(\S+; enabled", said, re.MULTILINE), said
    status = r'^ +Status: "\d+ CPUs, threshold 10 ms; \d+ stalls, the last .*; events: .*"$'
    assert re.search(status, said, re.MULTILINE), said


def test_who_may_tail() -> None:
    """A member of the group sees the stall, and what the service says of itself; others nothing."""
    member = user("watcher", NAME)
    stranger = user("stranger")
    assert NAME in run(*member, "id", "--groups", "--name").split()
    assert run(*member, PROGRAM, "tail", "--stats")
    watch = [*member, PROGRAM, "tail", "--json", "-n", "1", "--event", "stall"]
    with subprocess.Popen(watch, stdout=subprocess.PIPE, text=True) as tail:
        try:
            assert tail.stdout is not None
            assert json.loads(tail.stdout.readline())["event"] == "stall"
            tail.send_signal(signal.SIGINT)
            assert tail.wait(30) == 0
        finally:
            tail.kill()
    refused = subprocess.run(
        [*stranger, PROGRAM, "tail", "--stats"], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert "permission denied" in refused.stderr
    assert "usermod --append --groups" in refused.stderr


def test_reload_and_logrotate() -> None:
    """A file sink comes by reload; logrotate's own service rotates it, and no line is lost."""
    pid = wait_active()
    CONFIG.write_text(f'[[sinks.file]]\npath = "{EVENTS}"\n')
    run("systemctl", "reload", NAME)
    wait_until(EVENTS.exists, "the file is not opened")
    assert mode(EVENTS) == f"{NAME}:{NAME} 640"
    with stalls() as make:
        first = told_rightly(make, lambda: events_in(EVENTS))
    before = events_in(EVENTS)
    assert first in before
    # As if it had last been rotated long ago.
    Path("/var/lib/logrotate/status").write_text(
        f'logrotate state -- version 2\n"{EVENTS}" 2020-1-1-0:0:0\n'
    )
    run("systemctl", "start", "logrotate.service")
    assert show("Result", "logrotate.service") == "success"
    assert events_in(ROTATED)[: len(before)] == before
    with stalls() as make:
        second = told_rightly(make, lambda: events_in(ROTATED) + events_in(EVENTS))
    assert second in events_in(EVENTS)
    assert second["stall_id"] != first["stall_id"]
    assert mode(EVENTS) == mode(ROTATED) == f"{NAME}:{NAME} 640"
    kept = events_in(ROTATED) + events_in(EVENTS)
    told = events(pid)
    begin = told.index(kept[0])
    assert kept == told[begin : begin + len(kept)]

    CONFIG.write_text("detect.threshold_ms = 0\n")
    run("systemctl", "reload", NAME)
    wait_until(lambda: "has errors" in show("StatusText"), "the status does not tell")
    CONFIG.write_text("")
    run("systemctl", "reload", NAME)
    wait_until(lambda: "has errors" not in show("StatusText"), "the status still tells")
    assert int(show("MainPID")) == pid
    assert show("NRestarts") == "0"


def test_killed_it_leaves_nothing_and_comes_again() -> None:
    """kill -9: none of its programs, maps and links is left, and systemd starts it anew.

    With the programs that it had compiled: these tell a stall like the first ones.
    """
    pid = wait_active()
    kept = KEPT.stat()
    ours = bpf_objects_of(pid)
    assert {kind for kind, _ in ours} >= {"prog", "map"}
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "it does not die")
    # The kernel frees them after a grace period.
    wait_until(lambda: not ours & bpf_objects(), "its programs and maps stay", 30)
    wait_until(lambda: show("NRestarts") == "1", "it is not started again", START_S)
    again = wait_active()
    assert again != pid
    (first, second) = (events(of)[0] for of in (pid, again))
    for fact in ("event", "net_rx_action", "structs", "attached", "missing"):
        assert second[fact] == first[fact]
    assert mode(Path(f"/run/{NAME}/{NAME}.sock")) == f"{NAME}:{NAME} 660"
    # Compiled anew they would be in a new file.
    assert (KEPT.stat().st_ino, KEPT.stat().st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns)
    with stalls() as make:
        told_rightly(make, lambda: events(again))


def test_hung_it_is_killed_and_comes_again() -> None:
    """SIGSTOP: the watchdog of the unit as shipped ends it, and systemd starts it anew."""
    pid = wait_active()
    ours = bpf_objects_of(pid)
    os.kill(pid, signal.SIGSTOP)
    stopped = time.monotonic()
    wait_until(
        lambda: not Path(f"/proc/{pid}").exists(), "the watchdog does nothing", 2 * WATCHDOG_S
    )
    assert time.monotonic() - stopped > WATCHDOG_S / 2
    wait_until(lambda: show("NRestarts") == "2", "it is not started again", START_S)
    assert wait_active() != pid
    assert not ours & bpf_objects()
    said = run("journalctl", "--unit", NAME, "--output=cat", "--no-pager")
    assert "Watchdog timeout" in said


def test_stops_at_once() -> None:
    """Within two seconds, with its last event, and nothing left."""
    pid = wait_active()
    ours = bpf_objects_of(pid)
    run("systemctl", "stop", NAME)
    assert show("ActiveState") == "inactive"
    assert show("Result") == "success"
    took_s = monotonic_s("InactiveEnter") - monotonic_s("ActiveExit")
    with suppress(KeyError):
        Path(os.environ["STALLD_TEST_EVIDENCE"], "stop.json").write_text(json.dumps(took_s))
    assert took_s <= STOP_S
    assert events(pid)[-1]["event"] == "stopped"
    assert not Path(f"/run/{NAME}").exists()
    wait_until(lambda: not ours & bpf_objects(), "its programs and maps stay", 30)
