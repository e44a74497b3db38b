"""The daemon's side of the probe child."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stalld.errors import MissingAbilityError, ProbeError
from stalld.notify import MANAGERS_VARIABLES
from stalld.probe import protocol
from stalld.probe.btf import VMLINUX_BTF
from stalld.probe.protocol import Description, Request

TIMEOUT_S = 60.0
"""Emulated machines need 10 s for a compile; past this the child hangs."""

EXIT_S = 5.0
"""Once it has answered, or closed its end, it has nothing left to do."""


@dataclass
class Probes:
    """What the child handed over. Closing it detaches every program."""

    description: Description
    fds: dict[str, int]

    def close(self) -> None:
        """Close every descriptor; the kernel then frees programs and maps."""
        while self.fds:
            _, fd = self.fds.popitem()
            os.close(fd)


class ProbeChild:
    """A started child; the caller may do other work before :meth:`result`."""

    def __init__(self, request: Request) -> None:
        ours, theirs = socket.socketpair()
        self._socket = ours
        self._log = os.memfd_create("softirq-stalld-probe-log")
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "stalld.probe"],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=self._log,
                cwd="/",
                # Its word to the service manager would be taken for ours.
                env={
                    **{k: v for k, v in os.environ.items() if k not in MANAGERS_VARIABLES},
                    "PYTHONPATH": str(Path(__file__).parents[2]),
                },
            )
        protocol.send(ours, protocol.request_message(request), [])

    def result(self) -> Probes:
        """Wait for the child to finish.

        Raises:
            MissingAbilityError: this host lacks something; it is named.
            ProbeError: anything else, with what compiler or verifier said.
        """
        try:
            self._socket.settimeout(TIMEOUT_S)
            message, fds = protocol.receive(self._socket)
        except (EOFError, ConnectionError):
            raise ProbeError(
                f"the probe child ended with status {self._end()} before it answered{self._said()}"
            ) from None
        except TimeoutError:
            raise ProbeError(
                f"no answer from the probe child in {TIMEOUT_S:.0f} s{self._said()}"
            ) from None
        finally:
            self._end()
            self._socket.close()
            said = self._said()
            os.close(self._log)
        if "error" in message:
            if message["kind"] == "missing":
                raise MissingAbilityError(message["error"])
            raise ProbeError(message["error"] + said)
        description = protocol.description_from(message)
        if len(fds) != len(description.fds):
            for fd in fds:
                os.close(fd)
            raise ProbeError(
                f"{len(fds)} of {len(description.fds)} descriptors came through from the probe "
                "child: raise the limit of open files (ulimit -n)"
            )
        return Probes(description, dict(zip(description.fds, fds, strict=True)))

    def kill(self) -> None:
        """Have it end now: :meth:`result` then raises, unless it had answered already."""
        self._process.kill()

    def _end(self) -> int:
        """Its exit status; it has a moment to exit by itself."""
        try:
            return self._process.wait(EXIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _said(self) -> str:
        with os.fdopen(os.dup(self._log), "rb") as log:
            log.seek(0)
            text = log.read().decode("utf-8", "replace").strip()
        return f"; it said:\n{text}" if text else ""


def bpf_directory() -> Path:
    """The C sources: inside an installed package, else beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "_bpf"
    return inside if inside.is_dir() else package.parent / "bpf"


def possible_cpus(path: str = "/sys/devices/system/cpu/possible") -> int:
    """How many CPUs this machine may ever have (``0-7`` → 8)."""
    last = Path(path).read_text().strip().replace("-", ",").split(",")[-1]
    return int(last) + 1


def cache_directory(environ: Mapping[str, str]) -> str:
    """The first that systemd made (CacheDirectory=); "" where it made none."""
    return environ.get("CACHE_DIRECTORY", "").partition(":")[0]


def load_probes(nmi: str = "auto", cache_dir: str = "") -> ProbeChild:
    """Start the child for this host; see :class:`Request`."""
    return ProbeChild(
        Request(possible_cpus(), str(bpf_directory()), VMLINUX_BTF, nmi=nmi, cache_dir=cache_dir)
    )
