"""What the results depend on besides the code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from stalld import __version__
from stalld.detector import tick_ns
from stalld.host import is_virtual

_ROOT = Path(__file__).parents[1]
_STEAL_COLUMN = 8
_MEASURED = ("stalld", "bpf", "bench", "tests/injector", ":!bench/RESULTS*")
"""What the results depend on, but for themselves."""


def describe() -> list[str]:
    """Facts about this machine and this checkout, one a line."""
    info = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    memory = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    uname = os.uname()
    virtual = ", virtual" if is_virtual() else ""
    load = " ".join(f"{average:.2f}" for average in os.getloadavg())
    python = ".".join(map(str, sys.version_info[:3]))
    return [
        f"date: {time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())}",
        f"kernel: {uname.sysname} {uname.release} {uname.machine}, tick {tick_ns() / 1e6:g} ms",
        f"CPU: {os.cpu_count()} x {model[1].strip() if model else 'unknown'}{virtual}",
        f"memory: {int(memory[1]) >> 10 if memory else 0} MiB",
        f"softirq-stalld {__version__} {_commit()}, Python {python}",
        f"load averages when it began: {load}",
    ]


def loop_ms() -> float:
    """What a fixed piece of Python takes now, at its best.

    No load average and no steal time tells of what shares a core, a cache or a clock with us.
    """
    took = []
    for _ in range(5):
        began = time.perf_counter()
        sum(i * i for i in range(100_000))
        took.append(time.perf_counter() - began)
    return min(took) * 1e3


def steal_s(stat: str = "/proc/stat") -> float:
    """What the hypervisor took from all CPUs, ever."""
    fields = Path(stat).read_text().splitlines()[0].split()
    return int(fields[_STEAL_COLUMN]) / os.sysconf("SC_CLK_TCK")


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = ", changed" if git("status", "--porcelain", "--", *_MEASURED) else ""
    return f"({git('rev-parse', '--short', 'HEAD') or 'no git'}{changed})"
