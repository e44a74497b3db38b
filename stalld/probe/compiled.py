"""The BPF programs as bcc compiled them, free of the process that did: to load now or later."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass

from stalld.probe.libbpf import MapSpec
from stalld.probe.protocol import Missing

# struct bpf_insn: code, dst_reg and src_reg, off, imm
_INSTRUCTION = struct.Struct("=BBhi")
# BPF_LD | BPF_DW | BPF_IMM takes two instructions; with this source it is a map's descriptor.
_LOAD_64 = 0x18
_PSEUDO_MAP_FD = 1


@dataclass(frozen=True)
class Compiled:
    """What one kernel needs.

    Attributes:
        structs, net_rx_action, percpu, bcc_version: see :class:`Description`.
        missing: what was found out before anything was loaded.
        btf_ids: of the kernel's functions that programs are loaded for.
        license, kern_version: of all programs.
        maps: in the order in which the programs number them.
        programs: instructions by function; for a map's descriptor stands its number.
    """

    structs: str
    net_rx_action: str
    percpu: dict[str, int]
    bcc_version: str
    missing: list[Missing]
    btf_ids: dict[str, int]
    license: str
    kern_version: int
    maps: list[MapSpec]
    programs: dict[str, bytes]

    def dump(self) -> bytes:
        """For :meth:`load`."""
        programs = {name: base64.b64encode(code).decode() for name, code in self.programs.items()}
        return json.dumps({**asdict(self), "programs": programs}).encode()

    @classmethod
    def load(cls, data: bytes) -> Compiled:
        """The inverse of :meth:`dump`, of what this very version wrote."""
        fields = json.loads(data)
        return cls(
            **{
                **fields,
                "missing": [Missing(**each) for each in fields["missing"]],
                "maps": [MapSpec(*each) for each in fields["maps"]],
                "programs": {
                    name: base64.b64decode(code) for name, code in fields["programs"].items()
                },
            }
        )


def with_maps(code: bytes, number: Callable[[int], int]) -> bytes:
    """The instructions with ``number`` of each map's descriptor, or number, in its stead.

    Raises:
        KeyError: raised by ``number``.
    """
    changed = bytearray(code)
    at = 0
    while at < len(changed):
        operation, registers, offset, immediate = _INSTRUCTION.unpack_from(changed, at)
        wide = operation == _LOAD_64
        if wide and registers >> 4 == _PSEUDO_MAP_FD:
            _INSTRUCTION.pack_into(changed, at, operation, registers, offset, number(immediate))
        at += _INSTRUCTION.size * (1 + wide)
    return bytes(changed)
