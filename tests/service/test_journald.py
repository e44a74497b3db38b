"""Events in a real journal, written by a real systemd-journald of the test's own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.injector import Injector, Kind, Mode, Pressure, Truth
from tests.kernel.daemon import COMMAND, START_S, UNLIMITED, Event
from tests.kernel.daemon import STALLED_CPU as CPU
from tests.service.surroundings import started, until
from tests.unit import schema

pytestmark = pytest.mark.kernel

JOURNALD = "/lib/systemd/systemd-journald"
IDENTIFIER = "softirq-stalld"

# Its own /run and /var/log, hence its own sockets and journal. Audit= empty: hands off the
# kernel's auditing, which journald would switch on.
SETUP = """
set -e
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=755 tmpfs /var/log
mkdir /run/systemd /run/conf
printf '[Journal]\\nStorage=volatile\\nAudit=\\nReadKMsg=no\\nForwardToSyslog=no\\n' >/run/conf/main
mount --bind /run/conf/main /etc/systemd/journald.conf
for directory in /etc /run /usr/lib; do
    test ! -d $directory/systemd/journald.conf.d ||
        mount -t tmpfs tmpfs $directory/systemd/journald.conf.d
done
echo ready
# Ends with the test, however that ends.
exec cat >/dev/null
"""


class Journal:
    """A mount namespace in which systemd-journald may run, be killed and run again."""

    def __init__(self, stack: ExitStack) -> None:
        # PID and network namespaces stay the host's: journald reads our /proc/PID/cgroup.
        self._stack = stack
        self._holder = stack.enter_context(
            started(
                ["unshare", "--mount", "sh", "-c", SETUP],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "ready\n"
        self._root = Path(f"/proc/{self._holder.pid}/root")
        self._daemon: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Run journald; on return it listens."""
        inside = ["nsenter", f"--mount=/proc/{self._holder.pid}/ns/mnt"]
        less = "--bounding-set=-audit_control,-audit_read,-sys_boot,-sys_module"
        self._daemon = self._stack.enter_context(
            started(
                ["setpriv", "--pdeathsig", "KILL", less, *inside, JOURNALD],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )
        until(self._listens, what="systemd-journald listens")

    def kill(self) -> None:
        """It is gone in an instant, its sockets with it."""
        assert self._daemon is not None
        self._daemon.kill()
        self._daemon.wait(10)

    def hang(self) -> None:
        """It does not read any more."""
        assert self._daemon is not None
        self._daemon.send_signal(signal.SIGSTOP)

    def stream(self) -> socket.socket:
        """A stream as systemd gives it to a service as its standard output."""
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stream.connect(self._address)
        stream.shutdown(socket.SHUT_RD)
        # Identifier, unit, priority (LOG_INFO), level prefixes, forward to syslog, kmsg, console.
        stream.sendall(f"{IDENTIFIER}\n{IDENTIFIER}.service\n6\n1\n0\n0\n0\n".encode())
        return stream

    def entries(self, pid: int) -> list[dict[str, str]]:
        """What the journal holds of a process, as journalctl shows it."""
        (directory,) = (self._root / "run/log/journal").iterdir()
        shown = subprocess.run(
            ["journalctl", f"--directory={directory}", "--output=json", "--all", f"_PID={pid}"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        return [json.loads(line) for line in shown.stdout.splitlines()]

    @property
    def _address(self) -> str:
        return str(self._root / "run/systemd/journal/stdout")

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, suppress(OSError):
            probe.connect(self._address)
            return True
        return False


@pytest.fixture
def journal() -> Iterator[Journal]:
    """A journald that runs, which nobody else speaks to."""
    with ExitStack() as stack:
        made = Journal(stack)
        made.start()
        yield made


@contextmanager
def running(journal: Journal) -> Iterator[subprocess.Popen[str]]:
    """A daemon that writes into the journal, and has started."""
    with ExitStack() as stack:
        with journal.stream() as stream:
            status = os.fstat(stream.fileno())
            process = stack.enter_context(
                started(
                    [COMMAND, "run", "--config", UNLIMITED],
                    stdout=stream.fileno(),
                    stderr=subprocess.PIPE,
                    text=True,
                    # As systemd tells a service whose output goes to the journal.
                    env={**os.environ, "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"},
                )
            )
        until(
            lambda: process.poll() is not None or events(journal, process.pid, "started"),
            START_S,
            "something is in the journal",
        )
        yield process


def events(journal: Journal, pid: int, name: str) -> list[Event]:
    """Our lines in the journal; each must be a whole event."""
    lines = [schema.parse(f"{entry['MESSAGE']}\n".encode()) for entry in journal.entries(pid)]
    return [event for event in lines if event["event"] == name]


def stall() -> Truth:
    """One real stall."""
    with Injector(CPU) as injector, Pressure(CPU, Mode.PING) as pressure:
        return injector.inject(Kind.BH_OFF, 50, pressure=pressure)


def test_events_reach_the_journal(journal: Journal) -> None:
    """Every line is one journal entry whose MESSAGE is the event, under the unit's name."""
    with running(journal) as process:
        truth = stall()

        def told() -> bool:
            found = events(journal, process.pid, "stall")
            return any(
                e["phase"] == "resolved" and (e["blocker"] or {}).get("pid") == truth.pid
                for e in found
            )

        until(told, what="the stall is in the journal")
        process.terminate()
        assert process.wait(10) == 0
        until(
            lambda: events(journal, process.pid, "stopped"), what="the last line is in the journal"
        )
        entries = journal.entries(process.pid)
        assert {e["SYSLOG_IDENTIFIER"] for e in entries} == {IDENTIFIER}
        assert {e["PRIORITY"] for e in entries} == {"6"}
        assert {e["_TRANSPORT"] for e in entries} == {"stdout"}


@pytest.mark.parametrize("unread", [False, True], ids=["read", "unread"])
def test_journald_dies(journal: Journal, unread: bool) -> None:
    """It ends with one clear line and status 1; started again, it writes to the new journald.

    Unread: journald hung first, and died with lines in its socket.
    """
    with running(journal) as process:
        if unread:
            journal.hang()
            stall()
            time.sleep(0.2)
        journal.kill()
        stall()
        assert process.wait(10) == 1
        assert process.stderr is not None
        said = process.stderr.read()
    assert "standard output" in said
    assert "Traceback" not in said
    journal.start()
    with running(journal) as process:
        assert events(journal, process.pid, "started")
