"""Events as syslog messages: to a real rsyslogd over TCP and a unix socket, and to odd peers."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from stalld import config
from stalld.sinks.syslog import SyslogSink
from tests.service.peer import Peer
from tests.service.rsyslog import Rsyslog
from tests.service.sinks import STOPPED_KIB, Running, put_while_stopped
from tests.service.surroundings import until


def running(address: str, **settings: Any) -> Running:
    """A sink that sends to the address."""
    made = config.SyslogSink(address=address, **settings)
    return Running(lambda context: SyslogSink(made, context))


def place(rsyslog: Rsyslog, way: str) -> str:
    """Where rsyslog takes messages in that way."""
    return rsyslog.socket if way == "unix" else rsyslog.syslog_address


@pytest.mark.parametrize("way", ["tcp", "unix"])
def test_rsyslog_gets_every_event(tmp_path: Path, way: str) -> None:
    """All events come to rsyslog's mmjsonparse complete, in order, and equal; also long ones."""
    with Rsyslog(tmp_path) as rsyslog, running(place(rsyslog, way)) as sink:
        events = sink.put(200) + sink.put(10, padding=40_000)
        sink.wait_delivered(210)
        until(lambda: len(rsyslog.events()) >= 210, what="all events")
        assert rsyslog.events() == events
        assert sink.troubles == []


@pytest.mark.parametrize("way", ["tcp", "unix"])
def test_header(tmp_path: Path, way: str) -> None:
    """rsyslog finds in the header what the configuration and the event say."""
    fields = (
        *("syslogfacility-text", "syslogseverity-text", "protocol-version", "hostname"),
        *("app-name", "procid", "msgid", "structured-data", "timereported:::date-rfc3339"),
    )
    template = "[" + ",".join(f'\\"%{field}%\\"' for field in fields[:7])
    template += ',\\"%structured-data:::json%\\",\\"%timereported:::date-rfc3339%\\"]\\n'
    with (
        Rsyslog(tmp_path, **{"%$!all-json%\\n": template}) as rsyslog,
        running(place(rsyslog, way), facility="local3", app_name="my-stalld") as sink,
    ):
        events = sink.put(3)
        until(lambda: len(rsyslog.events()) == 3, what="all events")
        for number, (got, event) in enumerate(zip(rsyslog.events(), events, strict=True)):
            got[8] = got[8].replace("+00:00", "Z")
            assert list(got) == [
                *("local3", ("info", "warning", "err")[number], "1", "web-1"),
                *("my-stalld", str(os.getpid()), "stall"),
                *(f'[meta sequenceId="{number + 1}"]', event["timestamp"]),
            ]


@pytest.mark.parametrize("way", ["tcp", "unix"])
def test_server_comes_goes_and_comes(tmp_path: Path, way: str) -> None:
    """Events wait for a server; one that is killed loses only what it had taken already."""
    rsyslog = Rsyslog(tmp_path)
    with running(place(rsyslog, way)) as sink:
        sink.put(20)
        reason = sink.wait_for_trouble()
        assert "is the syslog server running" in reason or "is the collector running" in reason
        assert sink.stats[1:] == (0, 20, 0)
        with rsyslog:
            sink.wait_for_trouble(over=True)
            sink.put(20)
            sink.wait_delivered(40)
            until(lambda: len(rsyslog.events()) == 40, what="the first events")
            rsyslog.stop(signal.SIGKILL)
            sink.put(1)
            delivered = sink.stats.delivered
            sink.put(59)
            sink.wait_for_trouble()
            rsyslog.start()
            sink.wait_delivered(100)
            until(lambda: rsyslog.events()[-1]["number"] == 99, what="the last event")
            numbers = [event["number"] for event in rsyslog.events()]
            assert numbers == [*range(40), *range(delivered, 100)]


@pytest.mark.parametrize("way", ["tcp", "unix"])
def test_stopped_server(tmp_path: Path, way: str) -> None:
    """A server that reads nothing delays no put; the queue is bounded, and a line tells the gap."""
    with (
        Rsyslog(tmp_path) as rsyslog,
        running(place(rsyslog, way), queue_kib=STOPPED_KIB) as sink,
    ):
        put_while_stopped(rsyslog, sink, 1000)


def test_too_long_for_a_datagram(tmp_path: Path) -> None:
    """What no datagram can hold is dropped, counted and told once with its size; others go on."""
    with Rsyslog(tmp_path) as rsyslog, running(rsyslog.socket) as sink:
        sink.put(1)
        for _ in range(2):
            sink.put(1, padding=1_000_000)
            sink.put(1)
        until(lambda: len(rsyslog.events()) == 3, what="the others")
        assert [event["number"] for event in rsyslog.events()] == [0, 2, 4]
        assert sink.stats[1:] == (3, 0, 2)
        sink.wait_for_trouble(over=True)
        begun = [trouble.reason for trouble in sink.troubles if not trouble.over]
        assert len(begun) == 1
        assert "takes no message of 1000" in begun[0]


def test_unix_stream(tmp_path: Path) -> None:
    """A unix socket of streams gets messages with their lengths before them."""
    path = str(tmp_path / "stream.sock")
    with Peer(path) as peer, running(path) as sink:
        events = sink.put(5)
        first = peer.accept()
        frames = first.read_frames(5)
        assert [json.loads(frame.partition(b"@cee: ")[2]) for frame in frames] == events
        sink.wait_delivered(5)
        first.close()
        again = sink.put(5)
        frames = peer.accept().read_frames(5)
        assert [json.loads(frame.partition(b"@cee: ")[2]) for frame in frames] == again


def test_short_of_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOBUFS means to try again later, not at once and not never."""
    path = str(tmp_path / "log.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(path)
        server.settimeout(5)
        tries: list[float] = []
        times = threading.Semaphore(3)

        class Short(socket.socket):
            def send(self, *arguments: Any) -> int:
                tries.append(time.monotonic())
                if times.acquire(blocking=False):
                    raise OSError(105, os.strerror(105))
                return super().send(*arguments)

        monkeypatch.setattr("stalld.sinks.syslog.socket.socket", Short)
        with running(path) as sink:
            sink.put(1)
            assert b'"number": 0' in server.recv(65_536)
            assert len(tries) == 4
            assert tries[-1] - tries[0] >= 0.1
            sink.wait_delivered(1)
            assert sink.troubles == []
