"""One class a kind: how the worker process makes the stall. Each runs on the stalled CPU."""

from __future__ import annotations

import os
import platform
import select
import socket
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from tests.injector import build, system
from tests.injector.kinds import METHODS, InjectorError, Kind, UnsupportedError
from tests.injector.libbpf import EGRESS, INGRESS, BpfObject
from tests.slowness import slow

_ORDER = struct.Struct("=QIi")
_TRUTH = struct.Struct("=QQIII16s4x")
_GETPPID = {"x86_64": 110, "aarch64": 173, "riscv64": 173, "ppc64le": 64, "s390x": 64}
_READ = {"x86_64": 0, "aarch64": 63, "riscv64": 63, "ppc64le": 3, "s390x": 3}
_MARK = {Kind.BH_OFF: 0x51000000, Kind.SOFTIRQ_HOG: 0x52000000}
_FIFO_PRIORITY = 50
_TASKS = 3
_TURN = struct.Struct("=QQ")
_ORDERED = struct.Struct("=Q")
_TURN_TIMEOUT_S = slow(3.0)
_TICK_TIMEOUT_NS = 200_000_000
_PACKET_TIMEOUT_S = slow(1.0)
_SO_MARK = 36


class Made(NamedTuple):
    """A stall as its maker saw it; times are CLOCK_MONOTONIC."""

    start_ns: int
    end_ns: int
    cpu: int
    pid: int
    tid: int
    comm: str
    others: tuple[int, ...] = ()


class Stall(ABC):
    """A way to stall the CPU this process is pinned to."""

    @abstractmethod
    def make(self, duration_ns: int) -> Made:
        """Stall the CPU now."""

    def make_reading(self, duration_ns: int, path: str) -> Made:
        """Stall the CPU now, while a file is being read."""
        raise UnsupportedError("this kind of stall reads no file")

    def close(self) -> None:  # noqa: B027
        """Take down what the constructor set up."""


class _BpfStall(Stall):
    """A stall made by one program of spin.bpf.c."""

    def __init__(self, kind: Kind, cpu: int) -> None:
        self.kind = kind
        self.cpu = cpu
        self.program = f"stall_{kind}"
        self.bpf = BpfObject(build.compiled("spin"), [self.program])
        self._orders = self.bpf.map_fd("orders")
        self._truths = self.bpf.map_fd("truths")

    def order(
        self, duration_ns: int, tid: int, syscalls: Mapping[str, int] = MappingProxyType(_GETPPID)
    ) -> None:
        """Arm the program; it takes the order once."""
        self.bpf.update(self._truths, 0, bytes(_TRUTH.size))
        syscall = syscalls.get(platform.machine())
        if syscall is None:
            raise UnsupportedError(f"system calls' numbers on {platform.machine()} are not known")
        self.bpf.update(self._orders, 0, _ORDER.pack(duration_ns, tid, syscall))

    def began(self) -> bool:
        """Whether the program took its order."""
        start: int = _TRUTH.unpack(self.bpf.lookup(self._truths, 0, _TRUTH.size))[0]
        return start != 0

    def made(self) -> Made:
        """What the program wrote down; it takes no order any more.

        Raises:
            InjectorError: it did not run, or not to its end.
        """
        self.bpf.update(self._orders, 0, bytes(_ORDER.size))
        start, end, cpu, pid, tid, comm = _TRUTH.unpack(
            self.bpf.lookup(self._truths, 0, _TRUTH.size)
        )
        if not start or not end:
            raise InjectorError(f"{self.program} did not run")
        if cpu != self.cpu:
            raise InjectorError(f"{self.program} ran on CPU {cpu} instead of {self.cpu}")
        return Made(start, end, cpu, pid, tid, comm.partition(b"\0")[0].decode())

    def close(self) -> None:
        self.bpf.close()


class PreemptOff(_BpfStall):
    """A slow system call: getppid, spun in by a program on sys_enter."""

    def __init__(self, kind: Kind, cpu: int) -> None:
        super().__init__(kind, cpu)
        self.bpf.attach_raw_tracepoint(self.program, "sys_enter")

    def make(self, duration_ns: int) -> Made:
        self.order(duration_ns, os.getpid())
        os.getppid()
        return self.made()

    def make_reading(self, duration_ns: int, path: str) -> Made:
        fd = os.open(path, os.O_RDONLY)
        try:
            self.order(duration_ns, os.getpid(), _READ)
            os.read(fd, 1)
        finally:
            os.close(fd)
        return self.made()


class Packet(_BpfStall):
    """A slow packet on a veth pair of our own: at egress or, in NET_RX, at ingress."""

    _ends = 0

    def __init__(self, kind: Kind, cpu: int) -> None:
        super().__init__(kind, cpu)
        Packet._ends += 1
        here, there = f"here{Packet._ends}", f"there{Packet._ends}"
        subnet = f"198.18.{Packet._ends}"
        system.ip_batch(
            [
                f"link add {here} type veth peer name {there} address 02:00:00:00:00:02",
                f"address add {subnet}.1/24 dev {here}",
                f"link set {there} up",
                f"link set {here} up",
                f"neighbour add {subnet}.2 lladdr 02:00:00:00:00:02 dev {here} nud permanent",
            ]
        )
        end, point = (here, EGRESS) if kind is Kind.BH_OFF else (there, INGRESS)
        self.bpf.attach_tc(self.program, socket.if_nametoindex(end), point)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.connect((f"{subnet}.2", 9))

    def make(self, duration_ns: int) -> Made:
        duration_us = duration_ns // 1000
        self.order(duration_us * 1000, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_MARK, _MARK[self.kind] | duration_us)
        give_up = time.monotonic() + _PACKET_TIMEOUT_S
        # The order is taken once: a packet too many does nothing. Under a flood it may take a
        # few until one is not dropped, and ksoftirqd may be the one that handles it.
        self._socket.send(b"stall")
        while not self.began() and time.monotonic() < give_up:
            time.sleep(0.002)
            self._socket.send(b"stall")
        return self.made()

    def close(self) -> None:
        self._socket.close()
        super().close()


class IrqsOff(_BpfStall):
    """A slow inter-processor interrupt, sent from another CPU by a BPF test run."""

    def __init__(self, kind: Kind, cpu: int, *, busy: bool) -> None:
        super().__init__(kind, cpu)
        self._busy = busy
        self._sender = system.other_cpu(cpu)

    def make(self, duration_ns: int) -> Made:
        task = self._start_task() if self._busy else None
        # This process is no culprit: it waits on its CPU, likewise stuck, for the one it stalls.
        system.set_comm("inj-ipi-sender")
        try:
            system.pin(self._sender)
            self.order(duration_ns, 0)
            self.bpf.run_on_cpu(self.program, self.cpu)
        finally:
            if task is not None:
                system.end_task(task)
            system.pin(self.cpu)
        return self.made()

    def _start_task(self) -> int:
        """Have a task run on the CPU that is about to stall, so that it is not idle."""
        ours, theirs = os.pipe()

        def spin() -> None:
            os.write(theirs, b"!")
            burn_until(time.monotonic_ns() + 2_000_000_000)

        task = system.fork_task(METHODS[self.kind].comm, self.cpu, spin)
        os.close(theirs)
        os.read(ours, 1)
        os.close(ours)
        return task


class IrqsOffTimer(_BpfStall):
    """A slow timer interrupt that hits this process in user mode."""

    def __init__(self, kind: Kind, cpu: int) -> None:
        super().__init__(kind, cpu)
        self.bpf.attach_raw_tracepoint(self.program, "local_timer_entry")

    def make(self, duration_ns: int) -> Made:
        self.order(duration_ns, os.getpid())
        # No system call in here: the tick shall find user mode.
        before = now = time.monotonic_ns()
        give_up = before + _TICK_TIMEOUT_NS
        while now - before < duration_ns and before < give_up:
            before, now = now, time.monotonic_ns()
        return self.made()


class CpuContention(Stall):
    """A real-time task in user mode."""

    def __init__(self, kind: Kind, cpu: int) -> None:
        self._kind = kind
        self._cpu = cpu

    def make(self, duration_ns: int) -> Made:
        system.make_fifo(_FIFO_PRIORITY)
        start = time.monotonic_ns()
        end = burn_until(start + duration_ns)
        system.make_ordinary()
        pid = os.getpid()
        return Made(start, end, self._cpu, pid, pid, METHODS[self._kind].comm)


class TaskContention(Stall):
    """Ordinary tasks in user mode that take turns; ksoftirqd weighs little beside them.

    They are there from the beginning and sleep between stalls: nothing but them shall be busy.
    """

    def __init__(self, kind: Kind, cpu: int) -> None:
        self._comm = METHODS[kind].comm
        self._cpu = cpu
        orders, self._orders = os.pipe()
        self._reports, reports = os.pipe()

        def take_turns() -> None:
            os.close(self._orders)
            system.outweigh()
            os.write(reports, bytes(_TURN.size))
            while order := os.read(orders, _ORDERED.size):
                start = time.monotonic_ns()
                os.write(reports, _TURN.pack(start, burn_until(*_ORDERED.unpack(order))))

        self._tasks = [system.fork_task(self._comm, cpu, take_turns) for _ in range(_TASKS)]
        os.close(orders)
        os.close(reports)
        self._read_turns()

    def make(self, duration_ns: int) -> Made:
        # This process is no culprit: it waits for those that are.
        system.set_comm("inj-tasks-owner")
        until_ns = time.monotonic_ns() + duration_ns
        os.write(self._orders, _ORDERED.pack(until_ns) * _TASKS)
        starts, ends = zip(*self._read_turns(), strict=True)
        first, *others = self._tasks
        return Made(min(starts), max(ends), self._cpu, first, first, self._comm, tuple(others))

    def _read_turns(self) -> list[tuple[int, int]]:
        """One report from each task: begin and end of its part; zeros when it is ready."""
        data = b""
        while len(data) < _TASKS * _TURN.size:
            readable, _, _ = select.select([self._reports], [], [], _TURN_TIMEOUT_S)
            chunk = os.read(self._reports, _TURN.size) if readable else b""
            if not chunk:
                raise UnsupportedError("a task that should contend for the CPU does not run")
            data += chunk
        return list(_TURN.iter_unpack(data))

    def close(self) -> None:
        for pid in self._tasks:
            system.end_task(pid)
        os.close(self._orders)
        os.close(self._reports)


def burn_until(deadline_ns: int) -> int:
    """Stay in user mode until then; return when it really was."""
    while (now := time.monotonic_ns()) < deadline_ns:
        pass
    return now


def prepare(kind: Kind, cpu: int, *, busy: bool) -> Stall:
    """Set up what a kind needs.

    Raises:
        UnsupportedError: this machine cannot make it; the message says why.
    """
    if kind is Kind.PREEMPT_OFF:
        return PreemptOff(kind, cpu)
    if kind is Kind.IRQS_OFF:
        return IrqsOff(kind, cpu, busy=busy)
    if kind is Kind.IRQS_OFF_TIMER:
        return IrqsOffTimer(kind, cpu)
    if kind is Kind.CPU_CONTENTION:
        return CpuContention(kind, cpu)
    if kind is Kind.TASK_CONTENTION:
        return TaskContention(kind, cpu)
    return Packet(kind, cpu)
