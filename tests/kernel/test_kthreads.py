"""Other kernel threads than ksoftirqd: NAPI threads of a veth pair of our own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.injector import Injector, Kind
from tests.kernel.daemon import STALLED_CPU as CPU
from tests.kernel.daemon import THRESHOLD_MS, Daemon

pytestmark = pytest.mark.kernel

# In namespaces of its own, which end with it: a veth pair whose receiving end polls in a thread.
# It tells the thread's pid; then each line makes it send a frame every millisecond for 0.15 s.
SENDER = f"""
import ctypes, fcntl, os, socket, struct, subprocess, sys, time
def run(*command):
    subprocess.run(command, check=True)
run("mount", "-t", "sysfs", "none", "/sys")
run("ip", "link", "add", "napi-in", "up", "type", "veth", "peer", "name", "napi-out")
run("ip", "link", "set", "napi-out", "up")
def ethtool(device, command, value):
    buffer = ctypes.create_string_buffer(struct.pack("=II", command, value))
    request = struct.pack("16sP16x", device, ctypes.addressof(buffer))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, 0x8946, request)
# include/uapi/linux/ethtool.h: ETHTOOL_SGRO, ETHTOOL_STSO. A veth has NAPI while GRO is on, and
# uses it for every frame when its peer does not do segmentation.
ethtool(b"napi-in", 0x2C, 1)
ethtool(b"napi-out", 0x1F, 0)
with open("/sys/class/net/napi-in/threaded", "w") as file:
    file.write("1")
deadline = time.monotonic() + 5
pid = None
while pid is None and time.monotonic() < deadline:
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            comm = open("/proc/" + name + "/comm").read()
        except OSError:
            continue
        if comm.startswith("napi/napi-in"):
            pid = int(name)
os.sched_setaffinity(pid, {{{CPU}}})
os.sched_setaffinity(0, set(range(os.cpu_count())) - {{{CPU}}})
print(pid, flush=True)
out = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
out.bind(("napi-out", 0))
for _ in sys.stdin:
    end = time.monotonic() + 0.15
    while time.monotonic() < end:
        out.send(b"\\xff" * 6 + bytes(6) + b"\\x88\\xb5" + bytes(46))
        time.sleep(0.001)
"""


class NapiThread:
    """A device that polls in a thread pinned to ``CPU``, and a sender elsewhere."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self.pid = int(process.stdout.readline())
        self._process = process

    def send(self) -> None:
        """Begin to send a frame every millisecond, for 0.15 s."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()


@pytest.fixture
def napi_thread() -> Iterator[NapiThread]:
    """Set up before the daemon, which looks for threads when it starts."""
    process = subprocess.Popen(
        ["unshare", "--net", "--mount", sys.executable, "-c", SENDER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield NapiThread(process)
    finally:
        process.kill()
        process.communicate()


def test_a_napi_thread_waits(napi_thread: NapiThread) -> None:
    """A NAPI thread kept from its CPU is named with its wait, and who keeps it is blamed."""
    assert Path(f"/proc/{napi_thread.pid}/comm").read_text().startswith("napi/napi-in")
    with Daemon() as daemon, Injector(CPU) as injector:
        injector.prepare(Kind.PREEMPT_OFF)
        found = []
        for _ in range(5):
            napi_thread.send()
            time.sleep(0.02)
            truth = injector.inject(Kind.PREEMPT_OFF, 80)
            time.sleep(0.15)
            found.append((truth, daemon.of(truth)))
    assert daemon.started["kthreads"] > os.cpu_count()
    for truth, lines in found:
        assert lines[0]["phase"] == "ongoing"
        resolved = lines[-1]
        waits = {w["pid"]: w for w in resolved["waiting"]}
        assert napi_thread.pid in waits, resolved["waiting"]
        wait = waits[napi_thread.pid]
        assert wait["comm"].startswith("napi/napi-in")
        assert 80 - THRESHOLD_MS <= wait["runnable_ms"] <= truth.duration_ms + 5
        assert resolved["verdict"] == "stuck_in_kernel"
        assert resolved["blocker"]["tid"] == truth.tid
        assert resolved["evidence"]["ended"] == "record"
    assert daemon.events[-1]["missed_services"] == 0
    assert any(n["device"] == "napi-in" and n["polls"] for n in daemon.events[-1]["napi"])
