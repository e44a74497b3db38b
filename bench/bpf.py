"""Loaded BPF programs as sides of a comparison: attached and detached within milliseconds.

A daemon takes a second to start, and in that second a virtual machine has become another one.
So a program's owner is started once, its programs and maps are taken over by descriptor, and it
is killed. From then on each side is attached for a fraction of a second, in turn. Nobody reads
the perf buffers then, which on the hot path nobody does anyway.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Self

from stalld.check.price import Cost
from stalld.probe.libbpf import RETURN_ZERO, load_libbpf

_BPF_STATS_RUN_TIME = 0
_BPF_PROG_TYPE_RAW_TRACEPOINT = 17
SETTLE_S = 0.02
"""After programs were attached: the kernel patches its code, which interrupts every CPU."""


class BenchError(Exception):
    """Something cannot be measured here; the message says why."""


class _Info(ctypes.Structure):
    """``struct bpf_prog_info``, as far as it is read here."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("before_name", ctypes.c_uint8 * 60),
        ("name", ctypes.c_char * 16),
        ("before_time", ctypes.c_uint8 * 112),
        ("run_time_ns", ctypes.c_uint64),
        ("run_cnt", ctypes.c_uint64),
    )


class Program(NamedTuple):
    """A loaded program.

    Attributes:
        fd: ours to close.
        hook: the tracepoint it is for; "" where it is for a function (fentry).
        name: as the kernel has it: 15 bytes at most.
    """

    fd: int
    hook: str
    name: str

    def cost(self) -> Cost:
        """Runs and ns so far; the kernel counts only within :func:`statistics_enabled`."""
        info = _info(self.fd)
        return Cost(info.run_cnt, info.run_time_ns)


class Programs:
    """A side: programs that are attached and detached together, in their order.

    Args:
        programs: attached from first to last.
        held: further descriptors that keep them working, closed with them.
    """

    def __init__(self, programs: Sequence[Program], held: Sequence[int] = ()) -> None:
        self.programs = tuple(programs)
        self._held = list(held)
        self._links: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def attach(self) -> None:
        """Until :meth:`detach`."""
        for program in self.programs:
            # Those with types from BTF (tp_btf, fentry) know their place by themselves.
            typed = _info(program.fd).type != _BPF_PROG_TYPE_RAW_TRACEPOINT
            hook = None if typed else program.hook.encode()
            self._links.append(_call("bpf_raw_tracepoint_open", hook, program.fd))

    def detach(self) -> None:
        """May be called twice."""
        while self._links:
            os.close(self._links.pop())

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Meanwhile."""
        try:
            self.attach()
            time.sleep(SETTLE_S)
            yield
        finally:
            self.detach()

    def close(self) -> None:
        """Detach and let the kernel free them."""
        self.detach()
        for fd in [*(program.fd for program in self.programs), *self._held]:
            os.close(fd)
        self.programs = ()
        self._held.clear()


NOTHING = Programs(())
"""The side without any program."""


def empty(hooks: Sequence[str]) -> Programs:
    """A program that returns at once, on each of the hooks: nothing on them can cost less."""
    count = ctypes.c_size_t(len(RETURN_ZERO) // 8)
    programs = []
    for hook in hooks:
        code = b"empty", b"GPL", RETURN_ZERO, count, None
        fd = _call("bpf_prog_load", _BPF_PROG_TYPE_RAW_TRACEPOINT, *code)
        programs.append(Program(fd, hook, "empty"))
    return Programs(programs)


def take_over(process: subprocess.Popen[bytes]) -> Programs:
    """The programs that a process has attached to tracepoints and functions; ends it.

    Raises:
        BenchError: it has none.
    """
    links, maps = _held_by(process.pid)
    programs, held = [], []
    try:
        for link in sorted(links, key=lambda link: int(link["link_id"])):
            if link["link_type"] not in ("raw_tracepoint", "tracing"):
                continue
            fd = _call("bpf_prog_get_fd_by_id", ctypes.c_uint32(int(link["prog_id"])))
            programs.append(Program(fd, link.get("tp_name", ""), _info(fd).name.decode()))
        # The kernel empties a program array when its last descriptor is closed.
        held = [_call("bpf_map_get_fd_by_id", ctypes.c_uint32(number)) for number in maps]
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    if not programs:
        raise BenchError(f"{process.args!r} has attached nothing that can be taken over")
    return Programs(programs, held)


@contextmanager
def statistics_enabled() -> Iterator[None]:
    """The kernel times every run of every program meanwhile."""
    fd = _call("bpf_enable_stats", ctypes.c_int(_BPF_STATS_RUN_TIME))
    try:
        yield
    finally:
        os.close(fd)


def costs(sides: Mapping[str, Programs]) -> dict[tuple[str, str, str], Cost]:
    """(side, hook, name) → cost so far."""
    return {
        (side, program.hook, program.name): program.cost()
        for side, programs in sides.items()
        for program in programs.programs
    }


def _held_by(pid: int) -> tuple[list[dict[str, str]], set[int]]:
    """What the kernel tells of its links, and the ids of its maps."""
    infos = _fdinfo(pid)
    links = [info for info in infos if "link_type" in info]
    return links, {int(info["map_id"]) for info in infos if "map_id" in info}


def _fdinfo(pid: int) -> list[dict[str, str]]:
    found = []
    for path in sorted(Path(f"/proc/{pid}/fdinfo").iterdir()):
        try:
            lines = path.read_text().splitlines()
        except FileNotFoundError:
            continue  # it was closed meanwhile
        pairs = (line.partition(":") for line in lines)
        found.append({name: value.strip() for name, _, value in pairs})
    return found


def _info(fd: int) -> _Info:
    info, size = _Info(), ctypes.c_uint32(ctypes.sizeof(_Info))
    _call("bpf_obj_get_info_by_fd", fd, ctypes.byref(info), ctypes.byref(size))
    return info


def _call(function: str, *arguments: object) -> int:
    done: int = getattr(load_libbpf(), function)(*arguments)
    if done < 0:
        reason = os.strerror(ctypes.get_errno() or -done)
        raise BenchError(f"{function}: {reason}; this bench needs root and Linux 5.8 or later")
    return done
