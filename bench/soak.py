"""Real load and nothing injected: every stall must be explained by its own evidence.

    python -m bench.soak [--seconds S] [--threshold-ms N] [--events F]

Runs the daemon while hackbench, dd, a flood of datagrams and stress-ng take turns and then run
all at once. Prints each stall with what its verdict rests on, and at last those whose verdict
rests on nothing (then the status is 1); ``--events`` keeps all lines.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from bench.bpf import BenchError
from bench.command import ready
from stalld.track.verdict import Verdict
from tests.kernel.daemon import Daemon, Event

ROOT = Path(__file__).parents[1]
PHASES = 5
_ROUNDED = 0.999
"""Times are told in thousandths of a millisecond."""


def start(tool: str, *command: str) -> subprocess.Popen[bytes]:
    """A load in a session of its own, so that it can be ended with all its children.

    Args:
        tool: that it needs.
    """
    if shutil.which(tool) is None:
        raise BenchError(f"{tool} is not installed: apt install rt-tests stress-ng")
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd=ROOT,
    )


def hackbench() -> subprocess.Popen[bytes]:
    """400 tasks that write to each other."""
    return start("hackbench", "sh", "-c", "while hackbench -g 10 -l 1000; do :; done")


def dd() -> subprocess.Popen[bytes]:
    """Writes to disk, and waits for it."""
    file = Path(tempfile.gettempdir(), f"soak-{os.getpid()}")
    write = f"dd if=/dev/zero of={file} bs=1M count=512 conv=fdatasync"
    trap = f"trap 'rm -f {file}' EXIT; trap exit TERM"
    return start("dd", "sh", "-c", f"{trap}; while {write}; do :; done")


def flood() -> subprocess.Popen[bytes]:
    """Datagrams over loopback from two tasks, received by nobody."""
    return start(sys.executable, sys.executable, "-m", "bench.soak", "--flood")


def stress() -> subprocess.Popen[bytes]:
    """Processors, memory, sockets, disk and timers."""
    kinds = "--cpu 2 --vm 1 --vm-bytes 256M --sock 2 --udp 2 --hdd 1 --timer 1 --mmap 1 --fork 2"
    return start("stress-ng", "stress-ng", *kinds.split(), "--temp-path", tempfile.gettempdir())


LOADS: dict[str, Callable[[], subprocess.Popen[bytes]]] = {
    "hackbench": hackbench,
    "dd": dd,
    "flood": flood,
    "stress-ng": stress,
}


def end(load: subprocess.Popen[bytes]) -> None:
    """End a load with its children, also where itself has ended."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(load.pid, number)
        except ProcessLookupError:
            break
        time.sleep(1)
    load.wait()


def send_datagrams() -> None:
    """Until killed; a fork doubles it."""
    os.fork()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        while True:
            out.sendto(bytes(1000), ("127.0.0.1", 9))


def run(seconds: float, threshold_ms: float) -> tuple[list[Event], list[tuple[float, str]]]:
    """All events, and when (CLOCK_MONOTONIC, ns) which load began.

    Raises:
        BenchError: a load was missing or ended early, or the daemon did not last.
    """
    marks: list[tuple[float, str]] = []
    with Daemon("--threshold-ms", str(threshold_ms)) as daemon:
        for names in [[name] for name in LOADS] + [list(LOADS)]:
            marks.append((time.monotonic_ns(), " + ".join(names)))
            with ExitStack() as stack:
                running = {}
                for name in names:
                    running[name] = LOADS[name]()
                    stack.callback(end, running[name])
                time.sleep(seconds / PHASES)
                for name, load in running.items():
                    if load.poll() is not None:
                        raise BenchError(f"the load {name} ended early, status {load.returncode}")
        status = daemon.stop()
        if status or daemon.events[-1]["event"] != "stopped":
            raise BenchError(f"the daemon ended with status {status}: {daemon.said}")
    return daemon.events, marks


def unsupported(event: Event, threshold_ms: float) -> str:
    """Why a resolved stall should not have been told: what speaks against it; "" if nothing does.

    Each verdict's own evidence is asked for, by the rules of docs/events.md. ``unknown`` blames
    nobody, but something must have waited.
    """
    evidence, blocker = event["evidence"], event["blocker"]
    stolen_ms, late_ms = evidence["stolen_ms"] or 0.0, evidence["late_ms"]
    served_ms = event["handler"]["service_ms"] if event["handler"] else 0.0
    waited_ms = [w["runnable_ms"] for w in event["waiting"]]
    if event["ksoftirqd"]:
        waited_ms.append(event["ksoftirqd"]["runnable_ms"])
    starved_ms = max(event["starved"].values(), default=0.0)
    verdict = Verdict(event["verdict"])
    longest_ms = max([starved_ms, late_ms, served_ms, *waited_ms])
    waited = max([starved_ms, *waited_ms]) >= threshold_ms * _ROUNDED
    if longest_ms < threshold_ms * _ROUNDED and verdict is not Verdict.VCPU_PREEMPTED:
        return "nothing waited for the threshold"
    enough_ms = max(threshold_ms, event["duration_ms"] / 2) * _ROUNDED
    proved = {
        Verdict.VCPU_PREEMPTED: stolen_ms >= enough_ms and blocker is None,
        Verdict.IRQS_DISABLED: late_ms - stolen_ms >= enough_ms,
        Verdict.SOFTIRQ_HOG: served_ms >= enough_ms,
        Verdict.SOFTIRQS_DISABLED: starved_ms >= threshold_ms * _ROUNDED and blocker is not None,
        Verdict.STUCK_IN_KERNEL: waited and blocker is not None and bool(event["stack"]["kernel"]),
        Verdict.CPU_CONTENTION: max(waited_ms, default=0.0) >= threshold_ms * _ROUNDED,
        Verdict.UNKNOWN: longest_ms >= threshold_ms * _ROUNDED,
    }
    return "" if proved[verdict] else f"{verdict}: its evidence does not show it"


def describe(event: Event) -> str:
    """One stall: what was said, and what it rests on."""
    blocker, evidence = event["blocker"], event["evidence"]
    who = f"{blocker['comm']} ({blocker['mode']}, {blocker['policy']})" if blocker else "nobody"
    waits = {w["comm"]: w["runnable_ms"] for w in event["waiting"]}
    if event["ksoftirqd"]:
        waits["ksoftirqd"] = event["ksoftirqd"]["runnable_ms"]
    top = ", ".join(event["stack"]["kernel"][:3]) or "-"
    return (
        f"cpu {event['cpu']} {event['duration_ms']:.1f} ms {event['verdict']}: {who}; "
        f"starved {event['starved']}; waited {waits}; late {evidence['late_ms']}, stolen "
        f"{evidence['stolen_ms']}, switches {evidence['switches']}, samples "
        f"{evidence['samples']}/{evidence['expected']}, {event['stack']['captured']}: {top}"
    )


def main() -> int:
    """Print every stall, and how many of each verdict under which load."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--threshold-ms", type=float, default=50)
    parser.add_argument("--events", type=Path, help="keep all events here")
    parser.add_argument("--flood", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.flood:
        send_datagrams()
    if not ready():
        return 1
    events, marks = run(arguments.seconds, arguments.threshold_ms)
    if arguments.events:
        with arguments.events.open("w") as file:
            file.writelines(json.dumps(event) + "\n" for event in events)
    counts: Counter[tuple[str, str]] = Counter()
    for event in events:
        if event["event"] == "stall" and event["phase"] == "resolved":
            began_ns = event["read_ns"] - event["duration_ms"] * 1e6
            load = [name for mark, name in marks if mark <= began_ns]
            counts[load[-1] if load else "start", event["verdict"]] += 1
            print(describe(event))
        elif event["event"] not in ("stall", "started", "stopped"):
            print(json.dumps(event)[:300])
    for (load_name, verdict), count in sorted(counts.items()):
        print(f"{load_name}: {verdict} {count}")
    wrong = false_stalls(events, arguments.threshold_ms)
    for event, why in wrong:
        print(f"NOT SUPPORTED: {why}: {describe(event)}")
    print(f"{sum(counts.values())} stalls in {arguments.seconds:.0f} s; {events[-1]}")
    return 1 if wrong else 0


def false_stalls(events: Sequence[Event], threshold_ms: float) -> list[tuple[Event, str]]:
    """Those that no evidence supports, and why."""
    resolved = [e for e in events if e["event"] == "stall" and e["phase"] == "resolved"]
    return [(event, why) for event in resolved if (why := unsupported(event, threshold_ms))]


if __name__ == "__main__":
    sys.exit(main())
