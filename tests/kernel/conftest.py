"""What the kernel tests share. They need root; without it they fail, they do not skip."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.kernel.daemon import Daemon


@pytest.fixture(scope="session", autouse=True)
def _root() -> None:
    assert os.geteuid() == 0, "the kernel tests load BPF programs: run them as root"


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """A running daemon with the default threshold of 10 ms."""
    with Daemon() as running:
        yield running


@pytest.fixture
def tick_ms(daemon: Daemon) -> float:
    """The scheduler tick, as the daemon found it."""
    period: float = daemon.started["tick_ms"]
    return period
