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

from stalld import decode, kthreads, records, rings, state
from stalld.track import model

BPF = Path(__file__).parents[2] / "bpf"
HEADER = re.sub(r"/\*.*?\*/", "", (BPF / "records.h").read_text(), flags=re.DOTALL)
TYPES = (
    "typedef unsigned char u8; typedef unsigned short u16; typedef unsigned int u32;\n"
    "typedef unsigned long long u64;\n"
    "typedef int s32;\n"
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
    types = r"(?:u8|u16|u32|s32|u64|char|struct \w+)"
    members = re.findall(rf"^\t{types} (\w+)(?:\[\w+\])?;", found[1], re.MULTILINE)
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


ARRAYS = {"wait_ns", "waiter_ns", "waiter_pid", "user_stack", "stack", "path_names"}


def _from_ctypes(structure: type[ctypes.Structure]) -> Fields:
    places = {name: getattr(structure, name) for name, *_ in structure._fields_}
    return {name: (place.offset, place.size) for name, place in places.items()}


def _record_fields() -> Fields:
    # Not in StallRecord, which has the stacks themselves.
    names = [name for name in records.StallRecord._fields if name != "comm"]
    at = names.index("kernel_stack")
    names[at:] = ["kernel_stack_bytes", "user_stack_bytes", "comm", "user_stack"]
    fields = _from_format(decode.HEAD, names)
    fields["kernel_stack"] = (decode.HEAD.size, records.KERNEL_STACK_DEPTH * 8)
    return fields


def _who_fields() -> Fields:
    names = list(records.TaskRecord._fields)
    at = names.index("args_total") + 1
    paths = ["args_bytes", "path_names", "paths_cut", "names_bytes"]
    names[at:] = [*paths, "parent_comm", "file_system", "args"]
    fields = _from_format(decode.WHO, names)
    fields["names"] = (decode.WHO.size, records.NAMES_LEN)
    return fields


def _tick_fields() -> Fields:
    names = list(records.TickSample._fields)
    names[names.index("comm") :] = ["stack_bytes", "comm", "stack"]
    return _from_format(decode.TICK, names)


STRUCTS: dict[str, tuple[Fields, int]] = {
    "stall_record": (_record_fields(), decode.HEAD.size + records.KERNEL_STACK_DEPTH * 8),
    "task_entry": (
        _from_format(decode.TASK, list(records.TaskEntry._fields)),
        decode.TASK.size,
    ),
    "task_record": (_who_fields(), decode.WHO.size + records.NAMES_LEN),
    "tick_sample": (_tick_fields(), decode.TICK.size),
} | {
    name: (_from_ctypes(structure), ctypes.sizeof(structure))
    for name, structure in {
        "waiter": state.Waiter,
        "cpu_state": state.CpuState,
        "watch_config": state.WatchConfig,
        "watched_bucket": kthreads.Bucket,
        "napi_slot": rings.NapiSlot,
    }.items()
}


def test_every_struct() -> None:
    """No struct of the header is left out here."""
    assert set(re.findall(r"^struct (\w+) {", HEADER, re.MULTILINE)) == set(STRUCTS)


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


SAME_NAME = (
    "COMM_LEN",
    "KERNEL_STACK_DEPTH",
    "USER_STACK_DEPTH",
    "LOOKBACK_DEPTH",
    "LOOKBACK_SAMPLES",
    "LOOKBACK_RINGS",
    "WAITERS",
    "KSOFTIRQD",
    "NAPI_SLOTS",
    "NAPI_UNREGISTERED",
    "BUCKET_TASKS",
    "CPU_ANY",
    "BRIEF_BIT",
    "ARGS_LEN",
    "PATH_DEPTH",
    "NAME_LEN",
    "NAMES_LEN",
)


_PATHS = records.TaskRecord._fields[-records.PATH_COUNT :]


def test_every_constant(compiled: dict[str, int]) -> None:
    """Each constant of the header has its equal in Python, and no vector is left out."""
    vectors = {f"VEC_{name}": number for number, name in enumerate(records.VECTORS)}
    wanted = (
        vectors
        | {
            "VEC_COUNT": len(records.VECTORS),
            "VEC_NONE": records.VEC_NONE,
            "VEC_PENDING": records.VEC_PENDING,
            "ABI_VERSION": records.ABI_VERSION,
        }
        | {name: getattr(records, name) for name in SAME_NAME}
        | {f"KNOWN_{bit.name}": bit.value for bit in records.Known}
    )
    assert wanted == {name: compiled[name] for name in _macros()}


def test_every_enumerator(compiled: dict[str, int]) -> None:
    """Record types and sources have the same names and numbers."""

    def spelled(prefix: str, values: type[enum.IntEnum]) -> dict[str, int]:
        return {f"{prefix}_{value.name}": value.value for value in values}

    wanted = spelled("RECORD", records.RecordType) | spelled("SOURCE", records.Source)
    wanted |= spelled("TICK", records.TickKind)
    wanted["SOURCE_COUNT"] = len(records.Source)
    wanted |= {f"PATH_{name.upper()}": at for at, name in enumerate(_PATHS)}
    wanted["PATH_COUNT"] = len(_PATHS) == records.PATH_COUNT and records.PATH_COUNT
    assert wanted == {name: compiled[name] for name in _enumerators()}


def test_cache_lines(compiled: dict[str, int]) -> None:
    """A CPU's state fills whole cache lines; a bucket is one, so that a wake-up looks at one."""
    assert compiled["sizeof cpu_state"] % 64 == 0
    assert compiled["sizeof watched_bucket"] == 64


def test_raises_begin_a_cache_line(compiled: dict[str, int]) -> None:
    """What all programs look at is one line, the raises follow on the next."""
    assert compiled["cpu_state.raised"] == 64


def test_masks_bound_their_arrays(compiled: dict[str, int]) -> None:
    """The verifier's masks and the programs' shifts want these powers of two."""
    depth = compiled["KERNEL_STACK_DEPTH"]
    assert depth & (depth + 1) == 0
    for name in ("WAITERS", "BUCKET_TASKS", "LOOKBACK_SAMPLES", "NAPI_SLOTS"):
        assert compiled[name] & (compiled[name] - 1) == 0
    assert compiled["WAITERS"] == 8  # a word of bytes: cpu_state.waiting


def _defined(source: str, name: str) -> str:
    found = re.search(rf"^#define {name} (.+)$", (BPF / source).read_text(), re.MULTILINE)
    assert found, f"bpf/{source} has no {name}"
    return found[1]


def test_pf_kthread() -> None:
    """The flag that tells kernel threads is the same on both sides."""
    assert int(_defined("state.h", "PF_KTHREAD"), 16) == records.PF_KTHREAD


def test_the_hash_of_task_pointers() -> None:
    """The multiplier is the kernel program's: else no wake-up would find its bucket."""
    factor = int(_defined("sched.c", "HASH_FACTOR").removesuffix("ULL"), 16)
    for pointer in (0xFFFF888100D40000, 0xFFFF888100D43300, 0xFFFFFFFFFFFFFFC0):
        for bits in (6, 10, 17):
            in_c = (pointer * factor % (1 << 64)) >> (64 - bits)
            assert records.watched_bucket(pointer, bits) == in_c < 1 << bits


@pytest.mark.parametrize(("cpus", "bits"), [(1, 6), (4, 6), (5, 7), (8, 7), (9, 8), (4096, 16)])
def test_buckets(cpus: int, bits: int) -> None:
    """Sixteen buckets a CPU at least, and 64 on the smallest machine."""
    assert records.watched_bits(cpus) == bits
    assert 1 << bits >= 16 * cpus


def test_vectors_that_no_kernel_defers() -> None:
    """Their raises are timed even if they are not watched, for the program that needs them."""
    names = re.findall(r"VEC_(\w+)\)", _defined("softirq.c", "VEC_NOW_MASK"))
    assert sum(1 << records.VECTORS.index(name) for name in names) == state.TIMED_ALWAYS


def test_serious() -> None:
    """The kernel lets through what the daemon calls an error, and never mutes that."""
    assert int(_defined("state.h", "SERIOUS_FACTOR")) == model.SERIOUS_FACTOR
