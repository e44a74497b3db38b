"""A real task with a hostile name stalls a CPU: every output stays what it must be."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.injector import Mode, Pressure
from tests.kernel.daemon import COMMAND, Event
from tests.kernel.daemon import STALLED_CPU as CPU
from tests.service.surroundings import until

pytestmark = pytest.mark.kernel

NAME = b'\n\x1b[2J\xff\xe2\x80\xae\x07\r"'
SHOWN = '\n\x1b[2J\\xff\u202e\x07\r"'
# Named so, it has the CPU to itself for 100 ms, as a real-time task in user mode.
CULPRIT = """
import ctypes, os, sys, time
ctypes.CDLL(None).prctl(15, ctypes.c_char_p(bytes.fromhex(sys.argv[1])), 0, 0, 0)
os.sched_setaffinity(0, {int(sys.argv[2])})
os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
end = time.monotonic() + 0.1
while time.monotonic() < end:
    pass
"""


def stall() -> None:
    """One stall by a task of that name."""
    with Pressure(CPU, Mode.FLOOD) as pressure, pressure.active():
        subprocess.run(
            [sys.executable, "-c", CULPRIT, NAME.hex(), str(CPU)], check=True, timeout=10
        )


def test_hostile_name(tmp_path: Path) -> None:
    """JSON is one valid line and tells the name; text and terminals get no control character."""
    config, socket = tmp_path / "config.toml", tmp_path / "live.sock"
    config.write_text(
        f"live = {{ socket = '{socket}', group = '' }}\n"
        f"sinks.file = [{{ path = '{tmp_path / 'events'}' }}]\n"
        "storm = { stalls_per_second = 1000, identical_per_minute = 10000 }\n"
    )
    with (tmp_path / "text").open("wb") as text, (tmp_path / "tail").open("wb") as live:
        daemon = subprocess.Popen(
            [COMMAND, "run", "--format", "text", "--config", str(config)], stdout=text
        )
        try:
            until(lambda: socket.exists() and (tmp_path / "events").exists(), 60)
            tail = subprocess.Popen(
                [COMMAND, "tail", "--since-start", "--socket", str(socket)], stdout=live
            )
            try:
                deadline = time.monotonic() + 10
                while not blamed(tmp_path / "events") and time.monotonic() < deadline:
                    stall()
                    time.sleep(0.2)
                assert blamed(tmp_path / "events")
                until(lambda: b"cpu_contention" in (tmp_path / "tail").read_bytes())
            finally:
                tail.send_signal(signal.SIGINT)
                assert tail.wait(5) == 0
        finally:
            daemon.terminate()
            assert daemon.wait(10) == 0
    for name in ("text", "tail"):
        shown = (tmp_path / name).read_text(encoding="utf-8", errors="strict")
        assert "[2J" in shown
        assert all(c.isprintable() or c == "\n" for c in shown)


def blamed(path: Path) -> list[Event]:
    """The stalls of that task; every line must be valid JSON."""
    events = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    return [event for event in events if (event.get("blocker") or {}).get("comm") == SHOWN]
