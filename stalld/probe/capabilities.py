"""Does the kernel let this process use BPF? Tried for real; a refusal names the capability."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import struct
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from stalld.errors import MissingAbilityError
from stalld.probe import libbpf

NUMBERS = {"CAP_SYS_ADMIN": 21, "CAP_SYSLOG": 34, "CAP_PERFMON": 38, "CAP_BPF": 39}
"""include/uapi/linux/capability.h; CAP_PERFMON and CAP_BPF are new in 5.8."""

LOADING = ("CAP_BPF", "CAP_PERFMON")
"""Needed to create maps and to load and attach tracing programs."""

# CAP_SYS_ADMIN held these powers before; it does not stand in for CAP_SYSLOG
# (kallsyms_show_value in kernel/ksyms_common.c).
_WITHIN_SYS_ADMIN = LOADING

_HEADER = struct.Struct("=Ii")
_VERSION_3 = 0x20080522


def effective(status: str = "/proc/self/status") -> int:
    """The effective capabilities as a bit mask; 0 where they cannot be read."""
    try:
        found = re.search(r"^CapEff:\s*([0-9a-f]+)$", Path(status).read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1], 16) if found else 0


def lacking(mask: int, wanted: Sequence[str]) -> list[str]:
    """Those of ``wanted`` that are not in ``mask``, CAP_SYS_ADMIN taken into account."""
    admin = mask >> NUMBERS["CAP_SYS_ADMIN"] & 1
    return [
        name
        for name in wanted
        if not mask >> NUMBERS[name] & 1 and not (admin and name in _WITHIN_SYS_ADMIN)
    ]


def without_admin(attempt: Callable[[], None]) -> OSError | None:
    """How an attempt fails that this process makes without CAP_SYS_ADMIN; None: it does not.

    Capabilities are a thread's: made in one of its own, it changes nothing here.
    """
    failed: list[OSError] = []

    def make() -> None:
        try:
            _drop_effective(NUMBERS["CAP_SYS_ADMIN"])
            attempt()
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return failed[0] if failed else None


def _drop_effective(number: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    header = ctypes.create_string_buffer(_HEADER.pack(_VERSION_3, 0), _HEADER.size)
    # Effective, permitted and inheritable, each in two halves.
    sets = (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    sets[3 * (number // 32)] &= ~(1 << number % 32)
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


def listed(names: Sequence[str]) -> str:
    """``A``, ``A and B``, ``A, B and C``."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def missing(names: Sequence[str]) -> str:
    """That they are missing, as a sentence without its full stop."""
    return f"{listed(names)} {'is' if len(names) == 1 else 'are'} missing"


def remedy(names: Sequence[str]) -> str:
    """How to get capabilities."""
    return (
        f"run as root, or grant {listed(names)} "
        f"(systemd: AmbientCapabilities={' '.join(names)}; before Linux 5.8: CAP_SYS_ADMIN)"
    )


def require_bpf() -> None:
    """Create a map and load a program that does nothing; both are gone on return.

    Raises:
        MissingAbilityError: the kernel refused; which capability is missing,
            or what else may stand behind the refusal.
    """
    trial = libbpf.MapSpec("trial", libbpf.ARRAY, 4, 4, 1, 0)
    kind = libbpf.Kind(libbpf.RAW_TRACEPOINT)
    what = "creating a BPF map"
    try:
        os.close(libbpf.create_map(trial))
        what = "loading a tracing program"
        os.close(libbpf.load_program("trial", kind, libbpf.RETURN_ZERO))
    except libbpf.RefusedError as error:
        raise MissingAbilityError(refusal(what, error.number, effective())) from error


def refusal(what: str, number: int, mask: int) -> str:
    """What the kernel's answer to a BPF system call means for a process with ``mask``."""
    reason = f"{what}: {os.strerror(number)}"
    if number in (errno.EPERM, errno.EACCES):
        names = lacking(mask, LOADING)
        if names:
            return f"{missing(names)} ({reason}); {remedy(names)}"
        return (
            f"the kernel refuses BPF although the capabilities are there ({reason}); look for a "
            "user namespace or an unprivileged container, a seccomp filter, kernel lockdown, "
            "and before Linux 5.11 a small limit of locked memory (ulimit -l)"
        )
    if number == errno.ENOSYS:
        return f"this kernel has no BPF ({reason}); use one built with CONFIG_BPF_SYSCALL=y"
    return f"{reason}; the service needs it, so this kernel is not supported"
