"""One guest: a kernel under QEMU, on this machine's own files, for one command.

virtme-ng builds the initramfs and QEMU's command line. The root file system is this machine's
over 9p, read-only with an overlay in the guest's memory; only the directory for the results is
shared writable. The CPUs are emulated (no KVM), at the lowest priority, so that the guest takes
only time that nobody else wants.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shlex import join

from tests.vm.fetch import Fetched
from tests.vm.kernels import KernelsError, cache_directory
from tests.vm.systemd.stage import INIT, INIT_VARIABLE

ROOT = Path(__file__).parents[2]
CPUS = 2
MEMORY = "2G"
# The emulated TSC is the host's, yet the kernel does not trust it; reading the HPET instead takes
# some 10 us here, at each of a program's times, and clock_gettime() becomes a system call.
KERNEL_OPTIONS = "tsc=reliable clocksource=tsc"
# systemd-sysusers runs as after an update of the system.
SYSTEMD_OPTIONS = "systemd.condition_needs_update=yes"
SILENCE_S = 240.0
"""A guest that leaves nothing new in its results for so long does nothing any more: a test takes
less than half of it."""
SILENT = f"silent for {SILENCE_S:.0f} s"
_LOOK_EVERY_S = 5.0
_HELPERS = ("vng", "qemu-system-x86_64", "busybox", "depmod", "chrt")


def emulator_failed(results: Path, failed: str | None) -> bool:
    """Whether the guest died of its emulator: it hangs, or ran a breakpoint that was there no more.

    Linux patches its code through a breakpoint (text_poke_bp(), here of a static key that
    ``check`` turns on, bpf_stats_enabled_key). QEMU 7.2 with one thread per CPU may run the
    translation of the breakpoint after the patch is complete, which the kernel takes for an
    unexpected one.
    """
    return failed == SILENT or b"Oops: int3: " in (results / "console.log").read_bytes()


@contextmanager
def alone() -> Iterator[None]:
    """Wait until no other guest runs on this machine, whoever's: two take each other's CPUs."""
    with (cache_directory() / ".guest").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run_in_guest(
    kernel: Fetched,
    command: Sequence[str],
    results: Path,
    *,
    timeout_s: float,
    stage: Path | None = None,
) -> str | None:
    """Boot, run ``command`` as root in this checkout, power down.

    With a ``stage`` the guest's process 1 is systemd, which runs what was staged (``systemd/``).

    What the console said is left in ``results/console.log``.

    Returns:
        Why the guest had to be ended; None if it came to its end by itself.

    Raises:
        KernelsError: a program is missing here.
    """
    # The programs of this environment, and those that only root's path has.
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    shim = results / "virtme-run"
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.vm.virtme_run "$@"\n')
    shim.chmod(0o755)
    for helper in _HELPERS:
        if shutil.which(helper, path=path) is None:
            raise KernelsError(f"{helper} is missing: `make test-vm` installs it")
    environment = {**os.environ, "PATH": f"{results}:{path}"}  # The shim before virtme-ng's own.
    options = KERNEL_OPTIONS
    if stage is not None:
        environment[INIT_VARIABLE] = str(INIT)
        options += f" stalld_stage={stage} {SYSTEMD_OPTIONS}"
    line = f"cd {join([str(ROOT)])} && {join(command)}"
    virtme = [
        *("chrt", "--idle", "0", "vng", "--verbose", "--run", str(kernel.image)),
        *("--disable-kvm", "--force-9p", "--disable-microvm"),
        *("--cpus", str(CPUS), "--memory", MEMORY, "--append", options),
        *("--rwdir", str(results), "--exec", line),
    ]
    with subprocess.Popen(
        virtme,
        stdin=subprocess.DEVNULL,
        # A pipe: QEMU would truncate a file.
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        cwd=ROOT,
        start_new_session=True,
    ) as process:
        try:
            console, failed = _wait(process, results, timeout_s)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    (results / "console.log").write_bytes(console)
    return failed


def _wait(
    process: subprocess.Popen[bytes], results: Path, timeout_s: float
) -> tuple[bytes, str | None]:
    """What the console said, and why the guest had to be ended."""
    began = heard = time.monotonic()
    size = -1
    while True:
        try:
            return process.communicate(timeout=_LOOK_EVERY_S)[0], None
        except subprocess.TimeoutExpired:
            now = time.monotonic()
        if size != (size := sum(path.stat().st_size for path in results.iterdir())):
            heard = now
        failed = None
        if now - began > timeout_s:
            failed = f"not finished in {timeout_s:.0f} s"
        elif now - heard > SILENCE_S:
            failed = SILENT
        if failed:
            os.killpg(process.pid, signal.SIGKILL)
            return process.communicate()[0], failed
