"""What the daemon's process leaves behind, maps, and does when it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.injector import Injector, Kind, Mode, Pressure, Truth
from tests.kernel.daemon import COMMAND, UNLIMITED, Daemon, bpf_objects, children
from tests.kernel.daemon import STALLED_CPU as CPU
from tests.slowness import slow

pytestmark = pytest.mark.kernel

MAX_RSS_KIB = 45 * 1024


def gone_within(seconds: float, objects: set[tuple[str, int]]) -> bool:
    """Whether these BPF objects are gone; the kernel frees them a moment later."""
    # Not while the kernel empties the program array: docs/decisions/0004.
    time.sleep(1)
    deadline = time.monotonic() + slow(seconds)
    while objects & bpf_objects():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_memory_and_children(daemon: Daemon) -> None:
    """After start: no child is left, LLVM is not mapped, the daemon is at most 45 MiB large."""
    assert children(daemon.pid) == []
    # Only the names of the files: addresses are hexadecimal and may well hold "bcc".
    mapped = {
        Path(fields[5]).name
        for line in Path(f"/proc/{daemon.pid}/maps").read_text().splitlines()
        if len(fields := line.split(maxsplit=5)) == 6
    }
    assert "libbpf.so.1" in {name[: len("libbpf.so.1")] for name in mapped}
    assert [name for name in mapped if "LLVM" in name or "bcc" in name] == []
    status = Path(f"/proc/{daemon.pid}/status").read_text()
    rss = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    assert rss <= MAX_RSS_KIB


def test_kill_leaves_nothing() -> None:
    """kill -9 leaves no program, map or link in the kernel."""
    before = bpf_objects()
    with Daemon() as daemon:
        loaded = bpf_objects() - before
        assert {kind for kind, _ in loaded} == {"prog", "map", "link"}
        assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
    assert gone_within(5, loaded)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_it(number: signal.Signals) -> None:
    """SIGTERM and SIGINT end it soon, with a ``stopped`` event and status 0."""
    before = bpf_objects()
    with Daemon() as daemon:
        loaded = bpf_objects() - before
        asked = time.monotonic()
        assert daemon.stop(number) == 0
        assert time.monotonic() - asked < slow(2)
        assert daemon.events[-1]["event"] == "stopped"
        assert daemon.said == ""
    assert loaded
    assert gone_within(5, loaded)


def test_duration_ends_it() -> None:
    """``--duration`` stops it by itself."""
    with Daemon("--duration", "0.5") as daemon:
        assert daemon.process.wait(slow(5)) == 0
        stopped = daemon.wait_for(lambda e: e["event"] == "stopped")
        assert stopped["uptime_ms"] >= 500


def test_stop_in_mid_stall_resolves_it() -> None:
    """A stall that is open when the daemon stops gets its one resolved line, which says so."""
    with Daemon() as daemon, Injector(CPU) as injector, Pressure(CPU, Mode.PING) as pressure:
        injector.prepare(Kind.BH_OFF)
        truths: list[Truth] = []
        stall = threading.Thread(
            target=lambda: truths.append(injector.inject(Kind.BH_OFF, 400, pressure=pressure))
        )
        stall.start()
        first = daemon.wait_for(
            lambda e: e["event"] == "stall" and (e["blocker"] or {}).get("comm") == "inj-bh-off"
        )
        assert daemon.stop() == 0
        stall.join()
    assert first["phase"] == "ongoing"
    resolved = [e for e in daemon.stalls("resolved") if e["stall_id"] == first["stall_id"]]
    assert [e["evidence"]["ended"] for e in resolved] == ["shutdown"]
    # The kernel detaches the programs only when the stall is over; the lines do not wait.
    assert daemon.events[-1]["event"] == "stopped"
    assert daemon.events[-1]["read_ns"] < truths[0].end_ns


def test_broken_pipe_ends_it() -> None:
    """When nobody reads standard output any more it stops with one clear line."""
    reading, writing = os.pipe()
    with subprocess.Popen(
        [COMMAND, "run", "--config", UNLIMITED], stdout=writing, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            os.close(writing)
            assert b"started" in os.read(reading, 1 << 16)
            os.close(reading)
            with Injector(CPU) as injector, Pressure(CPU, Mode.PING) as pressure:
                injector.inject(Kind.BH_OFF, 50, pressure=pressure)
            assert process.wait(slow(5)) == 1
        finally:
            # It would be waited for without end.
            process.kill()
        assert process.stderr is not None
        said = process.stderr.read()
    assert "standard output" in said
    assert "Traceback" not in said


def test_overflow_is_counted() -> None:
    """Records that the perf buffer has no room for are counted, and no stall stays open."""
    with Daemon() as daemon, Injector(CPU) as injector, Pressure(CPU, Mode.PING) as pressure:
        injector.prepare(Kind.BH_OFF)
        os.kill(daemon.pid, signal.SIGSTOP)
        try:
            for _ in range(150):
                injector.inject(Kind.BH_OFF, 25, pressure=pressure)
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
        daemon.wait_for(lambda e: e["event"] == "records_lost", 5)
        time.sleep(1)
        assert daemon.stop() == 0
        counted = sum(e["count"] for e in daemon.events if e["event"] == "records_lost")
        stopped = daemon.events[-1]
        assert stopped["records_lost"] == counted > 0
        ids = [e["stall_id"] for e in daemon.stalls()]
        resolved = [e["stall_id"] for e in daemon.stalls("resolved")]
        assert sorted(set(ids)) == sorted(resolved)
