"""What each BPF program costs a run, from the kernel's own statistics.

    python -m bench.hot_path [--against CHECKOUT] [--seconds S]

Runs the daemon, and with ``--against`` the one of another checkout at the same
time, so that both see the very same events; an empty program on each hook is
the limit. The load is a pinned pipe ping-pong (``perf bench sched pipe``) and
a flood of datagrams over loopback. Every pair runs twice, attached in either
order, since the first program on a hook takes the cache misses.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from stalld.probe.btf import VMLINUX_BTF
from stalld.probe.headers import write_tree
from stalld.probe.loader import HOOKS, PROGRAMS, open_btf

HERE = Path(__file__).parents[1]
_BPF_STATS_RUN_TIME = 0
CPU = 1

Cost = dict[str, tuple[int, int]]
"""Program → runs and ns in all."""


def programs() -> dict[int, dict[str, int | str]]:
    """Every BPF program in the kernel, by id."""
    listed = subprocess.run(
        ["bpftool", "--json", "prog", "show"], capture_output=True, text=True, check=True
    )
    return {item["id"]: item for item in json.loads(listed.stdout)}


@contextmanager
def daemon(checkout: Path) -> Iterator[dict[str, int]]:
    """The daemon of ``checkout``, watching; yields its programs' ids by function name."""
    before = set(programs())
    process = subprocess.Popen(
        [sys.executable, "-m", "stalld.cli", "run"],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    drain = threading.Thread(target=lambda: None)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the daemon of {checkout} did not start: run it by hand")
        drain = threading.Thread(target=process.stdout.read, daemon=True)
        drain.start()
        now = programs()
        yield {str(now[i]["name"]): i for i in set(now) - before}
    finally:
        process.terminate()
        process.wait(10)
        drain.join(10)


@contextmanager
def empty() -> Iterator[dict[str, int]]:
    """A program that returns at once, on every hook."""
    from bcc import BPF

    hooks = sorted({HOOKS.get(name, name) for name in PROGRAMS})
    btf = open_btf(VMLINUX_BTF)
    if btf is None:
        raise RuntimeError("this bench needs a kernel with BTF")
    text = "".join(
        f"int empty_{i}(struct bpf_raw_tracepoint_args *ctx) {{ return 0; }}\n"
        for i in range(len(hooks))
    )
    before = set(programs())
    with tempfile.TemporaryDirectory() as tree, ExitStack() as stack:
        os.environ["BCC_KERNEL_SOURCE"] = tree
        bpf = BPF(text=text.encode(), cflags=write_tree(Path(tree), btf))
        lib = ctypes.CDLL("libbpf.so.1")
        for i, hook in enumerate(hooks):
            function = bpf.load_func(f"empty_{i}".encode(), BPF.RAW_TRACEPOINT)
            stack.callback(os.close, lib.bpf_raw_tracepoint_open(hook.encode(), function.fd))
        now = programs()
        names = {f"empty_{i}": hook for i, hook in enumerate(hooks)}
        yield {names[str(now[i]["name"])]: i for i in set(now) - before}
        stack.close()
        bpf.cleanup()


@contextmanager
def statistics_enabled() -> Iterator[None]:
    """The kernel times every run of every program meanwhile."""
    fd = ctypes.CDLL("libbpf.so.1").bpf_enable_stats(_BPF_STATS_RUN_TIME)
    if fd < 0:
        raise RuntimeError("BPF_ENABLE_STATS was refused: run as root on Linux 5.8 or later")
    try:
        yield
    finally:
        os.close(fd)


def load(seconds: float) -> None:
    """Context switches and packets on one CPU."""
    end = time.monotonic() + seconds
    pipe = subprocess.Popen(
        ["taskset", "-c", str(CPU), "perf", "bench", "sched", "pipe", "-l", "100000000"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    affinity = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {CPU})
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as flood:
            while time.monotonic() < end:
                for _ in range(64):
                    flood.sendto(b"x", ("127.0.0.1", 9))
                time.sleep(0.005)
    finally:
        os.sched_setaffinity(0, affinity)
        # perf has a partner, which would wait for it for good.
        os.killpg(pipe.pid, signal.SIGKILL)
        pipe.wait()


def measure(ids: dict[str, int], seconds: float) -> Cost:
    """Runs and time of each program under the load."""
    before = programs()
    with statistics_enabled():
        load(seconds)
        after = programs()

    def grown(number: int, key: str) -> int:
        return int(after[number].get(key, 0)) - int(before[number].get(key, 0))

    return {name: (grown(i, "run_cnt"), grown(i, "run_time_ns")) for name, i in ids.items()}


def rounds(against: Path | None, seconds: float) -> dict[str, dict[str, list[float]]]:
    """Program → who → ns a run, once for each round."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    sides = {"ours": HERE} | ({"against": against} if against else {})
    orders = [list(sides), list(reversed(sides))] * 2
    functions = {function: name for name, function in PROGRAMS.items()}
    for order in orders:
        with ExitStack() as stack:
            ids = {who: stack.enter_context(daemon(sides[who])) for who in order}
            ids["empty"] = stack.enter_context(empty())
            flat = {f"{who} {name}": i for who, own in ids.items() for name, i in own.items()}
            for key, (runs, ns) in measure(flat, seconds).items():
                who, name = key.split(" ", 1)
                full = next((p for f, p in functions.items() if f.startswith(name)), name)
                if runs:
                    found[full][who].append(ns / runs)
    return found


def main() -> int:
    """Print one row a program: ns a run, medians over the rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, help="another checkout of this project")
    parser.add_argument("--seconds", type=float, default=4.0, help="of load, each round")
    arguments = parser.parse_args()
    found = rounds(arguments.against, arguments.seconds)
    print(f"{'ns a run':<22} {'ours':>8} {'against':>8} {'empty':>8}")
    for name in PROGRAMS:
        cells = []
        for row, who in ((name, "ours"), (name, "against"), (HOOKS.get(name, name), "empty")):
            values = found[row][who]
            cells.append(f"{statistics.median(values):8.1f}" if values else f"{'-':>8}")
        print(f"{name:<22} {' '.join(cells)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
