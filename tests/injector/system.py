"""Calls of the operating system that Python 3.11's os lacks, and CPU choice."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import traceback
from collections.abc import Callable, Sequence

from tests.injector.kinds import InjectorError, UnsupportedError

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
CLONE_NEWNET = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise UnsupportedError(f"{what}: {os.strerror(error)}")


def set_comm(comm: str) -> None:
    """Name the calling thread; the kernel keeps 15 bytes."""
    _check(_libc.prctl(PR_SET_NAME, comm.encode(), 0, 0, 0), "prctl(PR_SET_NAME)")


def die_with(parent: int) -> None:
    """Have the kernel kill this process when the thread of ``parent`` that started it ends."""
    _check(_libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os._exit(1)


def enter_new_netns() -> None:
    """Give this process a network namespace of its own, which ends with it.

    Raises:
        UnsupportedError: no CAP_SYS_ADMIN, or a kernel without namespaces.
    """
    _check(_libc.unshare(CLONE_NEWNET), "unshare(CLONE_NEWNET)")


def enter_netns(fd: int) -> None:
    """Enter the network namespace that a descriptor of /proc/PID/ns/net stands for."""
    _check(_libc.setns(fd, CLONE_NEWNET), "setns")


def pin(cpu: int) -> None:
    """Run the calling thread on one CPU only.

    Raises:
        UnsupportedError: there is no such CPU, or we may not use it.
    """
    try:
        os.sched_setaffinity(0, {cpu})
    except OSError as error:
        raise UnsupportedError(f"cannot run on CPU {cpu}: {error.strerror}") from error


def online_cpus() -> set[int]:
    """Numbers of the CPUs that are online."""
    with open("/sys/devices/system/cpu/online", encoding="ascii") as file:
        ranges = [part.split("-") for part in file.read().strip().split(",")]
    return {cpu for ends in ranges for cpu in range(int(ends[0]), int(ends[-1]) + 1)}


def other_cpu(cpu: int) -> int:
    """Any other CPU than ``cpu``, the nearest above first.

    Raises:
        UnsupportedError: there is none.
    """
    others = sorted(online_cpus() - {cpu})
    if not others:
        raise UnsupportedError(f"no CPU but {cpu} to work from")
    return next((n for n in others if n > cpu), others[0])


def make_fifo(priority: int) -> None:
    """Make the calling thread a real-time one.

    Raises:
        UnsupportedError: no CAP_SYS_NICE, or a cgroup without real-time runtime.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
    except OSError as error:
        raise UnsupportedError(f"SCHED_FIFO: {error.strerror}") from error


def make_ordinary() -> None:
    """Make the calling thread an ordinary one again."""
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def outweigh() -> None:
    """Make the calling process outweigh all ordinary ones, and not share that with its session.

    Raises:
        UnsupportedError: no CAP_SYS_NICE.
    """
    os.setsid()
    try:
        os.setpriority(os.PRIO_PROCESS, 0, -20)
    except OSError as error:
        raise UnsupportedError(f"a nice value of -20: {error.strerror}") from error
    # With autogroups the session's own weight counts, the task's only within it.
    if os.path.exists("/proc/self/autogroup"):
        write_file("/proc/self/autogroup", "-20")


def fork_task(comm: str, cpu: int, task: Callable[[], object]) -> int:
    """Run ``task`` in a child of that name on that CPU until it is killed; return its pid.

    The child dies with the calling thread.
    """
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        die_with(parent)
        set_comm(comm)
        pin(cpu)
        task()
    except Exception:
        # Nobody else would tell.
        traceback.print_exc()
        raise
    finally:
        os._exit(1)


def end_task(pid: int) -> None:
    """Kill a child made by :func:`fork_task` and collect it."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def ip_batch(commands: Sequence[str]) -> None:
    """Run ``ip`` commands in the network namespace of the calling thread.

    Raises:
        UnsupportedError: one of them failed, or there is no ``ip``.
    """
    try:
        result = subprocess.run(
            ["ip", "-batch", "-"],
            input="\n".join(commands),
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError as error:
        raise UnsupportedError("the command ip is missing: install iproute2") from error
    if result.returncode != 0:
        raise UnsupportedError(f"ip: {result.stderr.strip()}")


def no_ipv6(interface: str) -> None:
    """Keep an interface of the calling thread's namespace from talking on its own."""
    path = f"/proc/sys/net/ipv6/conf/{interface}/disable_ipv6"
    if os.path.exists(path):
        write_file(path, "1")


def write_file(path: str, text: str) -> None:
    """Write a file of /proc or /sys.

    Raises:
        InjectorError: naming the file.
    """
    try:
        with open(path, "w", encoding="ascii") as file:
            file.write(text)
    except OSError as error:
        raise InjectorError(f"cannot write {path}: {error.strerror}") from error
