"""The test module, built for another kernel with this machine's compiler."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.vm.fetch import Fetched
from tests.vm.kernels import KernelsError

SOURCES = Path(__file__).with_name("module")


def build(kernel: Fetched, target: Path) -> Path | None:
    """The module below ``target``; None where the kernel's headers are not at hand.

    Raises:
        KernelsError: what the compiler said.
    """
    if kernel.headers is None:
        return None
    shutil.copytree(SOURCES, target, dirs_exist_ok=True)
    # The compiler that the headers name may not be here; a module this small does not mind.
    done = subprocess.run(
        ["make", "-C", str(kernel.headers), f"M={target}", "CC=gcc", "modules"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise KernelsError(f"the test module cannot be built for {kernel.release}:\n{done.stderr}")
    return target / "stalld_slow.ko"
