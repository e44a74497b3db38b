"""The file sink on real file systems: appended, rotated, full."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from stalld import config
from stalld.sinks.file import FileSink
from tests.service.surroundings import MAX_PUT_S, Loop, missing, numbers, until


@pytest.fixture
def loop() -> Iterator[Loop]:
    """A running event loop."""
    with Loop() as running:
        yield running


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def fill(ballast: Path) -> None:
    """Leave no room on a file system."""
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)


def opened(loop: Loop, path: Path, queue_kib: int = 1024) -> FileSink:
    """A sink that is open."""
    sink = FileSink(config.FileSink(str(path), queue_kib), loop.context)
    loop.call(sink.open)
    return sink


def test_appends(loop: Loop, tmp_path: Path) -> None:
    """Events are appended in order, what was there stays, others may not read it."""
    path = tmp_path / "events.jsonl"
    for first in (0, 100):
        sink = opened(loop, path)
        for number in range(first, first + 100):
            loop.emit(sink, number)
        loop.close(sink)
        assert sink.stats()[1:] == (100, 0, 0)
    assert numbers(path.read_bytes()) == list(range(200))
    assert path.stat().st_mode & 0o027 == 0
    assert loop.troubles == []


def test_there_before_the_first_event(loop: Loop, tmp_path: Path) -> None:
    """The file is made at once: who follows it by name need not wait for a stall."""
    path = tmp_path / "events.jsonl"
    sink = opened(loop, path)
    until(path.exists)
    loop.close(sink)


def test_line_cut_by_a_kill(loop: Loop, tmp_path: Path) -> None:
    """After a line that a killed writer left unfinished ours begins on its own."""
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event":"st')
    sink = opened(loop, path)
    loop.emit(sink, 1)
    loop.close(sink)
    cut, rest = path.read_bytes().split(b"\n", 1)
    assert cut == b'{"event":"st'
    assert numbers(rest) == [1]


def test_rotated_by_logrotate(loop: Loop, tmp_path: Path) -> None:
    """Real logrotate moves the file away: no event is lost, none stands in both files."""
    path, settings = tmp_path / "events.jsonl", tmp_path / "logrotate.conf"
    settings.write_text(
        f"{path} {{\n rotate 3\n nocompress\n create 0640 root root\n su root root\n}}\n"
    )
    tmp_path.chmod(0o755)
    sink = opened(loop, path)
    for turn in range(3):
        for number in range(turn * 50, turn * 50 + 50):
            loop.emit(sink, number)
        state = f"--state={tmp_path / 'state'}"
        subprocess.run(["logrotate", "--force", state, settings], check=True)
        loop.emit(sink, 1000 + turn)
        loop.call(sink.reopen)
        until(lambda: not sink.stats().queued)
    loop.close(sink)
    files = [tmp_path / f"events.jsonl.{n}" for n in (3, 2, 1)] + [path]
    found = [n for file in files for n in numbers(file.read_bytes())]
    assert sorted(found) == sorted([*range(150), 1000, 1001, 1002])
    assert [n for n in found if n < 1000] == list(range(150))


def test_full_disk(loop: Loop, small_disk: Path) -> None:
    """A full disk loses nothing that the queue holds; what it cannot hold is counted and told."""
    path, ballast = small_disk / "events.jsonl", small_disk / "ballast"
    sink = opened(loop, path, queue_kib=64)
    loop.emit(sink, 0)
    until(lambda: sink.stats().delivered == 1)
    fill(ballast)
    took_s = [loop.emit(sink, number, pad="p" * 900) for number in range(1, 301)]
    until(lambda: loop.troubles)
    assert "disk is full: make room" in loop.troubles[0].reason
    assert str(path) in loop.troubles[0].reason
    before = sink.stats()
    assert before.dropped > 100
    assert before.queued > 40
    assert max(took_s) < MAX_PUT_S
    ballast.unlink()
    until(lambda: loop.troubles[-1].over)
    until(lambda: not sink.stats().queued)
    loop.emit(sink, 1000)
    loop.close(sink)
    text = path.read_bytes()
    found = numbers(text)
    # The last page that the file had may have had room for some.
    assert found == [*range(before.delivered + before.queued), 1000]
    assert missing(text) == sink.stats().dropped == 302 - len(found)
    assert len(loop.troubles) == 2


def test_closed_while_full(loop: Loop, small_disk: Path) -> None:
    """A disk that stays full does not keep the daemon: what was not written counts as dropped."""
    ballast = small_disk / "ballast"
    sink = opened(loop, small_disk / "events.jsonl")
    fill(ballast)
    for number in range(100):
        loop.emit(sink, number, pad="p" * 900)
    loop.close(sink, within_s=0.5)
    name, delivered, queued, dropped = sink.stats()
    assert name == f"file {small_disk / 'events.jsonl'}"
    assert (queued, delivered + dropped) == (0, 100)
    assert dropped > 90


def test_directory_comes_later(loop: Loop, tmp_path: Path) -> None:
    """A missing directory is told with the remedy; nothing is lost until it is there."""
    path = tmp_path / "later" / "events.jsonl"
    sink = opened(loop, path)
    loop.emit(sink, 1)
    until(lambda: loop.troubles)
    assert loop.troubles[0].reason == f"{path}: No such file or directory; make the directory"
    path.parent.mkdir()
    until(lambda: sink.stats().delivered == 1)
    loop.close(sink)
    assert [trouble.over for trouble in loop.troubles] == [False, True]
    assert numbers(path.read_bytes()) == [1]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_no_regular_file(loop: Loop, tmp_path: Path, make: object) -> None:
    """A FIFO or a directory under that name is told, and nobody waits for its other end."""
    path = tmp_path / "events.jsonl"
    assert callable(make)
    make(path)
    sink = opened(loop, path)
    loop.emit(sink, 1)
    until(lambda: loop.troubles)
    assert str(path) in loop.troubles[0].reason
    loop.close(sink)
    assert sink.stats()[1:] == (0, 0, 1)
