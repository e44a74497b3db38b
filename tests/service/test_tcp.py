"""Events over TCP: to a real rsyslogd, and to peers that break, stop, lie or hang up."""

from __future__ import annotations

import signal
import socket
import ssl
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvloop

from stalld import config
from stalld.sinks import connection
from stalld.sinks.resolve import Resolver
from stalld.sinks.tcp import TcpSink
from tests.kernel.daemon import COMMAND
from tests.service.peer import Certificates, Peer
from tests.service.rsyslog import Rsyslog, free_port
from tests.service.sinks import STOPPED_KIB, Running, put_while_stopped
from tests.service.surroundings import started, until
from tests.slowness import slow


def running(address: str, *, plain: bool = False, **settings: Any) -> Running:
    """A sink that writes to the address."""
    made = config.TcpSink(address=address, **settings)
    return Running(lambda context: TcpSink(made, context), plain=plain)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """A throw-away CA."""
    return Certificates(tmp_path_factory.mktemp("ca"))


def test_rsyslog_gets_every_event(tmp_path: Path) -> None:
    """All events come to rsyslog, complete, in order, and equal; also very long ones."""
    with Rsyslog(tmp_path) as rsyslog, running(rsyslog.address) as sink:
        events = sink.put(200) + sink.put(20, padding=40_000)
        sink.wait_delivered(220)
        until(lambda: len(rsyslog.events()) >= 220, what="all events")
        assert rsyslog.events() == events
        assert sink.troubles == []


def test_no_peer_at_first(tmp_path: Path) -> None:
    """Events wait for a collector that comes later; trouble is told once, with its end."""
    rsyslog = Rsyslog(tmp_path)
    with running(rsyslog.address) as sink:
        events = sink.put(50)
        assert sink.wait_for_trouble() == (
            f"connection refused by {rsyslog.address}: is the collector running? "
            "Events are kept up to 4096 KiB"
        )
        assert sink.stats[1:] == (0, 50, 0)
        with rsyslog:
            sink.wait_delivered(50)
            until(lambda: len(rsyslog.events()) >= 50, what="all events")
            assert rsyslog.events() == events
            reason = sink.wait_for_trouble(over=True)
            assert reason.startswith(f"{rsyslog.address} takes events again, after ")
            assert len(sink.troubles) == 2


def test_killed_peer(tmp_path: Path) -> None:
    """What a killed rsyslogd had not yet in its kernel comes to the next, and all that follows.

    Gone is only what the dead process had read, or its kernel had acknowledged, and it had not
    written: one run of events up to the kill. What came twice is a run too.
    """
    with Rsyslog(tmp_path) as rsyslog, running(rsyslog.address) as sink:
        sink.put(100)
        sink.wait_delivered(100)
        until(lambda: len(rsyslog.events()) >= 100, what="the first events")
        sink.put(100)
        rsyslog.stop(signal.SIGKILL)
        sink.put(1)  # Answered by a reset, if the break was not noticed before.
        delivered = sink.stats.delivered
        sink.put(99, pause_s=0.001)
        sink.wait_for_trouble()
        rsyslog.start()
        sink.put(100, pause_s=0.001)
        sink.wait_delivered(400)
        until(lambda: rsyslog.events()[-1]["number"] == 399, what="the last event")
        numbers = [event["number"] for event in rsyslog.events()]
        assert numbers[:100] == list(range(100))
        lost = sorted(set(range(400)) - set(numbers))
        assert lost == list(range(lost[0], lost[-1] + 1)) if lost else True
        assert all(100 <= number < delivered for number in lost)
        assert numbers[-(400 - delivered) :] == list(range(delivered, 400))
        assert sink.stats[1:] == (400, 0, 0)


@pytest.mark.parametrize("tls", [False, True])
def test_unacknowledged_events_are_sent_again(certificates: Certificates, tls: bool) -> None:
    """Exactly what the peer's kernel did not acknowledge before a break comes again, whole."""
    server = certificates.server() if tls else None
    settings: dict[str, Any] = {}
    if tls:
        settings = {"tls": True, "tls_ca": certificates.path("ca.pem")}
    with (
        Peer(tls=server, receive_bytes=16_384) as peer,
        running(peer.address, **settings) as sink,
    ):
        first = peer.accept()
        time.sleep(0.6)
        events = sink.put(400, padding=1000)
        until(lambda: sink.stats.delivered > 0, what="something acknowledged")
        time.sleep(0.3)
        delivered = sink.stats.delivered
        assert 0 < delivered < 100
        assert sink.sink.outbox.unacknowledged
        first.abort()
        second = peer.accept()
        again = second.read(400 - delivered)
        sink.wait_delivered(400)
        assert again == events[delivered:]
        assert sink.troubles[0].reason.startswith(
            f"{peer.address} closed the connection: is the collector running, "
            if tls
            else f"{peer.address}: connection reset by peer: is the collector running? "
        )


def test_what_was_acknowledged_is_not_sent_again() -> None:
    """A connection that ends in peace when all is acknowledged brings no event twice."""
    with Peer() as peer, running(peer.address) as sink:
        first = peer.accept()
        sink.put(10)
        assert len(first.read(10)) == 10
        sink.wait_delivered(10)
        first.close()
        second = peer.accept()
        sink.wait_for_trouble()
        events = sink.put(5)
        assert second.read(5) == events


def test_stopped_peer(tmp_path: Path) -> None:
    """A peer that reads nothing delays no put; the queue is bounded, and a line tells the gap."""
    with (
        Rsyslog(tmp_path) as rsyslog,
        running(rsyslog.address, queue_kib=STOPPED_KIB) as sink,
    ):
        stats = put_while_stopped(rsyslog, sink, 2000)
        assert stats.dropped > 1900  # The kernel may have had room for some more.
        assert sink.stats[1:] == (sink.count - stats.dropped, 0, stats.dropped)


def test_vanished_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that answers nothing any more is given up after a time; its events go to the next."""
    monkeypatch.setattr(connection, "LOOK_EVERY_S", 0.2)
    monkeypatch.setattr(connection, "SILENT_S", 1.0)
    with Peer() as peer, running(peer.address) as sink:
        first = peer.accept()
        sink.put(5)
        first.read(5)
        first.vanish()
        events = sink.put(5)
        assert peer.accept().read(5) == events
        assert sink.troubles[0].reason.startswith(f"{peer.address} answers no more: is the host up")


def test_a_full_peer_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that answers but has no room keeps its connection; trouble tells of it meanwhile."""
    for name in ("SILENT_S", "STUCK_S"):
        monkeypatch.setattr(connection, name, 0.5)
    monkeypatch.setattr(connection, "LOOK_EVERY_S", 0.1)
    with Peer(receive_bytes=16_384) as peer, running(peer.address) as sink:
        first = peer.accept()
        events = sink.put(120, padding=1000)
        reason = sink.wait_for_trouble()
        assert reason.startswith(f"{peer.address} takes no more events: is the collector stuck?")
        time.sleep(1.2)
        assert first.read(120) == events
        assert "takes events again, after" in sink.wait_for_trouble(over=True)
        assert not any("answers no more" in trouble.reason for trouble in sink.troubles)


@pytest.mark.parametrize("plain", [False, True])
def test_either_loop_and_a_talking_peer(plain: bool) -> None:
    """uvloop and asyncio's own loop will both do; what the peer says is not listened to."""
    with Peer() as peer, running(peer.address, plain=plain) as sink:
        first = peer.accept()
        first.say(b"hello\n" * 10_000)
        events = sink.put(300, padding=10_000)
        assert first.read(300) == events
        first.say(b"hello\n" * 10_000)
        events = sink.put(1)
        assert first.read(301)[300:] == events
        first.close()
        assert "closed the connection" in sink.wait_for_trouble()
        events = sink.put(2)
        assert peer.accept().read(2) == events


def test_ipv6() -> None:
    """An IPv6 address will do."""
    try:
        free_port(socket.AF_INET6)
    except OSError:
        pytest.skip("this kernel has no IPv6 loopback")
    with Peer("::1") as peer, running(peer.address) as sink:
        events = sink.put(3)
        assert peer.accept().read(3) == events


def test_next_address_of_a_name() -> None:
    """Of a name's addresses the first that answers will do."""
    with Peer() as peer, running(f"localhost:{peer.address.rpartition(':')[2]}") as sink:
        events = sink.put(3)
        assert peer.accept().read(3) == events
        assert sink.troubles == []


def test_unknown_name() -> None:
    """A name that is none is told as such."""
    with running("no-such-host.invalid:6000") as sink:
        # DNS may take longer than we wait for it: that is told otherwise, with the same remedy.
        reason = sink.wait_for_trouble(timeout_s=2 * connection.CONNECT_S)
        assert reason.startswith("no-such-host.invalid:6000: the name cannot be resolved: ")
        assert "does DNS answer?" in reason


def test_dns_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it: neither the sink nor, at the end, the loop."""
    answered = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answered.wait(20))
    monkeypatch.setattr(connection, "CONNECT_S", 0.1)

    resolver = Resolver("example.invalid", 1)

    async def dial() -> None:
        with pytest.raises(connection.LostError, match="resolved: does DNS answer"):
            await connection.dial_tcp(resolver, "example.invalid:1")

    began = time.monotonic()
    try:
        uvloop.run(dial())
        assert time.monotonic() - began < 5
    finally:
        answered.set()


def test_flapping_peer() -> None:
    """Who accepts and hangs up at once is tried ever less often, and swallows no event."""
    with Peer() as peer, running(peer.address) as sink:
        events = sink.put(20)
        # At 0, then after 0.25, 0.5 and 1 s, by a fourth more or less.
        assert 2 <= peer.count(1.5) <= 4
        assert sink.stats[1:] == (0, 20, 0)
        assert [trouble.over for trouble in sink.troubles] == [False]
        assert peer.accept().read(20) == events


def test_reopen_tries_at_once() -> None:
    """SIGHUP ends the wait for the next try."""
    port = free_port()
    with running(f"127.0.0.1:{port}") as sink:
        sink.wait_for_trouble()
        time.sleep(1.2)  # Tries were at 0, 0.25 and 0.75 s; the next is a second after that.
        with socket.create_server(("127.0.0.1", port)) as server:
            server.settimeout(0.25)
            sink.sink.in_loop(sink.sink.reopen)
            server.accept()[0].close()


def test_close_delivers() -> None:
    """Closing delivers what waits, waits for the acknowledgement, and hangs up in order."""
    with Peer() as peer, running(peer.address) as sink:
        events = sink.put(500, padding=1000)
        with ThreadPoolExecutor() as threads:
            received = threads.submit(lambda: peer.accept().read_all())
            sink.close()
            assert sink.stats[1:] == (500, 0, 0)
            assert received.result() == events


def test_close_without_peer() -> None:
    """Closing tries no longer than it may; what could not be delivered is counted."""
    with running(f"127.0.0.1:{free_port()}") as sink:
        sink.put(5)
        sink.wait_for_trouble()
        began = time.monotonic()
        sink.close(0.5)
        assert 0.4 < time.monotonic() - began < 0.8
        assert sink.stats[1:] == (0, 5, 0)
        sink.sink.give_up()
        assert sink.stats[1:] == (0, 0, 5)


def test_tls_rsyslog(certificates: Certificates, tmp_path: Path) -> None:
    """rsyslog takes events through TLS from who has a certificate that it trusts."""
    files = {
        f"/etc/rsyslog.d/tls/{name}": certificates.path(name)
        for name in ("ca.pem", "server.pem", "server.key")
    }
    settings: dict[str, Any] = {
        "tls": True,
        "tls_ca": certificates.path("ca.pem"),
        "tls_cert": certificates.path("client.pem"),
        "tls_key": certificates.path("client.key"),
    }
    with (
        Rsyslog(tmp_path, "rsyslog-tls.conf", **files) as rsyslog,
        running(rsyslog.address, **settings) as sink,
    ):
        events = sink.put(100) + sink.put(5, padding=40_000)
        sink.wait_delivered(105)
        until(lambda: len(rsyslog.events()) >= 105, what="all events")
        assert rsyslog.events() == events


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"tls_ca": "other-ca.pem"}, "its certificate is not trusted"),
        ({"tls_ca": ""}, "its certificate is not trusted"),
        ({"tls_name": "other.example"}, "its certificate is not for other.example"),
        ({"tls_name": ".example"}, "is .example a host name?"),
        ({"tls_cert": "", "tls_key": ""}, "it wants our certificate: are tls_cert and tls_key"),
        ({"tls_key": "server.key"}, "tls_cert and tls_key: do they fit"),
        ({"tls_ca": "missing.pem"}, "missing.pem: No such file or directory: tls_ca"),
    ],
)
def test_tls_refused(certificates: Certificates, changed: dict[str, str], told: str) -> None:
    """Whom we do not trust, and who does not trust us, gets no event; the reason is told."""
    files = {"tls_ca": "ca.pem", "tls_cert": "client.pem", "tls_key": "client.key"} | changed
    names = {key: value for key, value in files.items() if key != "tls_name" and value}
    settings: dict[str, Any] = {key: certificates.path(value) for key, value in names.items()}
    settings |= {"tls_name": files.get("tls_name", "")}
    with (
        Peer(tls=certificates.server(client=True)) as peer,
        running(peer.address, tls=True, **settings) as sink,
    ):
        sink.put(3)
        received = b""
        if told.startswith("it"):  # Else we do not even begin to speak TLS.
            try:
                taken = peer.accept()
                taken.read_all()
                received = bytes(taken.data)
            except OSError:
                pass
        assert told in sink.wait_for_trouble()
        assert received == b""
        assert sink.stats[1:] == (0, 3, 0)


def test_old_tls_is_refused(certificates: Certificates) -> None:
    """A collector that has nothing newer than TLS 1.1 gets no event, and is told to be too old."""
    server = certificates.server()
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        server.minimum_version = server.maximum_version = ssl.TLSVersion.TLSv1_1
    server.set_ciphers("DEFAULT:@SECLEVEL=0")  # Or it would refuse its own versions.
    with (
        Peer(tls=server) as peer,
        running(peer.address, tls=True, tls_ca=certificates.path("ca.pem")) as sink,
    ):
        sink.put(3)
        with pytest.raises(OSError, match="UNSUPPORTED_PROTOCOL"):
            peer.accept()
        assert "it offers nothing newer than TLS 1.1" in sink.wait_for_trouble()
        assert sink.stats[1:] == (0, 3, 0)


def test_tls_name(certificates: Certificates) -> None:
    """tls_name is what the certificate must be for, whatever the address is."""
    settings = config.TcpSink(address="localhost:1", tls=True, tls_ca=certificates.path("ca.pem"))
    with Peer(tls=certificates.server()) as peer:
        made = replace(settings, address=peer.address, tls_name="collector.example")
        with Running(lambda context: TcpSink(made, context)) as sink:
            events = sink.put(3)
            taken = peer.accept()
            assert taken.read(3) == events
            sink.close()
            taken.read_all()


def test_tls_of_the_daemon(certificates: Certificates, tmp_path: Path) -> None:
    """The daemon itself, whose loop was loaded without OpenSSL, speaks TLS all the same."""
    file = tmp_path / "config.toml"
    with Peer(tls=certificates.server()) as peer:
        file.write_text(
            f"live.enabled = false\n[[sinks.tcp]]\naddress = '{peer.address}'\ntls = true\n"
            f"tls_ca = '{certificates.path('ca.pem')}'\n"
        )
        with started([COMMAND, "run", "--config", str(file)], stdout=subprocess.DEVNULL) as process:
            taken = peer.accept(slow(90))
            assert taken.read(1)[0]["event"] == "started"
            process.terminate()
            assert taken.read_all()[-1]["event"] == "stopped"
            assert process.wait(slow(10)) == 0


def test_tls_with_who_speaks_none(certificates: Certificates) -> None:
    """A port without TLS is told as such."""
    with (
        Peer() as peer,
        running(peer.address, tls=True, tls_ca=certificates.path("ca.pem")) as sink,
    ):
        peer.accept().say(b"220 hello\r\n")
        assert "it does not speak TLS: is this the right port?" in sink.wait_for_trouble()
