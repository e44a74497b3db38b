"""A real rsyslogd in the foreground, with a sample of ``contrib/log-pipeline`` as its config."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, Self

CONTRIB = Path(__file__).parents[2] / "contrib" / "log-pipeline"
RSYSLOGD = shutil.which("rsyslogd") or "/usr/sbin/rsyslogd"
START_TIMEOUT_S = 10.0


def free_port(family: socket.AddressFamily = socket.AF_INET) -> int:
    """A TCP port of the loopback that nobody has now."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Rsyslog:
    """Started and stopped in ``with``; touches nothing of the system's own.

    Args:
        work: its directory, for configuration, pid file and output.
        sample: the name of the configuration.
        replaced: what else to put in place of what in it.
    """

    def __init__(self, work: Path, sample: str = "rsyslog.conf", **replaced: str) -> None:
        self._work = work
        self.port = free_port()
        self.syslog_port = free_port()
        self.socket = str(work / "log.sock")
        self._out = work / "out.json"
        text = (CONTRIB / sample).read_text()
        for old, new in {
            "/var/log/softirq-stalld.json": str(self._out),
            "/run/rsyslog/softirq-stalld.sock": self.socket,
            'port="6000"': f'port="{self.port}"',
            'port="6514"': f'port="{self.port}"',
            'port="6001"': f'port="{self.syslog_port}"',
            "0.0.0.0": "127.0.0.1",
            **replaced,
        }.items():
            text = text.replace(old, new)
        self._config = work / "rsyslog.conf"
        self._config.write_text(f'global(workDirectory="{work}")\n{text}')
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(signal.SIGKILL)

    @property
    def address(self) -> str:
        """Where it takes JSON lines."""
        return f"127.0.0.1:{self.port}"

    @property
    def syslog_address(self) -> str:
        """Where it takes syslog messages over TCP."""
        return f"127.0.0.1:{self.syslog_port}"

    def start(self) -> None:
        """Returns when it listens."""
        with (self._work / "said").open("ab") as said:
            self._process = subprocess.Popen(
                [
                    *(RSYSLOGD, "-n", "-f", str(self._config)),
                    *("-i", str(self._work / "pid")),
                ],
                stdout=said,
                stderr=said,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        try:
            while not self._listens():
                assert self._process.poll() is None, (self._work / "said").read_text()
                assert time.monotonic() < deadline, (self._work / "said").read_text()
                time.sleep(0.02)
        except BaseException:
            self.stop(signal.SIGKILL)
            raise

    def kill(self, number: int) -> None:
        """Send it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it; with SIGTERM it writes first what it has."""
        if self._process is None:
            return
        self._process.send_signal(number)
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def events(self) -> list[Any]:
        """What it wrote: whole lines, each as the JSON it must be."""
        if not self._out.exists():
            return []
        text = self._out.read_text()
        return [json.loads(line) for line in text.split("\n")[:-1]]

    def _listens(self) -> bool:
        listening = {
            int(line.split()[1].rpartition(":")[2], 16)
            for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
            if line.split()[3] == "0A"
        }
        if self.port not in listening:
            return False
        text = self._config.read_text()
        if str(self.syslog_port) in text and self.syslog_port not in listening:
            return False
        return "imuxsock" not in text or os.path.exists(self.socket)
