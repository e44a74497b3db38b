"""Sets of CPUs in the kernel's two forms."""

from __future__ import annotations

import pytest

from stalld.enrich.cpus import list_of, parse_list, parse_mask


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("", set()), ("\n", set()), ("0", {0}), ("0-3,8\n", {0, 1, 2, 3, 8}), ("63,127", {63, 127})],
)
def test_lists(text: str, cpus: set[int]) -> None:
    """Ranges with both ends, single ones, none."""
    assert parse_list(text) == cpus


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("0", set()),
        ("00000000,00000000\n", set()),
        ("3\n", {0, 1}),
        ("1,00000002", {1, 32}),
        ("80000000,00000000,00000001", {0, 95}),
    ],
)
def test_masks(text: str, cpus: set[int]) -> None:
    """Words of 32 bits, the highest first."""
    assert parse_mask(text) == cpus


@pytest.mark.parametrize("text", ["a-b", "0,x", "0x1"])
def test_no_list(text: str) -> None:
    """What is none is an error."""
    with pytest.raises(ValueError, match="invalid literal"):
        parse_list(text)


@pytest.mark.parametrize("text", ["", "x"])
def test_no_mask(text: str) -> None:
    """An empty text is none: there is a digit at least."""
    with pytest.raises(ValueError, match="invalid literal"):
        parse_mask(text)


@pytest.mark.parametrize("text", ["", "0", "0-3", "0-1,5,7-9"])
def test_back_again(text: str) -> None:
    """A list is written as the kernel writes it."""
    assert list_of(parse_list(text)) == text
