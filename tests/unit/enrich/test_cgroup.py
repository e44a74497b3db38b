"""Paths as systemd, runtimes and Kubernetes really make them, and what they must mean."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stalld.enrich.cgroup import Place, resolve

A, B, C = "a1" * 32, "b2" * 32, "c3" * 32
UID = "6d7c8a1e-1f0a-4b59-9c3d-0b7f5d8f2a11"
UNDER = UID.replace("-", "_")
STATIC = "0123456789abcdef0123456789abcdef"
USER = "/user.slice/user-1000.slice/user@1000.service"
HUGE = "/kubepods.slice/kubepods-burstable.slice"

# path: unit, slice, runtime, container, pod
ONE: dict[str, tuple[str | None, str | None, str | None, str | None, str | None]] = {
    # systemd
    "/": (None, None, None, None, None),
    "/init.scope": ("init.scope", None, None, None, None),
    "/system.slice/cadvisor.service": ("cadvisor.service", "system.slice", None, None, None),
    "/system.slice/cadvisor.service/supervisor": (
        *("cadvisor.service", "system.slice"),
        *(None, None, None),
    ),
    "/system.slice/system-getty.slice/getty@tty1.service": (
        *("getty@tty1.service", "system-getty.slice"),
        *(None, None, None),
    ),
    "/system.slice/systemd-udevd.service/udev": (
        *("systemd-udevd.service", "system.slice"),
        *(None, None, None),
    ),
    "/system.slice/dev-hugepages.mount": ("dev-hugepages.mount", "system.slice", None, None, None),
    "/system.slice": (None, "system.slice", None, None, None),
    "/system.slice/_cgroup.procs.service": (
        *("cgroup.procs.service", "system.slice"),
        *(None, None, None),
    ),
    "/system.slice/run-rf1\\x2dx.scope": ("run-rf1\\x2dx.scope", "system.slice", None, None, None),
    "/user.slice/user-1000.slice/session-3.scope": (
        *("session-3.scope", "user-1000.slice"),
        *(None, None, None),
    ),
    f"{USER}/init.scope": ("init.scope", "user-1000.slice", None, None, None),
    f"{USER}/app.slice/app-gnome-Terminal.slice/vte-spawn-1.scope": (
        *("vte-spawn-1.scope", "app-gnome-Terminal.slice"),
        *(None, None, None),
    ),
    USER: ("user@1000.service", "user-1000.slice", None, None, None),
    # machines
    "/machine.slice/machine-web.scope/payload/system.slice/nginx.service": (
        *("machine-web.scope", "machine.slice"),
        *("nspawn", "web", None),
    ),
    "/machine.slice/systemd-nspawn@deb\\x2d12.service/payload": (
        *("systemd-nspawn@deb\\x2d12.service", "machine.slice"),
        *("nspawn", "deb-12", None),
    ),
    "/machine.slice/machine-qemu\\x2d1\\x2ddb.scope/libvirt/vcpu0": (
        *("machine-qemu\\x2d1\\x2ddb.scope", "machine.slice"),
        *("libvirt", "qemu-1-db", None),
    ),
    # docker
    f"/docker/{A}": (None, None, "docker", A, None),
    f"/system.slice/docker-{A}.scope": (
        *(f"docker-{A}.scope", "system.slice"),
        *("docker", A, None),
    ),
    f"{USER}/user.slice/docker-{A}.scope": (
        *(f"docker-{A}.scope", "user.slice"),
        *("docker", A, None),
    ),
    f"/actions_job/{A}": (None, None, None, A, None),
    f"/ecs/{STATIC}/{A}": (None, None, "docker", A, None),
    f"/docker/{A}/system.slice/nginx.service": (None, None, "docker", A, None),
    "/docker/buildkit": (None, None, None, None, None),
    "/system.slice/docker.service": ("docker.service", "system.slice", None, None, None),
    # docker in docker, kind
    f"/docker/{A}/docker/{B}": (None, None, "docker", B, None),
    f"/system.slice/docker-{A}.scope/docker/{B}": (
        *(f"docker-{A}.scope", "system.slice"),
        *("docker", B, None),
    ),
    f"/docker/{A}/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice"
    f"/kubelet-kubepods-burstable-pod{UNDER}.slice/cri-containerd-{B}.scope": (
        *(None, None),
        *("containerd", B, UID),
    ),
    f"/system.slice/docker-{A}.scope/kubelet/kubepods/besteffort/pod{UID}/{B}": (
        *(f"docker-{A}.scope", "system.slice"),
        *(None, B, UID),
    ),
    # containerd
    f"{HUGE}/kubepods-burstable-pod{UNDER}.slice/cri-containerd-{A}.scope": (
        *(f"cri-containerd-{A}.scope", f"kubepods-burstable-pod{UNDER}.slice"),
        *("containerd", A, UID),
    ),
    f"/kubepods.slice/kubepods-pod{UNDER}.slice/cri-containerd-{A}.scope": (
        *(f"cri-containerd-{A}.scope", f"kubepods-pod{UNDER}.slice"),
        *("containerd", A, UID),
    ),
    f"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{STATIC}.slice"
    f"/cri-containerd-{A}.scope": (
        *(f"cri-containerd-{A}.scope", f"kubepods-besteffort-pod{STATIC}.slice"),
        *("containerd", A, STATIC),
    ),
    f"/kubepods/burstable/pod{UID}/{A}": (None, None, None, A, UID),
    f"/kubepods/besteffort/pod{UID}/{A}": (None, None, None, A, UID),
    f"/kubepods/pod{STATIC}/{A}": (None, None, None, A, STATIC),
    f"/kubepods/burstable/pod{UID}": (None, None, None, None, UID),
    f"/system.slice/containerd.service/kubepods-burstable-pod{UNDER}.slice:cri-containerd:{A}": (
        *("containerd.service", "system.slice"),
        *("containerd", A, UID),
    ),
    f"/default/{A}": (None, None, "containerd", A, None),
    f"/system.slice/nerdctl-{A}.scope": (
        *(f"nerdctl-{A}.scope", "system.slice"),
        *("containerd", A, None),
    ),
    # CRI-O
    f"{HUGE}/kubepods-burstable-pod{UNDER}.slice/crio-{A}.scope": (
        *(f"crio-{A}.scope", f"kubepods-burstable-pod{UNDER}.slice"),
        *("cri-o", A, UID),
    ),
    f"{HUGE}/kubepods-burstable-pod{UNDER}.slice/crio-{A}.scope/container": (
        *(f"crio-{A}.scope", f"kubepods-burstable-pod{UNDER}.slice"),
        *("cri-o", A, UID),
    ),
    f"{HUGE}/kubepods-burstable-pod{UNDER}.slice/crio-conmon-{A}.scope": (
        *(f"crio-conmon-{A}.scope", f"kubepods-burstable-pod{UNDER}.slice"),
        *("cri-o", None, UID),
    ),
    f"/kubepods/burstable/pod{UID}/crio-{A}": (None, None, "cri-o", A, UID),
    # podman
    f"/machine.slice/libpod-{A}.scope/container": (
        *(f"libpod-{A}.scope", "machine.slice"),
        *("podman", A, None),
    ),
    f"/machine.slice/libpod-conmon-{A}.scope": (
        *(f"libpod-conmon-{A}.scope", "machine.slice"),
        *("podman", None, None),
    ),
    f"/machine.slice/machine-libpod_pod_{B}.slice/libpod-{A}.scope": (
        *(f"libpod-{A}.scope", f"machine-libpod_pod_{B}.slice"),
        *("podman", A, None),
    ),
    f"{USER}/user.slice/libpod-{A}.scope/container": (
        *(f"libpod-{A}.scope", "user.slice"),
        *("podman", A, None),
    ),
    f"/libpod_parent/libpod-{A}": (None, None, "podman", A, None),
    f"/libpod_parent/{B}/libpod-{A}": (None, None, "podman", A, None),
    f"/libpod_parent/{B}": (None, None, None, None, None),
    # LXC, LXD
    "/lxc.payload.web/system.slice/nginx.service": (None, None, "lxc", "web", None),
    "/lxc.monitor.web": (None, None, None, None, None),
    "/lxc/101/ns/system.slice/cron.service": (None, None, "lxc", "101", None),
    f"/lxc.payload.web/docker/{A}": (None, None, "docker", A, None),
    # seen from within a cgroup namespace
    f"/../../docker/{A}": (None, None, "docker", A, None),
    # what only looks like something
    "/docker/" + "z" * 64: (None, None, None, None, None),
    f"/docker/{A[:-1]}": (None, None, None, None, None),
    "/evil\n.service": (None, None, None, None, None),
    "/sh/evil.service": (None, None, None, None, None),
}


@pytest.mark.parametrize("path", ONE)
def test_one_path(path: str) -> None:
    """Unit, slice, runtime, container and pod of a path of cgroup v2, or v1."""
    place = resolve([path.encode()])
    assert place[1:] == ONE[path]
    assert place.path == path.replace("/../..", "")


V1 = f"/kubepods/burstable/pod{UID}/{A}"


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        # hybrid, where the runtime uses v1 only
        (["/", f"/docker/{A}"], Place(f"/docker/{A}", None, None, "docker", A, None)),
        (
            ["/system.slice/docker.service", f"/docker/{A}"],
            Place(f"/docker/{A}", "docker.service", "system.slice", "docker", A, None),
        ),
        (
            ["/system.slice/containerd.service", V1],
            Place(V1, "containerd.service", "system.slice", None, A, UID),
        ),
        # no controller has it, systemd does
        (
            ["/system.slice/cron.service", "/system.slice"],
            Place("/system.slice/cron.service", "cron.service", "system.slice"),
        ),
        (
            ["/", "/system.slice/cron.service"],
            Place("/system.slice/cron.service", "cron.service", "system.slice"),
        ),
        (["/", "/batch"], Place("/batch")),
        (["/"], Place("/")),
        ([], Place()),
    ],
)
def test_several_paths(paths: list[str], expected: Place) -> None:
    """Of a task in several hierarchies each tells what it knows."""
    assert resolve([path.encode() for path in paths]) == expected


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b"/a\xff\xfeb", "/a\\xff\\xfeb"),
        (b"/a\nb\x1b[31m", "/a\nb\x1b[31m"),
        (b"/system.slice/\xc3\xa9.service", "/system.slice/é.service"),
    ],
)
def test_hostile_names(raw: bytes, shown: str) -> None:
    """Any bytes give valid text, and no unit that systemd would not know."""
    place = resolve([raw])
    assert place == Place(shown, None, "system.slice" if "slice" in shown else None)


def test_a_container_cannot_pose_as_a_unit() -> None:
    """What a delegated cgroup holds is not taken for the host's."""
    place = resolve([f"/docker/{A}/system.slice/sshd.service".encode()])
    assert place.unit is None
    place = resolve([f"/system.slice/docker-{A}.scope/init.scope".encode()])
    assert place.unit == f"docker-{A}.scope"


@given(st.lists(st.binary(max_size=300), max_size=3))
def test_any_bytes(paths: list[bytes]) -> None:
    """Never an error, and all of it can be encoded."""
    for value in resolve(paths):
        assert value is None or value.encode()


@given(
    st.text(alphabet=st.characters(codec="utf-8"), min_size=1).filter(lambda name: "/" not in name)
)
def test_machine_names(name: str) -> None:
    """An escaped machine name comes back as it was."""
    escaped = "".join(
        c if c.isascii() and c.isalnum() else "".join(f"\\x{b:02x}" for b in c.encode())
        for c in name
    )
    assert resolve([f"/machine.slice/machine-{escaped}.scope".encode()]).container_id == name
