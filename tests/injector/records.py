"""Synthetic stall records at any rate, through a running daemon's own perf buffer.

    with Daemon() as daemon, RecordSource(daemon.pid, cpu=1) as source:
        assert source.send(200) == Sent(200, 0)
        source.flow(per_second=5000, seconds=60)

Each is the closing record of a stall of its own: 20 ms in which NET_RX waited, served in a task
``synthetic`` with a pid of its own, so that nothing is folded. What each means to the daemon's
own numbers, and to real stalls of that CPU, stands in records.bpf.c. Root only.
"""

from __future__ import annotations

import os
import re
import struct
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

from tests.injector import build, system
from tests.injector.child import Child, be_child, serve
from tests.injector.kinds import InjectorError, UnsupportedError
from tests.injector.libbpf import BpfObject, process_map

MAX_PER_RUN = 128
"""Records sent by one run of the program: some 100 us with interrupts off."""

_HEADER = Path(__file__).parents[2] / "bpf" / "records.h"
_STACK_DEPTH = 24
_ORDER = struct.Struct(f"=II{_STACK_DEPTH}Q")
_COUNTS = struct.Struct("=QQ")
# How sendto() serves what waited, innermost first, where this kernel has the function.
_STACK = (
    "bpf_trace_run1",
    "handle_softirqs",
    "do_softirq",
    "__local_bh_enable_ip",
    "__dev_queue_xmit",
    "ip_finish_output2",
    "ip_output",
    "ip_send_skb",
    "udp_send_skb",
    "udp_sendmsg",
    "__sys_sendto",
    "__x64_sys_sendto",
    "do_syscall_64",
    "entry_SYSCALL_64_after_hwframe",
)
_RETURN_OFFSET = 0x10
_FIFO_PRIORITY = 1
_STALL_TIMEOUT_S = 5.0
_LATE_S = 5.0
_CALL_TIMEOUT_S = 30.0


class Sent(NamedTuple):
    """Records that went into the perf buffer, and those it had no room for; exact."""

    sent: int
    lost: int


class RecordSource:
    """Sends from a process of its own, on another CPU than the records come from.

    The daemon reads that CPU's buffer on another one, perhaps the same as this process: so that
    neither waits for the other, it is a real-time one, which sleeps between bursts.

    Args:
        daemon_pid: of a ready ``softirq-stalld run``.
        cpu: whose buffer.

    Raises:
        UnsupportedError: in ``with``: there is no other CPU, or the kernel refuses the program.
        InjectorError: in ``with``: that process is no daemon.
    """

    def __init__(self, daemon_pid: int, cpu: int) -> None:
        self._arguments = [str(daemon_pid), str(cpu)]
        self._child: Child | None = None

    def __enter__(self) -> Self:
        self._child = Child("records", self._arguments)
        try:
            self._child.call({})
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process, and with it its program and maps; may be called twice."""
        if self._child is not None:
            self._child.close()
            self._child = None

    def send(self, count: int) -> Sent:
        """Produce ``count`` records without pause.

        Raises:
            InjectorError: a real stall of the CPU has kept them back for too long.
        """
        return self._call({"count": count}, _CALL_TIMEOUT_S)

    def flow(self, per_second: int, seconds: float, burst: int = 50) -> Sent:
        """Produce ``per_second * seconds`` records, evenly but for ``burst`` at a time.

        What comes late is made up for at no more than twice the rate.

        Args:
            burst: at most :data:`MAX_PER_RUN`.

        Raises:
            ValueError: a burst out of bounds.
            InjectorError: that rate could not be held, or as in :meth:`send`.
        """
        if not 0 < burst <= MAX_PER_RUN:
            raise ValueError(f"a burst has 1 to {MAX_PER_RUN} records, not {burst}")
        request = {
            "count": round(per_second * seconds),
            "per_second": per_second,
            "burst": burst,
        }
        return self._call(request, seconds + _LATE_S + _CALL_TIMEOUT_S)

    def _call(self, request: Mapping[str, Any], timeout_s: float) -> Sent:
        if self._child is None:
            raise InjectorError("use the source in a with statement")
        return Sent(**self._child.call(request, timeout_s))


class _Sender:
    """The child's part."""

    def __init__(self, daemon_pid: int, cpu: int) -> None:
        self._cpu = cpu
        system.pin(system.other_cpu(cpu))
        with suppress(UnsupportedError):
            system.make_fifo(_FIFO_PRIORITY)
        maps: dict[str, int] = {}
        try:
            for name in ("events", "cpus"):
                maps[name] = process_map(daemon_pid, name)
            self._bpf = BpfObject(_compiled(), reused=maps)
        finally:
            for fd in maps.values():
                os.close(fd)
        self._orders = self._bpf.map_fd("orders")
        self._counted = self._bpf.map_fd("counted")
        self._stack = kernel_stack()

    def close(self) -> None:
        self._bpf.close()

    def flow(self, count: int, per_second: int, burst: int) -> None:
        """Produce them, ``burst`` at a time."""
        period = burst / per_second
        due = time.monotonic()
        give_up = due + count / per_second + _LATE_S
        sent_at = due - period
        for done in range(0, count, burst):
            time.sleep(max(0.0, max(due, sent_at + period / 2) - time.monotonic()))
            sent_at = time.monotonic()
            if sent_at > give_up:
                raise InjectorError(f"only {done} of {count} records at {per_second} a second")
            self.send(min(burst, count - done))
            due += period

    def send(self, count: int) -> None:
        """Produce them without pause."""
        wanted = sum(self.counts()) + count
        give_up = time.monotonic() + _STALL_TIMEOUT_S
        while (left := wanted - sum(self.counts())) > 0:
            depth = len(self._stack)
            order = (min(left, MAX_PER_RUN), depth * 8, *self._stack, *[0] * (_STACK_DEPTH - depth))
            self._bpf.update(self._orders, 0, _ORDER.pack(*order))
            self._bpf.run_on_cpu("send_records", self._cpu)
            if wanted - sum(self.counts()) < left:
                give_up = time.monotonic() + _STALL_TIMEOUT_S
            elif time.monotonic() > give_up:
                raise InjectorError(f"CPU {self._cpu} has been stalled for {_STALL_TIMEOUT_S:g} s")
            else:
                time.sleep(0.001)

    def counts(self) -> Sent:
        """So far."""
        return Sent._make(_COUNTS.unpack(self._bpf.lookup(self._counted, 0, _COUNTS.size)))


def kernel_stack(path: str = "/proc/kallsyms") -> tuple[int, ...]:
    """Return addresses in functions of this kernel; none where it hides them."""
    line = rb"^([0-9a-f]+) \w (%s)$" % "|".join(_STACK).encode()
    found = re.findall(line, Path(path).read_bytes(), re.MULTILINE)
    address = {name.decode(): int(text, 16) for text, name in found}
    return tuple(address[name] + _RETURN_OFFSET for name in _STACK if address.get(name))


def _compiled() -> Path:
    # The object's name tells of the source alone, not of the header in it.
    path = build.compiled("records")
    if path.stat().st_mtime < _HEADER.stat().st_mtime:
        path.unlink(missing_ok=True)
        path = build.compiled("records")
    return path


class _Server:
    """Prepares on the first request, so that what fails is told."""

    def __init__(self, daemon_pid: int, cpu: int) -> None:
        self._of = daemon_pid, cpu
        self._sender: _Sender | None = None

    def handle(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """``{"count"}``, also ``{"per_second", "burst"}`` → :class:`Sent` as a mapping."""
        if self._sender is None:
            self._sender = _Sender(*self._of)
        before = self._sender.counts()
        if "per_second" in request:
            self._sender.flow(request["count"], request["per_second"], request["burst"])
        else:
            self._sender.send(request.get("count", 0))
        now = self._sender.counts()
        return Sent(now.sent - before.sent, now.lost - before.lost)._asdict()

    def close(self) -> None:
        if self._sender is not None:
            self._sender.close()


def main() -> None:
    """Serve until the source closes the pipe."""
    daemon_pid, cpu = be_child("inj-records")
    server = _Server(int(daemon_pid), int(cpu))
    try:
        serve(server.handle)
    finally:
        server.close()


if __name__ == "__main__":
    main()
