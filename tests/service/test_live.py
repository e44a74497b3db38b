"""The live socket and `tail`: many clients, slow ones, hostile ones, and a terminal."""

from __future__ import annotations

import contextlib
import grp
import os
import re
import resource
import signal
import socket
import stat
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest

from stalld.live_request import PROTOCOL
from stalld.tail.client import MAX_LINE_BYTES
from tests.service.live import TAIL, Client, Server, Tail, Terminal, asked
from tests.service.surroundings import missing, numbers, until
from tests.unit.tail.test_view import STALL

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changing the user needs root")
FRAMED = ("timestamp", "level", "event", "schema", "host")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the socket is."""
    return tmp_path / "live.sock"


def stall(**changes: Any) -> dict[str, Any]:
    """The fields of a stall that has just begun."""
    started = datetime.now(UTC) - timedelta(milliseconds=20)
    fields = {k: v for k, v in STALL.items() if k not in FRAMED}
    at = started.isoformat(timespec="microseconds").replace("+00:00", "Z")
    return fields | {"started_at": at} | changes


def counts(lines: list[dict[str, Any]]) -> list[int]:
    """The numbers of events."""
    return [line["count"] for line in lines]


# --- the protocol ---


def test_hello_then_events(path: Path) -> None:
    """A client is told whom it talks to, then each event as a line, as it comes."""
    with Server(path) as server:
        client, hello = asked(server)
        with client:
            assert hello == {
                "live": PROTOCOL,
                "instance": hello["instance"],
                "version": "9.9",
                "clients": 1,
                "replayed": 0,
                "forgotten": 0,
            }
            server.emit(cpu=3)
            line = client.line()
            assert line is not None
            assert [*line][:5] == list(FRAMED)
            assert (line["event"], line["cpu"], line["count"]) == ("records_lost", 3, 0)


def test_stats_only(path: Path) -> None:
    """Who asks for that gets the hello and the end."""
    with Server(path) as server, Client(path, {"stats": True}) as client:
        hello = client.line()
        assert hello is not None
        assert hello["live"] == PROTOCOL
        assert client.line() is None
        assert server.clients == 0


@pytest.mark.parametrize(
    "request_",
    [b"hello\n", b"\n", b"{}x\n", b'{"filter": {"pid": 1}}\n', b"\xff\xfe\n", b"x" * 5000],
)
def test_a_request_that_is_none(path: Path, request_: bytes) -> None:
    """One line that says what is wrong, then the end."""
    with Server(path) as server, Client(path, request_) as client:
        answer = client.line()
        assert answer is not None
        assert list(answer) == ["error"]
        assert client.line() is None
        assert server.clients == 0


def test_a_request_in_pieces(path: Path) -> None:
    """However it arrives, also with the end of the stream in place of the newline."""
    with Server(path) as server:
        with Client(path) as client:
            for piece in (b'{"hist', b'ory":', b" 0", b"}"):
                client.send(piece)
                time.sleep(0.02)
            client.socket.shutdown(socket.SHUT_WR)
            assert (client.line() or {})["live"] == PROTOCOL
            # It may hear although it says no more.
            time.sleep(0.1)
            server.emit()
            assert (client.line() or {})["count"] == 0
        until(lambda: server.clients == 0)


def test_filters_are_evaluated_on_the_server(path: Path) -> None:
    """Only what passes is sent, of the history too."""
    with Server(path) as server:
        server.emit(cpu=1)
        server.emit(cpu=2)
        client, hello = asked(server, filter={"cpu": [2]}, history=100)
        with client:
            for cpu in (1, 2, 3, 2):
                server.emit(cpu=cpu)
            server.emit("stopped", "info")
            assert hello["replayed"] == 1
            assert counts(client.lines(3)) == [1, 3, 5]
            assert client.nothing_comes()


def test_history(path: Path) -> None:
    """The last events on request, at most a hundred; all since the start begins with `started`."""
    with Server(path) as server:
        server.emit("started", "info", version="1")
        for _ in range(150):
            server.emit()
        client, hello = asked(server, history=7)
        with client:
            assert (hello["replayed"], hello["forgotten"]) == (7, 0)
            assert counts(client.lines(7)) == list(range(144, 151))
            assert client.nothing_comes()
        client, hello = asked(server, history="since_start")
        with client:
            assert (hello["replayed"], hello["forgotten"]) == (101, 50)
            lines = client.lines(101)
            assert lines[0]["event"] == "started"
            assert counts(lines[1:]) == list(range(51, 151))


def test_history_is_bounded_in_bytes(path: Path) -> None:
    """A hundred huge events are not kept."""
    with Server(path) as server:
        for _ in range(100):
            server.emit(padding="x" * 45_000)
        client, hello = asked(server, history=100)
        with client:
            assert 20 < hello["replayed"] < 50
            assert len(client.lines(hello["replayed"])) == hello["replayed"]


def test_who_comes_again_gets_what_is_new(path: Path) -> None:
    """The same run of the daemon: nothing twice. Another one: all since its start."""
    with Server(path) as server:
        client, hello = asked(server)
        client.socket.close()
        server.emit()
        client, again = asked(server, instance=hello["instance"])
        with client:
            assert again["instance"] == hello["instance"]
            assert client.nothing_comes()
    with Server(path) as server:
        server.emit()
        client, other = asked(server, instance=hello["instance"])
        with client:
            assert other["instance"] != hello["instance"]
            assert counts(client.lines(1)) == [0]


@pytest.mark.parametrize("history", [100, "since_start"])
def test_history_and_live_events_join(path: Path, history: Any) -> None:
    """Clients that come while events do miss none and get none twice."""
    with Server(path) as server:
        server.emit("started", "info", version="1")
        stop = threading.Event()

        def feed() -> None:
            while not stop.is_set():
                server.emit()
                time.sleep(0.0005)

        feeder = threading.Thread(target=feed)
        feeder.start()
        try:
            for _ in range(50):
                client, hello = asked(server, history=history)
                with client:
                    told = counts([e for e in client.lines(hello["replayed"] + 20) if "count" in e])
                    assert told == list(range(told[0], told[0] + len(told)))
        finally:
            stop.set()
            feeder.join()


# --- many and slow ones ---


def test_many_at_once(path: Path) -> None:
    """Sixty-four get everything; the next one is told that there are too many."""
    with Server(path) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(asked(server)[0]) for _ in range(64)]
        # It is told before it asks, and hung up on.
        with Client(path) as surplus:
            assert "64 clients" in (surplus.line() or {})["error"]
            assert surplus.line() is None
        for _ in range(20):
            server.emit()
        for client in clients:
            assert counts(client.lines(20)) == list(range(20))
        stats = server.call(server.sink.stats)
        assert (stats.delivered, stats.queued, stats.dropped) == (64 * 20, 0, 0)
        clients[0].socket.close()
        until(lambda: server.clients == 63)
        stack.enter_context(asked(server)[0])


def test_a_slow_client_loses_lines_and_is_told_how_many(path: Path) -> None:
    """A stopped `tail` costs others nothing and no time; when it goes on, the sum matches."""
    total = 3_000
    with Server(path, queue_kib=64) as server, Tail(path, "--json") as slow:
        client, _ = asked(server)
        with client:
            until(lambda: server.clients == 2)
            slow.process.send_signal(signal.SIGSTOP)
            got: list[dict[str, Any]] = []
            reader = threading.Thread(target=lambda: got.extend(client.lines(total)))
            reader.start()
            for _ in range(total):
                server.emit(padding="x" * 500)
                time.sleep(0.0002)
            reader.join(20)
            assert counts(got) == list(range(total))
            until(lambda: server.call(server.sink.stats).dropped > 0)
            slow.process.send_signal(signal.SIGCONT)
            server_has = server.call(server.sink.stats)
            until(lambda: server.call(server.sink.stats).queued == 0)
            # One more, so that the end is known; a gap at the end is told before it.
            server.emit()
            until(lambda: numbers(_whole(slow.output))[-1:] == [total])
            told = numbers(slow.output)
            assert told == sorted(set(told))
            assert missing(slow.output) > 0
            assert len(told) + missing(slow.output) == total + 1
            assert server_has.dropped == missing(slow.output)
    # What a client that does not read costs is what one that reads does.
    flat = sorted(server.put_s)
    assert flat[len(flat) // 2] < 0.002
    assert flat[int(len(flat) * 0.99)] < 0.02


def _whole(output: bytes) -> bytes:
    return output[: output.rfind(b"\n") + 1]


def test_the_end_is_delivered(path: Path) -> None:
    """At its end the service delivers what waits, `stopped` included, then hangs up."""
    with Server(path) as server:
        client, _ = asked(server)
        with client:
            for _ in range(400):
                server.emit(padding="x" * 1000)
            server.emit("stopped", "info")
            closer = threading.Thread(target=server.close)
            closer.start()
            lines = list(iter(client.line, None))
            closer.join()
        assert lines[-1]["event"] == "stopped"
        assert counts(lines[:-1]) == list(range(400))
        assert not path.exists()
        stats = server.sink.stats()
        assert (stats.delivered, stats.queued, stats.dropped) == (401, 0, 0)


def test_what_is_never_read_counts_as_dropped(path: Path) -> None:
    """All events for a client are accounted for when it is gone."""
    with Server(path, queue_kib=64) as server:
        client, _ = asked(server)
        for _ in range(1000):
            server.emit(padding="x" * 1000)
        client.socket.close()
        until(lambda: server.clients == 0)
        stats = server.call(server.sink.stats)
        assert stats.queued == 0
        assert stats.delivered + stats.dropped == 1000


# --- hostile ones ---


def _silent(client: Client) -> None:
    pass


def _garbage(client: Client) -> None:
    client.send(os.urandom(1000))


def _deaf(client: Client) -> None:
    client.send({"history": 100})


@pytest.mark.parametrize("behave", [_silent, _garbage, _deaf])
def test_a_thousand_connections(path: Path, behave: Any) -> None:
    """They leave no descriptor and no memory behind, and whoever comes then is served."""
    with Server(path) as server:
        for _ in range(100):
            server.emit(padding="x" * 2000)
        asked(server)[0].socket.close()
        until(lambda: server.clients == 0)
        before, memory = _descriptors(), _memory()
        clients = []
        for _ in range(1000):
            client = Client(path)
            clients.append(client)
            with contextlib.suppress(BrokenPipeError):  # There are too many, it was told so.
                behave(client)
        for _ in range(100):
            server.emit(padding="x" * 2000)
        assert server.clients <= 64
        for client in clients:
            client.socket.close()
        until(lambda: server.clients == 0 and _descriptors() <= before)
        assert _memory() - memory < 30 << 20
        client, _ = asked(server)
        with client:
            server.emit()
            assert client.lines(1)
        assert max(server.put_s) < 0.5


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_silent_clients_are_sent_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who does not say what it wants in time makes room for others."""
    monkeypatch.setattr("stalld.sinks.live.REQUEST_S", 0.3)
    with Server(path, max_clients=1), Client(path) as silent:
        begun = time.monotonic()
        assert silent.line() is None
        assert 0.2 < time.monotonic() - begun < 3
        with Client(path, {"stats": True}) as client:
            assert "live" in (client.line() or {})


def test_four_megabytes_of_request(path: Path) -> None:
    """It is refused after the first few kilobytes; the rest is not even read."""
    with Server(path) as server, Client(path) as client:
        memory = _memory()
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            client.send(b"x" * (4 << 20))
        assert "4096 bytes" in (client.line() or {})["error"]
        assert _memory() - memory < 16 << 20
        assert server.clients == 0


def test_who_talks_on_is_not_listened_to(path: Path) -> None:
    """What comes after the request is never read, and costs nothing."""
    with Server(path) as server:
        client, _ = asked(server)
        with client:
            client.socket.settimeout(0.1)
            with pytest.raises(TimeoutError):
                client.socket.sendall(b"x" * (8 << 20))
            client.socket.settimeout(10)
            used = time.process_time()
            time.sleep(0.3)
            assert time.process_time() - used < 0.1
            server.emit()
            assert counts(client.lines(1)) == [0]


def test_no_descriptors_left(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes then waits; it is told, and over once there are some again."""
    monkeypatch.setattr("stalld.sinks.live.REST_S", 0.2)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Server(path) as server, Client(path) as waiting:
        until(lambda: waiting.nothing_comes(0.0) and server.sink._visitors)
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(10)
        taken: list[int] = []
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (_descriptors() + 20, limit[1]))
            with contextlib.suppress(OSError):
                while True:
                    taken.append(os.dup(client.fileno()))
            client.connect(str(path))
            client.sendall(b"{}\n")
            until(lambda: server.troubles)
            assert "LimitNOFILE" in server.troubles[0].reason
            waiting.send({})
            assert "live" in (waiting.line() or {})
        finally:
            for fd in taken:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        with client:
            assert b"live" in client.recv(4096)
        until(lambda: server.troubles[-1].over)


# --- who may, and where ---


def test_for_our_user_and_the_group_only(path: Path) -> None:
    """Mode 0660, and the group that the configuration names."""
    group = next(g for g in grp.getgrall() if g.gr_gid not in (0, os.getegid()))
    with Server(path, group=group.gr_name):
        found = path.stat()
        assert stat.S_ISSOCK(found.st_mode)
        assert stat.S_IMODE(found.st_mode) == 0o660
        if os.geteuid() == 0:
            assert found.st_gid == group.gr_gid


def test_a_group_that_is_not_there(path: Path) -> None:
    """Then our own group, and nobody else."""
    with Server(path, group="no-such-group"):
        found = path.stat()
        assert (found.st_gid, stat.S_IMODE(found.st_mode)) == (os.getegid(), 0o660)


@needs_root
@pytest.mark.parametrize(("in_group", "status"), [(True, 0), (False, 1)])
def test_who_gets_in(in_group: bool, status: int) -> None:
    """A user of the group does; anybody else is told what to do."""
    group = next(g for g in grp.getgrall() if g.gr_gid not in (0, 65_534))
    # Nobody but us gets to what is below tmp_path.
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        os.chmod(directory, 0o755)
        path = Path(directory) / "live.sock"
        with Server(path, group=group.gr_name):
            done = subprocess.run(
                [*TAIL, "--socket", str(path), "--stats"],
                user=65_534,
                group=65_534,
                extra_groups=[group.gr_gid] if in_group else [],
                capture_output=True,
                text=True,
                timeout=20,
            )
    assert done.returncode == status, done.stderr
    if in_group:
        assert f"live: {PROTOCOL}\n" in done.stdout
    else:
        assert "permission denied" in done.stderr
        assert "usermod" in done.stderr


def test_a_stale_socket_is_replaced(path: Path) -> None:
    """What a killed daemon left is no obstacle."""
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    with Server(path) as server:
        asked(server)[0].socket.close()
        assert not server.troubles


def test_what_is_no_socket_is_not_touched(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told, and tried again until the place is free."""
    monkeypatch.setattr("stalld.sinks.live.RETRY_S", 0.1)
    path.write_text("precious")
    with Server(path) as server:
        until(lambda: server.troubles)
        assert "no socket" in server.troubles[0].reason
        server.emit()
        time.sleep(0.3)
        assert path.read_text() == "precious"
        assert len(server.troubles) == 1
        path.unlink()
        until(lambda: len(server.troubles) == 2 and server.troubles[1].over)
        client, _ = asked(server, history=1)
        with client:
            assert counts(client.lines(1)) == [0]


def test_another_daemon_keeps_its_socket(path: Path) -> None:
    """The second one says so, takes nothing away, and removes nothing when it goes."""
    with Server(path) as first:
        with Server(path) as second:
            until(lambda: second.troubles)
            assert "another process listens" in second.troubles[0].reason
            first.emit()
        client, _ = asked(first, history=1)
        with client:
            assert counts(client.lines(1)) == [0]


def test_no_directory(tmp_path: Path) -> None:
    """It is told what to do; the service goes on."""
    with Server(tmp_path / "missing" / "live.sock") as server:
        until(lambda: server.troubles)
        assert "RuntimeDirectory" in server.troubles[0].reason
        server.emit()


@needs_root
def test_the_usual_directory_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For root, at the usual place: nobody else may even look into it."""
    path = tmp_path / "run" / "live.sock"
    monkeypatch.setattr("stalld.sinks.live_socket.DEFAULT_SOCKET", str(path))
    group = next(g for g in grp.getgrall() if g.gr_gid != 0)
    with Server(path, group=group.gr_name) as server:
        found = path.parent.stat()
        assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o750, group.gr_gid)
        asked(server)[0].socket.close()


def test_a_socket_that_somebody_removed(path: Path) -> None:
    """SIGHUP has it there again; clients that were there stay."""
    with Server(path) as server:
        client, _ = asked(server)
        with client:
            inode = path.stat().st_ino
            server.call(server.sink.reopen)
            assert path.stat().st_ino == inode
            path.unlink()
            server.call(server.sink.reopen)
            asked(server)[0].socket.close()
            server.emit()
            assert counts(client.lines(1)) == [0]


def test_only_our_own_socket_is_removed(path: Path) -> None:
    """At the end, what others put in its place stays."""
    with Server(path):
        path.unlink()
        path.write_text("precious")
    assert path.read_text() == "precious"


# --- tail ---


def test_json_lines_pass_as_they_are(path: Path) -> None:
    """Byte for byte, each as soon as it comes; Ctrl-C ends it with 0 and no word."""
    with Server(path) as server, Tail(path, "--json", "-n", "100") as tail:
        until(lambda: server.clients == 1)
        for text in ("plain", 'ö"\\\n', "\u202e\x9b", "x" * 40_000):
            server.emit(padding=text)
            until(lambda: tail.output == b"".join(server.lines))
        assert tail.end() == 0
        assert tail.errors == b""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_cleanly(path: Path, number: int) -> None:
    """Exit 0, also while nobody reads its output."""
    reader, writer = os.pipe()
    with (
        os.fdopen(reader, "rb"),
        Server(path) as server,
        Tail(path, "--json", stdout=writer) as tail,
    ):
        os.close(writer)
        until(lambda: server.clients == 1)
        for _ in range(200):
            server.emit(padding="x" * 1000)
        until(lambda: server.call(server.sink.stats).delivered > 60)
        time.sleep(0.1)
        assert tail.end(number) == 0
        assert tail.errors == b""


def test_a_reader_that_is_gone(path: Path) -> None:
    """`tail | head`: exit 0 without a word, also when no event comes."""
    reader, writer = os.pipe()
    with Server(path) as server, Tail(path, stdout=writer) as tail:
        os.close(writer)
        until(lambda: server.clients == 1)
        os.close(reader)
        assert tail.process.wait(10) == 0
        assert tail.errors == b""


def test_plain_text_where_there_is_no_terminal(path: Path) -> None:
    """As `run --format text` writes it, without any escape sequence."""
    with Server(path) as server, Tail(path) as tail:
        until(lambda: server.clients == 1)
        server.emit("stall", **stall(blocker=STALL["blocker"] | {"comm": "\x1b[2J\nx\u202e"}))
        tail.wait_for(b"seq_read")
        assert b" warning stall cpu 3: 51.3 ms, stuck_in_kernel" in tail.output
        assert b"\\x1b[2J\\nx\\u202e pid 10" in tail.output
        assert b"\x1b" not in tail.output


def test_a_restart_of_the_service_is_survived(path: Path) -> None:
    """It says so once, comes back by itself, and shows what there was since the new start."""
    with Tail(path, "--json") as early:
        assert early.process.wait(10) == 1
        assert b"is the service running?" in early.errors
        assert b"Traceback" not in early.errors
    with contextlib.ExitStack() as stack:
        with Server(path) as server:
            tail = stack.enter_context(Tail(path, "--json"))
            until(lambda: server.clients == 1)
            server.emit()
            tail.wait_for(b'"count":0')
        tail.wait_for(b"lost the service")
        time.sleep(1.5)
        with Server(path) as server:
            server.emit(cpu=77)
            tail.wait_for(b'"cpu":77')
            tail.wait_for(b"connected again, to a new run")
            assert tail.errors.count(b"\n") == 2
            assert numbers(tail.output) == [0, 0]
            assert tail.end() == 0


def test_nobody_listens(path: Path) -> None:
    """A socket that a dead daemon left, or one that a server of another kind has."""
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        with Tail(path) as tail:
            assert tail.process.wait(10) == 1
            assert b"nobody listens there" in tail.errors
        other.listen()
        thread = threading.Thread(
            target=_answer, args=(other, b"HTTP/1.1 400 Bad\r\n\x1b[2J\n"), daemon=True
        )
        thread.start()
        with Tail(path) as tail:
            assert tail.process.wait(10) == 1
            assert b"not a softirq-stalld" in tail.errors
        thread.join()


def _answer(listener: socket.socket, data: bytes) -> None:
    connection, _ = listener.accept()
    with connection, contextlib.suppress(OSError):
        connection.recv(4096)
        connection.sendall(data)
        connection.recv(4096)


def test_a_refusal_is_told(path: Path) -> None:
    """Too many clients: exit 1, and the reason."""
    with Server(path, max_clients=1) as server:
        client, _ = asked(server)
        with client, Tail(path) as tail:
            assert tail.process.wait(10) == 1
            assert b"the service refuses: 1 clients are connected" in tail.errors


@pytest.mark.parametrize(
    "arguments",
    [
        ("-n", "101"),
        ("-n", "-1"),
        ("--cpu", "x"),
        ("--verdict", "bad"),
        ("--event", "bad"),
        ("--min-ms", "nan"),
        ("--comm", ""),
        ("--comm", b"\xff"),
        ("-n", "1", "--since-start"),
        ("--socket", ""),
        ("--comm", "x") * 17,
        ("--comm", "\U0001f41b" * 64) * 16,
    ],
)
def test_bad_usage(path: Path, arguments: tuple[str, ...]) -> None:
    """Exit 2, before anything is asked of a daemon."""
    with Tail(path, *arguments) as tail:
        assert tail.process.wait(10) == 2
        until(lambda: b"softirq-stalld" in tail.errors)


def test_stats_for_people_and_programs(path: Path) -> None:
    """What the service says of itself."""
    with Server(path):
        with Tail(path, "--stats") as tail:
            assert tail.process.wait(10) == 0
            tail.wait_for(b"version: 9.9\n")
        with Tail(path, "--stats", "--json") as tail:
            assert tail.process.wait(10) == 0
            until(lambda: tail.output.endswith(b"\n"))
            assert orjson.loads(tail.output)["version"] == "9.9"


@contextlib.contextmanager
def rogue(path: Path, data: bytes) -> Iterator[None]:
    """A server of somebody else's making that says hello and then this."""
    hello = orjson.dumps({"live": PROTOCOL, "instance": "x"}) + b"\n"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=_answer, args=(listener, hello + data), daemon=True)
        thread.start()
        yield
    thread.join()


def test_a_rogue_server(path: Path) -> None:
    """Lines that are no events, or endless, are left out with a word; the next one is shown."""
    good = b'{"event":"records_lost","count":5}\n'
    bad = [b"\x1b[2J\n", b"[]\n", b'{"a":' * 600 + b"1" + b"}" * 600 + b"\n", b"\xff\n"]
    huge = b"x" * (MAX_LINE_BYTES + 1) + b"\n"
    with rogue(path, b"".join(bad) + huge + good), Tail(path, "--json") as tail:
        tail.wait_for(b'"count":5')
        tail.wait_for(b"far too long")
        assert tail.errors.count(b"no event") == 3
        assert tail.output == bad[2] + good
        assert _peak(tail.process.pid) < 80 << 20
        assert tail.end() == 0


def _peak(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+)", text)[1]) << 10  # type: ignore[index]


# --- the terminal ---

OURS = {b"\r", b"\n", b"\x1b[?Nl", b"\x1b[?Nh", b"\x1b[NA", b"\x1b[K", b"\x1b[J"}
HOSTILE = "\x1b[2J\n\x1b]0;x\x07\x9b31m\u202e\r"


def test_a_stall_grows_on_the_terminal(path: Path) -> None:
    """While it goes on its duration grows in place; its end replaces it; Ctrl-C ends the rest."""
    with Server(path) as server, Terminal(path) as terminal:
        until(lambda: server.clients == 1)
        server.emit("stall", **stall(phase="ongoing"))
        terminal.wait_for("so far")
        time.sleep(1.2)
        grown = [float(ms) for ms in re.findall(rb"([\d.]+) ms so far", terminal.output)]
        assert 4 <= len(grown) <= 10
        assert grown == sorted(grown)
        assert 500 < grown[-1] - grown[0] < 2000
        server.emit("stall", **stall(duration_ms=1234.5))
        terminal.wait_for("1234.5 ms")
        end = terminal.output[terminal.output.rindex(b"\x1b[?7l") :]
        assert re.match(rb"\x1b\[\?7l\r\x1b\[\d+A", end)
        written = len(terminal.output)
        time.sleep(0.5)
        assert len(terminal.output) == written
        terminal.type(b"\x03")
        assert terminal.wait() == 0
        assert terminal.output.endswith(b"\x1b[?7h\x1b[0m")


def test_what_was_printed_since_stays(path: Path) -> None:
    """A block is drawn over only while it is the last thing there; Enter counts too."""
    with Server(path) as server, Terminal(path) as terminal:
        until(lambda: server.clients == 1)
        server.emit("stall", **stall(phase="ongoing"))
        server.emit(cpu=9)
        server.emit("stall", **stall(duration_ms=300.0))
        terminal.wait_for("300.0 ms")
        assert not re.search(rb"\x1b\[\d+A", terminal.output)
        assert terminal.output.count(b"#3-12") == 2
        server.emit("stall", **stall(phase="ongoing", stall_id="a-b-1-2"))
        terminal.wait_for("#1-2")
        until(lambda: re.search(rb"\x1b\[\d+A", terminal.output))
        drawn = len(terminal.output)
        terminal.type(b"\n")
        # The next drawing is not over the block, since that is one line higher now.
        below = re.compile(rb"\x1b\[\?7l\r\x1b\[K")
        until(lambda: below.search(terminal.output[drawn:]))


def test_names_cannot_control_the_terminal(path: Path) -> None:
    """Of all control sequences on the terminal, none comes from an event."""
    blocker = STALL["blocker"] | {"comm": HOSTILE, "cmdline": HOSTILE, "unit": HOSTILE}
    with Server(path) as server, Terminal(path) as terminal:
        until(lambda: server.clients == 1)
        server.emit("stall", **stall(blocker=blocker, hint=HOSTILE, phase="ongoing"))
        server.emit("degraded", name=HOSTILE, state="begun", reason=HOSTILE)
        server.emit("nic", x=HOSTILE)
        terminal.wait_for("nic")
        time.sleep(0.3)
        terminal.type(b"\x03")
        assert terminal.wait() == 0
        assert terminal.escapes <= OURS | {b"\x1b[Nm"} | {b"\x03"}
        assert b"\\x1b[2J\\n" in terminal.output
        assert "\u202e".encode() not in terminal.output


@pytest.mark.parametrize(
    ("environment", "allowed"),
    [({"NO_COLOR": "1"}, OURS), ({"TERM": "dumb"}, {b"\r", b"\n"})],
)
def test_colours_can_be_refused(
    path: Path, environment: dict[str, str], allowed: set[bytes]
) -> None:
    """NO_COLOR: no colour. A terminal that can do nothing: no sequence at all."""
    with Server(path) as server, Terminal(path, environment=environment) as terminal:
        until(lambda: server.clients == 1)
        server.emit("stall", **stall(phase="ongoing"))
        server.emit("stall", **stall())
        terminal.wait_for("51.3 ms  ")
        terminal.type(b"\x03")
        assert terminal.wait() == 0
        assert terminal.escapes <= allowed | {b"\x03"}


def test_json_on_a_terminal_is_safe_and_the_same(path: Path) -> None:
    """What a terminal would obey stands as an escape of JSON, so it still says the same."""
    with Server(path) as server, Terminal(path, "--json", size=(4000, 30)) as terminal:
        until(lambda: server.clients == 1)
        server.emit("nic", text=HOSTILE + "\U000e0001")
        terminal.wait_for("}")
        assert terminal.escapes <= {b"\r", b"\n"}
        assert orjson.loads(terminal.output)["text"] == HOSTILE + "\U000e0001"


def test_narrow_terminals(path: Path) -> None:
    """Lines are cut to the columns there are, also after they became fewer."""
    with (
        Server(path) as server,
        Terminal(path, size=(40, 10), environment={"NO_COLOR": "1"}) as terminal,
    ):
        until(lambda: server.clients == 1)
        server.emit("stall", **stall(phase="ongoing"))
        terminal.wait_for("so far")
        assert max(map(len, _shown(terminal.output))) == 40
        drawn = len(terminal.output)
        terminal.resize(25, 10)
        time.sleep(0.6)
        assert max(map(len, _shown(terminal.output[drawn:])[2:])) <= 25
        # What may have been folded is not drawn over.
        assert terminal.output[drawn:].count(b"A") < terminal.output[drawn:].count(b"cpu 3")


def _shown(output: bytes) -> list[str]:
    return re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]|\r", b"", output).decode().split("\n")


def test_a_lost_service_lets_nothing_grow(path: Path) -> None:
    """What goes on is not known then."""
    with contextlib.ExitStack() as stack:
        with Server(path) as server:
            terminal = stack.enter_context(Terminal(path))
            until(lambda: server.clients == 1)
            server.emit("stall", **stall(phase="ongoing"))
            terminal.wait_for("so far")
        terminal.wait_for("lost the service")
        written = terminal.output.count(b"so far")
        time.sleep(0.6)
        assert terminal.output.count(b"so far") == written
        terminal.type(b"\x03")
        assert terminal.wait() == 0


def test_peer_is_named_by_its_pid(path: Path) -> None:
    """Who lost events is told as which process."""
    with Server(path) as server:
        client, _ = asked(server)
        with client:
            size = struct.calcsize("3i")
            raw = client.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
            assert struct.unpack("3i", raw)[0] == os.getpid()
            assert server.sink._clients[0].name == f"live pid {os.getpid()}"
