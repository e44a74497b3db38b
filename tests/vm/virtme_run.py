"""virtme-run with a root file system that the guest caches, and with another init if asked for.

virtme-ng mounts the root over 9p without any caching and has no option for it: each page of a
shared library is then fetched anew by each process, which on 5.10 triples the time that a program
takes to start. Nothing changes below the guest while it runs, so it may cache all.
"""

from __future__ import annotations

import os
import shlex
import sys

from virtme import mkinitramfs
from virtme.commands.run import main

from tests.vm.systemd.stage import INIT_VARIABLE

_OPTIONS = "msize=524288"
_SWITCH = 'switch_root /newroot "$init"'


def cached(script: str) -> str:
    """The initramfs's script with cache=loose on its 9p mount.

    Raises:
        ValueError: this virtme-ng mounts otherwise.
    """
    if script.count(_OPTIONS) != 1:
        raise ValueError(f"not one 9p mount with {_OPTIONS} in virtme-ng's initramfs")
    return script.replace(_OPTIONS, f"{_OPTIONS},cache=loose")


def with_init(script: str, init: str) -> str:
    """The initramfs's script with another program as process 1.

    Raises:
        ValueError: this virtme-ng starts its own otherwise.
    """
    if script.count(_SWITCH) != 1:
        raise ValueError(f"not one {_SWITCH} in virtme-ng's initramfs")
    return script.replace(_SWITCH, f"switch_root /newroot {shlex.quote(init)}")


if __name__ == "__main__":
    mkinitramfs._MOUNT_ROOT_HOST = cached(mkinitramfs._MOUNT_ROOT_HOST)
    if INIT_VARIABLE in os.environ:
        mkinitramfs._INIT = with_init(mkinitramfs._INIT, os.environ[INIT_VARIABLE])
    sys.exit(main())
