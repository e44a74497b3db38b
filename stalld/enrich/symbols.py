"""Names for the addresses in kernel stacks, kept true while modules and BPF programs come and go.

The base is /proc/kallsyms as it was once read; on top lie the exact ranges the kernel announced
since. The table never reads files itself: `needs_reload` tells the caller to call
`Kallsyms.load` in a thread and hand the result to `replace`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from stalld.enrich.kallsyms import Kallsyms, Symbol, printable
from stalld.enrich.ksymbols import Drained, Ksymbol
from stalld.enrich.stack import Kind, Trimmed, is_entry, trim

_PAGE_SHIFT = 12
_KERNEL_HALF = 1 << 63
# An announcement is made a moment before (removal) or after (arrival) kallsyms changes.
_RELOAD_MARGIN_NS = 100_000_000
_MAX_RANGES = 16384
_MAX_REMOVED = 1024
_MAX_ASKED = 1024
_MAX_FRAMES = 2048


class Feed(Protocol):
    """What the table needs of `ksymbols.KsymbolFeed`."""

    def pending(self) -> bool:
        """Whether `drain` would return anything."""

    def drain(self) -> Drained:
        """Announcements since the last call, oldest first."""


class _Range(NamedTuple):
    end: int
    name: str
    module: str | None
    time_ns: int
    removed: bool


class _Frame(NamedTuple):
    text: str
    core: bool  # in core kernel text, where nothing changes


class SymbolTable:
    """Resolves and formats kernel addresses; belongs to one thread.

    Without a `feed`, every BPF program met in a stack asks for a reload, since another one may
    have taken its place; the caller limits how often it reloads.
    """

    def __init__(self, base: Kallsyms, feed: Feed | None = None, max_stacks: int = 256) -> None:
        self._base = base
        self._feed = feed
        self._max_stacks = max_stacks
        self._starts: list[int] = []
        self._ranges: dict[int, _Range] = {}
        self._removed: OrderedDict[int, None] = OrderedDict()
        # Pages that are unknown ask for a reload twice (what lies there may come while the
        # first one is being read) and then no more: how often, and which since `replace`.
        self._asks: dict[int, int] = {}
        self._asked: set[int] = set()
        self._frames: dict[int, _Frame] = {}
        self._stacks: OrderedDict[tuple[Kind | None, tuple[int, ...]], _Cached] = OrderedDict()
        self.needs_reload = False
        self.version = 0
        """Another one whenever an address may have got another name."""

    @property
    def hidden(self) -> bool:
        """Whether the kernel hides its addresses: names are missing and no reload will help."""
        return self._base.hidden

    def resolve(self, address: int) -> Symbol | None:
        """What lies at `address` now, or was the last to lie there; None when unknown."""
        if not self._base.is_core(address):
            self._catch_up()
        return self._lookup(address)

    def format(self, address: int) -> str:
        """``fn+0xoff``, with `` [module]`` outside the core kernel; unknown: ``0x…``."""
        frame = self._frames.get(address)
        if frame is not None and frame.core:
            return frame.text
        if not self._base.is_core(address):
            self._catch_up()
        return self._frame(address, own=False, exact=True).text

    def format_stack(self, addresses: Sequence[int]) -> tuple[str, ...]:
        """All frames, innermost first, as `format` writes them; cached.

        All but interrupted addresses are return addresses: one at the very start of a symbol
        was pushed by a call that does not return, at the end of the function before.
        """
        return self._stack(None, tuple(addresses)).frames

    def trimmed(self, addresses: Sequence[int], kind: Kind) -> Trimmed:
        """`format_stack` with the frames of tracing and interrupt entry cut by `stack.trim`."""
        trimmed = self._stack(kind, tuple(addresses)).trimmed
        assert trimmed is not None
        return trimmed

    def cut(self, addresses: Sequence[int], kind: Kind) -> tuple[str, ...]:
        """The innermost frames, which `trimmed` leaves out."""
        cached = self._stack(kind, tuple(addresses))
        assert cached.trimmed is not None
        return cached.frames[: cached.trimmed.cut]

    def replace(self, base: Kallsyms) -> None:
        """Take a newly read table; announcements from before its reading are settled by it."""
        self.needs_reload = False
        self._catch_up()
        self._base = base
        oldest_ns = base.loaded_ns - _RELOAD_MARGIN_NS
        self._asked.clear()
        for start in list(self._starts):
            known = self._ranges[start]
            if known.time_ns < oldest_ns and (known.removed or not self._confirmed(start, known)):
                self._drop(start)
        self._forget()

    def _confirmed(self, start: int, known: _Range) -> bool:
        """Whether the new base has it too, of which we know the exact length."""
        return self._base.hidden or self._base.resolve(start) == (known.name, 0, known.module, True)

    def _stack(self, kind: Kind | None, addresses: tuple[int, ...]) -> _Cached:
        key = kind, addresses
        cached = self._stacks.get(key)
        if cached is not None and not (cached.volatile and self._catch_up()):
            self._stacks.move_to_end(key)
            return cached
        cached = self._read_stack(kind, addresses)
        self._stacks[key] = cached
        if len(self._stacks) > self._max_stacks:
            self._stacks.popitem(last=False)
        return cached

    def _read_stack(self, kind: Kind | None, addresses: tuple[int, ...]) -> _Cached:
        frames: list[_Frame] = []
        exact = True
        if any(not self._base.is_core(address) for address in addresses):
            self._catch_up()
        for address in addresses:
            frame = self._frame(address, own=not frames, exact=exact)
            frames.append(frame)
            exact = is_entry(frame.text)
        texts = tuple([frame.text for frame in frames])
        # The innermost frame is the program that took the stack. It outlives the table, and it
        # is in nearly every stack: it must not make them all be looked at twice.
        volatile = not all(frame.core for frame in frames[1:])
        return _Cached(texts, trim(texts, kind) if kind is not None else None, volatile)

    def _frame(self, address: int, *, own: bool, exact: bool) -> _Frame:
        key = address if exact else ~address
        frame = self._frames.get(key)
        if frame is not None:
            return frame
        symbol = self._lookup(address, own=own)
        if not exact and (symbol is None or symbol.offset == 0):
            caller = self._lookup(address - 1)
            if caller is not None:
                symbol = caller._replace(offset=caller.offset + 1)
        text = f"{address:#x}" if symbol is None else str(symbol)
        frame = _Frame(text, self._base.is_core(address))
        if len(self._frames) >= _MAX_FRAMES:
            self._frames.clear()
        self._frames[key] = frame
        return frame

    def _lookup(self, address: int, *, own: bool = False) -> Symbol | None:
        index = bisect_right(self._starts, address) - 1
        start = self._starts[index] if index >= 0 else 0
        if index >= 0 and address < (found := self._ranges[start]).end:
            if found.removed:
                # It was there when the stack was taken, or else a module has come since.
                self.needs_reload = True
            return Symbol(found.name, address - start, found.module)
        symbol = self._base.resolve(address)
        if symbol is not None and symbol.module is not None:
            if index >= 0 and start >= address - symbol.offset:
                symbol = None  # something of known length ends between that symbol and here
            elif self._feed is None and symbol.module == "bpf" and not own:
                self.needs_reload = True
        if symbol is None or not symbol.sure:
            self._ask(address)
        return symbol

    def _ask(self, address: int) -> None:
        page = address >> _PAGE_SHIFT
        if address < _KERNEL_HALF or page in self._asked or self._base.hidden:
            return
        if len(self._asks) >= _MAX_ASKED:
            self._asks.clear()
        self._asked.add(page)
        self._asks[page] = self._asks.get(page, 0) + 1
        if self._asks[page] <= 2:
            self.needs_reload = True

    def _catch_up(self) -> bool:
        """Apply what was announced since; true when that changed anything."""
        if self._feed is None or not self._feed.pending():
            return False
        drained = self._feed.drain()
        for event in drained.events:
            self._apply(event)
        if drained.lost or len(self._ranges) > _MAX_RANGES:
            self.needs_reload = True
        self._forget()
        return True

    def _apply(self, event: Ksymbol) -> None:
        if event.length == 0 or event.address + event.length >= 1 << 64:
            return
        end = event.address + event.length
        first = bisect_right(self._starts, event.address) - 1
        if first < 0 or self._ranges[self._starts[first]].end <= event.address:
            first += 1
        for start in self._starts[first : bisect_left(self._starts, end)]:
            self._drop(start)
        name = printable(event.name)
        module = "bpf" if event.bpf else _builtin(name)
        insort(self._starts, event.address)
        self._ranges[event.address] = _Range(end, name, module, event.time_ns, event.removed)
        if event.removed:
            self._removed[event.address] = None
            if len(self._removed) > _MAX_REMOVED:
                self._drop(next(iter(self._removed)))

    def _drop(self, start: int) -> None:
        del self._ranges[start]
        del self._starts[bisect_left(self._starts, start)]
        self._removed.pop(start, None)

    def _forget(self) -> None:
        self.version += 1
        self._frames.clear()
        self._stacks.clear()


class _Cached(NamedTuple):
    frames: tuple[str, ...]
    trimmed: Trimmed | None
    volatile: bool


def _builtin(name: str) -> str:
    """The bracketed name under which kallsyms lists pages of ftrace and kprobes."""
    return "__builtin__kprobes" if name.startswith("kprobe") else "__builtin__ftrace"
