"""One daemon for all tests here: on an emulated CPU it takes 20 s to start."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.daemon import Daemon


@pytest.fixture(scope="session")
def daemon() -> Iterator[Daemon]:
    """A running daemon with the default threshold of 10 ms."""
    with Daemon() as running:
        yield running


@pytest.fixture(scope="session")
def tick_ms(daemon: Daemon) -> float:
    """The scheduler tick, as the daemon found it."""
    period: float = daemon.started["tick_ms"]
    return period


@pytest.fixture
def keep() -> Callable[[str, Any], None]:
    """Leaves evidence with the results of the guest's run."""
    directory = os.environ.get("STALLD_TEST_EVIDENCE")

    def write(name: str, what: Any) -> None:
        if directory:
            Path(directory, name).write_text(json.dumps(what, indent=1))

    return write
