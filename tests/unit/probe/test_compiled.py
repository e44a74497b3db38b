"""Programs that outlive the process that compiled them."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stalld.probe.compiled import Compiled, with_maps
from stalld.probe.libbpf import RETURN_ZERO, MapSpec
from stalld.probe.protocol import Missing

INSTRUCTION = struct.Struct("=BBhi")
LOAD, CONSTANT, MAP_FD = 0x18, 0x01, 0x11

COMPILED = Compiled(
    structs="btf",
    net_rx_action="kfunc",
    percpu={"steal": -4096},
    bcc_version="0.26.0",
    missing=[Missing("NMI sampler", "no PMU", "an effect")],
    btf_ids={"net_rx_action": 4711},
    license="GPL",
    kern_version=397824,
    maps=[MapSpec("cpus", 2, 4, 768, 2, 0x400), MapSpec("tails", 3, 4, 4, 5, 0)],
    programs={"handle_tick": bytes(range(256)), "handle_nmi": RETURN_ZERO},
)


def load_64(registers: int, low: int, high: int = 0) -> bytes:
    """The one instruction that takes two places."""
    return INSTRUCTION.pack(LOAD, registers, 0, low) + INSTRUCTION.pack(0, 0, 0, high)


def test_what_is_kept_comes_back() -> None:
    """All of it, code byte by byte."""
    assert Compiled.load(COMPILED.dump()) == COMPILED


def code(cpus: int, tails: int) -> bytes:
    """Some that refers to two maps, and otherwise has what only looks like it."""
    return (
        load_64(MAP_FD, cpus)
        + load_64(CONSTANT, 12)
        # The second half of a constant may look like anything.
        + INSTRUCTION.pack(LOAD, CONSTANT, 0, 1)
        + INSTRUCTION.pack(LOAD, MAP_FD, 0, 12)
        + load_64(0x12, tails)
        + RETURN_ZERO
    )


def test_maps_are_numbered() -> None:
    """Descriptors of maps change, whatever looks like them does not."""
    assert with_maps(code(12, 5), {12: 3, 5: 0}.__getitem__) == code(3, 0)


def test_an_unknown_map() -> None:
    """Code that uses a map which nobody made is not let through."""
    with pytest.raises(KeyError):
        with_maps(load_64(MAP_FD, 12), {7: 0}.__getitem__)


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255), st.integers(0, 9))))
def test_there_and_back(instructions: list[tuple[int, int, int]]) -> None:
    """Numbers for descriptors, and descriptors for numbers: the same code."""
    made = b"".join(
        load_64(registers, value)
        if operation == LOAD
        else INSTRUCTION.pack(operation, registers, 0, value)
        for operation, registers, value in instructions
    )
    there = with_maps(made, lambda fd: fd + 100)
    assert len(there) == len(made)
    assert with_maps(there, lambda number: number - 100) == made
