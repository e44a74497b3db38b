"""The compact symbol table, held against small files and a naive model."""

import random
import string
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stalld.enrich.kallsyms import Kallsyms, Symbol, preference, printable

CORE = """\
0000000000000000 A fixed_percpu_data
ffffffff81000000 T srso_alias_untrain_ret
ffffffff81000000 T _stext
ffffffff81000000 T startup_64
ffffffff81000100 t __pfx_read_zero
ffffffff81000110 t read_zero
ffffffff81000200 T __pfx_vfs_read
ffffffff81000210 t __do_sys_getpid
ffffffff81000210 T __ia32_sys_getpid
ffffffff81000210 T __x64_sys_getpid
ffffffff81000300 W weak_name
ffffffff81000300 t local_name
ffffffff81000300 T global_name
ffffffff81000400 T __softirqentry_text_start
ffffffff81000400 T __do_softirq
ffffffff81100000 T last_function
ffffffff81200000 T _etext
ffffffff81200100 R some_data
ffffffff81300000 T _sinittext
ffffffff81300000 t early_function
ffffffff81301000 T _einittext
ffffffff81302000 t some_driver_exit
"""
MODULES = """\
ffffffffc0001000 t poll\t[e1000]
ffffffffc0000f00 t probe\t[e1000]
ffffffffc0001800 d data\t[e1000]
ffffffffc0101000 t ftrace_trampoline\t[__builtin__ftrace]
ffffffffc0200040 t bpf_prog_00112233aabbccdd_two\t[bpf]
ffffffffc0200000 t bpf_prog_00112233aabbccdd_one\t[bpf]
"""


def load(directory: Path, text: str | bytes) -> Kallsyms:
    """The table of a file with this content."""
    path = directory / "kallsyms"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return Kallsyms.load(str(path), now_ns=lambda: 7)


@pytest.fixture
def table(tmp_path: Path) -> Kallsyms:
    return load(tmp_path, CORE + MODULES)


def test_address(table: Kallsyms) -> None:
    """The address of a name; 0 for one that is not there, nor part of another."""
    assert table.address(b"read_zero") == 0xFFFFFFFF81000110
    assert table.address(b"poll") == 0xFFFFFFFFC0001000
    assert table.address(b"read_zer") == table.address(b"no_such_function") == 0


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (0xFFFFFFFF81000110, "read_zero+0x0"),
        (0xFFFFFFFF8100011F, "read_zero+0xf"),
        (0xFFFFFFFF81000200, "read_zero+0xf0"),  # padding belongs to the function before
        (0xFFFFFFFF8115FFFF, "last_function+0x5ffff"),
        (0xFFFFFFFF81300010, "early_function+0x10"),
        (0xFFFFFFFF81302010, "some_driver_exit+0x10"),
        (0xFFFFFFFFC0000F10, "probe+0x10 [e1000]"),
        (0xFFFFFFFFC0001010, "poll+0x10 [e1000]"),
        (0xFFFFFFFFC0101004, "ftrace_trampoline+0x4 [__builtin__ftrace]"),
        (0xFFFFFFFFC0200010, "bpf_prog_00112233aabbccdd_one+0x10 [bpf]"),
        (0xFFFFFFFFC0200041, "bpf_prog_00112233aabbccdd_two+0x1 [bpf]"),
        # nothing known is there
        (0, "0x0"),
        (0x401000, "0x401000"),
        (0xFFFFFFFF80FFFFFF, "0xffffffff80ffffff"),
        (0xFFFFFFFF81200000, "0xffffffff81200000"),
        (0xFFFFFFFF81200100, "0xffffffff81200100"),
        (0xFFFFFFFF81301000, "0xffffffff81301000"),
        (0xFFFFFFFF81304000, "0xffffffff81304000"),
        (0xFFFFFFFFC0080000, "0xffffffffc0080000"),
        (0xFFFFFFFFFFFFFFFF, "0xffffffffffffffff"),
    ],
)
def test_format(table: Kallsyms, address: int, text: str) -> None:
    """Known addresses read fn+0xoff [module]; where nothing known can lie, plain hex."""
    assert table.format(address) == text


@pytest.mark.parametrize(
    ("address", "name"),
    [
        (0xFFFFFFFF81000000, "startup_64"),
        (0xFFFFFFFF81000210, "__x64_sys_getpid"),
        (0xFFFFFFFF81000300, "global_name"),
        (0xFFFFFFFF81000400, "__do_softirq"),
        (0xFFFFFFFF81300000, "early_function"),
    ],
)
def test_the_best_name_of_an_address(table: Kallsyms, address: int, name: str) -> None:
    """Of several names a real, global function wins over bounds, weak and local ones."""
    assert table.resolve(address) == Symbol(name, 0)


def test_what_is_only_near_is_not_sure(table: Kallsyms) -> None:
    """Behind the page after a module's last symbol something else may have been loaded."""
    inside = table.resolve(0xFFFFFFFFC0000FFF)
    behind = table.resolve(0xFFFFFFFFC0001000 + 4095)
    far = table.resolve(0xFFFFFFFFC0001000 + 4096)
    assert inside is not None
    assert inside.sure
    assert behind is not None
    assert behind.sure
    assert far is not None
    assert not far.sure


def test_counts_and_core(table: Kallsyms) -> None:
    """One symbol an address, and core text is told from the rest."""
    assert len(table) == 13
    assert table.loaded_ns == 7
    assert not table.hidden
    assert table.is_core(0xFFFFFFFF81000000)
    assert not table.is_core(0xFFFFFFFF81200000)
    assert not table.is_core(0xFFFFFFFFC0001000)


def test_modules_below_the_core(tmp_path: Path) -> None:
    """arm64 has modules below the kernel and BPF programs far away: all resolve."""
    far = "ffff800080000000 t bpf_prog_00112233aabbccdd_far\t[bpf]\n"
    low = MODULES.replace("ffffffffc0", "ffffffff70") + far
    table = load(tmp_path, CORE + low)
    assert table.format(0xFFFFFFFF70001010) == "poll+0x10 [e1000]"
    assert table.format(0xFFFF800080000010) == "bpf_prog_00112233aabbccdd_far+0x10 [bpf]"
    assert table.format(0xFFFFFFFF81000110) == "read_zero+0x0"
    assert table.format(0xFFFF800180000010) == "0xffff800180000010"


def test_hidden_addresses_are_said(tmp_path: Path) -> None:
    """Zeros for all addresses are a table that knows nothing and says why."""
    table = load(tmp_path, "".join(f"{0:016x} T name{n}\n" for n in range(10)))
    assert table.hidden
    assert len(table) == 0
    assert table.resolve(0) is None
    assert table.resolve(0xFFFFFFFF81000110) is None


@pytest.mark.parametrize("text", ["", "ffffffff81000000 D data\n", "nonsense\n\n\xff\x00\n"])
def test_no_symbols_is_not_hidden(tmp_path: Path, text: str) -> None:
    """A file without any text symbol gives an empty table."""
    table = load(tmp_path, text)
    assert not table.hidden
    assert len(table) == 0
    assert table.format(5) == "0x5"


def test_empty_table() -> None:
    """The table of the time before loading knows nothing and hides nothing."""
    table = Kallsyms.empty()
    assert not table.hidden
    assert table.resolve(0xFFFFFFFF81000110) is None
    assert not table.is_core(0xFFFFFFFF81000110)


def test_no_kallsyms_at_all(tmp_path: Path) -> None:
    """A missing file is the system's own error."""
    with pytest.raises(FileNotFoundError):
        Kallsyms.load(str(tmp_path / "none"))


def test_bad_lines_are_passed_over(tmp_path: Path) -> None:
    """A line that cannot be understood costs that line only."""
    bad = b"xyz T a\nffffffff81000001\n81000002 T short\n-fffffff81000003 T sign\n\n \n  \n"
    bad += b"ffffffff8100000a TW b\nffffffff8100000b  c\n1ffffffff81000001 T long\n"
    table = load(tmp_path, CORE.encode() + bad + MODULES.encode())
    assert len(table) == 13


def test_no_bounds_in_the_file(tmp_path: Path) -> None:
    """Without _stext and _etext, nearness decides for the core as it does for modules."""
    table = load(tmp_path, "ffffffff81000000 T one\nffffffff81000100 T two\n")
    assert table.format(0xFFFFFFFF81000110) == "two+0x10"
    assert table.format(0xFFFFFFFF82000000) == "0xffffffff82000000"


def test_hostile_names(tmp_path: Path) -> None:
    """Control characters and non-ASCII in names never reach the output as they are."""
    line = b"ffffffffc0200000 t bpf_prog_\x1b[31m\xc3\xa9\x07\t[b\x00f]\n"
    table = load(tmp_path, CORE.encode() + line)
    assert table.format(0xFFFFFFFFC0200000) == "bpf_prog_\\x1b[31m\\xc3\\xa9\\x07+0x0 [b\\x00f]"


@settings(deadline=None)
@given(st.binary())
def test_printable_is_printable(name: bytes) -> None:
    """Any bytes become printable ASCII, and printable ASCII stays."""
    text = printable(name)
    assert text.isascii()
    assert not text or text.isprintable()
    if name.isascii() and name.decode().isprintable():
        assert text == name.decode()


NAMES = st.text(string.ascii_lowercase + "_.", min_size=1, max_size=6).filter(
    lambda name: not name.startswith(("__pfx_", "__cfi_"))
)
BASES = st.sampled_from([0xFFFF800000000000, 0xFFFFFFFF81000000, 0xFFFFFFFFC0000000])
LINES = st.lists(
    st.tuples(
        st.builds(int.__add__, BASES, st.integers(0, 600_000) | st.integers(0, 40)),
        st.sampled_from("TtWwDdRrb"),
        NAMES,
        st.sampled_from([None, None, "ext4", "bpf"]),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(LINES, st.booleans(), st.lists(st.integers(0, 300_000), max_size=5))
def test_against_a_naive_model(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[tuple[int, str, str, str | None]],
    in_order: bool,
    steps: list[int],
) -> None:
    """Whatever the order of the lines, lookups equal a search through a plain sorted list."""
    if in_order:
        lines = sorted(lines, key=lambda line: line[0])
    text = "".join(
        f"{address:016x} {kind} {name}" + (f"\t[{module}]" if module else "") + "\n"
        for address, kind, name, module in lines
    )
    table = load(tmp_path_factory.getbasetemp(), text)
    best: dict[int, tuple[bool, int, int, bytes]] = {}
    modules: dict[tuple[int, str], set[str | None]] = {}
    for address, kind, name, module in lines:
        if kind in "TtWw":
            key = preference(ord(kind), name.encode())
            best[address] = min(best.get(address, key), key)
            modules.setdefault((address, name), set()).add(module)
    order = sorted(best)
    assert len(table) == len(order)
    if order:
        assert table.resolve(order[0] - 1) is None
    for offset in (0, *steps):
        for start in order:
            symbol = table.resolve(start + offset)
            at = max(a for a in order if a <= start + offset)
            distance = start + offset - at
            if symbol is None:
                assert distance >= 64 << 10
            else:
                assert distance < 256 << 10
                assert (symbol.offset, symbol.name) == (distance, best[at][3].decode())
                assert symbol.module in modules[at, symbol.name]


def test_memory_of_a_large_host(tmp_path: Path) -> None:
    """200,000 symbols of usual length, half of them in shuffled modules, stay within 6 MB."""
    shuffle = random.Random(1)
    lines = [
        f"{0xFFFFFFFF81000000 + n * 96:016x} t some_function_name_{n:04d}\n" for n in range(100_000)
    ]
    for module in range(100):
        base = 0xFFFFFFFFC0000000 + module * 200_000
        part = [
            f"{base + n * 96:016x} t another_function_{n:05d}\t[module_{module}]\n"
            for n in range(1000)
        ]
        shuffle.shuffle(part)
        lines += part
    path = tmp_path / "kallsyms"
    path.write_text("".join(lines))
    del lines, part
    tracemalloc.start()
    table = Kallsyms.load(str(path))
    retained, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(table) == 200_000
    assert retained <= 6 << 20
    assert peak <= 20 << 20
