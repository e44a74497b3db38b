"""What the probes need of this host: capabilities, libraries, type information."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import re
from pathlib import Path

from stalld import perf
from stalld.check.report import Item, State
from stalld.errors import MissingAbilityError
from stalld.probe import capabilities
from stalld.probe.btf import VMLINUX_BTF, Btf
from stalld.probe.headers import FIELDS, distribution_headers, structs
from stalld.probe.libbpf import load_libbpf


def kernel() -> Item:
    """Release, build and architecture."""
    system = os.uname()
    return Item("kernel", State.OK, f"{system.release} {system.version} {system.machine}")


def granted(mask: int) -> Item:
    """The capabilities in ``mask``."""
    wanted = (*capabilities.LOADING, "CAP_SYSLOG")
    names = capabilities.lacking(mask, wanted)
    if not names:
        return Item("capabilities", State.OK, ", ".join(wanted))
    loading = capabilities.lacking(mask, capabilities.LOADING)
    return Item(
        "capabilities",
        State.MISSING if loading else State.DEGRADED,
        capabilities.missing(names),
        "the kernel refuses the probes"
        if loading
        else "addresses of kernel symbols may be hidden, see kernel symbols",
        capabilities.remedy(names),
        required=True,
    )


def perf_events(mask: int) -> list[Item]:
    """Whether CAP_PERFMON, all that the service's user has, is enough; tried also as root."""
    if not mask >> capabilities.NUMBERS["CAP_PERFMON"] & 1:
        return []
    error = capabilities.without_admin(_open_event)
    if error is None:
        return [Item("perf events", State.OK, "CAP_PERFMON is enough")]
    admin = mask >> capabilities.NUMBERS["CAP_SYS_ADMIN"] & 1
    detail = f"CAP_PERFMON is not enough: {os.strerror(error.errno or 0)}"
    return [
        Item(
            "perf events",
            State.DEGRADED if admin else State.MISSING,
            "; ".join(filter(None, (detail, perf.stricter()))),
            "the service, whose user has no CAP_SYS_ADMIN, cannot start",
            "sysctl kernel.perf_event_paranoid=2, and the same in /etc/sysctl.d",
            required=True,
        )
    ]


def _open_event() -> None:
    os.close(perf.open_event(perf.attribute(perf.TYPE_SOFTWARE, perf.SW_DUMMY), 0))


def libbpf() -> Item:
    """libbpf.so.1 and its version."""
    try:
        lib = load_libbpf()
    except MissingAbilityError as error:
        return Item(
            "libbpf",
            State.MISSING,
            str(error),
            "neither type information nor perf buffers can be read",
            "apt install libbpf1",
            required=True,
        )
    lib.libbpf_version_string.restype = ctypes.c_char_p
    return Item("libbpf", State.OK, (lib.libbpf_version_string() or b"").decode().lstrip("v"))


def bcc() -> Item:
    """bcc's version, without importing it: that would map LLVM."""
    spec = importlib.util.find_spec("bcc")
    if spec is None or spec.origin is None:
        return Item(
            "bcc",
            State.MISSING,
            "python3 finds no module bcc",
            "the probes cannot be compiled",
            "apt install python3-bpfcc, and use the distribution's python3 "
            "(the package bcc of PyPI is something else)",
            required=True,
        )
    try:
        text = Path(spec.origin).with_name("version.py").read_text()
    except OSError:
        text = ""
    version = re.search(r"__version__ = ['\"]([^'\"]+)", text)
    return Item("bcc", State.OK, f"{version[1] if version else 'version unknown'} ({spec.origin})")


def types(path: str = VMLINUX_BTF) -> list[Item]:
    """BTF with the fields we touch, and the kernel headers that stand in for it."""
    try:
        distribution_headers()
        headers = f"installed for {platform.release()}"
    except MissingAbilityError:
        headers = ""
    btf = _btf(path, bool(headers))
    if headers or btf.state is State.OK:
        return [btf, Item("kernel headers", State.OK, headers or "not installed, not needed: BTF")]
    missing = Item(
        "kernel headers",
        State.MISSING,
        f"not installed for {platform.release()}",
        "nothing stands in for BTF",
        f"apt install linux-headers-{platform.release()}",
        required=True,
    )
    return [btf, missing]


def _btf(path: str, headers: bool) -> Item:
    try:
        if not Path(path).exists():
            raise MissingAbilityError(f"this kernel has no {path}")
        btf = Btf(path)
        try:
            structs(btf)
            arguments = btf.tracepoint_args("sched_switch")
        finally:
            btf.close()
    except OSError:
        return Item(
            "BTF", State.MISSING, "not read: libbpf is missing", remedy="apt install libbpf1"
        )
    except MissingAbilityError as error:
        return Item(
            "BTF",
            State.DEGRADED if headers else State.MISSING,
            str(error),
            "the kernel headers stand in; ksoftirqd is learned from /proc"
            if headers
            else "the layout of the kernel's structs is unknown",
            "use a kernel built with CONFIG_DEBUG_INFO_BTF=y",
            required=True,
        )
    fields = ", ".join(f"{name} {len(wanted)}" for name, wanted in FIELDS.items())
    return Item("BTF", State.OK, f"fields found: {fields}; sched_switch passes {arguments}")
