"""Sets of CPUs as the kernel writes them: lists and masks. Pure."""

from __future__ import annotations

from collections.abc import Iterable


def parse_list(text: str) -> frozenset[int]:
    """``0-3,8`` → 0, 1, 2, 3, 8; an empty text is the empty set.

    Raises:
        ValueError: it is no such list.
    """
    found: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def parse_mask(text: str) -> frozenset[int]:
    """``00000001,00000003`` → 0, 1, 32: words of 32 bits in hex, highest first.

    Raises:
        ValueError: it is no such mask.
    """
    bits = 0
    for word in text.strip().split(","):
        bits = bits << 32 | int(word, 16)
    return frozenset(cpu for cpu in range(bits.bit_length()) if bits >> cpu & 1)


def list_of(cpus: Iterable[int]) -> str:
    """0, 1, 2, 3, 8 → ``0-3,8``."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and runs[-1][-1] == cpu - 1:
            runs[-1].append(cpu)
        else:
            runs.append([cpu])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
