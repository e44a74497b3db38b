"""The Python side of the ABI against what the C compilers make of ``bpf/records.h``."""

from __future__ import annotations

import ctypes
import enum
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from stalld import decode, records, state

BPF = Path(__file__).parents[2] / "bpf"
HEADER = re.sub(r"/\*.*?\*/", "", (BPF / "records.h").read_text(), flags=re.DOTALL)
TYPES = (
    "typedef unsigned char u8; typedef unsigned int u32; typedef unsigned long long u64;\n"
    "#define offsetof __builtin_offsetof\n"
)
COMPILERS = {
    "bpf": ["clang-14", "-target", "bpf"],
    "host clang": ["clang-14"],
    "host gcc": ["gcc", "-std=gnu11"],
}

Fields = dict[str, tuple[int, int]]
"""Name → offset and size."""


@pytest.fixture(scope="module", params=COMPILERS)
def compiled(request: pytest.FixtureRequest) -> dict[str, int]:
    """The value of every constant, offset and size, from the compiler's assembly."""
    compiler = COMPILERS[request.param]
    assert shutil.which(compiler[0]), f"{compiler[0]} is not installed: run make test"
    wanted = {name: name for name in [*_macros(), *_enumerators()]}
    for struct_name in STRUCTS:
        wanted[f"sizeof {struct_name}"] = f"sizeof(struct {struct_name})"
        for field in _members(struct_name):
            place = f"struct {struct_name}, {field}"
            wanted[f"{struct_name}.{field}"] = f"offsetof({place})"
            size = f"sizeof(((struct {struct_name} *)0)->{field})"
            wanted[f"sizeof {struct_name}.{field}"] = size
    # One array that the assembler spells out, a word each.
    values = ",\n".join(f"(u64)({expression})" for expression in wanted.values())
    source = f"{TYPES}\n{HEADER}\nu64 layout[] = {{\n{values}\n}};\n"
    done = subprocess.run(
        [*compiler, "-Wall", "-Wpadded", "-Werror", "-O1", "-S", "-x", "c", "-o", "-", "-"],
        input=source,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    words = _words(done.stdout.partition("\nlayout:")[2])
    return dict(zip(wanted, words, strict=True))


def _words(assembly: str) -> list[int]:
    numbers: list[int] = []
    for directive, value in re.findall(r"^\s+\.(\w+)\s+(\S+)", assembly, re.MULTILINE):
        if directive in ("quad", "xword", "8byte"):
            numbers.append(int(value, 0) & 0xFFFFFFFFFFFFFFFF)
        elif directive in ("zero", "skip"):
            numbers += [0] * (int(value.partition(",")[0]) // 8)
    return numbers


def _macros() -> list[str]:
    return re.findall(r"^#define (\w+) \S", HEADER, re.MULTILINE)


def _enumerators() -> list[str]:
    return re.findall(r"^\t([A-Z_]+) = \d+,", HEADER, re.MULTILINE)


def _members(struct_name: str) -> list[str]:
    found = re.search(rf"^struct {struct_name} {{\n(.*?)^}};", HEADER, re.MULTILINE | re.DOTALL)
    assert found, f"bpf/records.h has no struct {struct_name}"
    members = re.findall(r"^\t(?:u32|u64|char) (\w+)(?:\[\w+\])?;", found[1], re.MULTILINE)
    assert len(members) == found[1].count(";")
    return list(members)


def _from_format(layout: struct.Struct, names: list[str]) -> Fields:
    """Offsets and sizes of an unaligned struct format whose repeated items are arrays."""
    fields: Fields = {}
    offset = 0
    counts = re.findall(r"(\d*)([A-Zs])", layout.format)
    names = list(names)
    for count, code in counts:
        size = struct.calcsize(f"={code}")
        number = int(count or 1)
        if code == "s" or names[0] in ARRAYS:
            fields[names.pop(0)] = (offset, number * size)
            offset += number * size
            continue
        for _ in range(number):
            fields[names.pop(0)] = (offset, size)
            offset += size
    assert not names
    return fields


ARRAYS = {"wait_ns", "user_stack"}


def _from_ctypes(structure: type[ctypes.Structure]) -> Fields:
    places = {name: getattr(structure, name) for name, *_ in structure._fields_}
    return {name: (place.offset, place.size) for name, place in places.items()}


def _record_fields() -> Fields:
    # Not in StallRecord, which has the stacks themselves.
    names = [name for name in records.StallRecord._fields if name not in ("comm",)]
    at = names.index("kernel_stack")
    names[at:] = ["kernel_stack_bytes", "user_stack_bytes", "comm", "user_stack"]
    fields = _from_format(decode.HEAD, names)
    fields["kernel_stack"] = (decode.HEAD.size, records.KERNEL_STACK_DEPTH * 8)
    return fields


STRUCTS: dict[str, tuple[Fields, int]] = {
    "stall_record": (_record_fields(), decode.HEAD.size + records.KERNEL_STACK_DEPTH * 8),
    "cpu_state": (_from_ctypes(state.CpuState), ctypes.sizeof(state.CpuState)),
    "watch_config": (_from_ctypes(state.WatchConfig), ctypes.sizeof(state.WatchConfig)),
    "task_entry": (
        _from_format(decode.TASK, list(records.TaskEntry._fields)),
        decode.TASK.size,
    ),
}


@pytest.mark.parametrize("name", STRUCTS)
def test_fields(compiled: dict[str, int], name: str) -> None:
    """Same fields in the same order, each at the same offset and of the same size."""
    fields, size = STRUCTS[name]
    in_c = {
        field: (compiled[f"{name}.{field}"], compiled[f"sizeof {name}.{field}"])
        for field in _members(name)
    }
    assert list(fields.items()) == list(in_c.items())
    assert size == compiled[f"sizeof {name}"]


@pytest.mark.parametrize("name", STRUCTS)
def test_no_holes(compiled: dict[str, int], name: str) -> None:
    """Fields follow each other without padding, up to the end."""
    end = 0
    for field in _members(name):
        assert compiled[f"{name}.{field}"] == end
        end += compiled[f"sizeof {name}.{field}"]
    assert compiled[f"sizeof {name}"] == end


def test_every_constant(compiled: dict[str, int]) -> None:
    """Each constant of the header has its equal in Python, and no vector is left out."""
    vectors = {f"VEC_{name}": number for number, name in enumerate(records.VECTORS)}
    wanted = vectors | {
        "VEC_COUNT": len(records.VECTORS),
        "VEC_NONE": records.VEC_NONE,
        "ABI_VERSION": records.ABI_VERSION,
        "COMM_LEN": records.COMM_LEN,
        "KERNEL_STACK_DEPTH": records.KERNEL_STACK_DEPTH,
        "USER_STACK_DEPTH": records.USER_STACK_DEPTH,
    }
    assert wanted == {name: compiled[name] for name in _macros()}


def test_every_enumerator(compiled: dict[str, int]) -> None:
    """Record types and sources have the same names and numbers."""

    def spelled(prefix: str, values: type[enum.IntEnum]) -> dict[str, int]:
        return {f"{prefix}_{value.name}": value.value for value in values}

    wanted = spelled("RECORD", records.RecordType) | spelled("SOURCE", records.Source)
    wanted["SOURCE_COUNT"] = len(records.Source)
    assert wanted == {name: compiled[name] for name in _enumerators()}


def test_cpus_share_no_cache_line(compiled: dict[str, int]) -> None:
    """A CPU's state fills whole cache lines."""
    assert compiled["sizeof cpu_state"] % 64 == 0


def test_the_stack_mask_bounds_the_stack(compiled: dict[str, int]) -> None:
    """One below a power of two: the verifier's mask must not change any possible size."""
    depth = compiled["KERNEL_STACK_DEPTH"]
    assert depth & (depth + 1) == 0


def test_pf_kthread() -> None:
    """The flag that tells kernel threads is the same on both sides."""
    found = re.search(r"#define PF_KTHREAD (\w+)", (BPF / "state.h").read_text())
    assert found
    assert int(found[1], 16) == records.PF_KTHREAD
