"""Who stalled the CPU: process, system call and file, unit, container and pod."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.injector import Injector, InjectorError, Kind, Mode, Pressure, Truth
from tests.kernel import daemon as kernel_daemon
from tests.kernel.cgroups import NAME, Tree, tree
from tests.kernel.daemon import STALLED_CPU as CPU
from tests.kernel.daemon import Daemon, Event, overlap
from tests.service.surroundings import started
from tests.service.test_unit import NOBODY, limited
from tests.slowness import slow

pytestmark = pytest.mark.kernel

STALL_MS = 40
ID = "5f" * 32
UID = "0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9"
POD = UID.replace("-", "_")
BURSTABLE = f"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{POD}.slice"


STALL_IN_A_NAMESPACE = f"""
import os, sys, time
os.sched_setaffinity(0, {{{CPU}}})
print(os.readlink("/proc/self"), flush=True)
sys.stdin.read(1)
os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
end = time.monotonic() + 0.1
while time.monotonic() < end:
    pass
"""
"""Says what its pid is outside, then waits for a byte."""


class Layout(NamedTuple):
    """A cgroup as a runtime makes it, and what must be told of it."""

    path: str
    unit: str | None = None
    runtime: str | None = None
    container_id: str | None = None
    pod_uid: str | None = None


LAYOUTS = [
    Layout("system.slice/cadvisor.service", "cadvisor.service"),
    Layout("user.slice/user-1000.slice/session-3.scope", "session-3.scope"),
    Layout(f"system.slice/docker-{ID}.scope", f"docker-{ID}.scope", "docker", ID),
    Layout(f"docker/{ID}", None, "docker", ID),
    Layout(
        f"{BURSTABLE}/cri-containerd-{ID}.scope",
        f"cri-containerd-{ID}.scope",
        "containerd",
        ID,
        UID,
    ),
    Layout(f"kubepods/burstable/pod{UID}/{ID}", None, None, ID, UID),
    Layout(f"{BURSTABLE}/crio-{ID}.scope", f"crio-{ID}.scope", "cri-o", ID, UID),
    Layout(f"machine.slice/libpod-{ID}.scope/container", f"libpod-{ID}.scope", "podman", ID),
    Layout("lxc.payload.web/system.slice/nginx.service", None, "lxc", "web"),
    # kind: a node in docker, a pod's container in that
    Layout(
        f"docker/{'6e' * 32}/kubelet.slice/{BURSTABLE}/cri-containerd-{ID}.scope",
        None,
        "containerd",
        ID,
        UID,
    ),
]


@pytest.fixture(scope="module")
def ping() -> Iterator[Pressure]:
    """Packets that wait while bottom halves are off."""
    with Pressure(CPU, Mode.PING) as pressure:
        yield pressure


@pytest.fixture(scope="module")
def running(ping: Pressure) -> Iterator[tuple[Daemon, Injector]]:
    """One daemon and one injector for many layouts."""
    with Daemon() as daemon, Injector(CPU) as injector:
        injector.prepare(Kind.BH_OFF)
        yield daemon, injector


@pytest.fixture
def unified() -> Iterator[Tree]:
    """Our part of the unified hierarchy."""
    with tree() as ours:
        yield ours


def lines_of(daemon: Daemon, truth: Truth) -> list[Event]:
    """All lines of a stall that we made, the first of them while it went on."""
    lines = daemon.of(truth)
    assert lines[0]["phase"] == "ongoing"
    assert lines[0]["blocker"]["tid"] == truth.tid
    return lines


def slow_send(daemon: Daemon, injector: Injector, ping: Pressure) -> list[Event]:
    """A sendto() that takes long; again, should the hypervisor take the CPU meanwhile."""
    for _ in range(4):
        truth = injector.inject(Kind.BH_OFF, STALL_MS, pressure=ping)
        lines = daemon.of(truth)
        if all(e["verdict"] != "vcpu_preempted" for e in lines):
            break
    return lines_of(daemon, truth)


def check_place(event: Event, layout: Layout, path: str) -> None:
    """Unit, runtime, container and pod, and the path they come from."""
    blocker = event["blocker"]
    told = {key: blocker[key] for key in Layout._fields if key != "path"}
    assert told == {key: value for key, value in layout._asdict().items() if key != "path"}
    assert blocker["cgroup"] == path


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.path[:40])
def test_unified(
    running: tuple[Daemon, Injector], ping: Pressure, unified: Tree, layout: Layout
) -> None:
    """In the unified hierarchy: told in every line, from the first on."""
    daemon, injector = running
    path = unified.move(injector.pid, layout.path)
    try:
        lines = slow_send(daemon, injector, ping)
    finally:
        unified.leave(injector.pid)
    for event in lines:
        check_place(event, layout, path)


V1 = [
    Layout(f"docker/{ID}", None, "docker", ID),
    Layout(f"kubepods/besteffort/pod{UID}/{ID}", None, None, ID, UID),
    Layout(f"{BURSTABLE}/cri-containerd-{ID}.scope", None, "containerd", ID, UID),
]


@pytest.mark.parametrize("layout", V1, ids=lambda layout: layout.path[:40])
def test_hybrid(
    running: tuple[Daemon, Injector], ping: Pressure, unified: Tree, layout: Layout
) -> None:
    """A runtime that uses v1 only: the unit from the unified hierarchy, the rest from v1's."""
    daemon, injector = running
    before = own_cgroup(injector.pid, "memory")
    with tree("cgroup", "memory") as memory:
        path = memory.move(injector.pid, layout.path)
        unified.move(injector.pid, "system.slice/containerd.service")
        try:
            lines = slow_send(daemon, injector, ping)
        finally:
            unified.leave(injector.pid)
            memory.back(injector.pid, before)
    wanted = layout._replace(unit=Path(path).name if path.endswith(".scope") else None)
    wanted = wanted if wanted.unit else wanted._replace(unit="containerd.service")
    for event in lines:
        check_place(event, wanted, path)


def own_cgroup(pid: int, controller: str) -> str:
    """Where a process is in a v1 hierarchy."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path
    pytest.skip(f"no v1 hierarchy of {controller}")


def check_process(event: Event, injector: Injector) -> None:
    """Command line, executable, user, parent, as /proc tells them of the injector."""
    blocker = event["blocker"]
    raw = Path(f"/proc/{injector.pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    assert blocker["cmdline"] == " ".join(word.decode() for word in raw)
    assert os.path.basename(blocker["exe"]) == os.path.basename(os.path.realpath(sys.executable))
    assert blocker["exe"].startswith("/")
    assert blocker["uid"] == os.getuid()
    assert blocker["parent"]["pid"] == os.getpid()
    assert blocker["parent"]["comm"] == Path("/proc/self/comm").read_text().rstrip("\n")
    assert blocker["ns_pid"] is None


def test_process(running: tuple[Daemon, Injector], ping: Pressure) -> None:
    """A slow sendto(): who called it, and that it works on a socket."""
    daemon, injector = running
    for event in slow_send(daemon, injector, ping):
        check_process(event, injector)
        assert event["blocker"]["syscall"] == "sendto"
        assert event["blocker"]["file"].startswith("socket:[")


def slow_read(daemon: Daemon, injector: Injector, path: str) -> list[Event]:
    """A read() that takes long, until one made a stall."""
    for _ in range(8):
        truth = injector.inject(Kind.PREEMPT_OFF, 80, pressure=Mode.BURSTS, reads=path)
        time.sleep(0.1)
        found = [e for e in daemon.stalls("resolved") if overlap(e, truth) > 20_000_000]
        if found:
            return lines_of(daemon, truth)
    raise AssertionError("no slow read was seen")


def test_files(running: tuple[Daemon, Injector], unified: Tree, tmp_path: Path) -> None:
    """A slow read(): of which file, be it the kernel's or one on a disk."""
    daemon, injector = running
    cgroup = unified.directory("system.slice/cadvisor.service") / "cgroup.stat"
    plain = tmp_path / "plain file"
    plain.write_text("x")
    inner = "/system.slice/cadvisor.service/cgroup.stat"
    for path, told in (
        (str(cgroup), f"cgroup2:/{NAME}{inner}"),
        (f"/proc/{os.getpid()}/stat", f"proc:/{os.getpid()}/stat"),
        (str(plain), f"/{tmp_path.name}/plain file"),
    ):
        for event in slow_read(daemon, injector, path):
            assert event["blocker"]["syscall"] == "read"
            assert event["blocker"]["file"].endswith(told)
            check_process(event, injector)


def test_exit_in_mid_stall(unified: Tree, ping: Pressure) -> None:
    """A process that is killed while it stalls, and its cgroup removed: named to the last line."""
    layout = LAYOUTS[4]
    with Daemon() as daemon, Injector(CPU) as injector:
        injector.prepare(Kind.BH_OFF)
        pid = injector.pid
        path = unified.move(pid, layout.path)

        def stall() -> None:
            with suppress(InjectorError):
                injector.inject(Kind.BH_OFF, 200, pressure=ping)

        thread = threading.Thread(target=stall)
        thread.start()
        first = daemon.wait_for(
            lambda e: e["event"] == "stall" and (e["blocker"] or {}).get("pid") == pid
        )
        assert first["phase"] == "ongoing"
        os.kill(pid, signal.SIGKILL)
        thread.join()
        unified.remove()
        assert (
            not Path(f"/proc/{pid}/cmdline").exists()
            or not Path(f"/proc/{pid}/cmdline").read_bytes()
        )
        last = daemon.wait_for(
            lambda e: e.get("stall_id") == first["stall_id"] and e["phase"] == "resolved"
        )
        lines = [e for e in daemon.stalls() if e["stall_id"] == first["stall_id"]]
        assert lines[-1] is last
        for event in lines:
            check_place(event, layout, path)
            assert event["blocker"]["cmdline"].endswith("worker " + str(os.getpid()) + " 1 busy")
            assert event["blocker"]["syscall"] == "sendto"
        daemon.stop()
        enrichment = daemon.events[-1]["enrichment"]
        # 2 ms, and what another process or the hypervisor takes.
        assert enrichment["longest_wait_ms"] <= 100


def test_three_capabilities_suffice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unified: Tree, ping: Pressure
) -> None:
    """As nobody, who may not look at a process of root's, all of it is told as well."""
    monkeypatch.setattr(kernel_daemon, "COMMAND", limited(tmp_path))
    layout = LAYOUTS[4]
    with Daemon() as daemon, Injector(CPU) as injector:
        assert f"Uid:\t{NOBODY}" in Path(f"/proc/{daemon.pid}/status").read_text()
        path = unified.move(injector.pid, layout.path)
        lines = slow_send(daemon, injector, ping)
        unified.leave(injector.pid)
        for event in lines:
            check_place(event, layout, path)
            check_process(event, injector)
            assert event["blocker"]["file"].startswith("socket:[")


def test_contention(running: tuple[Daemon, Injector]) -> None:
    """A task in user code has a command line and no system call."""
    daemon, injector = running
    with Pressure(CPU, Mode.FLOOD) as pressure:
        for _ in range(40):  # at about every second one its samples were in softirqs
            truth = injector.inject(Kind.CPU_CONTENTION, 80, pressure=pressure)
            time.sleep(0.1)
            found = [e for e in daemon.stalls("resolved") if overlap(e, truth) > 40_000_000]
            if found and (found[-1]["blocker"] or {}).get("mode") == "user":
                check_process(found[-1], injector)
                assert found[-1]["blocker"]["syscall"] is None
                assert found[-1]["blocker"]["file"] is None
                return
    raise AssertionError("no contention in user mode was seen")


def test_pid_namespace(running: tuple[Daemon, Injector]) -> None:
    """A process in a pid namespace, as in a container: its pid there too, be it gone meanwhile."""
    daemon, _ = running
    inside = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with Pressure(CPU, Mode.FLOOD) as pressure:
        for _ in range(40):
            with started([*inside, STALL_IN_A_NAMESPACE], **pipes) as process:
                assert process.stdin is not None
                assert process.stdout is not None
                pid = int(process.stdout.readline())
                with pressure.active():
                    process.stdin.write("\n")
                    process.stdin.close()
                    process.wait(slow(10))
            time.sleep(0.1)
            found = [e for e in daemon.stalls() if (e["blocker"] or {}).get("pid") == pid]
            if found:
                assert {e["blocker"]["ns_pid"] for e in found} == {1}
                assert found[-1]["phase"] == "resolved"
                return
    raise AssertionError("no process of the namespace was blamed")
