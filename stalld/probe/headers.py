"""A directory that looks enough like a kernel tree for bcc.

bcc wants kernel headers, yet our programs touch a handful of fields. With BTF
the tree holds just those, at the running kernel's offsets; it also compiles
three times faster than a full ``vmlinux.h``. Without BTF the distribution's
headers serve, which bcc finds by itself.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

from stalld.errors import MissingAbilityError
from stalld.probe.btf import Btf, Field

FIELDS: dict[str, tuple[tuple[str, ...], ...]] = {
    # state was renamed __state in 5.14 (commit 2f064a59a11f).
    "task_struct": (
        ("pid",),
        ("flags",),
        ("comm",),
        ("policy",),
        ("prio",),
        ("__state", "state"),
        ("on_rq",),
        ("on_cpu",),
        ("wake_cpu",),
        ("nr_cpus_allowed",),
    ),
    "hrtimer": (("_softexpires",), ("function",), ("state", "is_queued")),
    "net_device": (("name",), ("ifindex",)),
    "napi_struct": (("dev",),),
    "bpf_iter_meta": (("seq",),),
    "bpf_iter__task": (("meta",), ("task",)),
}
"""What the programs touch: per struct the fields, each with its older names."""

_TYPES = """\
#pragma once
typedef signed char __s8; typedef unsigned char __u8;
typedef short __s16; typedef unsigned short __u16;
typedef int __s32; typedef unsigned int __u32;
typedef long long __s64; typedef unsigned long long __u64;
typedef __s8 s8; typedef __u8 u8; typedef __s16 s16; typedef __u16 u16;
typedef __s32 s32; typedef __u32 u32; typedef __s64 s64; typedef __u64 u64;
typedef __u64 __attribute__((aligned(8))) __aligned_u64;
typedef __u16 __be16; typedef __u32 __be32; typedef __u64 __be64;
typedef __u16 __sum16; typedef __u32 __wsum;
typedef _Bool bool; typedef unsigned long size_t; typedef unsigned long uintptr_t;
typedef int pid_t;
enum { false, true };
#define NULL ((void *)0)
#define offsetof(type, member) __builtin_offsetof(type, member)
#define __always_inline inline __attribute__((always_inline))
"""

# bcc's own headers ask the version only for helpers of 4.x and for a section
# that raw tracepoints do not need.
_VERSION = """\
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + ((c) > 255 ? 255 : (c)))
#define LINUX_VERSION_CODE KERNEL_VERSION({major}, {minor}, 0)
"""

_PT_REGS = "struct pt_regs;\n"

_FILES = {
    "include/linux/kconfig.h": "#define CONFIG_BPF_SYSCALL 1\n",
    "include/linux/types.h": _TYPES,
    "include/linux/bpf_common.h": "",
    "include/linux/log2.h": "",
    "include/asm/page.h": "",
    "include/uapi/linux/bpf.h": "",
    "include/uapi/linux/if_packet.h": "",
    "include/uapi/linux/ptrace.h": _PT_REGS,
}


def write_tree(root: Path, btf: Btf) -> list[str]:
    """Write the tree below ``root``.

    Returns:
        The compiler flags that go with it.

    Raises:
        MissingAbilityError: the kernel lacks a field; it is named.
    """
    release = re.match(r"(\d+)\.(\d+)", os.uname().release)
    major, minor = release.groups() if release else ("5", "8")
    files = {
        **_FILES,
        "include/linux/version.h": _VERSION.format(major=major, minor=minor),
        "include/stalld_structs.h": structs(btf),
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    flags = [f"-I{root}/include", "-DSTALLD_STRUCTS_FROM_BTF"]
    if platform.machine() == "x86_64":
        flags.append("-DSTALLD_REGISTERS")
    flags.append(f"-DSTALLD_TASK_STATE={btf.field('task_struct', '__state', 'state').name}")
    queued = btf.field("hrtimer", "state", "is_queued").name
    flags.append(f"-DSTALLD_HRTIMER_QUEUED={queued}")
    # prev_state became an argument in 5.18 (commit fa2c3254d7cf).
    if (btf.tracepoint_args("sched_switch") or 0) >= 4:
        flags.append("-DSCHED_SWITCH_HAS_PREV_STATE")
    return flags


def structs(btf: Btf) -> str:
    """C declarations of :data:`FIELDS` with every field at its true offset."""
    parts = ["#pragma once", "struct seq_file;"]
    for name, wanted in FIELDS.items():
        fields = [btf.field(name, *names) for names in wanted]
        parts.append(declare(name, fields))
    if platform.machine() == "x86_64":
        fields = [btf.field("pt_regs", name) for name in ("ip", "cs", "flags")]
        parts.append(declare("pt_regs", fields))
    return "\n".join(parts) + "\n"


def declare(name: str, fields: Sequence[Field]) -> str:
    """One struct: padding between the fields, the compiler checks the offsets."""
    lines = [f"struct {name} {{"]
    end = 0
    for field in sorted(fields, key=lambda field: field.offset):
        if field.offset > end:
            lines.append(f"\tchar _pad{end}[{field.offset - end}];")
        lines.append(f"\t{field.declaration % field.name};")
        end = field.offset + field.size
    lines.append("};")
    lines.extend(
        f'_Static_assert(offsetof(struct {name}, {field.name}) == {field.offset}, "{field.name}");'
        for field in fields
    )
    return "\n".join(lines)


def distribution_headers(root: Path = Path("/")) -> list[str]:
    """Flags for the installed headers of the running kernel, where there is no BTF.

    Raises:
        MissingAbilityError: they are not installed either.
    """
    release = os.uname().release
    modules = root / "lib/modules" / release
    for tree in (modules / "source", modules / "build"):
        sched = tree / "include/linux/sched.h"
        if sched.is_file():
            break
    else:
        raise MissingAbilityError(
            f"neither BTF nor kernel headers: this kernel has no /sys/kernel/btf/vmlinux, and "
            f"{modules}/build holds no headers; use a kernel built with "
            f"CONFIG_DEBUG_INFO_BTF=y or install linux-headers-{release}"
        )
    new_state = re.search(r"unsigned int\s+__state;", sched.read_text(errors="replace"))
    flags = [f"-DSTALLD_TASK_STATE={'__state' if new_state else 'state'}"]
    flags.append("-DSTALLD_HRTIMER_QUEUED=state")
    events = tree / "include/trace/events/sched.h"
    if events.is_file() and re.search(
        r"TRACE_EVENT\(sched_switch,\s*TP_PROTO\([^)]*prev_state", events.read_text()
    ):
        flags.append("-DSCHED_SWITCH_HAS_PREV_STATE")
    return flags
