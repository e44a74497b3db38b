"""What the daemon knows before it starts the probe child."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stalld.probe.client import Probes, bpf_directory, possible_cpus
from stalld.probe.compiler import SOURCES
from tests.unit.probe.test_protocol import DESCRIPTION


@pytest.mark.parametrize(("text", "count"), [("0\n", 1), ("0-7\n", 8), ("0-3,8-11\n", 12)])
def test_possible_cpus(tmp_path: Path, text: str, count: int) -> None:
    """One more than the highest number, holes included."""
    path = tmp_path / "possible"
    path.write_text(text)
    assert possible_cpus(str(path)) == count


def test_the_sources_are_there() -> None:
    """Every source that is compiled lies where the daemon looks."""
    assert [name for name in SOURCES if not (bpf_directory() / name).is_file()] == []


def test_closing_closes_every_descriptor() -> None:
    """Nothing stays attached, and closing twice does no harm."""
    fds = os.pipe()
    probes = Probes(DESCRIPTION, {"map:cpus": fds[0], "link:softirq_entry": fds[1]})
    probes.close()
    probes.close()
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
