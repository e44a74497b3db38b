"""The unit and its companions, judged by the programs that will read them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.injector import Injector, Kind, Mode, Pressure
from tests.kernel import daemon as kernel_daemon
from tests.kernel.daemon import COMMAND, Daemon
from tests.kernel.daemon import STALLED_CPU as CPU
from tests.service.surroundings import status_of

pytestmark = pytest.mark.kernel

ROOT = Path(__file__).parents[2]
SYSTEMD = ROOT / "systemd"
UNIT = SYSTEMD / "softirq-stalld.service"
NAME = "softirq-stalld"
CAPABILITIES = {"bpf": 39, "perfmon": 38, "syslog": 34}
MASK = sum(1 << number for number in CAPABILITIES.values())
MAX_EXPOSURE = 2.0
NOBODY = 65534


def run(*command: str | Path, timeout_s: float = 30) -> str:
    """What a command said in all; it must succeed."""
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def directives(unit: Path = UNIT) -> dict[str, list[str]]:
    """Name → values of all settings of a unit file."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        if line and line[0] not in "#[":
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


@pytest.fixture
def accounts(tmp_path: Path) -> Path:
    """A root directory in which systemd-sysusers has made the user."""
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\n")
    run("systemd-sysusers", f"--root={root}", SYSTEMD / f"{NAME}.sysusers")
    return root


def test_verify(tmp_path: Path) -> None:
    """systemd finds no fault with the unit, but that it is not installed here."""
    copy = tmp_path / UNIT.name
    text = UNIT.read_text()
    assert f"ExecStart=/usr/bin/{NAME} run\n" in text
    copy.write_text(text.replace(f"/usr/bin/{NAME}", COMMAND))
    assert run("systemd-analyze", "verify", copy) == ""


def test_exposure() -> None:
    """systemd itself rates the sandbox as tight."""
    said = run("systemd-analyze", "security", "--offline=true", "--no-pager", UNIT)
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", said)
    assert found, said
    assert float(found[1]) <= MAX_EXPOSURE


def test_capabilities() -> None:
    """Three capabilities, no more, and a user of its own."""
    wanted = {f"CAP_{name.upper()}" for name in CAPABILITIES}
    said = directives()
    for name in ("CapabilityBoundingSet", "AmbientCapabilities"):
        assert [set(value.split()) for value in said[name]] == [wanted]
    assert said["User"] == said["Group"] == [NAME]


def test_what_would_break_it_is_off() -> None:
    """Nothing is set that is known to take away what the service reads."""
    fatal = {
        *("ProtectKernelTunables", "ProtectKernelLogs", "ProtectProc", "ProcSubset"),
        *("PrivateUsers", "PrivateNetwork", "DynamicUser"),
    }
    assert not fatal & directives().keys()


def test_sysusers(accounts: Path) -> None:
    """The user and its group are made, without a shell and without a home."""
    passwd = (accounts / "etc/passwd").read_text().splitlines()
    (line,) = [line.split(":") for line in passwd if line.startswith(f"{NAME}:")]
    assert 0 < int(line[2]) < 1000
    assert line[5] == "/"
    assert line[6] == "/usr/sbin/nologin"
    groups = (accounts / "etc/group").read_text().splitlines()
    assert [g.split(":")[2] for g in groups if g.startswith(f"{NAME}:")] == [line[3]]


LOGROTATE = """
set -e
mount --bind "$1/etc/passwd" /etc/passwd
mount --bind "$1/etc/group" /etc/group
mount -t tmpfs -o mode=755 tmpfs /var/log
mount -t tmpfs -o mode=755 tmpfs /run
directory=/var/log/softirq-stalld
install -d -o softirq-stalld -g softirq-stalld -m 750 $directory
install -o softirq-stalld -g softirq-stalld -m 640 /dev/null $directory/events.jsonl
logrotate --debug "$2" 2>&1
for day in one two three; do
    echo $day >>$directory/events.jsonl
    logrotate --force --state /var/log/state "$2" 2>/dev/null
done
stat -c '%n %U:%G %a' $directory/*
zcat $directory/events.jsonl.2.gz
cat $directory/events.jsonl.1
"""


def test_logrotate(accounts: Path, tmp_path: Path) -> None:
    """logrotate takes the file, and rotates so that only the user writes and the group reads."""
    copy = tmp_path / "logrotate.conf"
    copy.write_bytes((SYSTEMD / f"{NAME}.logrotate").read_bytes())
    copy.chmod(0o644)
    # The accounts and the logs exist in a mount namespace only, which ends with its shell.
    said = run("unshare", "--mount", "sh", "-c", LOGROTATE, "sh", accounts, copy)
    assert "error" not in said, said
    rotated = f"{NAME}:{NAME} 640\n"
    for name in ("events.jsonl", "events.jsonl.1", "events.jsonl.2.gz", "events.jsonl.3.gz"):
        assert f"/var/log/{NAME}/{name} {rotated}" in said
    assert said.endswith("two\nthree\n")


def limited(directory: Path) -> str:
    """A command that runs the daemon as nobody, with nothing but the three capabilities."""
    caps = ",".join(["-all", *(f"+{name}" for name in CAPABILITIES)])
    path = directory / NAME
    path.write_text(
        f"#!/bin/sh\nexec setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups --no-new-privs "
        f'--inh-caps={caps} --ambient-caps={caps} --bounding-set={caps} {COMMAND} "$@"\n'
    )
    path.chmod(0o755)
    return str(path)


def test_three_capabilities_suffice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not root, the same is attached as by root, and a stall is told in full."""
    with Daemon() as privileged:
        as_root = privileged.started
    monkeypatch.setattr(kernel_daemon, "COMMAND", limited(tmp_path))
    with Daemon() as daemon:
        status = status_of(daemon.pid)
        assert status["Uid"].split() == [str(NOBODY)] * 4
        assert status["NoNewPrivs"] == "1"
        for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(status[name], 16) == MASK, name
        for name in ("attached", "missing", "kthreads", "cpus", "sampler"):
            assert daemon.started[name] == as_root[name]
        with Injector(CPU) as injector, Pressure(CPU, Mode.PING) as pressure:
            truth = injector.inject(Kind.BH_OFF, 80, pressure=pressure)
            resolved = daemon.of(truth)[-1]
    assert resolved["verdict"] == "softirqs_disabled"
    assert resolved["blocker"]["pid"] == truth.pid
    assert resolved["blocker"]["comm"] == truth.comm
    assert resolved["stack"]["captured"] == "during"
    frames = resolved["stack"]["kernel"]
    assert any(truth.symbol in frame for frame in frames), frames
    assert all(re.match(r"[A-Za-z_][\w.]*\+0x", frame) for frame in frames), frames


SETUP = """
set -e
root=$1 python=$2 unit=$3 sysusers=$4 cgroup=$5
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/etc /run/etc.work /run/var /run/var.work /run/dev
for name in etc var; do
    mount -t overlay -o "lowerdir=/$name,upperdir=/run/$name,workdir=/run/$name.work" o /$name
done
mkdir -p /run/checkout /run/python /run/units/softirq-stalld.service.d
mount --bind "$root" /run/checkout
mount --bind "$python" /run/python
cp "$unit" /run/units/softirq-stalld.service
systemd-sysusers "$sysusers"
for target in sysinit basic shutdown test; do
    printf '[Unit]\\nDefaultDependencies=no\\n' >/run/units/$target.target
done
mount -t tmpfs -o mode=755 tmpfs /run/dev
for node in null zero full random urandom tty; do
    touch /run/dev/$node
    mount --bind /dev/$node /run/dev/$node
done
mkdir /run/dev/pts /run/dev/shm /run/dev/mqueue /run/dev/hugepages
mount -t devpts -o newinstance,ptmxmode=0666 devpts /run/dev/pts
ln -s pts/ptmx /run/dev/ptmx
mount --rbind /run/dev /dev
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs tmpfs /usr/lib/systemd/system-generators
mount -t proc proc /proc
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
umount --lazy --recursive "$cgroup"
mount -o remount,bind,ro /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -o remount,bind,ro /
export container=test SYSTEMD_UNIT_PATH=/run/units
exec setpriv --bounding-set=-sys_boot,-sys_time,-sys_module,-audit_control,-audit_read,-mac_admin \\
    /lib/systemd/systemd --unit=test.target --show-status=0 --log-target=null
"""


class Manager:
    """A systemd of our own, process 1 of namespaces of its own, which knows but our unit.

    What of the host it sees it sees read-only, its /dev, /run and /tmp are its own, and with its
    process everything ends.
    """

    def __init__(self) -> None:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
        unified = [m[1] for m in mounts if m[2] == "cgroup2"]
        if not unified:
            pytest.skip("no cgroup2 file system is mounted: systemd cannot run beside the host's")
        self._cgroup = Path(unified[0]) / f"{NAME}-test-{os.getpid()}"
        self._outer: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Manager:
        self._cgroup.mkdir()
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _start(self) -> None:
        self._outer = subprocess.Popen(
            [
                *("sh", "-c", 'echo $$ >"$0/cgroup.procs" && exec "$@"', self._cgroup),
                *("setpriv", "--pdeathsig", "KILL"),
                *("unshare", "--mount", "--pid", "--ipc", "--uts", "--net", "--cgroup"),
                *("--fork", "--kill-child", "sh", "-c", SETUP, "sh", ROOT, sys.prefix, UNIT),
                *(SYSTEMD / f"{NAME}.sysusers", "/sys/fs/cgroup"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 20
        while not self._runs():
            assert self._outer.poll() is None, "systemd did not start"
            assert time.monotonic() < deadline, "systemd is not ready"
            time.sleep(0.1)

    def _runs(self) -> bool:
        with suppress(OSError, ValueError, subprocess.SubprocessError):
            assert self._outer is not None
            children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children")
            self._init = int(children.read_text())
            return self.control("is-active", "test.target", check=False) == "active"
        return False

    def _end(self) -> None:
        if self._outer is not None:
            # unshare takes process 1 with it, and that everything.
            self._outer.kill()
            self._outer.wait(10)
        deadline = time.monotonic() + 10
        while self._cgroup.exists():
            for directory in sorted(self._cgroup.glob("**/"), reverse=True):
                with suppress(OSError):
                    directory.rmdir()
            assert time.monotonic() < deadline, f"{self._cgroup} is still in use"
            time.sleep(0.05)

    def inside(self, *command: str, check: bool = True) -> str:
        """Run a command beside it."""
        done = subprocess.run(
            ["nsenter", "--target", str(self._init), "--all", *command],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0 or not check, (command, done.stdout, done.stderr)
        return done.stdout.strip()

    def control(self, *arguments: str, check: bool = True) -> str:
        """Run systemctl."""
        return self.inside("systemctl", *arguments, check=check)

    def show(self, name: str) -> str:
        """A property of the unit."""
        return self.control("show", "--value", f"--property={name}", NAME)

    def override(self, arguments: str = "run", *lines: str) -> None:
        """Run the checkout, into files; ``lines`` are further settings."""
        settings = [
            "[Service]",
            "Environment=PYTHONPATH=/run/checkout",
            "ExecStart=",
            f"ExecStart=/run/python/bin/python -P -m stalld.cli {arguments}",
            "StandardOutput=append:/run/events",
            "StandardError=append:/run/said",
            *lines,
        ]
        path = "/run/units/softirq-stalld.service.d/test.conf"
        self.inside("sh", "-c", f'printf "%s\\n" "$@" >{path}', "sh", *settings)
        self.control("daemon-reload")

    def wait_for(self, name: str, *values: str, timeout_s: float = 15) -> None:
        """Until a property has one of these values."""
        deadline = time.monotonic() + timeout_s
        while (now := self.show(name)) not in values:
            assert time.monotonic() < deadline, (name, now, self.said())
            time.sleep(0.2)

    def said(self) -> str:
        """The daemon's own log."""
        return self.inside("sh", "-c", "cat /run/said 2>&1", check=False)


@pytest.fixture(scope="module")
def manager() -> Iterator[Manager]:
    """A systemd that runs."""
    with Manager() as running:
        yield running


def test_systemd_runs_it(manager: Manager) -> None:
    """In its sandbox everything attaches that attaches without; it reloads and stops well."""
    with Daemon() as privileged:
        as_root = privileged.started
    directory = f"/var/log/{NAME}"
    config = f'[[sinks.file]]\npath = "{directory}/events.jsonl"\n'
    manager.inside("sh", "-c", 'printf %s "$0" >/run/config.toml', config)
    manager.override("run --config /run/config.toml")
    manager.control("start", NAME)
    assert manager.show("ActiveState") == "active"
    assert manager.show("StatusText") != ""
    started = json.loads(manager.inside("cat", "/run/events").splitlines()[0])
    assert started["event"] == "started"
    for name in ("attached", "missing", "sampler", "structs"):
        assert started[name] == as_root[name]
    main = manager.show("MainPID")
    status = manager.inside("cat", f"/proc/{main}/status")
    for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert re.search(rf"^{name}:\s+{MASK:016x}$", status, re.MULTILINE), status
    assert re.search(r"^Seccomp:\s+2$", status, re.MULTILINE)
    for path, mode in (
        (f"/run/{NAME}", "750"),
        (f"/run/{NAME}/{NAME}.sock", "660"),
        (directory, "750"),
        (f"{directory}/events.jsonl", "640"),
    ):
        assert manager.inside("stat", "-c", "%U:%G %a", path) == f"{NAME}:{NAME} {mode}", path
    # The probe child is gone.
    assert manager.inside("cat", f"/proc/{main}/task/{main}/children") == ""
    manager.control("reload", NAME)
    manager.wait_for("ActiveState", "active")
    assert manager.show("MainPID") == main
    manager.control("stop", NAME)
    assert manager.show("Result") == "success"
    assert manager.show("ExecMainStatus") == "0"


def test_systemd_restarts_it_when_it_hangs(manager: Manager) -> None:
    """A daemon that hangs is killed by the watchdog and started again."""
    manager.override("run", "WatchdogSec=2", "RestartSec=100ms")
    manager.control("start", NAME)
    first = manager.show("MainPID")
    # Fed in time, it lives longer than the period.
    time.sleep(3)
    assert manager.show("MainPID") == first
    manager.inside("kill", "-STOP", first)
    manager.wait_for("NRestarts", "1")
    manager.wait_for("ActiveState", "active")
    assert manager.show("MainPID") != first
    manager.control("stop", NAME)


def test_systemd_leaves_a_wrong_configuration_alone(manager: Manager) -> None:
    """Exit status 2 is not tried again."""
    manager.override("run --config /run/absent.toml", "RestartSec=100ms")
    manager.control("start", NAME, check=False)
    time.sleep(1)
    assert manager.show("ExecMainStatus") == "2"
    assert manager.show("ActiveState") == "failed"
    assert manager.show("NRestarts") == "0"
    assert "cannot be read" in manager.said()
    manager.control("reset-failed", NAME)


CONNECT = """
import socket
with socket.create_server(("127.0.0.1", 0)) as server:
    socket.create_connection(server.getsockname(), 3).close()
"""


def test_network(manager: Manager) -> None:
    """Nothing goes out until a drop-in, as the unit's comment shows it, lets it."""
    comment = re.findall(
        r"^#   ((?:RestrictAddressFamilies|IPAddressAllow)=.*)$", UNIT.read_text(), re.MULTILINE
    )
    assert [line.partition("=")[0] for line in comment] == [
        "RestrictAddressFamilies",
        "IPAddressAllow",
    ]
    drop_in = [comment[0], "IPAddressAllow=127.0.0.1"]
    manager.inside("sh", "-c", 'printf %s "$0" >/run/connect.py', CONNECT)
    once = ["Type=oneshot", "Restart=no", "ExecStart=", "ExecStart=/run/python/bin/python"]
    once[-1] += " /run/connect.py"
    for lines, result in (
        ([], "exit-code"),
        (drop_in[:1], "exit-code"),
        (drop_in, "success"),
    ):
        manager.override("run", *once, *lines)
        manager.control("start", NAME, check=False)
        assert manager.show("Result") == result, (lines, manager.said())
        manager.control("reset-failed", NAME, check=False)
