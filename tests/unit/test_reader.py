"""Which CPU reads which: the pure parts of the reader."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stalld.reader import cpu_list, online_cpus, split


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("0\n", [0]),
        ("0-3\n", [0, 1, 2, 3]),
        ("0-1,4,6-7\n", [0, 1, 4, 6, 7]),
        ("0,2-2,1023\n", [0, 2, 1023]),
    ],
)
def test_online_cpus(tmp_path: Path, text: str, cpus: list[int]) -> None:
    """The kernel's lists of ranges, as plain numbers."""
    path = tmp_path / "online"
    path.write_text(text)
    assert online_cpus(str(path)) == cpu_list(text) == cpus


def test_online_cpus_of_this_host() -> None:
    """We run on CPUs that are online."""
    assert set(os.sched_getaffinity(0)) <= set(online_cpus())


CPUS = st.lists(st.integers(0, 100), unique=True).map(sorted)


@given(CPUS, st.sets(st.integers(0, 100)))
def test_split(cpus: list[int], allowed: set[int]) -> None:
    """Both groups are allowed, apart, and equal but for one; one CPU alone is not split."""
    here, there = split(cpus, allowed)
    usable = sorted(set(cpus) & allowed)
    assert sorted(here + there) == usable
    assert bool(there) is (len(usable) > 1)
    if there:
        assert len(here) - len(there) in (0, 1)
