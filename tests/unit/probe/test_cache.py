"""What is kept of compiled programs, and who may have written it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from stalld.probe import cache
from stalld.probe.cache import Cache
from stalld.probe.client import bpf_directory, cache_directory
from stalld.probe.compiler import SOURCES
from stalld.probe.protocol import Request
from tests.unit.probe.test_compiled import COMPILED

KEY = "a key"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """As systemd makes it."""
    made = tmp_path / "cache"
    made.mkdir(mode=0o700)
    return made


@pytest.fixture
def kept(directory: Path) -> Cache:
    """With something in it."""
    made = Cache(directory)
    made.write(KEY, COMPILED)
    return made


def test_kept(kept: Cache, directory: Path) -> None:
    """What was written is read, by its key only; the file is the user's own."""
    assert kept.read(KEY) == COMPILED
    assert kept.read("another key") is None
    (file,) = directory.iterdir()
    assert file.name == cache.FILE
    assert file.stat().st_mode & 0o777 == 0o600


def test_nothing_kept(directory: Path) -> None:
    """The first start finds nothing, which is no error."""
    assert Cache(directory).read(KEY) is None


def test_the_last_one_counts(kept: Cache, directory: Path) -> None:
    """Another kernel's programs take the place of these: the directory does not grow."""
    another = replace(COMPILED, bcc_version="0.30.0")
    kept.write("another key", another)
    assert kept.read("another key") == another
    assert kept.read(KEY) is None
    assert len(list(directory.iterdir())) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:100],
        lambda data: data[:-1],
        lambda data: data + b" ",
        lambda data: data.replace(b"GPL", b"GPM"),
        lambda data: b"\0" * len(data),
        lambda data: b"\n" + data,
    ],
)
def test_damage(kept: Cache, directory: Path, damage: Callable[[bytes], bytes]) -> None:
    """What a crash or a disk left of it is not taken."""
    path = directory / cache.FILE
    path.write_bytes(damage(path.read_bytes()))
    assert kept.read(KEY) is None


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write(kept: Cache, directory: Path, mode: int) -> None:
    """It is not trusted, and named."""
    path = directory / cache.FILE
    path.chmod(mode)
    with pytest.raises(PermissionError, match="others may write to it") as caught:
        kept.read(KEY)
    assert cache.trouble(caught.value).reason == f"{path}: others may write to it"


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_directory_that_others_may_write(kept: Cache, directory: Path, mode: int) -> None:
    """Likewise: what is in it may be replaced."""
    directory.chmod(mode)
    with pytest.raises(PermissionError, match="others may write to it"):
        kept.read(KEY)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("which", [".", cache.FILE])
def test_another_users(kept: Cache, directory: Path, which: str) -> None:
    """Who owns a file can write to it."""
    os.chown(directory / which, 65534, 65534)
    with pytest.raises(PermissionError, match="another user's"):
        kept.read(KEY)


def test_no_regular_file(directory: Path) -> None:
    """A link is not followed, and a pipe not waited for."""
    path, elsewhere = directory / cache.FILE, directory / "elsewhere"
    Cache(directory).write(KEY, COMPILED)
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    with pytest.raises(OSError, match="symbolic links"):
        Cache(directory).read(KEY)
    path.unlink()
    os.mkfifo(path, 0o600)
    assert Cache(directory).read(KEY) is None


def test_no_directory(tmp_path: Path) -> None:
    """What is missing is named, and what that means."""
    with pytest.raises(FileNotFoundError) as caught:
        Cache(tmp_path / "none").read(KEY)
    told = cache.trouble(caught.value)
    assert told.ability == "compile cache"
    assert told.reason == f"{tmp_path / 'none'}: No such file or directory"
    assert "compiles" in told.effect


def test_no_room(kept: Cache, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be put into place leaves what was there, and nothing else."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        kept.write("another key", COMPILED)
    assert kept.read(KEY) == COMPILED
    assert len(list(directory.iterdir())) == 1


class TestKey:
    """It changes with all that the programs depend on."""

    @pytest.fixture
    def request_(self, tmp_path: Path) -> Request:
        """With sources of its own."""
        sources = tmp_path / "bpf"
        shutil.copytree(bpf_directory(), sources)
        return Request(2, str(sources), "/none")

    def test_the_same(self, request_: Request) -> None:
        """Where nothing changes it stays."""
        assert cache.key(request_, nmi=False) == cache.key(request_, nmi=False)

    def test_where_it_is_kept_does_not_matter(self, request_: Request) -> None:
        """Nor which hooks are wanted: all programs are in it."""
        other = replace(request_, cache_dir="/elsewhere", hooks=["softirq_exit"])
        assert cache.key(other, nmi=False) == cache.key(request_, nmi=False)

    def test_another_request(self, request_: Request) -> None:
        """Other programs, or other reasons why something is missing."""
        keys = {
            cache.key(request_, nmi=False),
            cache.key(request_, nmi=True),
            cache.key(replace(request_, cpus=3), nmi=False),
            cache.key(replace(request_, nmi="never"), nmi=False),
        }
        assert len(keys) == 4

    @pytest.mark.parametrize("name", SOURCES)
    def test_another_source(self, request_: Request, name: str) -> None:
        """An upgrade that changes one byte."""
        before = cache.key(request_, nmi=False)
        with open(Path(request_.bpf_dir, name), "a") as source:
            source.write("\n")
        assert cache.key(request_, nmi=False) != before

    def test_another_kernel(self, request_: Request, tmp_path: Path) -> None:
        """A kernel built anew under the same name has another build id."""
        keys = set()
        for build_id in (b"one", b"two"):
            notes = tmp_path / "notes"
            notes.write_bytes(build_id)
            keys.add(cache.key(request_, nmi=False, notes=notes))
        assert len(keys) == 2

    def test_other_capabilities(self, request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
        """What was refused without them may be granted with them."""
        before = cache.key(request_, nmi=False)
        monkeypatch.setattr(cache, "effective", lambda: 1 << 63)
        assert cache.key(request_, nmi=False) != before

    def test_no_notes(self, request_: Request, tmp_path: Path) -> None:
        """A kernel that does not tell its build id keeps nothing."""
        with pytest.raises(FileNotFoundError):
            cache.key(request_, nmi=False, notes=tmp_path / "none")


@pytest.mark.parametrize(
    ("environ", "directory"),
    [
        ({}, ""),
        ({"CACHE_DIRECTORY": "/var/cache/softirq-stalld"}, "/var/cache/softirq-stalld"),
        ({"CACHE_DIRECTORY": "/var/cache/one:/var/cache/two"}, "/var/cache/one"),
    ],
)
def test_where(environ: dict[str, str], directory: str) -> None:
    """Where systemd says, and nowhere else."""
    assert cache_directory(environ) == directory
