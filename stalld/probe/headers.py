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
from typing import NamedTuple

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
    "bpf_iter_meta": (("seq",), ("seq_num",)),
    "bpf_iter__task": (("meta",), ("task",)),
}
"""What the programs touch: per struct the fields, each with what other kernels call it."""


_TIMER_HEADERS = ("hrtimer_types.h", "hrtimer.h")
"""Below include/linux of a source tree: where struct hrtimer is, in new kernels and in old ones."""


class Who(NamedTuple):
    """A part of ``bpf/task.c`` that tells who a task is, where the kernel has its fields.

    ``what`` it tells; what is without that is in ``effect``; ``fields`` as in :data:`FIELDS`.
    """

    what: str
    effect: str
    fields: dict[str, tuple[tuple[str, ...], ...]]


_ASKED = "it is asked of /proc, which may be too late"
WHO = {
    "PARENT": Who("parent", _ASKED, {"task_struct": (("real_parent",), ("tgid",))}),
    "NS_PID": Who(
        "pid in its namespace",
        _ASKED,
        {
            "task_struct": (("group_leader",), ("thread_pid",)),
            "pid": (("level",), ("numbers",)),
        },
    ),
    "COMMAND": Who(
        "command line",
        _ASKED,
        {"task_struct": (("mm",),), "mm_struct": (("arg_start",), ("arg_end",))},
    ),
    "EXE": Who(
        "executable",
        "blocker.exe is null",
        {
            "task_struct": (("mm",),),
            "mm_struct": (("exe_file",),),
            "file": (("f_path.dentry",),),
            "dentry": (("d_parent",), ("d_name.name",)),
        },
    ),
    "FILE": Who(
        "system call and file",
        "the system call is told by the stack, blocker.file is null",
        {
            "task_struct": (("stack",), ("thread_info.status",), ("files",)),
            "files_struct": (("fdt",),),
            "fdtable": (("max_fds",), ("fd",)),
            "file": (("f_path.dentry",), ("f_inode",)),
            "inode": (("i_ino",),),
            "dentry": (("d_parent",), ("d_name.name",), ("d_sb",)),
            "super_block": (("s_type",),),
            "file_system_type": (("name",),),
        },
    ),
    "CGROUP": Who(
        "cgroup",
        _ASKED,
        {
            "task_struct": (("cgroups",),),
            "css_set": (("subsys",), ("dfl_cgrp",)),
            "cgroup_subsys_state": (("cgroup",),),
            "cgroup": (("kn",), ("root",)),
            # parent was renamed __parent in 6.15 (commit 633488947ef6).
            "kernfs_node": (("__parent", "parent"), ("name",)),
        },
    ),
}
"""By the end of the macro ``STALLD_WHO_…`` that has it compiled in."""
_X86_ONLY = {"FILE"}

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
    without = lacking(btf)
    flags += [f"-DSTALLD_WHO_{part}" for part in WHO if part not in without]
    if "-DSTALLD_WHO_CGROUP" in flags:
        parent = btf.field("kernfs_node", "__parent", "parent").name
        flags += [f"-DSTALLD_KERNFS_PARENT={parent}", f"-DSTALLD_CONTROLLER={_controller(btf)}"]
    # prev_state became an argument in 5.18 (commit fa2c3254d7cf).
    if (btf.tracepoint_args("sched_switch") or 0) >= 4:
        flags.append("-DSCHED_SWITCH_HAS_PREV_STATE")
    return flags


def lacking(btf: Btf) -> dict[str, str]:
    """The parts of :data:`WHO` that this kernel cannot tell, and why."""
    found = {}
    for part, who in WHO.items():
        if part in _X86_ONLY and platform.machine() != "x86_64":
            found[part] = f"not written for {platform.machine()}"
            continue
        try:
            for name, wanted in who.fields.items():
                for names in wanted:
                    btf.field(name, *names)
            if part == "CGROUP":
                _controller(btf)
        except MissingAbilityError as error:
            found[part] = str(error).partition(":")[0]
    return found


def _controller(btf: Btf) -> int:
    """Number of the controller whose hierarchy is looked at besides the unified one.

    Raises:
        MissingAbilityError: the kernel has none of those that runtimes use.
    """
    for name in ("memory", "cpu"):
        number = btf.enumerator("cgroup_subsys_id", f"{name}_cgrp_id")
        if number is not None:
            return number
    raise MissingAbilityError("the kernel has neither a memory nor a cpu controller")


def wanted_fields(btf: Btf) -> dict[str, list[tuple[str, ...]]]:
    """Of each struct the fields that are declared: all of :data:`FIELDS`, of :data:`WHO` those
    of the parts that this kernel can tell."""
    wanted = {name: list(fields) for name, fields in FIELDS.items()}
    without = lacking(btf)
    for part, who in WHO.items():
        if part in without:
            continue
        for name, fields in who.fields.items():
            known = wanted.setdefault(name, [])
            known += [field for field in fields if field not in known]
    if platform.machine() == "x86_64":
        wanted["pt_regs"] = [("ip",), ("cs",), ("flags",)]
    return wanted


def structs(btf: Btf) -> str:
    """C declarations of what the programs touch with every field at its true offset."""
    parts = ["#pragma once", "struct seq_file;"]
    for name, wanted in wanted_fields(btf).items():
        parts.append(declare(name, [btf.field(name, *names) for names in wanted]))
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
        sched = _text(tree / "include/linux/sched.h")
        if sched is not None:
            break
    else:
        raise MissingAbilityError(
            f"neither BTF nor kernel headers: this kernel has no /sys/kernel/btf/vmlinux, and "
            f"{modules}/build holds no headers that we may read; use a kernel built with "
            f"CONFIG_DEBUG_INFO_BTF=y or install linux-headers-{release}"
        )
    new_state = re.search(r"unsigned int\s+__state;", sched)
    flags = [f"-DSTALLD_TASK_STATE={'__state' if new_state else 'state'}"]
    timers = [_text(tree / "include/linux" / name) or "" for name in _TIMER_HEADERS]
    queued = "is_queued" if any(re.search(r"\bis_queued;", text) for text in timers) else "state"
    flags.append(f"-DSTALLD_HRTIMER_QUEUED={queued}")
    events = _text(tree / "include/trace/events/sched.h") or ""
    if re.search(r"TRACE_EVENT\(sched_switch,\s*TP_PROTO\([^)]*prev_state", events):
        flags.append("-DSCHED_SWITCH_HAS_PREV_STATE")
    return flags


def _text(path: Path) -> str | None:
    """What is in it; None where it is not there, or is another user's own."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None
