"""What the service manager is told, byte by byte, through real sockets."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stalld.notify import Notifier, watchdog_period_s

PID = 4711


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """Where a service manager listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.setblocking(False)
        yield listening


@pytest.fixture
def notifier(manager: socket.socket) -> Iterator[Notifier]:
    """One that speaks to ``manager``, at 1.5 s of CLOCK_MONOTONIC."""
    made = Notifier(manager.getsockname(), monotonic_ns=lambda: 1_500_000_999)
    yield made
    made.close()


def heard(manager: socket.socket) -> list[str]:
    """All datagrams so far."""
    messages = []
    while True:
        try:
            messages.append(manager.recv(4097).decode())
        except BlockingIOError:
            return messages


def test_what_is_said(manager: socket.socket, notifier: Notifier) -> None:
    """Each call is one datagram with the assignments of sd_notify(3)."""
    notifier.ready("watching 2 CPUs")
    notifier.status("3 stalls")
    notifier.alive()
    notifier.reloading()
    notifier.stopping("asked to stop")
    assert heard(manager) == [
        "READY=1\nSTATUS=watching 2 CPUs",
        "STATUS=3 stalls",
        "WATCHDOG=1",
        "RELOADING=1\nMONOTONIC_USEC=1500000",
        "STOPPING=1\nSTATUS=asked to stop",
    ]
    assert (notifier.failures, notifier.fault) == (0, "")


def test_abstract_socket() -> None:
    """An address that begins with @ is a name in the abstract namespace."""
    name = f"softirq-stalld-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"\0{name}")
        notifier = Notifier.from_environment({"NOTIFY_SOCKET": f"@{name}"}, PID)
        notifier.alive()
        notifier.close()
        assert listening.recv(100) == b"WATCHDOG=1"


def test_no_manager() -> None:
    """Without NOTIFY_SOCKET nothing happens, nothing fails and nobody wants to be fed."""
    notifier = Notifier.from_environment({"WATCHDOG_USEC": "1000000"}, PID)
    notifier.ready("ready")
    notifier.status("fine")
    notifier.reloading()
    notifier.alive()
    notifier.stopping("bye")
    notifier.close()
    assert notifier.watchdog_s is None
    assert (notifier.failures, notifier.fault) == (0, "")


@pytest.mark.parametrize("address", ["relative", "@", "/", "vsock:2:1234"])
def test_foolish_address(address: str) -> None:
    """An address that cannot be right is counted and explained, and raises nothing."""
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": address}, PID)
    notifier.ready("ready")
    notifier.close()
    assert notifier.failures == 1
    assert notifier.fault


@pytest.mark.parametrize("name", ["gone", "x" * 200])
def test_manager_gone(tmp_path: Path, name: str) -> None:
    """A manager that is not there is counted, call by call, and raises nothing."""
    notifier = Notifier(str(tmp_path / name))
    notifier.ready("ready")
    notifier.alive()
    assert notifier.failures == 2
    assert notifier.fault
    notifier.close()


def test_manager_returns(tmp_path: Path) -> None:
    """A change of state that did not get through goes out with the next datagram, once."""
    notifier = Notifier(str(tmp_path / "late"))
    notifier.reloading()
    notifier.ready("watching")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "late"))
        listening.setblocking(False)
        notifier.alive()
        notifier.alive()
        assert heard(listening) == ["READY=1\nSTATUS=watching\nWATCHDOG=1", "WATCHDOG=1"]
    notifier.close()


def test_manager_is_slow(manager: socket.socket, notifier: Notifier) -> None:
    """A full queue does not hold the service up; what has no room is counted."""
    for _ in range(5000):
        notifier.alive()
        if notifier.failures:
            break
    assert notifier.failures == 1
    assert heard(manager)
    notifier.alive()
    assert heard(manager) == ["WATCHDOG=1"]


def test_closed(manager: socket.socket, notifier: Notifier) -> None:
    """After close, and a second one, nothing is sent and nothing fails."""
    notifier.close()
    notifier.close()
    notifier.alive()
    assert heard(manager) == []
    assert notifier.failures == 0


@given(st.text(st.characters(), max_size=2000))
def test_any_status(text: str) -> None:
    """Whatever the text, also lone surrogates: one printable line that systemd has room for."""
    name = f"\0softirq-stalld-status-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(name)
        notifier = Notifier("@" + name[1:])
        notifier.stopping(text)
        notifier.close()
        message = listening.recv(10_000)
    assert len(message) <= 4096
    assert notifier.failures == 0
    state, _, status = message.decode().partition("\n")
    assert state == "STOPPING=1"
    assert status.startswith("STATUS=")
    assert status.isprintable()


@pytest.mark.parametrize(
    ("variables", "period_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "1500000", "WATCHDOG_PID": str(PID)}, 1.5),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": ""}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": ""}, None),
        ({"WATCHDOG_USEC": "-5"}, None),
        ({"WATCHDOG_USEC": "1.5"}, None),
        ({"WATCHDOG_USEC": "٣"}, None),
        ({"WATCHDOG_USEC": "9" * 21}, None),
    ],
)
def test_watchdog_period(variables: dict[str, str], period_s: float | None) -> None:
    """The period is taken when it is meant for this process and makes sense."""
    assert watchdog_period_s(variables, PID) == period_s
    environ = {"NOTIFY_SOCKET": "@nobody", **variables}
    notifier = Notifier.from_environment(environ, PID)
    notifier.close()
    assert notifier.watchdog_s == period_s


def test_child_gets_nothing(notifier: Notifier) -> None:
    """A child inherits no descriptor that leads to the manager."""
    assert notifier._socket is not None
    assert not os.get_inheritable(notifier._socket.fileno())
