"""Loads that take a known number of steps on one CPU and tell how long a step took."""

from __future__ import annotations

import ctypes
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import suppress
from typing import Self

from bench.bpf import BenchError
from bench.processes import ROOT, end, tool
from tests.injector import InjectorError, system

CPU = 1
_PORT = 9
_MTU_SAFE = 64
_BATCH = 64
_PAIR = ("bench0", "bench1")
_SENDER_MAC, _RECEIVER_MAC = "02:00:00:00:02:01", "02:00:00:00:02:02"
# The network for benchmarks, RFC 2544.
_SENDER, _RECEIVER = "198.18.128.1", "198.18.128.2"


def pipe_us(steps: int) -> float:
    """``perf bench sched pipe``, both tasks pinned: microseconds for a step.

    A step is two wake-ups and two context switches.

    Raises:
        BenchError: there is no perf.
    """
    command = ["taskset", "-c", str(CPU), tool("perf", "linux-perf"), "bench"]
    done = subprocess.run(
        [*command, "sched", "pipe", "-l", str(steps)],
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"([\d.]+) usecs/op", done.stdout)
    if not found:
        raise BenchError(f"perf bench sched pipe failed: {done.stderr.strip()}")
    return float(found[1])


class Flood:
    """Datagrams over a veth pair between two namespaces, sent and received on :data:`CPU`.

    All of it belongs to two child processes, whose namespaces the kernel removes with them. The
    receiver's socket is full after a few packets: each further one is looked up and dropped.
    """

    def __enter__(self) -> Self:
        self._sender = subprocess.Popen(
            [sys.executable, "-m", "bench.loads", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        try:
            self._answer()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in (self._sender.stdin, self._sender.stdout):
            if pipe is not None:
                pipe.close()
        with suppress(subprocess.TimeoutExpired):
            self._sender.wait(2)
        end(self._sender)

    def packet_us(self, packets: int) -> float:
        """Send about that many; microseconds of the CPU for one, softirq included."""
        assert self._sender.stdin is not None
        self._sender.stdin.write(b"%d\n" % packets)
        self._sender.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self._sender.stdout is not None
        line = self._sender.stdout.readline().decode().strip()
        if not line or line.startswith("!"):
            raise BenchError(f"no packets can be sent: {line[1:] or 'the sender ended'}")
        return line


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Header(ctypes.Structure):
    """``struct msghdr``."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("vectors", ctypes.POINTER(_Vector)),
        ("count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Message(ctypes.Structure):
    """``struct mmsghdr``."""

    _fields_ = (("header", _Header), ("sent", ctypes.c_uint))


def _receive(to_parent: int, from_parent: int) -> None:
    """The second process: a namespace, told; then, once it has an interface, a socket."""
    system.enter_new_netns()
    os.write(to_parent, b"!")
    os.read(from_parent, 1)
    name, mac = _PAIR[1], _SENDER_MAC
    system.no_ipv6(name)
    system.ip_batch(
        [
            f"address add {_RECEIVER}/30 dev {name}",
            f"neighbour add {_SENDER} lladdr {mac} dev {name} nud permanent",
            f"link set {name} up",
        ]
    )
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bound:
        bound.bind((_RECEIVER, _PORT))
        os.write(to_parent, b"!")
        os.read(from_parent, 1)


def _set_up() -> socket.socket:
    """Both namespaces and the pair; a socket that sends to the other side."""
    from_child, to_parent = os.pipe()
    from_parent, to_child = os.pipe()
    system.enter_new_netns()
    system.no_ipv6("default")

    def receive() -> None:
        os.close(to_child)
        _receive(to_parent, from_parent)

    child = system.fork_task("bench-receiver", CPU, receive)
    os.read(from_child, 1)
    here, there = _PAIR
    system.ip_batch(
        [
            f"link add {here} address {_SENDER_MAC} type veth"
            f" peer name {there} address {_RECEIVER_MAC} netns {child}",
            f"address add {_SENDER}/30 dev {here}",
            f"neighbour add {_RECEIVER} lladdr {_RECEIVER_MAC} dev {here} nud permanent",
            f"link set {here} up",
        ]
    )
    os.write(to_child, b"!")
    os.close(to_parent)
    if not os.read(from_child, 1):
        raise BenchError("the receiver cannot set up its end")
    out = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    out.connect((_RECEIVER, _PORT))
    return out


def _send(out: socket.socket, packets: int) -> float:
    data = ctypes.create_string_buffer(_MTU_SAFE)
    vector = _Vector(ctypes.addressof(data), _MTU_SAFE)
    messages = (_Message * _BATCH)()
    for message in messages:
        message.header.vectors = ctypes.pointer(vector)
        message.header.count = 1
    send, fd = ctypes.CDLL(None, use_errno=True).sendmmsg, out.fileno()
    batches = max(1, packets // _BATCH)
    sent = 0
    began = time.perf_counter_ns()
    for _ in range(batches):
        sent += max(0, send(fd, messages, _BATCH, 0))
    took_ns = time.perf_counter_ns() - began
    if sent < batches * _BATCH:
        raise BenchError(f"only {sent} of {batches * _BATCH} packets were sent")
    return took_ns / 1e3 / sent


def _main() -> None:
    system.die_with(int(sys.argv[1]))
    system.pin(CPU)
    try:
        out = _set_up()
        print("ready", flush=True)
        for line in sys.stdin:
            print(_send(out, int(line)), flush=True)
    except (BenchError, InjectorError) as error:
        print(f"!{error}", flush=True)


if __name__ == "__main__":
    _main()
