"""A bounded load on one CPU under which ksoftirqd is woken and has to wait.

Every datagram to a closed loopback port runs NET_RX in the sender's system
call. When a tick falls into that handler and asks for a reschedule, whatever
was raised meanwhile is left to ksoftirqd (``handle_softirqs`` in
kernel/softirq.c), which then competes with the senders. What the kernel does
with softirqs raised in that time is what we want to see.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress

LIMIT_S = 0.3
"""The load never lasts longer."""
FAIR_S = 0.1
"""Only after this much of it real-time senders join, where that is allowed."""
_LOOK_EVERY_S = 0.005

# Wheel timers that expire at every tick raise TIMER at every tick.
_WAIT_US = 1000
_DATAGRAMS = 64
# A burst spans more than one tick of 100 Hz, as a deferral does.
_BURST_S = 0.012
_PAUSE_S = 0.002
_DISCARD = ("127.0.0.1", 9)

_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274, "riscv64": 274, "ppc64le": 355, "s390x": 345}
_SLICE_NS = 100_000
# struct sched_attr, first published size (include/uapi/linux/sched/types.h).
_SCHED_ATTR = struct.Struct("=IIQiIQQQ")


def stimulate(cpu: int, seen: Callable[[], bool]) -> float:
    """Load ``cpu`` until ``seen()`` or for :data:`LIMIT_S`, then end the load.

    Returns:
        How long it lasted, in seconds.

    Raises:
        OSError: no process could be started.
    """
    begun = time.monotonic()
    end = begun + LIMIT_S
    children: list[int] = []
    try:
        for work in (*[_send] * 3, _wait_briefly, *[_send_real_time] * 2):
            children.append(_start(work, cpu, end))
        while time.monotonic() < end and not seen():
            time.sleep(_LOOK_EVERY_S)
    finally:
        for child in children:
            # Not reaped yet, so the number is still its own.
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    # Its processes stop by themselves, also when we get no CPU to end them.
    return min(time.monotonic() - begun, LIMIT_S)


def _start(work: Callable[[float], None], cpu: int, end: float) -> int:
    child = os.fork()
    if child:
        return child
    # Never back into the caller's code, whatever happens; a sender that may not
    # send (no loopback, a filter) only makes the answer "not observed".
    try:
        with suppress(OSError):
            os.sched_setaffinity(0, {cpu})
            work(end)
    finally:
        os._exit(0)


def _send(end: float) -> None:
    _shorten_slice()
    _flood(end)


def _flood(end: float) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        while time.monotonic() < end:
            for _ in range(_DATAGRAMS):
                sender.sendto(b"", _DISCARD)
            # Real-time senders take turns, since a deferral shows at a switch.
            os.sched_yield()


def _send_real_time(end: float) -> None:
    """Above ksoftirqd's priority it has to wait for certain; needs CAP_SYS_NICE.

    In bursts: each wake-up asks the CPU to reschedule in what may be a handler.
    """
    time.sleep(FAIR_S)
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    while time.monotonic() < end:
        time.sleep(_PAUSE_S)
        _flood(min(end, time.monotonic() + _BURST_S))


def _wait_briefly(end: float) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        timeout = struct.pack("@ll", 0, _WAIT_US)
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        while time.monotonic() < end:
            with suppress(BlockingIOError):
                silent.recv(1)


def _shorten_slice() -> None:
    """An earlier deadline than ksoftirqd's, so that it waits (EEVDF, since 6.12)."""
    number = _SCHED_SETATTR.get(platform.machine())
    if number is not None:
        attr = _SCHED_ATTR.pack(_SCHED_ATTR.size, 0, 0, 0, 0, _SLICE_NS, 0, 0)
        ctypes.CDLL(None).syscall(ctypes.c_long(number), 0, attr, 0)
