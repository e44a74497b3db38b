"""Real records for a minute into four sinks at once: what arrived, what was lost, how late.

    python -m bench.flow [--per-second 5000] [--seconds 60] [--no-lookback] [--stop-readers]

Records are made in the kernel, in the daemon's own perf buffer (tests/injector/records.py); the
sinks are a pipe, a file, a real rsyslog behind TCP, and a real ``tail``. Every column must add up:
arrived and missing are what the kernel took, taken and lost are what was made.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from bench.row import quantile
from tests.service.flow import Flow, Result


def _seconds_of_cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def _quantiles(values: list[float]) -> str:
    p50, p99, most = (quantile(values, part) if values else 0.0 for part in (0.5, 0.99, 1.0))
    return f"p50 {p50:.1f} p99 {p99:.1f} max {most:.1f} ms"


def _report(result: Result) -> bool:
    sent, lost = result.sent
    print(f"made {sent + lost}, taken {sent}, lost in the kernel {lost}, told {result.lost}\n")
    print("| sink | lines of stalls | told as missing | sum | delivered | dropped |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, counted in result.sinks.items():
        told = result.told[name]
        whole = counted.stalls + counted.missing
        print(
            f"| {name} | {counted.stalls} | {counted.missing} | {whole} "
            f"| {told['delivered']} | {told['dropped']} |"
        )
    print(f"\nrecord → line made: {_quantiles(result.latency_ms)}; RSS {result.rss_kib} KiB")
    # Of what a sink missed, some may have been no stalls.
    right = all(
        told["delivered"] == counted.all - 1 and told["dropped"] == counted.missing
        for counted, told in ((c, result.told[n]) for n, c in result.sinks.items())
    )
    # A busy machine has stalls of its own, and may have lost some of them too.
    return right and 0 <= result.lost - lost <= lost // 1000 + 1


def main() -> int:
    """Run it; 1 when something does not add up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--per-second", type=int, default=5000)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--no-lookback", action="store_true")
    parser.add_argument("--stop-readers", action="store_true", help="tail and rsyslog, in between")
    options = parser.parse_args()
    settings = "detect.lookback = false" if options.no_lookback else ""
    with tempfile.TemporaryDirectory() as work, Flow(Path(work), settings) as flow:
        with flow.source() as source:
            began, cpu_s = time.monotonic(), _seconds_of_cpu(flow.daemon.pid)
            which = ("tail", "rsyslog") if options.stop_readers else ()
            with flow.stopped(*which):
                sent = source.flow(options.per_second, options.seconds)
            part = (_seconds_of_cpu(flow.daemon.pid) - cpu_s) / (time.monotonic() - began)
        result = flow.finish(sent)
    print(f"{options.per_second}/s for {options.seconds:g} s: {part:.0%} of a CPU")
    right = _report(result)
    print("all adds up" if right else "IT DOES NOT ADD UP")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
