"""The daemon's own log: one line an entry, and never a wait for its reader."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from stalld.log import PatientStream, open_log


def test_entries(tmp_path: Path) -> None:
    """Whatever an entry holds, it is one line without control characters."""
    with (tmp_path / "log").open("w") as stream:
        log = open_log(stream)
        log.warning("a sink is in trouble", reason="a\nb\x1b[2J\udcff")
        log.info("reloaded")
    first, second = (tmp_path / "log").read_text().splitlines()
    assert "level='warning' event='a sink is in trouble'" in first
    assert r"reason='a\nb\x1b[2J\udcff'" in first
    assert "level='info' event='reloaded'" in second


def test_closed() -> None:
    """Without standard error nothing is logged, above all not on standard output."""
    open_log(None).error("nobody hears this")


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_reader_stands_still(kind: str) -> None:
    """Lines that find no room are left out and counted; the mode of the pipe stays."""
    if kind == "pipe":
        reading, writing = os.pipe()
    else:
        ours, theirs = socket.socketpair()
        reading, writing = ours.detach(), theirs.detach()
    stream = PatientStream(writing)
    for number in range(2000):
        stream.write(f"{number} {'x' * 1000}\n")
    left_out = stream.left_out
    assert left_out > 1000
    os.set_blocking(reading, False)
    text = b""
    while True:
        try:
            text += os.read(reading, 1 << 20)
        except BlockingIOError:
            break
    stream.write("again\n")
    assert os.read(reading, 4096).endswith(f"[{left_out} lines left out]\nagain\n".encode())
    assert stream.left_out == 0
    assert os.get_blocking(writing)
    stream.flush()
    stream.close()
    os.close(reading)
    os.close(writing)


def test_reader_is_gone() -> None:
    """That is no reason to stop detecting."""
    reading, writing = os.pipe()
    os.close(reading)
    stream = PatientStream(writing)
    stream.write("nobody hears this\n")
    assert stream.left_out == 1
    stream.close()
    os.close(writing)
