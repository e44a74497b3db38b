"""What a guest with systemd gets laid over its root: the installed program and a few units."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from shlex import join

from tests.vm.kernels import KernelsError

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent
INIT = HERE / "init"
INIT_VARIABLE = "STALLD_VM_INIT"
"""Environment of virtme-run: the program to run as process 1 in place of its own."""
COMMAND = "etc/tests-in-guest"


def stage(command: Sequence[str], directory: Path) -> Path:
    """An archive below ``directory``: the installed program, and a service that runs ``command``.

    Raises:
        KernelsError: what ``make install`` said.
    """
    target = directory / "root"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", "install", f"DESTDIR={target}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise KernelsError(f"make install: {done.stderr.strip()}")
    shutil.copytree(HERE / "units", target / "etc/systemd/system")
    drop_in = target / "etc/systemd/journald.conf.d/guest.conf"
    drop_in.parent.mkdir()
    shutil.copy(HERE / "journald.conf", drop_in)
    # As docs/deployment.md says of Debian's kernels.
    sysctl = target / "etc/sysctl.d/softirq-stalld.conf"
    sysctl.parent.mkdir()
    sysctl.write_text("kernel.perf_event_paranoid = 2\n")
    script = target / COMMAND
    script.write_text(f"#!/bin/sh\ncd {join([str(ROOT)])} && exec {join(command)}\n")
    script.chmod(0o755)
    archive = directory / "stage.tar"
    # One file: each of a thousand takes its time over 9p. Of the directories only the content.
    done = subprocess.run(
        ["tar", "-cf", archive, "-C", target, "--owner=0", "--group=0", "usr", "etc"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise KernelsError(f"tar: {done.stderr.strip()}")
    return archive
