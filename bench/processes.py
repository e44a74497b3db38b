"""What runs beside a measurement: our daemon, other tools, and what they use up."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

from bench.bpf import BenchError, Programs, take_over
from tests.kernel.daemon import COMMAND, STALLED_CPU

ROOT = Path(__file__).parents[1]
START_TIMEOUT_S = 30.0
_FIFO_PRIORITY = 1
_END_S = 10.0

Event = dict[str, Any]


class Chunk(NamedTuple):
    """What one read from a pipe gave, and when (CLOCK_MONOTONIC)."""

    read_ns: int
    data: bytes


class Lines:
    """Reads a pipe in a real-time thread, so that it knows when something was written.

    It stays off the stalled CPU, and parses nothing before it is asked.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._chunks: list[Chunk] = []
        self.bytes = 0
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, allowed - {STALLED_CPU} or allowed)
        with suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(_FIFO_PRIORITY))
        while data := os.read(self._fd, 1 << 20):
            self._chunks.append(Chunk(time.monotonic_ns(), data))
            self.bytes += len(data)

    def join(self) -> None:
        """Wait for the end of the pipe."""
        self._thread.join(_END_S)

    def events(self, since: int = 0) -> list[Event]:
        """All whole lines, parsed; ``read_ns`` is when the line's end came.

        Args:
            since: chunks to pass over, as :meth:`mark` told.
        """
        found, rest = [], b""
        for chunk in self._chunks[since:]:
            *whole, rest = (rest + chunk.data).split(b"\n")
            for line in whole:
                event: Event = json.loads(line)
                event["read_ns"] = chunk.read_ns
                found.append(event)
        return found

    def forget(self) -> bytes:
        """All that has come, once more; an hour's lines are more than fits into memory.

        The last line may go on in what comes later. Marks are void.
        """
        count = len(self._chunks)
        data = b"".join(chunk.data for chunk in self._chunks[:count])
        del self._chunks[:count]
        return data

    def mark(self) -> int:
        """Where :meth:`events` may begin later."""
        return len(self._chunks)


class Piped:
    """A process whose standard output is read, in ``with`` once it has said something.

    Attributes:
        ready_s: from its start until it said so.
    """

    def __init__(
        self,
        *command: str,
        cwd: Path = ROOT,
        environment: dict[str, str] | None = None,
    ) -> None:
        self._command = command
        self._cwd = cwd
        self._environment = environment
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115

    def __enter__(self) -> Self:
        began = time.monotonic()
        self.process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=self._cwd,
            env=self._environment,
        )
        assert self.process.stdout is not None
        self.lines = Lines(self.process.stdout.fileno())
        try:
            while not self.lines.bytes:
                if self.process.poll() is not None or time.monotonic() > began + START_TIMEOUT_S:
                    raise BenchError(f"{self._command[-1]} does not start: {self._said()}")
                time.sleep(0.001)
        except BaseException:
            self.close()
            raise
        self.ready_s = time.monotonic() - began
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Of its process."""
        return self.process.pid

    def stop(self, number: int = signal.SIGTERM) -> list[Event]:
        """End it in order; all it said."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        if self.process.wait(_END_S):
            raise BenchError(f"{self._command[-1]} failed: {self._said()}")
        self.lines.join()
        return self.lines.events()

    def close(self) -> None:
        """End it in any case; may be called twice."""
        end(self.process)
        self.lines.join()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._log.close()

    def _said(self) -> str:
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode().strip()


def unit_setting(name: str) -> str:
    """What a directive of the service's unit says.

    Raises:
        BenchError: the unit does not have it.
    """
    text = (ROOT / "systemd" / "softirq-stalld.service").read_text()
    found = re.search(rf"^{name}=(.*)$", text, re.MULTILINE)
    if found is None:
        raise BenchError(f"softirq-stalld.service does not set {name}=")
    return found[1]


class Daemon(Piped):
    """A real ``softirq-stalld run``, ready, with the priority that its unit gives it.

    All is as by default, but that nothing is folded and that the live socket is its own.

    Args:
        settings: of the configuration, before these.
        checkout: of which; this one's without.
        module: of this checkout, that is run in the command's stead.
        cache: where it keeps its compiled programs, of mode 0700.
    """

    def __init__(
        self,
        settings: str = "",
        *,
        checkout: Path | None = None,
        module: str = "",
        cache: Path | None = None,
    ) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="stalld-bench-")
        self.socket = Path(self._directory.name, "live.sock")
        config = Path(self._directory.name, "config.toml")
        config.write_text(
            f"{settings}\nstorm.stalls_per_second = 1000\nstorm.identical_per_minute = 10000\n"
            f"live.socket = '{self.socket}'\nlive.group = ''\n"
        )
        run = ("run", "--config", str(config))
        nice = ("nice", "-n", unit_setting("Nice"))
        if module:
            super().__init__(*nice, sys.executable, "-m", module, *run)
        elif checkout is None:
            environment = {**os.environ, "CACHE_DIRECTORY": str(cache or "")}
            super().__init__(*nice, COMMAND, *run, environment=environment)
        else:
            environment = {**os.environ, "PYTHONPATH": str(checkout)}
            command = *nice, sys.executable, "-m", "stalld.cli", *run
            super().__init__(*command, cwd=checkout, environment=environment)

    @property
    def started(self) -> Event:
        """Its first event."""
        return self.lines.events()[0]

    def close(self) -> None:
        """End it in any case; may be called twice."""
        super().close()
        self._directory.cleanup()


class Tool:
    """Another program, in ``with`` once it has said so.

    Its output is a terminal, so that it is not held back.

    Args:
        ready: in its output, once everything is attached.
    """

    def __init__(self, *command: str, ready: bytes) -> None:
        self._command = command
        self._ready = ready

    def __enter__(self) -> Self:
        ours, theirs = pty.openpty()
        began = time.monotonic()
        with tempfile.TemporaryFile() as log:
            self.process = subprocess.Popen(
                self._command, stdout=theirs, stderr=log, stdin=subprocess.DEVNULL, cwd=ROOT
            )
            os.close(theirs)
            try:
                self._wait(ours, began + START_TIMEOUT_S)
            except BaseException as error:
                os.close(ours)
                end(self.process)
                if not isinstance(error, BenchError):
                    raise
                log.seek(0)
                said = log.read().decode(errors="replace").strip().splitlines()[-1:]
                raise BenchError(f"{error}: {' '.join(said)}") from None
        self.ready_s = time.monotonic() - began
        self._drain = threading.Thread(target=_drain, args=(ours,), daemon=True)
        self._drain.start()
        return self

    def _wait(self, fd: int, deadline: float) -> None:
        said = b""
        with suppress(OSError):  # EIO: its other end is closed.
            while self._ready not in said and time.monotonic() < deadline:
                if select.select([fd], [], [], 0.1)[0]:
                    said += os.read(fd, 1 << 16)
        if self._ready not in said:
            raise BenchError(f"{self._command[0]} does not start")

    def __exit__(self, *_: object) -> None:
        end(self.process)
        self._drain.join(_END_S)

    @property
    def pid(self) -> int:
        """Of its process."""
        return self.process.pid


def _drain(fd: int) -> None:
    with suppress(OSError):
        while os.read(fd, 1 << 16):
            pass
    os.close(fd)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end, then insist."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def tool(name: str, package: str = "libbpf-tools") -> str:
    """Path of a tool.

    Raises:
        BenchError: it is not installed.
    """
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin")
    if not found:
        raise BenchError(f"{name} is not installed: apt install {package}")
    return found


def runqslower() -> Tool:
    """libbpf-tools' own, at our threshold."""
    return Tool(tool("runqslower"), "10000", ready=b"Tracing")


def softirqs() -> Tool:
    """libbpf-tools' own; it sums up once an hour."""
    return Tool(tool("softirqs"), "3600", ready=b"Tracing")


def bcc_tool(*arguments: str) -> Piped:
    """A tool in Python on bcc, in the manner of all of them: see bench/bcc_tool.py."""
    return Piped(sys.executable, "-m", "bench.bcc_tool", *arguments)


def our_programs(settings: str = "", checkout: Path | None = None) -> Programs:
    """Those of a daemon that was started for them, and is gone."""
    with Daemon(settings, checkout=checkout) as daemon:
        return take_over(daemon.process)


def programs_of(other: Tool) -> Programs:
    """Likewise, of another program."""
    with other:
        return take_over(other.process)


def cpu_s(pid: int) -> float:
    """CPU time of all threads of a process so far, to the nanosecond."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError):  # The thread has ended.
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def memory_mib(pid: int) -> tuple[float, float]:
    """Resident memory, and its share of it (Pss), in MiB."""
    sizes = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.split()
        sizes[name] = int(value) / 1024
    return sizes["Rss:"], sizes["Pss:"]


@contextmanager
def loaded(cpus: Sequence[int]) -> Iterator[None]:
    """An ordinary task that never sleeps on each of these CPUs meanwhile."""
    script = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"
    burners = [subprocess.Popen([sys.executable, "-c", script, str(cpu)]) for cpu in cpus]
    try:
        time.sleep(0.3)
        yield
        if any(burner.poll() is not None for burner in burners):
            raise BenchError("a task that was to load a CPU has ended")
    finally:
        for burner in burners:
            burner.send_signal(signal.SIGKILL)
            burner.wait()
