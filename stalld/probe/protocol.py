"""What the daemon and its probe child tell each other.

The daemon starts the child with one end of a socket pair as standard input and
writes a :class:`Request`; the child answers once, with descriptors and a
:class:`Description` or with an error, and exits.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from dataclasses import asdict, dataclass, field
from typing import Any

from stalld.errors import ProbeError

_LENGTH = struct.Struct("=I")
_MAX_FDS = 64

OF_A_TASK = " of a task"
"""How abilities end that tell who had the CPU."""
NMI_SAMPLER = "NMI sampler"
NO_NMI = "of a stall with interrupts off the stack is that of the moment they were enabled again"


@dataclass(frozen=True)
class Request:
    """What to load.

    Attributes:
        cpus: possible CPUs; one state each.
        bpf_dir: where the C sources are.
        btf_path: the kernel's BTF.
        hooks: raw tracepoints to attach; empty for all.
        nmi: load the NMI sampler's program: ``auto``: where a counter exists,
            ``never``, or ``always``.
        cache_dir: where compiled programs are kept for the next time; "" for nowhere.
    """

    cpus: int
    bpf_dir: str
    btf_path: str
    hooks: list[str] = field(default_factory=list)
    nmi: str = "auto"
    cache_dir: str = ""


@dataclass(frozen=True)
class Attached:
    """One hook in use and how: raw_tracepoint, kfunc, kprobe or iterator."""

    hook: str
    how: str


@dataclass(frozen=True)
class Missing:
    """Something this kernel refused, why, and what that means for detection."""

    ability: str
    reason: str
    effect: str


@dataclass(frozen=True)
class Description:
    """What was attached; ``fds`` names the descriptors in the order sent.

    Names are ``map:NAME``, ``link:HOOK``, ``iter:task`` and ``prog:nmi``. ``net_rx_action``
    is ``kfunc``, ``kprobe`` or ``softirq`` (entry and exit of NET_RX stand in).
    ``percpu`` tells where things are relative to the hrtimer of the CPU's tick:
    ``regs``, ``steal``, ``cpustat``, ``softnet`` and further members of softnet_data, as far as
    the kernel has them. (``flow_count`` is relative to what ``flow_limit`` points to.)
    ``compile_ms`` is None where the programs were kept of an earlier time.
    """

    structs: str
    net_rx_action: str
    attached: list[Attached]
    missing: list[Missing]
    fds: list[str]
    bcc_version: str
    compile_ms: float | None
    attach_ms: float
    percpu: dict[str, int] = field(default_factory=dict)


def send(sock: socket.socket, message: dict[str, Any], fds: list[int]) -> None:
    """Write one message with its descriptors."""
    body = json.dumps(message).encode()
    socket.send_fds(sock, [_LENGTH.pack(len(body))], fds)
    sock.sendall(body)


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Read one message with its descriptors.

    Raises:
        EOFError: the other side closed first.
        ProbeError: what came is not a message.
    """
    head, fds, _, _ = socket.recv_fds(sock, _LENGTH.size, _MAX_FDS)
    for fd in fds:
        # recv_fds() of Python 3.11 drops its flags, so MSG_CMSG_CLOEXEC with them.
        os.set_inheritable(fd, False)
    try:
        return _body(sock, head), list(fds)
    except BaseException:
        # Descriptors without their names would stay open for good.
        for fd in fds:
            os.close(fd)
        raise


def _body(sock: socket.socket, head: bytes) -> dict[str, Any]:
    if len(head) < _LENGTH.size:
        raise EOFError("no message")
    (length,) = _LENGTH.unpack(head)
    body = bytearray()
    while len(body) < length:
        chunk = sock.recv(length - len(body))
        if not chunk:
            raise EOFError("the message was cut short")
        body += chunk
    try:
        message = json.loads(body)
    except ValueError:
        message = None
    if not isinstance(message, dict):
        raise ProbeError("the probe child sent something that is not a message")
    return message


def request_message(request: Request) -> dict[str, Any]:
    """A request as a message."""
    return asdict(request)


def description_from(message: dict[str, Any]) -> Description:
    """The inverse of ``asdict(description)``."""
    return Description(
        **{
            **message,
            "attached": [Attached(**item) for item in message["attached"]],
            "missing": [Missing(**item) for item in message["missing"]],
        }
    )
