"""Who sends packets and who competes for the CPU: bodies of processes, ended by a kill."""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from contextlib import suppress

from tests.injector.pressure import PROBE

FLOOD_PORT = 9
_ECHO_REQUEST = 8
_ECHO_REPLY = 0
_SOL_RAW = 255
_ICMP_FILTER = 1
_SO_RCVBUFFORCE = 33
_ECHO = struct.Struct("!BBHHHI")
_IP_HEADER = 20


def compete() -> None:
    """Want the CPU, in user mode."""
    while True:
        pass


def next_due(due_ns: int, interval_ns: int) -> int:
    """The next whole interval after ``due_ns`` that is not past yet; missed ones are left out."""
    return due_ns + interval_ns * (1 + max(0, time.monotonic_ns() - due_ns) // interval_ns)


def flood(address: str, burst: int, interval_ns: int) -> None:
    """Send ``burst`` small packets as fast as one CPU can, each interval; 0 is without pause."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect((address, FLOOD_PORT))
        send = sender.send
        due = time.monotonic_ns()
        while True:
            for _ in range(burst):
                # Full buffers or nobody listening: the packets count, not their fate.
                with suppress(OSError):
                    send(b"flood")
            if interval_ns:
                due = next_due(due, interval_ns)
                time.sleep(max(0, due - time.monotonic_ns()) / 1e9)


def ping(address: str, interval_ns: int, probes_fd: int) -> None:
    """Send an ICMP echo request each interval, whether or not the last one was answered.

    Probe number n stands in ``probes_fd`` at n times the size of a record.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
        raw.setsockopt(_SOL_RAW, _ICMP_FILTER, struct.pack("I", ~(1 << _ECHO_REPLY) & 0xFFFFFFFF))
        raw.connect((address, 0))
        raw.setblocking(False)
        # All answers of a long stall come at once.
        raw.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 22)
        sent: list[int] = []
        due = time.monotonic_ns()
        while True:
            now = time.monotonic_ns()
            if now >= due:
                os.pwrite(probes_fd, PROBE.pack(now, 0), len(sent) * PROBE.size)
                sent.append(now)
                raw.send(_echo_request(len(sent) - 1))
                due = next_due(due, interval_ns)
            if select.select([raw], [], [], max(0, due - time.monotonic_ns()) / 1e9)[0]:
                _take_answers(raw, sent, probes_fd)


def _take_answers(raw: socket.socket, sent: list[int], probes_fd: int) -> None:
    while True:
        try:
            packet = raw.recv(256)
        except BlockingIOError:
            return
        now = time.monotonic_ns()
        number = _ECHO.unpack_from(packet, _IP_HEADER)[5]
        if number < len(sent):
            os.pwrite(probes_fd, PROBE.pack(sent[number], now - sent[number]), number * PROBE.size)


def _echo_request(number: int) -> bytes:
    packet = _ECHO.pack(_ECHO_REQUEST, 0, 0, os.getpid() & 0xFFFF, number & 0xFFFF, number)
    total = sum(struct.unpack("!6H", packet))
    total = (total & 0xFFFF) + (total >> 16)
    checksum = ~(total + (total >> 16)) & 0xFFFF
    return packet[:2] + struct.pack("!H", checksum) + packet[4:]
