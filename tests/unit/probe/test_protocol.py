"""Daemon and probe child over a real socket pair, with real descriptors."""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import asdict

import pytest

from stalld.errors import ProbeError
from stalld.probe.protocol import (
    Attached,
    Description,
    Missing,
    Request,
    description_from,
    receive,
    request_message,
    send,
)

Pair = tuple[socket.socket, socket.socket]

DESCRIPTION = Description(
    structs="btf",
    net_rx_action="softirq",
    attached=[Attached("softirq_entry", "raw_tracepoint")],
    missing=[Missing("kfunc", "EPERM", "softirq stands in")],
    fds=["map:cpus", "link:softirq_entry"],
    bcc_version="0.26.0",
    compile_ms=170.5,
    attach_ms=1.5,
    percpu={"steal": -4096, "softnet": 128},
)


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Both ends."""
    ours, theirs = socket.socketpair()
    ours.settimeout(10)
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def passed() -> Iterator[list[int]]:
    """Two descriptors to hand over."""
    fds = list(os.pipe())
    yield fds
    for fd in fds:
        os.close(fd)


def open_fds() -> set[str]:
    """Descriptors of this process."""
    return set(os.listdir("/proc/self/fd"))


def test_request_round_trip(pair: Pair) -> None:
    """The child reads the request that the daemon wrote."""
    request = Request(8, "/usr/share/bpf", "/sys/kernel/btf/vmlinux", ["softirq_entry"], "never")
    send(pair[0], request_message(request), [])
    message, fds = receive(pair[1])
    assert Request(**message) == request
    assert fds == []


def test_description_round_trip(pair: Pair, passed: list[int]) -> None:
    """The answer arrives whole, with descriptors that are the sender's, in order."""
    send(pair[1], asdict(DESCRIPTION), passed)
    message, fds = receive(pair[0])
    assert description_from(message) == DESCRIPTION
    assert [os.fstat(fd).st_ino for fd in fds] == [os.fstat(fd).st_ino for fd in passed]
    os.write(fds[1], b"through")
    assert os.read(passed[0], 16) == b"through"
    assert not any(os.get_inheritable(fd) for fd in fds)
    for fd in fds:
        os.close(fd)


def test_long_messages(pair: Pair) -> None:
    """A verifier log larger than any socket buffer arrives whole."""
    log = "R1 type=ctx expected=fp\n" * 200_000
    sender = threading.Thread(target=send, args=(pair[1], {"error": log, "kind": "probe"}, []))
    sender.start()
    message, _ = receive(pair[0])
    sender.join()
    assert message["error"] == log


@pytest.mark.parametrize("keep", [0, 1, 3, 4, 5, -1])
def test_cut_off(pair: Pair, passed: list[int], keep: int) -> None:
    """A child that dies while it answers is an EOFError, and no descriptor stays open."""
    body = json.dumps(asdict(DESCRIPTION)).encode()
    whole = struct.pack("=I", len(body)) + body
    if keep:
        socket.send_fds(pair[1], [whole[:keep]], passed)
    pair[1].close()
    before = open_fds()
    with pytest.raises(EOFError):
        receive(pair[0])
    assert open_fds() == before


@pytest.mark.parametrize("body", [b"[]", b"null", b"{", b"\xff", b""])
def test_not_a_message(pair: Pair, passed: list[int], body: bytes) -> None:
    """Anything but an object is refused in words, and no descriptor stays open."""
    socket.send_fds(pair[1], [struct.pack("=I", len(body)) + body], passed)
    before = open_fds()
    with pytest.raises(ProbeError, match="not a message"):
        receive(pair[0])
    assert open_fds() == before


def test_an_answer_without_places(pair: Pair) -> None:
    """Where the kernel's places are not known, there are none."""
    message = asdict(DESCRIPTION)
    del message["percpu"]
    send(pair[1], message, [])
    assert description_from(receive(pair[0])[0]).percpu == {}
