"""What is opened once, and read as it is now."""

from __future__ import annotations

from pathlib import Path

import pytest

from stalld.enrich.kept import Kept, read_again


def test_opened_once(tmp_path: Path) -> None:
    """Until it is closed; what cannot be opened is tried again."""
    path = tmp_path / "file"
    kept = Kept(lambda: open(path, "rb", buffering=0))  # noqa: SIM115
    with pytest.raises(FileNotFoundError):
        kept.get()
    path.write_bytes(b"one")
    first = kept.get()
    assert kept.get() is first
    kept.close()
    kept.close()
    assert first.closed
    assert not kept.get().closed
    kept.close()


def test_read_as_it_is_now(tmp_path: Path) -> None:
    """All of it, from its beginning, however long."""
    path = tmp_path / "file"
    with path.open("w+b", buffering=0) as file:
        for content in (b"a" * 200_000, b"", b"short"):
            path.write_bytes(content)
            assert read_again(file.fileno()) == content


def test_a_table_of_the_kernel() -> None:
    """Which is made anew at each reading."""
    with open("/proc/uptime", "rb", buffering=0) as file:
        before = float(read_again(file.fileno()).split()[0])
        after = before
        while after <= before:
            after = float(read_again(file.fileno()).split()[0])
