"""What the running service costs, in figures that are the same at each run.

Nanoseconds are the bench's affair. Here: the size of each BPF program that runs all the time and
which helpers it may call, what the daemon's process has loaded, its threads and descriptors. More
than these bounds means that somebody has put work where it is done a million times a second, or
weight on every host: take it off again, or raise the bound knowingly.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from stalld.netwatch import LATE_S
from stalld.probe.attacher import HOOKS, PROGRAMS
from stalld.reader import online_cpus
from tests.kernel.daemon import Daemon, bpf_objects_of, descriptors_of, wakeups

pytestmark = pytest.mark.kernel


class Budget(NamedTuple):
    """Of one program, all its branches together.

    Attributes:
        instructions: after the verifier, which writes helpers out where the kernel can. It does
            more of that in newer kernels, so there is room for a quarter.
        maps: how often it refers to one: a look-up each, or a tail call.
        helpers: that it may call, and at how many places.
    """

    instructions: int
    maps: int
    helpers: Mapping[str, int]


BUDGETS = {
    "sched_switch": Budget(40, 2, {"tail_call": 1}),
    "sched_wakeup": Budget(45, 2, {"tail_call": 1}),
    "softirq_raise": Budget(60, 1, {"ktime_get_ns": 1}),
    "softirq_entry": Budget(
        170,
        3,
        {"ktime_get_ns": 1, "get_current_pid_tgid": 1, "get_current_task": 2, "tail_call": 1},
    ),
    "softirq_exit": Budget(106, 3, {"ktime_get_ns": 1, "tail_call": 1}),
    "napi_poll": Budget(275, 2, {"jiffies64": 1, "probe_read_kernel": 6}),
    "hrtimer_expire_entry": Budget(108, 3, {"ktime_get_ns": 1, "tail_call": 1}),
    "lookback": Budget(
        750,
        3,
        {
            "ktime_get_ns": 1,
            "probe_read_kernel": 16,
            "get_current_pid_tgid": 1,
            "get_current_task": 1,
            "get_current_comm": 1,
            "get_stack": 1,
        },
    ),
}
"""By our name of the program: those that run all the time."""
FREE = {"get_smp_processor_id", "map_lookup_elem"}
"""Helpers of every program, which newer kernels write out; look-ups are counted by their maps."""

MAX_THREADS = 5
MAX_DESCRIPTORS = 45
"""Besides those for each CPU."""
LOOKS = 4
MAX_PERF_EVENTS_PER_CPU = 3
MAX_MODULES = 330
FORBIDDEN = {
    *("bcc", "jsonschema", "pyroute2", "pytest", "hypothesis", "ssl", "_ssl", "_hashlib"),
    *("asyncio.windows_events", "email", "http", "html", "xml", "sqlite3", "multiprocessing"),
    *("unittest", "xmlrpc", "distutils", "setuptools", "pkg_resources", "cffi", "numpy"),
    *("stalld.check", "stalld.tail", "stalld.probe.loader", "stalld.probe.compiler"),
    # Of sinks that nobody has configured:
    *("stalld.sinks.tls", "stalld.sinks.tcp", "stalld.sinks.syslog"),
}
"""What a daemon with its default configuration has no use for."""


def bpftool(*arguments: str) -> Any:
    """What it says, as an object."""
    done = subprocess.run(
        ["bpftool", "--json", *arguments], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def programs(pid: int) -> dict[str, int]:
    """Our name of each program on a hook → its id."""
    ids = {number for kind, number in bpf_objects_of(pid) if kind == "prog"}
    names = {one["name"]: one["id"] for one in bpftool("prog", "show") if one["id"] in ids}
    return {
        ours: number
        for ours, function in PROGRAMS.items()
        for name, number in names.items()
        if name in (function, function[:15])
    }


def cost(number: int) -> Budget:
    """What a loaded program has."""
    text = subprocess.run(
        ["bpftool", "prog", "dump", "xlated", "id", str(number)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    called = re.findall(r"call (?:bpf_)?(\w+)#", text)
    # Those that need a program's context have a name for each type of program.
    helpers = Counter(name.removesuffix("_raw_tp") for name in called if name not in FREE)
    return Budget(
        bpftool("prog", "show", "id", str(number))["bytes_xlated"] // 8,
        len(re.findall(r"map\[id:\d+\]", text)),
        dict(helpers),
    )


def test_programs(daemon: Daemon) -> None:
    """No program that runs all the time is larger, or calls more, than it may."""
    loaded = programs(daemon.pid)
    assert set(BUDGETS) <= set(loaded)
    assert set(HOOKS) <= set(BUDGETS)
    over = {}
    for name, budget in BUDGETS.items():
        found = cost(loaded[name])
        more = {h: n for h, n in found.helpers.items() if n > budget.helpers.get(h, 0)}
        if found.instructions > budget.instructions or found.maps > budget.maps or more:
            over[name] = found
    assert over == {}


def test_threads_and_descriptors(daemon: Daemon) -> None:
    """Few threads whatever the machine's size; three perf events for each CPU, and few others."""
    assert len(os.listdir(f"/proc/{daemon.pid}/task")) <= MAX_THREADS
    links = descriptors_of(daemon.pid)
    perf = sum(link == "anon_inode:[perf_event]" for link in links)
    assert perf <= MAX_PERF_EVENTS_PER_CPU * len(online_cpus())
    assert len(links) - perf <= MAX_DESCRIPTORS


def test_wakeups_of_a_quiet_daemon(tmp_path: Path) -> None:
    """A look at what CPUs and devices count wakes one thread once, and not the loop.

    It has no interrupt of its own where another one is near.
    """
    config = tmp_path / "config.toml"
    config.write_text("live.enabled = false\nsoftnet.interval_s = 1.0\n")
    with Daemon("--config", str(config), "--threshold-ms", "5000") as daemon:
        time.sleep(2.5)
        before = wakeups(daemon.pid)
        time.sleep(LOOKS)
        assert wakeups(daemon.pid) - before in range(LOOKS - 1, 2 * LOOKS + 1)
        threads = os.listdir(f"/proc/{daemon.pid}/task")
        slacks = [int(Path(f"/proc/{tid}/timerslack_ns").read_text()) for tid in threads]
        assert slacks.count(round(LATE_S * 1e9)) == 1


def test_imports(tmp_path: Path) -> None:
    """The daemon imports nothing that it has no use for; bcc lives and dies in its child."""
    config = tmp_path / "config.toml"
    config.write_text(f"live.socket = '{tmp_path}/live.sock'\nlive.group = ''\n")
    command = ["run", "--duration", "0.1", "--config", str(config)]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "stalld.cli", *command],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    lines = (line for line in done.stderr.splitlines() if line.startswith("import time:"))
    modules = {line.rpartition("|")[2].strip() for line in lines}
    assert {"stalld.service", "stalld.sinks.live"} <= modules
    found = {m for m in modules if any(m == f or m.startswith(f"{f}.") for f in FORBIDDEN)}
    assert found == set()
    assert len(modules) <= MAX_MODULES
