"""What costs more where there is more of something.

    python -m bench.growth [--cpus N]

Possible CPUs: the programs are really loaded for that many, and the kernel tells what each of
their maps takes; what it keeps for each CPU of this machine, and the buffers that the daemon
maps, are counted here and multiplied. Watched threads, stalls a second, readers of live events,
cgroups and the size of the kernel's symbol table are varied and measured. Cgroups are looked
through only for a task that is gone, of which the kernel told no more than its cgroup's number.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from bench.bpf import BenchError, empty, take_over
from bench.command import run
from bench.hot_path import pipe, rounds_of
from bench.processes import Daemon, Piped, cpu_s, end
from bench.row import Figure, Row, differences, plain, row, spread, unmeasured
from stalld.enrich import procfs
from stalld.enrich.kallsyms import Kallsyms
from stalld.probe.btf import VMLINUX_BTF
from stalld.probe.client import ProbeChild, bpf_directory, possible_cpus
from stalld.probe.protocol import Request
from stalld.reader import online_cpus
from tests.injector.records import RecordSource
from tests.kernel.cgroups import Tree
from tests.kernel.daemon import COMMAND, descriptors_of
from tests.kernel.daemon import STALLED_CPU as CPU

CPUS = 256
RATES = (10, 100, 1000)
SECONDS = 2.0
TAILS = 8
TAILED_RATE = 200
CGROUPS, CGROUPS_REMOVE_S, NO_CGROUP = 1000, 60.0, -1
ROUNDS = 4


def measure(cpus: int = CPUS) -> list[Row]:
    """A row for each kind of growth."""
    return [
        *of_cpus(cpus),
        *watched_threads(),
        *stalls_per_second(),
        *readers(),
        *cgroups(),
        *symbols(),
    ]


class Loaded(NamedTuple):
    """The programs, loaded for a number of CPUs: KiB of each map, of which per CPU here, ms."""

    kib: Mapping[str, float]
    percpu_kib: float
    took_ms: float


def of_cpus(cpus: int) -> Iterator[Row]:
    """Memory and start-up."""
    here = possible_cpus()
    _loaded(here)  # What is read for the first time takes longer.
    small, large = _loaded(here), _loaded(cpus)
    # Per-CPU maps are as large as this machine has CPUs, whatever the programs are made for.
    kib = sum(large.kib.values()) + large.percpu_kib * (cpus / here - 1)
    largest = sorted(large.kib, key=lambda name: -large.kib[name])[:3]
    yield row(
        f"BPF maps for {cpus} possible CPUs",
        _mib(kib),
        reference=plain(round(sum(small.kib.values()) / 1024, 1), f"MiB for {here}"),
        why=f"{kib / cpus:.0f} KiB for each CPU; most in {', '.join(largest)}",
    )
    yield row(
        f"compile and attach for {cpus} possible CPUs",
        plain(round(large.took_ms), "ms"),
        reference=plain(round(small.took_ms), f"ms for {here}"),
    )
    with Daemon() as daemon:
        kib, descriptors = _buffers(daemon.pid)
    online = len(online_cpus())
    yield row(
        f"perf buffers of {cpus} CPUs",
        _mib(kib / online * cpus),
        reference=plain(kib / 1024, f"MiB of {online}"),
        why=f"{kib / online:.0f} KiB and {descriptors / online:g} descriptors for each CPU",
    )


def _loaded(cpus: int) -> Loaded:
    request = Request(cpus, str(bpf_directory()), VMLINUX_BTF, nmi="never")
    before = {program["id"] for program in _bpftool("prog")}
    probes = ProbeChild(request).result()
    try:
        # All that are new: those that others end in (tail calls) are attached to nothing.
        used = {
            number
            for program in _bpftool("prog")
            if program["id"] not in before
            for number in program.get("map_ids", [])
        }
        maps = [one for one in _bpftool("map") if one["id"] in used]
        took_ms = (probes.description.compile_ms or 0) + probes.description.attach_ms
    finally:
        probes.close()
    kib: Counter[str] = Counter()
    for one in maps:
        kib[one.get("name", "?")] += one["bytes_memlock"] / 1024
    percpu = sum(one["bytes_memlock"] for one in maps if "percpu" in one["type"]) / 1024
    return Loaded(kib, percpu, took_ms)


def _bpftool(kind: str) -> list[dict[str, Any]]:
    command = ["bpftool", "--json", kind, "show"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    listed: list[dict[str, Any]] = json.loads(done.stdout)
    return listed


def _buffers(pid: int) -> tuple[float, int]:
    """KiB of mapped perf buffers, and how many descriptors of perf events there are."""
    kib = 0.0
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if line.endswith("[perf_event]"):
            first, last = (int(number, 16) for number in line.split()[0].split("-"))
            kib += (last - first) / 1024
    return kib, sum(link.endswith("[perf_event]") for link in descriptors_of(pid))


def watched_threads() -> Iterator[Row]:
    """What a wake-up costs while few and while all kernel threads are watched."""
    with ExitStack() as stack:
        threads, sides = {}, {"empty": stack.enter_context(empty(["sched_wakeup"]))}
        for side, settings in (("few", ""), ("all", 'detect.kthreads = ["*"]')):
            with Daemon(settings) as daemon:
                threads[side] = daemon.started["kthreads"]
                sides[side] = stack.enter_context(take_over(daemon.process))
        (means,) = rounds_of(sides, [lambda: pipe(1.0)], ROUNDS)
    few, many = means["sched_wakeup"]["few"], means["sched_wakeup"]["all"]
    yield row(
        f"a run of sched_wakeup, {threads['all']} threads watched",
        spread(many, "ns"),
        reference=spread(few, "ns"),
        against=differences(many, few, "ns"),
        why=f"the reference watches {threads['few']}, as by default",
    )


def stalls_per_second() -> Iterator[Row]:
    """CPU time of the daemon, which tells each one."""
    with Daemon() as daemon, RecordSource(daemon.pid, CPU) as source:
        for rate in RATES:
            each_us = _each_us(daemon, source, rate)
            yield row(
                f"CPU time at {rate} stalls/s, each told",
                plain(each_us * rate / 1e4, "% of a core"),
                why=f"{each_us:.0f} us for each",
            )


def _each_us(daemon: Piped, source: RecordSource, rate: int) -> float:
    daemon.lines.forget()
    used = cpu_s(daemon.pid)
    # The last ones are read a moment later.
    sent = source.flow(rate, SECONDS, burst=max(1, rate // 100))
    time.sleep(0.3)
    spent_s = cpu_s(daemon.pid) - used
    told = daemon.lines.forget().count(b'"synthetic"')
    if told != sent.sent or sent.lost or not told:
        raise BenchError(f"of {sent.sent} stalls {told} were told, {sent.lost} were lost")
    return spent_s * 1e6 / told


def readers() -> Iterator[Row]:
    """CPU time of the daemon for a line, with and without readers of live events, in turn."""
    alone, tailed = [], []
    with Daemon() as daemon, RecordSource(daemon.pid, CPU) as source:
        for number in range(ROUNDS):
            for with_tails in (number % 2 == 1, number % 2 == 0):
                if with_tails:
                    with _tails(daemon.socket):
                        tailed.append(_each_us(daemon, source, TAILED_RATE))
                else:
                    alone.append(_each_us(daemon, source, TAILED_RATE))
    yield row(
        f"CPU time for a stall, {TAILS} readers of live events",
        spread(tailed, "us"),
        reference=spread(alone, "us"),
        against=differences(tailed, alone, "us"),
        why=f"at {TAILED_RATE} stalls/s; the reference has none",
    )


@contextmanager
def _tails(socket: Path) -> Iterator[None]:
    command = [COMMAND, "tail", "--json", "--socket", str(socket)]
    with ExitStack() as stack:
        tails = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(TAILS)]
        for tail in tails:
            stack.callback(end, tail)
        time.sleep(1.5)
        yield
        if any(tail.poll() is not None for tail in tails):
            raise BenchError("a reader of live events ended before its time")


def cgroups() -> Iterator[Row]:
    """Looking through many, and through a tenth of them, for one that is not there."""
    name = f"looking through {CGROUPS:,} more cgroups for one that is gone"
    mount = procfs.unified_mount()
    if mount is None:
        yield unmeasured(name, "no unified hierarchy is mounted")
        return
    tree = Tree(Path(mount))
    took = []
    try:
        for first, last in ((0, CGROUPS // 10), (CGROUPS // 10, CGROUPS)):
            for number in range(first, last):
                tree.directory(f"pod{number // 10}.slice/container{number}.scope")
            took.append(statistics.median(_search_ms(mount) for _ in range(ROUNDS)))
    finally:
        tree.remove(CGROUPS_REMOVE_S)
    few, many = took
    yield row(
        name,
        plain(many, "ms"),
        reference=plain(few, "ms for a tenth of them"),
        why="pauses included, in a thread for which no line waits; once a second at most",
    )


def _search_ms(mount: str) -> float:
    began = time.monotonic()
    assert procfs.find_cgroup(mount, NO_CGROUP) is None
    return (time.monotonic() - began) * 1e3


def symbols() -> Iterator[Row]:
    """Reading the kernel's symbols at start, all and half of them."""
    lines = Path("/proc/kallsyms").read_bytes().splitlines(keepends=True)
    with tempfile.TemporaryDirectory() as work:
        took = [_read_ms(Path(work, "symbols"), part) for part in (lines, lines[::2])]
    yield row(
        f"reading {len(lines)} symbols of the kernel",
        plain(round(took[0]), "ms"),
        reference=plain(round(took[1]), "ms for half of them"),
    )


def _read_ms(path: Path, lines: Sequence[bytes]) -> float:
    path.write_bytes(b"".join(lines))
    began = time.process_time()
    Kallsyms.load(str(path))
    return (time.process_time() - began) * 1e3


def _mib(kib: float) -> Figure:
    return plain(kib / 1024, "MiB")


if __name__ == "__main__":
    sys.exit(run(__doc__, measure, ("cpus", CPUS, "that a large machine may have")))
