"""The second start: with programs that the first one compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.bpf import statistics_enabled
from stalld.probe import cache
from stalld.probe.btf import VMLINUX_BTF
from stalld.probe.cache import Cache
from stalld.probe.client import ProbeChild, Probes, bpf_directory, possible_cpus
from stalld.probe.libbpf import RETURN_ZERO
from stalld.probe.protocol import Description, Request
from tests.injector import Injector, Kind, Mode, Pressure
from tests.kernel.daemon import STALLED_CPU as CPU
from tests.kernel.daemon import Daemon, bpf_objects, bpf_objects_of
from tests.kernel.test_stalls import check_life, functions

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(
        not Path(VMLINUX_BTF).exists(), reason="nothing is kept on a kernel without BTF"
    ),
]


@pytest.fixture
def request_(tmp_path: Path) -> Request:
    """All of it, kept in a directory like systemd's."""
    directory = tmp_path / "cache"
    directory.mkdir(mode=0o700)
    return Request(possible_cpus(), str(bpf_directory()), VMLINUX_BTF, cache_dir=str(directory))


@pytest.fixture
def first(request_: Request) -> Iterator[Probes]:
    """What was compiled, and is attached."""
    probes = ProbeChild(request_).result()
    yield probes
    probes.close()


def untimed(probes: Probes) -> Description:
    """The description without what differs from start to start."""
    return replace(probes.description, compile_ms=0, attach_ms=0)


def programs() -> list[dict[str, Any]]:
    """All that the kernel has, as bpftool shows them."""
    listed = subprocess.run(
        ["bpftool", "--json", "prog", "show"], capture_output=True, text=True, check=True
    )
    found: list[dict[str, Any]] = json.loads(listed.stdout)
    return found


def loaded(probes: Probes) -> Counter[tuple[str, str, int]]:
    """Kind, name and size of every program that is attached, or the maps hold."""
    sizes: Counter[tuple[str, str, int]] = Counter()
    ours = {int(fdinfo(fd)["map_id"]) for name, fd in probes.fds.items() if name == "map:cpus"}
    for program in programs():
        if ours & set(program.get("map_ids", [])):
            sizes[program["type"], program["name"], program["bytes_xlated"]] += 1
    return sizes


def fdinfo(fd: int) -> dict[str, str]:
    """What the kernel tells of a descriptor."""
    lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def test_the_same_programs(request_: Request, first: Probes) -> None:
    """What was kept loads as what was compiled: maps, programs, hooks, and what is missing."""
    second = ProbeChild(request_).result()
    try:
        assert first.description.compile_ms is not None
        assert second.description.compile_ms is None
        assert untimed(second) == untimed(first)
        assert loaded(second) == loaded(first)
        for name in first.fds:
            if name.startswith("map:"):
                one, two = fdinfo(first.fds[name]), fdinfo(second.fds[name])
                for fact in ("map_type", "key_size", "value_size", "max_entries", "map_flags"):
                    assert one[fact] == two[fact]
    finally:
        second.close()


WITHOUT_BCC = f"""\
#!{sys.executable}
import sys
sys.modules["bcc"] = None
from stalld.probe.__main__ import main
sys.exit(main())
"""


def test_bcc_is_not_loaded(
    request_: Request, first: Probes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second start needs no compiler: that is what it saves."""
    if first.description.net_rx_action == "kprobe":
        pytest.skip("this kernel has no fentry, and bcc attaches kprobes")
    child = tmp_path / "child"
    child.write_text(WITHOUT_BCC)
    child.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(child))
    second = ProbeChild(request_).result()
    assert second.description.compile_ms is None
    second.close()


BY_KPROBE = f"""\
#!{sys.executable}
import sys
from stalld.probe import loader
loader.fentry_error = lambda *_: "not wanted"
from stalld.probe.__main__ import main
sys.exit(main())
"""


@pytest.mark.skipif(
    not Path("/sys/bus/event_source/devices/kprobe").exists(),
    reason="no kprobe support in this kernel (CONFIG_KPROBES)",
)
def test_net_rx_action_by_kprobe(
    request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no fentry, kprobes run, of programs just compiled and of kept ones."""
    child = tmp_path / "child"
    child.write_text(BY_KPROBE)
    child.chmod(0o700)
    for kept in (False, True):
        with monkeypatch.context() as patched:
            patched.setattr(sys, "executable", str(child))
            starting = ProbeChild(request_)
        probes = starting.result()
        try:
            assert (probes.description.compile_ms is None) == kept
            assert probes.description.net_rx_action == "kprobe"
            assert "link:net_rx_action return" in probes.fds
            with Pressure(CPU, Mode.PING), statistics_enabled():
                time.sleep(1)
            # Theirs are the only ones; the kernel cuts their names to the same 15 bytes.
            runs = [each.get("run_cnt", 0) for each in programs() if each["type"] == "kprobe"]
            assert len(runs) == 2
            assert min(runs) > 0
        finally:
            probes.close()


def test_stalls_are_told(request_: Request, first: Probes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service with kept programs sees a real stall, and blames the right task."""
    first.close()
    path = Path(request_.cache_dir, cache.FILE)
    before = path.stat()
    monkeypatch.setenv("CACHE_DIRECTORY", request_.cache_dir)
    with Daemon() as daemon, Injector(CPU) as injector, Pressure(CPU, Mode.PING) as pressure:
        truth = injector.inject(Kind.BH_OFF, 80, pressure=pressure)
        lines = daemon.of(truth)
        resolved = check_life(lines)
        assert resolved["verdict"] == "softirqs_disabled"
        assert {event["blocker"]["tid"] for event in lines} == {truth.tid}
        # Not in each: some kernels do not unwind from within a retpoline.
        assert any(truth.symbol in functions(event) for event in lines)
        assert cache.ABILITY not in {each["ability"] for each in daemon.started["missing"]}
    # Compiled anew it would have been written anew.
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("how", ["damaged", "refused", "without a program"])
def test_what_is_no_good(request_: Request, first: Probes, how: str) -> None:
    """Compiled anew, and kept in its stead; nothing of the attempt stays."""
    first.close()
    kept = Cache(Path(request_.cache_dir))
    path = Path(request_.cache_dir, cache.FILE)
    key = cache.key(request_, nmi="prog:nmi" in first.description.fds)
    compiled = kept.read(key)
    assert compiled is not None
    good = path.read_bytes()
    code = dict(compiled.programs)
    if how == "damaged":
        path.write_bytes(good[:-8])
    elif how == "refused":
        # Ends without an exit: the last hook's program, when all others are attached.
        code["handle_hrtimer_expire"] = RETURN_ZERO[:8]
    else:
        del code["handle_softirq_raise"]
    if how != "damaged":
        kept.write(key, replace(compiled, programs=code))
    others = bpf_objects()
    again = ProbeChild(request_).result()
    try:
        assert again.description.compile_ms is not None
        assert again.description.missing == first.description.missing
        assert path.read_bytes() == good
        links = {one for one in bpf_objects() - others if one[0] == "link"}
        assert links
        assert links <= bpf_objects_of(os.getpid())
    finally:
        again.close()


@pytest.mark.parametrize("what", ["open to all", "not there"])
def test_what_is_not_ours(request_: Request, tmp_path: Path, what: str) -> None:
    """Neither taken nor written, and said to be missing; the service starts as ever."""
    directory = Path(request_.cache_dir)
    if what == "open to all":
        directory.chmod(0o777)
    else:
        directory.rmdir()
    probes = ProbeChild(request_).result()
    probes.close()
    assert probes.description.compile_ms is not None
    told = [each for each in probes.description.missing if each.ability == cache.ABILITY]
    assert len(told) == 1
    assert str(directory) in told[0].reason
    assert not directory.exists() or not list(directory.iterdir())
