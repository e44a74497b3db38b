"""Names that stay true while programs and modules come and go."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stalld.enrich.kallsyms import Kallsyms, Symbol
from stalld.enrich.ksymbols import Drained, Ksymbol
from stalld.enrich.symbols import SymbolTable

BASE = """\
ffffffff81000000 T _stext
ffffffff81000000 T start_kernel
ffffffff81000100 T bpf_trace_run2
ffffffff81000200 T hrtimer_interrupt
ffffffff81000300 T asm_sysvec_apic_timer_interrupt
ffffffff81000400 T read_zero
ffffffff81000500 T vfs_read
ffffffff81000600 T do_exit
ffffffff81000700 T after_do_exit
ffffffff81001000 T _etext
ffffffffc0001000 t poll\t[e1000]
ffffffffc0100000 t bpf_prog_0000000000000001_old\t[bpf]
ffffffffc0180000 t bpf_prog_0000000000000002_tick\t[bpf]
"""
OLD = 0xFFFFFFFFC0100000
TICK = 0xFFFFFFFFC0180010
NEW = 0xFFFFFFFFC0200000
CORE = 0xFFFFFFFF81000000
RELOADED_NS = 1_000_000_000
STACK = (TICK, CORE + 0x110, CORE + 0x210, CORE + 0x310, CORE + 0x400, CORE + 0x510)


class FakeFeed:
    """Announcements put in by hand; counts the drains."""

    def __init__(self) -> None:
        self.events: list[Ksymbol] = []
        self.lost = False
        self.drains = 0

    def pending(self) -> bool:
        return bool(self.events) or self.lost

    def drain(self) -> Drained:
        drained = Drained(tuple(self.events), self.lost)
        self.events, self.lost = [], False
        self.drains += 1
        return drained

    def load(self, address: int, name: str, length: int = 0x40, time_ns: int = 0) -> None:
        """A program of `length` bytes appears."""
        event = Ksymbol(time_ns, address, length, name.encode(), bpf=True, removed=False)
        self.events.append(event)

    def unload(self, address: int, name: str, length: int = 0x40, time_ns: int = 0) -> None:
        """It goes."""
        event = Ksymbol(time_ns, address, length, name.encode(), bpf=True, removed=True)
        self.events.append(event)


def asks(table: SymbolTable) -> bool:
    """Whether the table wants a reload."""
    return table.needs_reload


@pytest.fixture(scope="module")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Kallsyms]:
    path = tmp_path_factory.mktemp("kallsyms") / "kallsyms"

    def make(text: str = BASE, loaded_ns: int = RELOADED_NS) -> Kallsyms:
        Path(path).write_text(text)
        return Kallsyms.load(str(path), now_ns=lambda: loaded_ns)

    return make


@pytest.fixture
def feed() -> FakeFeed:
    return FakeFeed()


@pytest.fixture
def table(make_base: Callable[..., Kallsyms], feed: FakeFeed) -> SymbolTable:
    return SymbolTable(make_base(), feed)


def test_new_program_is_known_at_once(table: SymbolTable, feed: FakeFeed) -> None:
    """A program announced since is resolved within its exact length, with no reload."""
    feed.load(NEW, "bpf_prog_3_new", length=0x40)
    assert table.format(NEW) == "bpf_prog_3_new+0x0 [bpf]"
    assert table.format(NEW + 0x3F) == "bpf_prog_3_new+0x3f [bpf]"
    assert not asks(table)
    assert table.resolve(NEW + 0x40) is None
    assert asks(table)


def test_core_addresses_do_not_look_at_the_feed(table: SymbolTable, feed: FakeFeed) -> None:
    """Core kernel text does not change: resolving it drains nothing."""
    feed.load(NEW, "bpf_prog_3_new")
    assert table.format(CORE + 0x410) == "read_zero+0x10"
    assert feed.drains == 0


def test_unloaded_program_keeps_its_last_name(
    table: SymbolTable, feed: FakeFeed, make_base: Callable[..., Kallsyms]
) -> None:
    """A stack may be read after its program went: the name stays until the next reload."""
    feed.load(NEW, "bpf_prog_3_gone")
    feed.unload(NEW, "bpf_prog_3_gone")
    assert table.format(NEW + 4) == "bpf_prog_3_gone+0x4 [bpf]"
    assert asks(table)
    table.replace(make_base())
    assert table.format(NEW + 4) == f"{NEW + 4:#x}"


def test_address_taken_over_by_another(table: SymbolTable, feed: FakeFeed) -> None:
    """The newest owner of an address names it, also where it only overlaps an older one."""
    feed.unload(OLD, "bpf_prog_0000000000000001_old", length=0x80)
    feed.load(OLD + 0x20, "bpf_prog_4_next", length=0x20)
    assert table.format(OLD + 0x21) == "bpf_prog_4_next+0x1 [bpf]"
    assert table.resolve(OLD + 0x50) is None


def test_base_symbol_ends_where_a_known_range_starts(table: SymbolTable, feed: FakeFeed) -> None:
    """A symbol without a length does not reach over something of known length behind it."""
    assert table.format(OLD + 0x200) == "bpf_prog_0000000000000001_old+0x200 [bpf]"
    feed.load(OLD + 0x100, "bpf_prog_5_between", length=0x40)
    assert table.format(OLD + 0xFF) == "bpf_prog_0000000000000001_old+0xff [bpf]"
    assert table.format(OLD + 0x120) == "bpf_prog_5_between+0x20 [bpf]"
    assert table.resolve(OLD + 0x200) is None


def test_pages_of_ftrace_and_kprobes(table: SymbolTable, feed: FakeFeed) -> None:
    """Text that is no BPF program reads as kallsyms would write it."""
    feed.events.append(Ksymbol(0, NEW, 64, b"ftrace_trampoline", bpf=False, removed=False))
    feed.events.append(Ksymbol(0, NEW + 64, 64, b"kprobe_insn_page", bpf=False, removed=False))
    assert table.format(NEW) == "ftrace_trampoline+0x0 [__builtin__ftrace]"
    assert table.format(NEW + 64) == "kprobe_insn_page+0x0 [__builtin__kprobes]"


def test_lost_announcements_ask_for_a_reload(
    table: SymbolTable, feed: FakeFeed, make_base: Callable[..., Kallsyms]
) -> None:
    """What the ring could not hold is never missed silently."""
    feed.lost = True
    table.format(OLD)
    assert asks(table)
    table.replace(make_base())
    assert not asks(table)
    feed.lost = True
    table.replace(make_base())
    assert asks(table), "lost while the table was being read"


def test_unknown_page_asks_twice(table: SymbolTable, make_base: Callable[..., Kallsyms]) -> None:
    """An address that no reload explains does not cause reloads for ever."""
    for wanted in (True, True, False, False):
        assert table.format(0xFFFFFFFFD0000010) == "0xffffffffd0000010"
        assert table.format(0xFFFFFFFFD0000020) == "0xffffffffd0000020"
        assert asks(table) is wanted
        table.replace(make_base())


def test_user_space_and_rubbish_never_ask(table: SymbolTable) -> None:
    """Only addresses of the kernel's half can be explained by a reload."""
    for address in (0, 1, 0x401000, 0x7FFFFFFFFFFF):
        assert table.format(address) == f"{address:#x}"
    assert not asks(table)


def test_far_behind_a_module_is_doubted(table: SymbolTable) -> None:
    """Nearness gives the name, but asks whether something else has been loaded there."""
    assert table.format(0xFFFFFFFFC0001010) == "poll+0x10 [e1000]"
    assert not asks(table)
    assert table.format(0xFFFFFFFFC0003000) == "poll+0x2000 [e1000]"
    assert asks(table)


def test_hidden_addresses_never_ask(make_base: Callable[..., Kallsyms], feed: FakeFeed) -> None:
    """Where the kernel hides addresses no reload helps; announced programs still have names."""
    table = SymbolTable(make_base("0000000000000000 T vfs_read\n"), feed)
    assert table.hidden
    assert table.format(CORE + 0x510) == f"{CORE + 0x510:#x}"
    feed.load(NEW, "bpf_prog_3_new")
    assert table.format(NEW) == "bpf_prog_3_new+0x0 [bpf]"
    assert not asks(table)


def test_reload_settles_what_happened_before(
    table: SymbolTable, feed: FakeFeed, make_base: Callable[..., Kallsyms]
) -> None:
    """Of older announcements only those survive that the new table confirms, with length."""
    feed.load(NEW, "bpf_prog_3_new", length=0x40, time_ns=1)
    feed.load(NEW + 0x100, "bpf_prog_6_lost", length=0x40, time_ns=2)
    feed.load(NEW + 0x200, "bpf_prog_7_since", length=0x40, time_ns=RELOADED_NS + 5)
    assert table.resolve(NEW + 0x100) == Symbol("bpf_prog_6_lost", 0, "bpf")
    table.replace(make_base(BASE + f"{NEW:016x} t bpf_prog_3_new\t[bpf]\n"))
    assert table.resolve(NEW + 0x10) == Symbol("bpf_prog_3_new", 0x10, "bpf")
    assert table.resolve(NEW + 0x40) is None
    assert table.resolve(NEW + 0x110) is None
    assert table.resolve(NEW + 0x210) == Symbol("bpf_prog_7_since", 0x10, "bpf")


def test_without_a_feed_programs_are_doubted(make_base: Callable[..., Kallsyms]) -> None:
    """With nobody announcing, any program met asks for a reload, save the one that sampled."""
    table = SymbolTable(make_base())
    assert table.format_stack(STACK)[0] == "bpf_prog_0000000000000002_tick+0x10 [bpf]"
    assert not asks(table)
    assert table.format_stack((*STACK, OLD + 1))[-1] == "bpf_prog_0000000000000001_old+0x1 [bpf]"
    assert asks(table)


def test_empty_base_asks(feed: FakeFeed) -> None:
    """Before the first load every kernel address asks for one."""
    table = SymbolTable(Kallsyms.empty(), feed)
    assert table.format_stack(STACK) == tuple(f"{address:#x}" for address in STACK)
    assert asks(table)


def test_return_address_after_a_call_that_does_not_return(table: SymbolTable) -> None:
    """It lies at the next symbol's start but belongs to the caller; interrupted ones do not."""
    frames = table.format_stack((CORE + 0x510, CORE + 0x700, CORE + 0x310, CORE + 0x400))
    assert frames == (
        "vfs_read+0x10",
        "do_exit+0x100",
        "asm_sysvec_apic_timer_interrupt+0x10",
        "read_zero+0x0",
    )
    assert table.format(CORE + 0x700) == "after_do_exit+0x0"


def test_trimmed(table: SymbolTable) -> None:
    """A stack is formatted, trimmed and remembered in one call."""
    trimmed = table.trimmed(STACK, "tick")
    assert trimmed.frames == ("read_zero+0x0", "vfs_read+0x10")
    assert trimmed.mode == "kernel"
    assert table.trimmed(STACK, "tick") is trimmed
    assert table.trimmed(STACK, "switch").mode is None


def test_cached_stack_follows_changes(table: SymbolTable, feed: FakeFeed) -> None:
    """A remembered stack with a program in it is looked at anew when anything was announced."""
    stack = (*STACK, NEW)
    feed.load(NEW, "bpf_prog_3_one")
    assert table.format_stack(stack)[-1] == "bpf_prog_3_one+0x0 [bpf]"
    feed.unload(NEW, "bpf_prog_3_one")
    feed.load(NEW, "bpf_prog_4_two")
    assert table.format_stack(stack)[-1] == "bpf_prog_4_two+0x0 [bpf]"
    first = table.format_stack(stack)
    assert table.format_stack(list(stack)) is first


def test_core_stack_is_remembered_without_draining(table: SymbolTable, feed: FakeFeed) -> None:
    """A stack in core text below our own program costs no look at the feed once it is known."""
    table.trimmed(STACK, "tick")
    drains = feed.drains
    feed.load(NEW, "bpf_prog_3_new")
    table.trimmed(STACK, "tick")
    assert feed.drains == drains


def test_replace_forgets_remembered_stacks(
    table: SymbolTable, make_base: Callable[..., Kallsyms]
) -> None:
    """After a reload nothing is answered from the old table."""
    assert table.format_stack(STACK)[-1] == "vfs_read+0x10"
    table.replace(make_base(BASE.replace("vfs_read", "vfs_other")))
    assert table.format_stack(STACK)[-1] == "vfs_other+0x10"


def test_memory_is_bounded(make_base: Callable[..., Kallsyms], feed: FakeFeed) -> None:
    """Neither many stacks, nor unknown pages, nor programs without end make the table grow."""
    table = SymbolTable(make_base(), feed, max_stacks=8)
    for n in range(6000):
        table.format_stack((CORE + 0x400 + n % 0x100, 0xFFFFFFFFD0000000 + (n << 12)))
        feed.load(NEW + n * 0x40, f"bpf_prog_{n}_x")
        feed.unload(NEW + n * 0x40, f"bpf_prog_{n}_x")
    table.format(NEW)
    assert len(table._stacks) <= 8
    assert len(table._frames) <= 4096
    assert len(table._asks) <= 1024
    assert len(table._ranges) == len(table._starts) == len(table._removed) == 1024


def test_nonsense_announcements(table: SymbolTable, feed: FakeFeed) -> None:
    """Empty ranges and ranges over the end of memory change nothing; names are escaped."""
    feed.load(NEW, "empty", length=0)
    feed.load((1 << 64) - 8, "wrapped", length=64)
    feed.load(NEW + 8, "bpf_prog_\x1b[2J", length=8)
    assert table.resolve(NEW) is None
    assert table.resolve((1 << 64) - 4) is None
    assert table.format(NEW + 8) == "bpf_prog_\\x1b[2J+0x0 [bpf]"


EVENTS = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 12), st.sampled_from("abc"), st.booleans()),
    max_size=30,
)


@settings(max_examples=300, deadline=None)
@given(EVENTS)
def test_against_a_naive_model(
    make_base: Callable[..., Kallsyms], events: list[tuple[int, int, str, bool]]
) -> None:
    """After any announcements, each byte belongs to the last range that covered it whole."""
    feed = FakeFeed()
    table = SymbolTable(make_base(), feed)
    model: list[tuple[int, int, str]] = []
    for start, length, name, removed in events:
        (feed.unload if removed else feed.load)(NEW + start, name, length)
        overlapped = [r for r in model if r[0] < start + length and start < r[1]]
        model = [r for r in model if r not in overlapped]
        model.append((start, start + length, name))
    for at in range(80):
        expected = next(
            (Symbol(name, at - first, "bpf") for first, end, name in model if first <= at < end),
            None,
        )
        assert table.resolve(NEW + at) == expected
