"""Standard output as a pipe, a socket, a file, a terminal: whoever reads it never holds us up."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stalld.sinks.sink import Sink
from stalld.sinks.stdout import GONE, open_stdout
from tests.service.surroundings import MAX_PUT_S, Loop, missing, numbers, until


@pytest.fixture
def loop() -> Iterator[Loop]:
    """A running event loop."""
    with Loop() as running:
        yield running


def opened(loop: Loop, fd: int, style: str = "json", max_bytes: int = 1 << 20) -> Sink:
    """A sink that is open."""
    sink = open_stdout(fd, style, max_bytes, loop.context)
    loop.call(sink.open)
    return sink


def pair(kind: str) -> tuple[int, int]:
    """Two descriptors, to read and to write."""
    if kind == "pipe":
        return os.pipe()
    ours, theirs = socket.socketpair()
    return ours.detach(), theirs.detach()


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_at_once(loop: Loop, kind: str) -> None:
    """The line is with the reader when the event has been given."""
    reading, writing = pair(kind)
    sink = opened(loop, writing)
    for number in range(3):
        loop.emit(sink, number)
        assert numbers(os.read(reading, 65536)) == [number]
    loop.close(sink)
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_reader_that_stands_still(loop: Loop, kind: str) -> None:
    """Nobody waits for it; once it reads again all is there, or told as missing."""
    reading, writing = pair(kind)
    before = os.get_blocking(writing)
    sink = opened(loop, writing, max_bytes=65536)
    took_s = [loop.emit(sink, number, pad="p" * 500) for number in range(1500)]
    assert max(took_s) < MAX_PUT_S
    dropped = sink.stats().dropped
    assert dropped > 500
    text = b""
    os.set_blocking(reading, False)

    def read_on() -> bool:
        nonlocal text
        try:
            text += os.read(reading, 65536)
        except BlockingIOError:
            return not sink.stats().queued
        return False

    until(read_on)
    loop.emit(sink, 9999)
    until(read_on)
    found = numbers(text)
    assert found == [*range(1500 - dropped), 9999]
    assert missing(text) == dropped == sink.stats().dropped
    # Others may have the same pipe or socket: its mode is theirs.
    assert os.get_blocking(writing) is before
    loop.close(sink)
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_reader_that_is_gone(loop: Loop, kind: str) -> None:
    """It is told once, and the sink says that nothing will come through any more."""
    reading, writing = pair(kind)
    sink = opened(loop, writing)
    os.close(reading)
    for number in range(3):
        loop.emit(sink, number)
    until(lambda: loop.troubles)
    assert [trouble.reason for trouble in loop.troubles] == [GONE]
    assert sink.fatal
    loop.close(sink)
    assert sink.stats()[1:] == (0, 0, 3)
    os.close(writing)


def test_file(loop: Loop, tmp_path: Path) -> None:
    """Redirected to a file, events are appended where the shell's descriptor stands."""
    path = tmp_path / "out"
    with path.open("wb") as file:
        file.write(b"before\n")
        file.flush()
        sink = opened(loop, file.fileno())
        for number in range(100):
            loop.emit(sink, number)
        loop.close(sink)
        os.write(file.fileno(), b"after\n")
    first, *lines, last = path.read_bytes().splitlines()
    assert (first, last) == (b"before", b"after")
    assert numbers(b"\n".join(lines)) == list(range(100))


def test_full_device(loop: Loop) -> None:
    """A device that takes nothing is trouble, not the end."""
    fd = os.open("/dev/full", os.O_WRONLY)
    sink = opened(loop, fd)
    loop.emit(sink, 1)
    until(lambda: loop.troubles)
    assert "No space left" in loop.troubles[0].reason
    loop.close(sink)
    os.close(fd)


def test_terminal(loop: Loop) -> None:
    """On a terminal events are text for people, on request."""
    master, slave = os.openpty()
    sink = opened(loop, slave, style="text")
    loop.emit(sink, 7)
    assert b"records_lost cpu=0 count=7\r\n" in os.read(master, 4096)
    loop.close(sink)
    os.close(master)
    os.close(slave)


def test_another_users_pipe() -> None:
    """A pipe that we may not open again is written to all the same."""
    script = (
        "import os, sys\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "from stalld.sinks.stdout import open_stdout\n"
        "from tests.service.surroundings import Loop\n"
        "with Loop() as loop:\n"
        "    sink = open_stdout(1, 'json', 1 << 20, loop.context)\n"
        "    loop.call(sink.open)\n"
        "    [loop.emit(sink, number) for number in range(200)]\n"
        "    loop.close(sink)\n"
        "    print(type(sink).__name__, sink.stats(), file=sys.stderr)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, cwd=root, timeout=20, check=True
    )
    assert numbers(done.stdout) == list(range(200))
    assert b"_BlockingStdout" in done.stderr
