"""What runs inside a guest, or on the machine itself: check, then the tests of one suite.

``python -m tests.vm.guest RESULTS SUITE``. Everything it finds is left in RESULTS: the answer of
``softirq-stalld check``, pytest's reports, the kernel's messages, and at last ``outcome.json``.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.vm import suites

COMMAND = str(Path(sys.executable).with_name("softirq-stalld"))
MODULE = "stalld_slow.ko"
EMULATED_SLOWNESS = 10.0
"""Measured: a compile takes 11 s instead of 0.7 s, the start of a Python process 1 s."""

_MODULES = ("veth", "sch_ingress", "cls_bpf")
"""What the injector uses."""


def main(arguments: list[str]) -> int:
    """Run it; 0 once the outcome is written, whatever it is."""
    directory, suite, where = arguments
    results = Path(directory)
    emulated = where == "guest"
    if emulated:
        os.environ["STALLD_TEST_SLOWNESS"] = str(EMULATED_SLOWNESS)
        # Each line on an emulated serial console is a time with interrupts off.
        subprocess.run(["dmesg", "--console-level", "1"], check=False)
        prepare_guest(results)
    began = time.monotonic()
    outcome: dict[str, Any] = {"release": platform.release(), "emulated": emulated}
    if suite not in suites.BOOTED:  # There the service starts at this very moment.
        outcome["check"], outcome["check_s"] = check(results)
    outcome["statuses"] = {
        name: run_tests(results / f"{name}.xml", options)
        for name, options in suites.SUITES[suite].items()
    }
    outcome["seconds"] = round(time.monotonic() - began, 1)
    messages = subprocess.run(["dmesg"], capture_output=True, check=False).stdout
    (results / "dmesg.log").write_bytes(messages)
    (results / "outcome.json").write_text(json.dumps(outcome))
    return 0


def prepare_guest(results: Path) -> None:
    """What a booted Debian has and a bare guest lacks."""
    log = (results / "tests.log").open("ab")
    for number in (1, 2):
        os.dup2(log.fileno(), number)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=False)
    # Else they come with the first stall, and the daemon has to read the symbols anew.
    subprocess.run(["modprobe", "--all", *_MODULES], check=True)
    # What the slow emulation delays is no lockup.
    for name in ("kernel/watchdog", "kernel/panic_on_oops"):
        path = Path("/proc/sys") / name
        if path.exists():
            path.write_text("0" if name.endswith("watchdog") else "1")
    module = results / MODULE
    if module.exists():
        subprocess.run(["insmod", str(module)], check=True)


def check(results: Path) -> tuple[dict[str, Any] | None, float]:
    """What ``check`` says; None where it says nothing that can be read."""
    began = time.monotonic()
    done = subprocess.run([COMMAND, "check", "--json"], capture_output=True, text=True, check=False)
    (results / "check.log").write_text(done.stdout + done.stderr)
    try:
        said: dict[str, Any] | None = json.loads(done.stdout)
    except ValueError:
        said = None
    return said, round(time.monotonic() - began, 1)


def run_tests(report: Path, options: list[str]) -> int:
    """One run of pytest, its exit status; its report tells what became of each test."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "--verbose", "-p", "no:cacheprovider"),
            *("--durations=0", f"--junit-xml={report}"),
            *options,
        ],
        # Evidence that tests leave behind, for the case studies.
        # The checkout is read-only in a guest.
        env={
            **os.environ,
            "STALLD_TEST_EVIDENCE": str(report.parent),
            "HYPOTHESIS_STORAGE_DIRECTORY": tempfile.gettempdir(),
        },
        check=False,
    ).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
