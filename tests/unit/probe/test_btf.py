"""The BTF reader against the running kernel, with bpftool as the independent witness."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stalld.errors import MissingAbilityError
from stalld.probe.btf import VMLINUX_BTF, Btf, Field
from stalld.probe.headers import FIELDS, WHO
from stalld.probe.loader import percpu_places
from stalld.state import offsets

pytestmark = pytest.mark.skipif(
    not Path(VMLINUX_BTF).exists(), reason="this kernel has no BTF (CONFIG_DEBUG_INFO_BTF)"
)

_STRUCT, _UNION = 4, 5


@pytest.fixture(scope="module")
def btf() -> Iterator[Btf]:
    """The running kernel's."""
    found = Btf()
    yield found
    found.close()


@pytest.fixture(scope="module")
def dump() -> dict[int, dict[str, Any]]:
    """Every type as bpftool reads it."""
    bpftool = shutil.which("bpftool", path=f"{os.environ['PATH']}:/usr/sbin")
    assert bpftool, "bpftool is not installed: run make test"
    command = [bpftool, "--json", "btf", "dump", "file", VMLINUX_BTF]
    types = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["types"]
    return {each["id"]: each for each in types}


def witness(dump: dict[int, dict[str, Any]], struct_name: str) -> dict[str, int]:
    """Member → offset in bits, members of anonymous members included."""
    (whole,) = [t for t in dump.values() if t["kind"] == "STRUCT" and t["name"] == struct_name]
    return dict(_members(dump, whole, 0))


def _members(
    dump: dict[int, dict[str, Any]], whole: dict[str, Any], base: int
) -> Iterator[tuple[str, int]]:
    for member in whole["members"]:
        at = base + member["bits_offset"]
        inner = dump[member["type_id"]]
        if member["name"] != "(anon)":
            yield member["name"], at
        elif inner["kind"] in ("STRUCT", "UNION"):
            yield from _members(dump, inner, at)


@pytest.mark.parametrize(
    ("struct_name", "names"),
    [
        (struct_name, names)
        for wanted in (FIELDS, *(who.fields for who in WHO.values()))
        for struct_name, fields in wanted.items()
        for names in fields
    ],
)
def test_offsets(
    btf: Btf, dump: dict[int, dict[str, Any]], struct_name: str, names: tuple[str, ...]
) -> None:
    """Each field that the programs touch is where bpftool says it is."""
    field = btf.field(struct_name, *names)
    if "." not in names[0]:
        assert field.offset * 8 == witness(dump, struct_name)[field.name]


def test_declarations(btf: Btf) -> None:
    """Sizes and types as include/linux/sched.h has them."""
    assert btf.field("task_struct", "pid")[2:] == (4, "s32 %s")
    assert btf.field("task_struct", "comm")[2:] == (16, "u8 %s[16]")
    assert btf.field("task_struct", "flags")[2:] == (4, "u32 %s")
    assert btf.field("task_struct", "stack")[2:] == (8, "void *%s")
    assert btf.field("bpf_iter__task", "task")[2:] == (8, "struct task_struct *%s")


def test_the_newer_name_wins(btf: Btf) -> None:
    """Of several names the first that exists is taken."""
    assert btf.field("task_struct", "no_such", "pid").name == "pid"
    assert btf.field("task_struct", "pid", "tgid").name == "pid"


def test_members_of_anonymous_structs(btf: Btf, dump: dict[int, dict[str, Any]]) -> None:
    """They count as the struct's own, at their offset in the whole."""
    bits = witness(dump, "sk_buff")["dev"]
    assert btf.field("sk_buff", "dev").offset * 8 == bits


def test_missing_field(btf: Btf) -> None:
    """The error names struct, all names tried and where was looked."""
    with pytest.raises(
        MissingAbilityError, match=r"vmlinux .*task_struct\.__nope or nope:"
    ) as told:
        btf.field("task_struct", "__nope", "nope")
    assert told.value.exit_code == 1


def test_missing_struct(btf: Btf) -> None:
    """The error names the struct."""
    with pytest.raises(MissingAbilityError, match="no struct no_such_struct"):
        btf.field("no_such_struct", "pid")


@pytest.mark.parametrize("name", ["sched_reset_on_fork", "sched_contributes_to_load"])
def test_bit_fields_are_refused(btf: Btf, name: str) -> None:
    """A bit-field has no offset in bytes, also where it begins at one."""
    with pytest.raises(MissingAbilityError, match=f"task_struct.{name} is a bit-field"):
        btf.field("task_struct", name)


def test_structs_by_value(btf: Btf) -> None:
    """A member that is a struct by value is bytes: only its address is of use."""
    whole, inner = btf.field("napi_struct", "dev_list"), btf.field("napi_struct", "dev_list.prev")
    assert whole.declaration == f"u8 %s[{whole.size}]" == "u8 %s[16]"
    assert (inner.name, inner.offset) == ("dev_list_prev", whole.offset + 8)
    assert btf.field("pid", "numbers").declaration.startswith("u8 %s[16][")


@pytest.mark.parametrize("name", ["dev.name", "dev_list.none", "none.prev"])
def test_members_of_what_has_none(btf: Btf, name: str) -> None:
    """A pointer is not followed, and what is not there is named."""
    with pytest.raises(MissingAbilityError, match=f"napi_struct.{name}"):
        btf.field("napi_struct", name)


def test_enumerators(btf: Btf, dump: dict[int, dict[str, Any]]) -> None:
    """Values of an enum; None of what is not there."""
    (found,) = (t for t in dump.values() if t["kind"] == "ENUM" and t["name"] == "cpu_usage_stat")
    for value in found["values"]:
        assert btf.enumerator("cpu_usage_stat", value["name"]) == value["val"]
    assert btf.enumerator("cpu_usage_stat", "none") is None
    assert btf.enumerator("no_such_enum", "none") is None


@pytest.mark.parametrize("content", [None, b"", b"not BTF"])
def test_unreadable_file(tmp_path: Path, content: bytes | None) -> None:
    """A file that is missing or broken is named, with the remedy."""
    path = tmp_path / "btf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MissingAbilityError, match=rf"{path}.*CONFIG_DEBUG_INFO_BTF"):
        Btf(str(path))


def test_functions(btf: Btf, dump: dict[int, dict[str, Any]]) -> None:
    """A function is found by name, another one is not."""
    found = btf.function_id("net_rx_action")
    assert found is not None
    assert (dump[found]["kind"], dump[found]["name"]) == ("FUNC", "net_rx_action")
    assert btf.function_id("no_such_function") is None


def test_tracepoint_arguments(btf: Btf, dump: dict[int, dict[str, Any]]) -> None:
    """As many as the tracepoint passes, its own data pointer left out."""
    assert btf.tracepoint_args("softirq_raise") == 1
    assert btf.tracepoint_args("no_such_tracepoint") is None
    (trace,) = [
        t for t in dump.values() if t["kind"] == "TYPEDEF" and t["name"] == "btf_trace_sched_switch"
    ]
    proto = dump[dump[trace["type_id"]]["type_id"]]
    assert btf.tracepoint_args("sched_switch") == proto["vlen"] - 1


def test_a_field_says_what_it_is() -> None:
    """The declaration takes the name of the field."""
    assert Field("pid", 8, 4, "s32 %s").declaration % "pid" == "s32 pid"


class TestPerCpu:
    """Where a CPU keeps its own variables."""

    def witness(self, dump: dict[int, dict[str, Any]], name: str) -> int:
        """Where bpftool says that a variable is."""
        (section,) = [
            t for t in dump.values() if t["kind"] == "DATASEC" and t["name"] == ".data..percpu"
        ]
        places = {dump[each["type_id"]]["name"]: each["offset"] for each in section["vars"]}
        found: int = places[name]
        return found

    @pytest.mark.parametrize(
        "name", ["tick_cpu_sched", "softnet_data", "kernel_cpustat", "cpu_number"]
    )
    def test_variables(self, btf: Btf, dump: dict[int, dict[str, Any]], name: str) -> None:
        """Each lies where bpftool says."""
        try:
            wanted = self.witness(dump, name)
        except (KeyError, ValueError):
            assert btf.percpu_offset(name) is None
        else:
            assert btf.percpu_offset(name) == wanted

    def test_members(self, btf: Btf, dump: dict[int, dict[str, Any]]) -> None:
        """A member lies at the offset that its struct gives it."""
        for variable, struct_name, member in (
            ("tick_cpu_sched", "tick_sched", "sched_timer"),
            ("softnet_data", "softnet_data", "processed"),
        ):
            whole = btf.percpu_offset(variable)
            assert whole is not None
            bits = witness(dump, struct_name)[member]
            assert btf.percpu_offset(variable, member) == whole + bits // 8

    def test_members_of_members(self, btf: Btf) -> None:
        """A path through structs adds up."""
        timer = btf.percpu_offset("tick_cpu_sched", "sched_timer")
        assert timer is not None
        inner = btf.percpu_offset("tick_cpu_sched", "sched_timer", "_softexpires")
        assert inner == timer + btf.field("hrtimer", "_softexpires").offset

    @pytest.mark.parametrize(
        "path",
        [
            ("no_such_variable",),
            ("jiffies",),  # there is one, but not one for each CPU
            ("tick_cpu_sched", "no_such_member"),
            ("tick_cpu_sched", "sched_timer", "no_such_member"),
            ("tick_cpu_sched", "sched_timer", "_softexpires", "of_a_number"),
        ],
    )
    def test_what_there_is_not(self, btf: Btf, path: tuple[str, ...]) -> None:
        """A variable or member that this kernel does not have is none, not an error."""
        assert btf.percpu_offset(*path) is None

    def test_places_of_this_kernel(self, btf: Btf) -> None:
        """All places are relative to the tick's timer, and apart from it."""
        timer = btf.percpu_offset("tick_cpu_sched", "sched_timer")
        places = percpu_places(btf, btf)
        assert timer is not None
        softnet = btf.percpu_offset("softnet_data", "processed")
        assert softnet is not None
        assert places["softnet"] == softnet - timer
        cpustat = btf.percpu_offset("kernel_cpustat", "cpustat")
        assert cpustat is not None
        assert places["cpustat"] == cpustat + 7 * 8 - timer
        assert {f"{name}_offset" for name in places} <= offsets({}).keys()
        assert {"dropped", "received_rps", "backlog"} <= places.keys()
        count = places.pop("flow_count", 0)
        assert 0 <= count < 64
        # They go into 32-bit settings.
        assert all(place and -(1 << 31) <= place < 1 << 31 for place in places.values())
