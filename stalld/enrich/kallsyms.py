"""The kernel's own symbol table, compact: 64-bit address to function name, offset, module.

Source: /proc/kallsyms (kernel/kallsyms.c), one ``address type name[\\t[module]]`` a line; core
kernel sorted by address, then modules, ftrace and kprobe pages, BPF programs in no order. Only
text is kept. Without CAP_SYSLOG, or with kernel.kptr_restrict=2, every address reads as zero.
"""

from __future__ import annotations

import re
import time
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush
from itertools import islice
from typing import NamedTuple

# The padding before each function (CONFIG_CALL_PADDING, 6.2) and the type hashes of kCFI are
# half of all lines and never what a stack frame means.
_SKIPPED = (b"__pfx_", b"__cfi_")
_TEXT_TYPES = b"TWtw"

# Section bounds share their address with a real function, and so do second names of the same
# code. They lose against any other name.
_MARKER = re.compile(
    rb"_(?:s|sinit)?text|__pi_.*|.*text_(?:start|end)|__(?:start|stop)_.*|srso_.*"
    rb"|__ia32_.*|__do_(?:sys|compat_sys)_.*"
)
_CORE_STARTS = (b"_stext", b"_sinittext")
_CORE_ENDS = (b"_etext", b"_einittext")  # not in the text themselves

_NAMES_PER_MARK = 16
_SEGMENT_SPAN = 1 << 32
_PAGE = 4096
# Symbols outside the core kernel carry no size. Inside one module the next symbol is the bound;
# these are the longest functions still believed between two symbols and behind the last one.
_LONGEST_INSIDE = 256 << 10
_LONGEST_LAST = 64 << 10


class Symbol(NamedTuple):
    """Where an address lies: ``offset`` bytes into ``name``; ``module`` None in the core kernel.

    ``sure`` is false where only nearness speaks for it: behind the first page after the last
    known symbol of a module, where by now something else may have been loaded.
    """

    name: str
    offset: int
    module: str | None = None
    sure: bool = True

    def __str__(self) -> str:
        suffix = f" [{self.module}]" if self.module is not None else ""
        return f"{self.name}+{self.offset:#x}{suffix}"


def printable(name: bytes) -> str:
    """`name` as printable ASCII; every other byte as ``\\xNN``.

    Users choose the names of BPF programs and modules; none of them may steer a terminal.
    """
    text = name.decode("latin-1")
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if " " <= c <= "~" else f"\\x{ord(c):02x}" for c in text)


def preference(kind: int, name: bytes) -> tuple[bool, int, int, bytes]:
    """Sort key that puts the most telling of several names of one address first.

    A real function before a section bound, global before weak before local, shorter before
    longer.
    """
    return _MARKER.fullmatch(name) is not None, _TEXT_TYPES.index(kind), len(name), name


class Kallsyms:
    """An immutable symbol table; about 27 bytes a symbol (64,000 symbols: 1.7 MB).

    `hidden` is true when the kernel showed only zeros: every lookup then fails, and the remedy
    is CAP_SYSLOG or a kernel.kptr_restrict below 2. `loaded_ns` (CLOCK_MONOTONIC) is when the
    reading began: later changes are not in the table for sure.
    """

    __slots__ = (
        "_bases",
        "_core",
        "_firsts",
        "_low",
        "_marks",
        "_modules",
        "_names",
        "_run_firsts",
        "_run_modules",
        "hidden",
        "loaded_ns",
    )

    def __init__(
        self, table: _Builder, core: Iterable[tuple[int, int]], *, hidden: bool, loaded_ns: int
    ) -> None:
        self.hidden = hidden
        self.loaded_ns = loaded_ns
        # [start, end) of core kernel text, where every address belongs to the symbol before it.
        self._core = tuple((start, end) for start, end in core if start < end)
        # Addresses as 32-bit offsets; a segment starts wherever they would not fit.
        self._low = array("I")
        self._firsts: list[int] = []
        self._bases: list[int] = []
        at, total = 0, len(table.addresses)
        while at < total:
            base = table.addresses[at]
            end = bisect_left(table.addresses, base + _SEGMENT_SPAN, at)
            self._bases.append(base)
            self._firsts.append(at)
            self._low.extend(a - base for a in islice(table.addresses, at, end))
            at = end
        self._firsts.append(total)
        self._names = bytes(table.names)
        self._marks = table.starts[::_NAMES_PER_MARK]
        self._marks.append(len(self._names))
        # Runs of neighbours in the same module.
        self._run_firsts = array("I")
        self._run_modules = array("I")
        for index, module in enumerate(table.modules):
            if not self._run_modules or self._run_modules[-1] != module:
                self._run_firsts.append(index)
                self._run_modules.append(module)
        self._run_firsts.append(total)
        self._modules = (None, *(printable(name) for name in table.module_ids))

    @classmethod
    def empty(cls) -> Kallsyms:
        """A table that knows nothing, for the time until the first one is read."""
        return cls(_Builder({}), (), hidden=False, loaded_ns=0)

    @classmethod
    def load(
        cls, path: str = "/proc/kallsyms", now_ns: Callable[[], int] = time.monotonic_ns
    ) -> Kallsyms:
        """Read the table from `path`; blocks for about 0.2 s, so run it in a thread.

        Lines that cannot be understood are passed over. Raises OSError when `path` cannot be
        read (no such file: the kernel was built without CONFIG_KALLSYMS).
        """
        loaded_ns = now_ns()
        module_ids: dict[bytes, int] = {}
        core = _Builder(module_ids)
        parts = [core]
        bounds: dict[bytes, int] = {}
        loose: list[bytes] = []  # of one module, in any order
        loose_module: bytes | None = None
        width = last = 0
        seen = False
        with open(path, "rb", buffering=1 << 16) as lines:
            for line in lines:
                try:
                    digits, kind, rest = line.split(b" ", 2)
                    if kind not in _TEXT_TYPES or rest.startswith(_SKIPPED):
                        continue
                    address = int(digits, 16)
                except ValueError:
                    continue
                seen = True
                width = width or len(digits)
                if not 0 < address < 1 << 64 or len(kind) != 1 or len(digits) != width:
                    continue
                name = rest.rstrip(b"\n")
                if address < last or b"\t" in name:
                    module = name.partition(b"\t")[2]
                    if loose and module != loose_module:
                        parts.append(_ordered(loose, module_ids))
                        loose = []
                    loose_module = module
                    loose.append(line)
                    continue
                if name in _CORE_STARTS:
                    bounds[name] = address
                elif name in _CORE_ENDS:
                    bounds[name] = address
                    continue
                core.add(address, kind[0], name, 0)
                last = address
        if loose:
            parts.append(_ordered(loose, module_ids))
        table = _merge(parts)
        return cls(
            table,
            [
                (bounds.get(start, 0), bounds.get(end, 0))
                for start, end in zip(_CORE_STARTS, _CORE_ENDS, strict=True)
            ],
            hidden=seen and not table.addresses,
            loaded_ns=loaded_ns,
        )

    def __len__(self) -> int:
        return len(self._low)

    def is_core(self, address: int) -> bool:
        """Whether `address` lies in core kernel text, whose symbols never change."""
        return any(start <= address < end for start, end in self._core)

    def resolve(self, address: int) -> Symbol | None:
        """The symbol at or before `address`; None when nothing known can be there."""
        segment = bisect_right(self._bases, address) - 1
        if segment < 0:
            return None
        base = self._bases[segment]
        end = self._firsts[segment + 1]
        index = bisect_right(self._low, address - base, self._firsts[segment], end) - 1
        offset = address - base - self._low[index]
        run = bisect_right(self._run_firsts, index) - 1
        module = self._modules[self._run_modules[run]]
        if module is None and self._core:
            # Outside those bounds lies text that is gone after boot (.exit.text), then data.
            if self.is_core(address) or (offset < _PAGE and not self.is_core(address - offset)):
                return Symbol(self._name(index), offset)
            return None
        last_of_run = index + 1 == self._run_firsts[run + 1]
        if offset >= (_LONGEST_LAST if last_of_run else _LONGEST_INSIDE):
            return None
        sure = not last_of_run or offset < _PAGE
        return Symbol(self._name(index), offset, module, sure)

    def address(self, name: bytes) -> int:
        """Where the first symbol called ``name`` begins; 0 where there is none."""
        at = self._names.find(b"\n%s\n" % name) + 1
        if not at:
            return 0
        index = self._names.count(b"\n", 0, at)
        segment = bisect_right(self._firsts, index) - 1
        return self._bases[segment] + self._low[index]

    def format(self, address: int) -> str:
        """``fn+0xoff``, with `` [module]`` outside the core kernel; unknown: ``0x…``."""
        symbol = self.resolve(address)
        return f"{address:#x}" if symbol is None else str(symbol)

    def _name(self, index: int) -> str:
        block, nth = divmod(index, _NAMES_PER_MARK)
        names = self._names[self._marks[block] : self._marks[block + 1]]
        return printable(names.split(b"\n", nth + 1)[nth])


class _Builder:
    """Symbols in ascending order, one an address; names each followed by a newline."""

    __slots__ = ("addresses", "kinds", "module_ids", "modules", "names", "starts")

    def __init__(self, module_ids: dict[bytes, int]) -> None:
        self.module_ids = module_ids  # shared; 0 is the core kernel
        self.addresses = array("Q")
        self.starts = array("I")
        self.modules = array("I")
        self.kinds = bytearray()
        self.names = bytearray()

    def add(self, address: int, kind: int, name: bytes, module: int) -> None:
        """Append; of two names for one address the better one stays."""
        if self.addresses and self.addresses[-1] == address:
            start = self.starts[-1]
            known = preference(self.kinds[-1], bytes(self.names[start:-1]))
            if known <= preference(kind, name):
                return
            del self.names[start:]
            self.kinds[-1] = kind
            self.modules[-1] = module
        else:
            self.addresses.append(address)
            self.starts.append(len(self.names))
            self.modules.append(module)
            self.kinds.append(kind)
        self.names += name
        self.names.append(0x0A)

    def extend(self, other: _Builder, first: int, end: int) -> None:
        """Append other[first:end], which lies above everything here or starts level with it."""
        names_end = other.starts[end] if end < len(other.starts) else len(other.names)
        if self.addresses and self.addresses[-1] == other.addresses[first]:
            stop = other.starts[first + 1] if first + 1 < len(other.starts) else len(other.names)
            name = bytes(other.names[other.starts[first] : stop - 1])
            self.add(other.addresses[first], other.kinds[first], name, other.modules[first])
            first += 1
            if first == end:
                return
        shift = len(self.names) - other.starts[first]
        self.addresses += other.addresses[first:end]
        self.starts.extend(start + shift for start in islice(other.starts, first, end))
        self.modules += other.modules[first:end]
        self.kinds += other.kinds[first:end]
        self.names += other.names[other.starts[first] : names_end]


def _ordered(lines: list[bytes], module_ids: dict[bytes, int]) -> _Builder:
    """A builder from checked lines, whose addresses are of one width and so sort as bytes."""
    table = _Builder(module_ids)
    for line in sorted(lines):
        digits, kind, rest = line.split(b" ", 2)
        name, _, module = rest.rstrip(b"\n").partition(b"\t")
        number = 0
        if module:
            number = module_ids.setdefault(module.strip(b"[]"), len(module_ids) + 1)
        table.add(int(digits, 16), kind[0], name, number)
    return table


def _merge(parts: list[_Builder]) -> _Builder:
    """All parts in one order, copied in whole blocks; each part is dropped when used up."""
    heads = [(part.addresses[0], nth, 0) for nth, part in enumerate(parts) if part.addresses]
    heapify(heads)
    table: _Builder | None = None
    while heads:
        _, nth, first = heappop(heads)
        part = parts[nth]
        end = len(part.addresses)
        if heads:
            end = max(bisect_left(part.addresses, heads[0][0], first), first + 1)
        if end < len(part.addresses):
            heappush(heads, (part.addresses[end], nth, end))
        elif table is None and first == 0:
            table = part  # nothing to copy: as a rule the core kernel
            continue
        else:
            parts[nth] = _Builder({})
        if table is None:
            table = _Builder(part.module_ids)
        table.extend(part, first, end)
    return table or _Builder({})
