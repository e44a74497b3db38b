"""Where the running kernel keeps the fields we touch, from its BTF.

BTF is read through libbpf, which bcc depends on anyway. The layout of a type
entry is that of ``include/uapi/linux/btf.h``.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

from stalld.errors import MissingAbilityError

VMLINUX_BTF = "/sys/kernel/btf/vmlinux"

_INT, _PTR, _ARRAY, _STRUCT, _UNION, _ENUM, _TYPEDEF = 1, 2, 3, 4, 5, 6, 8
_FUNC_PROTO, _VAR, _DATASEC = 13, 14, 15
# volatile, const, restrict, type tag: they change nothing about the layout.
_MODIFIERS = {_TYPEDEF, 9, 10, 11, 18}
_ENTRY = struct.Struct("=III")
_ENUMERATOR = struct.Struct("=Ii")


class _Type(NamedTuple):
    name: str
    kind: int
    vlen: int
    bitfields: bool
    size_or_type: int
    address: int


class Field(NamedTuple):
    """A struct member: ``declaration`` is C with ``%s`` for its name."""

    name: str
    offset: int
    size: int
    declaration: str


class Btf:
    """Read-only view of one BTF file.

    Raises:
        MissingAbilityError: the file is missing or libbpf cannot parse it.
    """

    def __init__(self, path: str = VMLINUX_BTF) -> None:
        self._lib = ctypes.CDLL("libbpf.so.1", use_errno=True)
        self._lib.btf__parse.restype = ctypes.c_void_p
        self._lib.btf__parse.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
        self._lib.btf__free.argtypes = [ctypes.c_void_p]
        self._lib.btf__type_by_id.restype = ctypes.c_void_p
        self._lib.btf__type_by_id.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
        self._lib.btf__name_by_offset.restype = ctypes.c_char_p
        self._lib.btf__name_by_offset.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
        self._lib.btf__find_by_name_kind.argtypes = [
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.c_uint32,
        ]
        self.path = path
        self._known: dict[int, dict[str, list[int]]] = {}
        self._btf = self._lib.btf__parse(path.encode(), None)
        if not self._btf:
            raise MissingAbilityError(
                f"cannot read the kernel's type information from {path}: "
                f"{os.strerror(ctypes.get_errno())}; "
                "use a kernel built with CONFIG_DEBUG_INFO_BTF=y or install its headers"
            )

    def close(self) -> None:
        """Free libbpf's copy."""
        self._lib.btf__free(self._btf)
        self._btf = None

    def find(self, name: str, kind: int) -> int | None:
        """The id of a type, or None."""
        type_id: int = self._lib.btf__find_by_name_kind(self._btf, name.encode(), kind)
        return type_id if type_id > 0 else None

    def function_id(self, name: str) -> int | None:
        """The id of a kernel function (BTF_KIND_FUNC), or None."""
        return self.find(name, 12)

    def tracepoint_args(self, name: str) -> int | None:
        """How many arguments the raw tracepoint ``name`` passes, or None."""
        type_id = self.find(f"btf_trace_{name}", _TYPEDEF)
        if type_id is None:
            return None
        pointer = self._type(self._type(type_id).size_or_type)
        proto = self._type(pointer.size_or_type)
        # The first parameter is the tracepoint's own data pointer.
        return proto.vlen - 1 if proto.kind == _FUNC_PROTO else None

    def field(self, struct_name: str, *names: str) -> Field:
        """The first of ``names`` that is a member of ``struct_name``.

        Members of anonymous structs and unions count as the struct's own. ``a.b`` is a
        member's member, called ``a_b`` in what is returned. A struct, or an array of them,
        is declared as bytes: it has an address, and that is all.

        Raises:
            MissingAbilityError: no such struct or field; it is named.
        """
        type_id = self.find(struct_name, _STRUCT)
        if type_id is None:
            raise MissingAbilityError(f"{self.path} has no struct {struct_name}")
        for name in names:
            found = self._member(type_id, name)
            if found is None:
                continue
            member, bits, width = found
            if width or bits % 8:
                raise MissingAbilityError(f"{struct_name}.{name} is a bit-field in {self.path}")
            size, declaration = self._declare(member)
            return Field(name.replace(".", "_"), bits // 8, size, declaration)
        raise MissingAbilityError(
            f"{self.path} has no field {struct_name}.{' or '.join(names)}: "
            "this kernel is not supported, please report it with its version"
        )

    def enumerator(self, enum_name: str, name: str) -> int | None:
        """The value of one name of an enum, or None."""
        type_id = self.find(enum_name, _ENUM)
        if type_id is None:
            return None
        whole = self._type(type_id)
        raw = ctypes.string_at(whole.address, whole.vlen * _ENUMERATOR.size)
        found = (value for at, value in _ENUMERATOR.iter_unpack(raw) if self._name(at) == name)
        return next(found, None)

    def percpu_offset(self, variable: str, *members: str) -> int | None:
        """Where a member of a per-CPU variable lies in a CPU's area, in bytes.

        None where this kernel has no such variable (or its BTF lists none). Offsets are
        relative to one common start, so only differences of two mean anything.
        """
        variable_id = self.find(variable, _VAR)
        section = self.find(".data..percpu", _DATASEC)
        if variable_id is None or section is None:
            return None
        whole = self._type(section)
        raw = ctypes.string_at(whole.address, whole.vlen * _ENTRY.size)
        offset = next(
            (at for found, at, _ in _ENTRY.iter_unpack(raw) if found == variable_id), None
        )
        inside = self._inside(self._type(variable_id).size_or_type, *members)
        return None if offset is None or inside is None else offset + inside

    @property
    def lists_percpu_variables(self) -> bool:
        """Whether :meth:`percpu_offset` can find any."""
        return self.find(".data..percpu", _DATASEC) is not None

    def member_offset(self, struct_name: str, *members: str) -> int | None:
        """Where a member of a member of a struct lies in it, in bytes; None: there is none."""
        type_id = self.find(struct_name, _STRUCT)
        return None if type_id is None else self._inside(type_id, *members)

    def _inside(self, type_id: int, *members: str) -> int | None:
        offset = 0
        for name in members:
            while self._type(type_id).kind in _MODIFIERS:
                type_id = self._type(type_id).size_or_type
            if self._type(type_id).kind not in (_STRUCT, _UNION):
                return None
            found = {name: rest for name, *rest in self._members(type_id, 0)}
            if name not in found:
                return None
            type_id, bits, _ = found[name]
            offset += bits // 8
        return offset

    def _type(self, type_id: int) -> _Type:
        address = self._lib.btf__type_by_id(self._btf, type_id)
        name, info, size_or_type = _ENTRY.unpack(ctypes.string_at(address, _ENTRY.size))
        return _Type(
            self._name(name),
            info >> 24 & 0x1F,
            info & 0xFFFF,
            bool(info >> 31),
            size_or_type,
            address + _ENTRY.size,
        )

    def _name(self, offset: int) -> str:
        name: bytes = self._lib.btf__name_by_offset(self._btf, offset) or b""
        return name.decode("utf-8", "replace")

    def _members(self, type_id: int, base: int) -> Iterator[tuple[str, int, int, int]]:
        """Name, type id, bit offset and bit-field width (0: none) of each member."""
        whole = self._type(type_id)
        raw = ctypes.string_at(whole.address, whole.vlen * _ENTRY.size)
        for name_offset, member, offset in _ENTRY.iter_unpack(raw):
            width, bits = divmod(offset, 1 << 24) if whole.bitfields else (0, offset)
            bits += base
            name = self._name(name_offset)
            if name:
                yield name, member, bits, width
            elif self._type(member).kind in (_STRUCT, _UNION):
                yield from self._members(member, bits)

    def _member(self, type_id: int, path: str) -> tuple[int, int, int] | None:
        """Type id, bit offset and bit-field width of a member, or a member's member."""
        base = 0
        found = None
        for name in path.split("."):
            if found is not None:
                type_id, base, _ = found
                while self._type(type_id).kind in _MODIFIERS:
                    type_id = self._type(type_id).size_or_type
                if self._type(type_id).kind not in (_STRUCT, _UNION):
                    return None
            if type_id not in self._known:
                # A task has hundreds of them.
                self._known[type_id] = {name: rest for name, *rest in self._members(type_id, 0)}
            if name not in self._known[type_id]:
                return None
            member, bits, width = self._known[type_id][name]
            found = member, base + bits, width
        return found

    def _declare(self, type_id: int) -> tuple[int, str]:
        """Size and C declaration of a member's type."""
        found = self._type(type_id)
        while found.kind in _MODIFIERS:
            found = self._type(found.size_or_type)
        if found.kind == _PTR:
            target = self._type(found.size_or_type) if found.size_or_type else None
            if target and target.kind == _STRUCT and target.name:
                return ctypes.sizeof(ctypes.c_void_p), f"struct {target.name} *%s"
            return ctypes.sizeof(ctypes.c_void_p), "void *%s"
        if found.kind in (_INT, _ENUM):
            signed = found.kind == _INT and self._int_is_signed(found)
            return found.size_or_type, f"{'s' if signed else 'u'}{found.size_or_type * 8} %s"
        if found.kind == _ARRAY:
            element, _, count = _ENTRY.unpack(ctypes.string_at(found.address, _ENTRY.size))
            size, declaration = self._declare(element)
            return size * count, f"{declaration}[{count}]"
        if found.kind in (_STRUCT, _UNION):
            return found.size_or_type, f"u8 %s[{found.size_or_type}]"
        raise MissingAbilityError(f"{self.path}: cannot declare a member of kind {found.kind}")

    @staticmethod
    def _int_is_signed(found: _Type) -> bool:
        (encoding,) = struct.unpack("=I", ctypes.string_at(found.address, 4))
        # BTF_INT_ENCODING; a char is signed for C but plain for us.
        return bool(encoding >> 24 & 1) and found.size_or_type > 1
