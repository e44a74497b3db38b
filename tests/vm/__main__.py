"""``make test-vm``: the tests on other kernels, one guest after the other."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from tests.vm import boot, module, outcome, report, suites
from tests.vm.fetch import fetch
from tests.vm.kernels import RUNNING, Kernel, KernelsError, cache_directory, chosen
from tests.vm.systemd.stage import stage

TIMEOUT_S = 3600.0
BOOTS = 3


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.vm",
        description="Run the tests on other kernels, under QEMU. Root only.",
    )
    parser.add_argument("kernels", nargs="*", help="of tests/vm/kernels.toml; all by default")
    parser.add_argument("--suite", choices=suites.SUITES, default="full")
    parser.add_argument(
        "--results", type=Path, help="directory for what the runs leave (default: a new one)"
    )
    parser.add_argument(
        "--timeout-s", type=float, default=TIMEOUT_S, help=f"per kernel (default {TIMEOUT_S:.0f})"
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep what went well in --results, run the others"
    )
    parser.add_argument("--refresh", action="store_true", help="look for newer kernels first")
    parser.add_argument(
        "--matrix", type=Path, metavar="FILE", help="write the support matrix of this run"
    )
    return parser.parse_args(argv)


def run(kernel: Kernel, options: argparse.Namespace, results: Path) -> outcome.Outcome:
    """One kernel, whatever becomes of it."""
    if options.keep and (before := outcome.read_again(kernel.name, results)):
        before = before.without_skips(kernel.may_skip)
        if before.good:
            return before
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    guest = [sys.executable, "-m", "tests.vm.guest", str(results), options.suite]
    failed = None
    began = time.monotonic()
    try:
        if kernel.name == RUNNING:
            with (results / "tests.log").open("wb") as log:
                _run_here([*guest, "here"], log, options.timeout_s)
        else:
            fetched = fetch(kernel, cache_directory(), refresh=options.refresh)
            command = [*guest, "guest"]
            with tempfile.TemporaryDirectory() as directory:
                built = module.build(fetched, Path(directory))
                if built is not None:
                    shutil.copy(built, results)
                staged = None
                if options.suite in suites.BOOTED:
                    staged = stage(command, Path(directory))
                for _ in range(BOOTS):
                    with boot.alone():
                        began = time.monotonic()
                        failed = boot.run_in_guest(
                            fetched, command, results, timeout_s=options.timeout_s, stage=staged
                        )
                    if not boot.emulator_failed(results, failed):
                        break
                    print(f"    the emulator failed ({failed or 'stale code'})", flush=True)
    except (KernelsError, subprocess.TimeoutExpired) as error:
        failed = str(error)
    found = outcome.read(kernel.name, results, failed, time.monotonic() - began)
    return found.without_skips(kernel.may_skip)


def _run_here(command: list[str], log: IO[bytes], timeout_s: float) -> None:
    """On this machine; ended with all its children when it takes too long.

    Raises:
        subprocess.TimeoutExpired: it did.
    """
    with subprocess.Popen(
        command, stdout=log, stderr=log, cwd=boot.ROOT, start_new_session=True
    ) as process:
        try:
            process.wait(timeout_s)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 all good, 1 something failed, 2 bad usage."""
    options = _arguments(argv)
    # Guests are ended on the way out.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        kernels = chosen(options.kernels)
        if options.suite in suites.BOOTED:
            kernels = [kernel for kernel in kernels if kernel.name != RUNNING]
    except KernelsError as error:
        print(error, file=sys.stderr)
        return 2
    if os.geteuid() != 0:
        print("the guests' files are this machine's, as root sees them: run as root")
        return 1
    directory = options.results or Path(tempfile.mkdtemp(prefix="softirq-stalld-vm-"))
    outcomes = []
    for kernel in kernels:
        print(f"=== {kernel.name}: {kernel.why}", flush=True)
        done = run(kernel, options, directory / kernel.name)
        outcomes.append(done)
        print(report.summary(done), flush=True)
        if options.matrix:
            options.matrix.write_text(report.matrix(outcomes, options.suite))
    print(f"what the runs left: {directory}")
    passed, failed, skipped = (
        sum(done.count(result) for done in outcomes) for result in ("passed", "failed", "skipped")
    )
    failed += sum(not done.good and not done.count("failed") for done in outcomes)
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 0 if all(done.good for done in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
