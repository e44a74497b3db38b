"""The directory that stands for a kernel tree: does it compile, and does it say the truth?"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stalld.errors import MissingAbilityError
from stalld.probe.btf import VMLINUX_BTF, Btf, Field
from stalld.probe.headers import (
    FIELDS,
    WHO,
    declare,
    distribution_headers,
    lacking,
    structs,
    wanted_fields,
    write_tree,
)

needs_btf = pytest.mark.skipif(
    not Path(VMLINUX_BTF).exists(), reason="this kernel has no BTF (CONFIG_DEBUG_INFO_BTF)"
)


def compile_bpf(source: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Check C for the BPF target, warnings as errors."""
    command = ["clang-14", "-target", "bpf", "-nostdinc", "-Wall", "-Werror", "-fsyntax-only"]
    return subprocess.run(
        [*command, "-x", "c", *flags, "-"], input=source, capture_output=True, text=True
    )


@needs_btf
def test_the_tree_compiles(tmp_path: Path) -> None:
    """Every header of the tree compiles, and the compiler agrees with all offsets."""
    flags = write_tree(tmp_path, Btf())
    headers = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert len(headers) == 10
    includes = "".join(f'#include "{path}"\n' for path in headers if path.name != "types.h")
    done = compile_bpf("#include <linux/types.h>\n" + includes, *flags)
    assert done.returncode == 0, done.stderr
    asserted = (tmp_path / "include/stalld_structs.h").read_text().count("_Static_assert")
    assert asserted == sum(map(len, wanted_fields(Btf()).values()))
    # pt_regs is the machine's own.
    assert ("pt_regs" in wanted_fields(Btf())) is (platform.machine() == "x86_64")


@needs_btf
def test_flags(tmp_path: Path) -> None:
    """What the programs must know of this kernel is among the flags."""
    btf = Btf()
    flags = write_tree(tmp_path, btf)
    assert f"-I{tmp_path}/include" in flags
    assert f"-DSTALLD_TASK_STATE={btf.field('task_struct', '__state', 'state').name}" in flags
    assert f"-DSTALLD_HRTIMER_QUEUED={btf.field('hrtimer', 'state', 'is_queued').name}" in flags
    has = "-DSCHED_SWITCH_HAS_PREV_STATE" in flags
    assert has == (btf.tracepoint_args("sched_switch") == 4)


@pytest.mark.parametrize(("args", "expected"), [(None, False), (3, False), (4, True)])
def test_prev_state(tmp_path: Path, args: int | None, expected: bool) -> None:
    """Before 5.18 sched_switch passes three arguments, and the state is read instead."""
    flags = write_tree(tmp_path, fake(tracepoint_args=args))
    assert ("-DSCHED_SWITCH_HAS_PREV_STATE" in flags) is expected


def test_the_older_name_of_the_state(tmp_path: Path) -> None:
    """Before 5.14 the field is called state."""
    assert "-DSTALLD_TASK_STATE=state" in write_tree(tmp_path, fake(without={"__state"}))


@pytest.mark.parametrize(("without", "name"), [("is_queued", "state"), ("state", "is_queued")])
def test_whether_a_timer_is_queued(tmp_path: Path, without: str, name: str) -> None:
    """The field that tells it has had two names."""
    assert f"-DSTALLD_HRTIMER_QUEUED={name}" in write_tree(tmp_path, fake(without={without}))


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    """A kernel without a field that the programs touch is refused."""
    with pytest.raises(MissingAbilityError, match=r"task_struct\.prio"):
        write_tree(tmp_path, fake(without={"prio"}))


WHO_FLAGS = {f"-DSTALLD_WHO_{part}" for part in WHO}
X86_ONLY = {"FILE"}


@pytest.mark.parametrize(
    ("without", "parts"),
    [
        (set(), set()),
        ({"real_parent"}, {"PARENT"}),
        ({"thread_pid"}, {"NS_PID"}),
        ({"arg_start"}, {"COMMAND"}),
        ({"mm"}, {"COMMAND", "EXE"}),
        ({"exe_file"}, {"EXE"}),
        ({"d_name.name"}, {"EXE", "FILE"}),
        ({"s_type"}, {"FILE"}),
        ({"__parent", "parent"}, {"CGROUP"}),
        ({"memory_cgrp_id", "cpu_cgrp_id"}, {"CGROUP"}),
    ],
)
def test_what_is_told_of_tasks(tmp_path: Path, without: set[str], parts: set[str]) -> None:
    """A part whose fields the kernel lacks is left out and told; all others are there."""
    if platform.machine() != "x86_64":
        parts = parts | X86_ONLY
    btf = fake(without=without)
    assert set(lacking(btf)) == parts
    assert all(reason and ":" not in reason for reason in lacking(btf).values())
    flags = set(write_tree(tmp_path, btf))
    assert WHO_FLAGS - flags == {f"-DSTALLD_WHO_{part}" for part in parts}


@pytest.mark.parametrize(
    ("without", "flags"),
    [
        (set(), {"-DSTALLD_KERNFS_PARENT=__parent", "-DSTALLD_CONTROLLER=4"}),
        ({"__parent"}, {"-DSTALLD_KERNFS_PARENT=parent"}),
        ({"memory_cgrp_id"}, {"-DSTALLD_CONTROLLER=4"}),
    ],
)
def test_cgroup_flags(tmp_path: Path, without: set[str], flags: set[str]) -> None:
    """The parent's name, and which controller's hierarchy is looked at."""
    assert flags <= set(write_tree(tmp_path, fake(without=without)))


def fake(tracepoint_args: int | None = 4, without: frozenset[str] | set[str] = frozenset()) -> Btf:
    """A kernel whose structs hold their fields one after the other."""

    class Fake:
        def field(self, struct_name: str, *names: str) -> Field:
            wanted = (FIELDS, *(who.fields for who in WHO.values()))
            fields = [each for group in wanted for each in group.get(struct_name, ())]
            known = [name for each in fields or [names] for name in each]
            for name in names:
                if name not in without:
                    return Field(name.replace(".", "_"), 8 * known.index(name), 4, "u32 %s")
            raise MissingAbilityError(f"no {struct_name}.{names[0]}: please report it")

        def enumerator(self, enum_name: str, name: str) -> int | None:
            return None if name in without else 4

        def tracepoint_args(self, name: str) -> int | None:
            return tracepoint_args

    made: Any = Fake()
    btf: Btf = made
    return btf


def test_declare() -> None:
    """Fields in the order of their offsets, padding between, each offset asserted."""
    text = declare("s", [Field("late", 24, 8, "u64 %s"), Field("name", 4, 16, "u8 %s[16]")])
    assert text.splitlines() == [
        "struct s {",
        "\tchar _pad0[4];",
        "\tu8 name[16];",
        "\tchar _pad20[4];",
        "\tu64 late;",
        "};",
        '_Static_assert(offsetof(struct s, late) == 24, "late");',
        '_Static_assert(offsetof(struct s, name) == 4, "name");',
    ]


def test_a_wrong_offset_does_not_compile(tmp_path: Path) -> None:
    """An offset that C cannot give the field stops the compiler instead of reading rubbish."""
    write_tree(tmp_path, fake())
    text = declare("s", [Field("odd", 2, 4, "u32 %s")])
    done = compile_bpf(f"#include <linux/types.h>\n{text}\n", f"-I{tmp_path}/include")
    assert done.returncode != 0
    assert '"odd"' in done.stderr or "odd" in done.stderr


def test_all_structs_are_declared() -> None:
    """Each struct that the programs touch is there once."""
    text = structs(fake())
    for name in FIELDS:
        assert text.count(f"struct {name} {{") == 1


class TestDistributionHeaders:
    """Where there is no BTF."""

    def tree(self, root: Path, sched: str, events: str | None = None, under: str = "build") -> Path:
        """Installed headers of the running kernel."""
        include = root / "lib/modules" / os.uname().release / under / "include"
        (include / "linux").mkdir(parents=True)
        (include / "linux/sched.h").write_text(sched)
        if events is not None:
            (include / "trace/events").mkdir(parents=True)
            (include / "trace/events/sched.h").write_text(events)
        return root

    NEW = "struct task_struct {\n\tunsigned int\t\t\t__state;\n"
    OLD = "struct task_struct {\n\tvolatile long\t\t\tstate;\n"
    SWITCH = "TRACE_EVENT(sched_switch,\n\n\tTP_PROTO(bool preempt,\n\t\t struct task_struct *prev"

    @pytest.mark.parametrize("under", ["build", "source"])
    def test_new(self, tmp_path: Path, under: str) -> None:
        """From 5.18 both the name and the argument are new."""
        events = self.SWITCH + ",\n\t\t struct task_struct *next,\n\t\t unsigned int prev_state),"
        assert distribution_headers(self.tree(tmp_path, self.NEW, events, under)) == [
            "-DSTALLD_TASK_STATE=__state",
            "-DSTALLD_HRTIMER_QUEUED=state",
            "-DSCHED_SWITCH_HAS_PREV_STATE",
        ]

    @pytest.mark.parametrize("events", [None, SWITCH + ",\n\t\t struct task_struct *next),"])
    def test_old(self, tmp_path: Path, events: str | None) -> None:
        """Before 5.14 neither is; headers without tracepoints count as old."""
        assert distribution_headers(self.tree(tmp_path, self.OLD, events)) == [
            "-DSTALLD_TASK_STATE=state",
            "-DSTALLD_HRTIMER_QUEUED=state",
        ]

    def test_none(self, tmp_path: Path) -> None:
        """Neither BTF nor headers: both remedies are named."""
        with pytest.raises(
            MissingAbilityError,
            match=rf"CONFIG_DEBUG_INFO_BTF=y or install linux-headers-{os.uname().release}",
        ):
            distribution_headers(tmp_path)

    def test_another_users(self, tmp_path: Path) -> None:
        """Those of a kernel that root built at home are none for the service; nothing breaks."""
        home = self.tree(tmp_path, self.NEW)
        home.chmod(0o700)
        code = (
            "import sys; from pathlib import Path; from stalld.probe.headers import *\n"
            "try: distribution_headers(Path(sys.argv[1]))\n"
            "except MissingAbilityError as error: print(error)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(home)],
            cwd=Path(__file__).parents[3],
            user="nobody",
            group="nogroup",
            extra_groups=[],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stderr == ""
        assert "holds no headers that we may read" in done.stdout
