"""What a control group's path says: systemd unit, container, pod. Pure.

The forms are those that systemd, the container runtimes and Kubernetes make,
with their systemd drivers and with their cgroupfs drivers, on cgroup v1, v2
and hybrid hosts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple


class Place(NamedTuple):
    """Where a task belongs; what its path does not say is None.

    ``path``: the one of its paths that says most. ``unit``: a systemd unit of the host, as
    ``systemctl`` takes it, or of a user's own manager. ``runtime``: who made the container.
    ``container_id``: as that runtime knows it, of the innermost container; for LXC, nspawn
    and libvirt its name. ``pod_uid``: of the Kubernetes pod, with dashes.
    """

    path: str | None = None
    unit: str | None = None
    slice: str | None = None
    runtime: str | None = None
    container_id: str | None = None
    pod_uid: str | None = None


_ID = "[0-9a-f]{64}"
_POD_UID = "[0-9a-f]{8}(?:[_-][0-9a-f]{4}){3}[_-][0-9a-f]{12}|[0-9a-f]{32}"
# A unit that may have processes of its own, and slices, which have none.
_UNIT = re.compile(r"[\w:.\\@-]+\.(?:service|scope|socket|mount|swap)", re.ASCII)
_SLICE = re.compile(r"[\w:.\\@-]+\.slice", re.ASCII)
_USER_MANAGER = re.compile(r"user@\d+\.service", re.ASCII)
# kubepods-burstable-pod<uid>.slice, kubepods-pod<uid>.slice, and below a --cgroup-root
_POD_SLICE = re.compile(rf"(?:[\w\\-]+-)?pod({_POD_UID})\.slice", re.ASCII)
_POD = re.compile(rf"pod({_POD_UID})")
# PREFIX-<id>.scope of the systemd drivers, and without .scope of CRI-O's and podman's cgroupfs
# ones. The monitors of these two (conmon) have cgroups of their own beside the container's.
_SCOPE = re.compile(rf"([a-z-]+)-({_ID})(?:\.scope)?")
_RUNTIMES = {
    "docker": "docker",
    "cri-containerd": "containerd",
    "containerd": "containerd",
    "nerdctl": "containerd",
    "crio": "cri-o",
    "libpod": "podman",
    "libpod-payload": "podman",
}
_MONITORS = {"crio-conmon": "cri-o", "libpod-conmon": "podman"}
# A cgroupfs driver's name of a kubelet that uses systemd's: SLICE:RUNTIME:ID
_COLONS = re.compile(rf"([^:]*):([a-z-]+):({_ID})")
# /docker/<id>, /docker/<id>/docker/<id>; of /kubepods/…/<id> nobody can say whose it is.
_PARENTS = {
    "docker": "docker",
    "default": "containerd",
    "k8s.io": "containerd",
    "moby": "docker",
}
_HEX = re.compile(_ID)
_LXC = re.compile(r"lxc\.payload\.([^/]+)|lxc/([^/]+)", re.DOTALL)
_MACHINE = re.compile(r"machine-(.+)\.scope", re.DOTALL)
_NSPAWN = re.compile(r"systemd-nspawn@(.+)\.service", re.DOTALL)
_ESCAPE = re.compile(r"\\x([0-9a-f]{2})")


def resolve(paths: Sequence[bytes]) -> Place:
    """What the paths of one task in its hierarchies say.

    Args:
        paths: from the roots of the hierarchies, the unified one's first. Any bytes: what is
            no valid text stands as ``\\xNN``.
    """
    places = [_resolve(path) for path in paths]
    if not places:
        return Place()
    first = next((p for p in places if p.path != "/"), places[0])
    contained = next((p for p in places if p.container_id), None)
    pod = next((p for p in places if p.pod_uid), None)
    made = contained or next((p for p in places if p.runtime), None)
    told = contained or pod or made or first
    # The hierarchy that tells of the container may be one that systemd leaves to it.
    unit = next((p for p in (told, *places) if p.unit), None)
    return Place(
        told.path,
        unit.unit if unit else None,
        (unit or told).slice,
        made.runtime if made else None,
        contained.container_id if contained else None,
        pod.pod_uid if pod else None,
    )


@lru_cache(maxsize=256)
def _resolve(raw: bytes) -> Place:
    text = raw.decode("utf-8", "backslashreplace")
    parts = [part for part in text.split("/") if part]
    # How a cgroup namespace shows what is outside of it.
    while parts and parts[0] == "..":
        del parts[0]
    unit, within = _unit(parts)
    runtime = container = pod = None
    for at, part in enumerate(parts):
        pod = _pod_of(part) or pod
        found = _container(parts, at)
        if found is not None:
            runtime, container = found
    return Place("/" + "/".join(parts), unit, within, runtime, container, pod)


def _unit(parts: Sequence[str]) -> tuple[str | None, str | None]:
    """As systemd finds them: below its slices stands the unit, or nothing of its own.

    What is deeper down may be called anything, by whoever the cgroup was delegated to; only a
    user's manager makes units there again.
    """
    within = unit = None
    for part in parts:
        # systemd puts it before names that the kernel might want for a file.
        name = part.removeprefix("_")
        if _SLICE.fullmatch(name):
            within = name
            continue
        if not _UNIT.fullmatch(name):
            break
        unit = name
        if not _USER_MANAGER.fullmatch(name):
            break
    return unit, within


def _pod_of(part: str) -> str | None:
    colons = _COLONS.fullmatch(part)
    name = colons[1] if colons else part
    found = _POD_SLICE.fullmatch(name) or _POD.fullmatch(name)
    return found[1].replace("_", "-") if found else None


def _container(parts: Sequence[str], at: int) -> tuple[str | None, str | None] | None:
    """Runtime and id of the container that begins with this part of the path, if one does."""
    part = parts[at]
    if found := _SCOPE.fullmatch(part):
        if found[1] in _MONITORS:
            return _MONITORS[found[1]], None
        return _RUNTIMES.get(found[1]), found[2]
    if found := _COLONS.fullmatch(part):
        return _RUNTIMES.get(found[2]), found[3]
    above = parts[at - 1] if at else ""
    if _HEX.fullmatch(part):
        if above == "libpod_parent":
            return None  # A podman pod: its containers are below.
        return _PARENTS.get(above, "docker" if "ecs" in parts[:at] else None), part
    if found := _LXC.fullmatch(part) or _LXC.fullmatch(f"{above}/{part}"):
        return "lxc", found[1] or found[2]
    if found := _MACHINE.fullmatch(part):
        name = _unescape(found[1])
        return "libvirt" if re.match(r"(?:qemu|lxc)-\d", name) else "nspawn", name
    if found := _NSPAWN.fullmatch(part):
        return "nspawn", _unescape(found[1])
    return None


def _unescape(name: str) -> str:
    """A name as it was before systemd made a unit name of it."""
    dashed = name.replace("-", "/")
    raw = _ESCAPE.sub(lambda found: chr(int(found[1], 16)), dashed)
    # Beyond ASCII each byte was escaped by itself.
    try:
        return raw.encode("latin-1").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return raw
