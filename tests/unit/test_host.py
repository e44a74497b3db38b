"""What the tracker asks about the machine: shared memory, symbols, the hypervisor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stalld.enrich.stack import Mode, Trimmed, below
from stalld.host import LocalHost, is_virtual, nohz_full, threads_softirqs
from stalld.records import NAPI_SLOTS, TickKind
from stalld.rings import NapiSlot, Polled
from stalld.track.model import Host
from tests.unit import make
from tests.unit.make import keep, tick

CPUS = 2


class Symbols:
    """Names every address, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[tuple[int, ...], str]] = []
        self.version = 0

    def trimmed(self, addresses: tuple[int, ...], kind: str) -> Trimmed:
        """Cuts nothing."""
        self.asked.append((addresses, kind))
        return Trimmed(tuple(map(self.format, addresses)), "kernel", True, 0, len(addresses))

    def format(self, address: int) -> str:
        """Any address."""
        return f"f{address:x}+0x1"


class Made:
    """A host whose maps are memory of our own."""

    def __init__(self, virtual: bool = False, threaded: bool = False) -> None:
        self.maps = make.maps(CPUS)
        self.rings = make.rings(self.maps)
        self.symbols = Symbols()
        symbols: Any = self.symbols
        self.host: Host = LocalHost(
            self.maps, self.rings, symbols, virtual, {"dropped": -64}, threaded=threaded
        )


def test_counts() -> None:
    """What the programs were told the place of."""
    assert "dropped" in Made().host.counts()
    assert "softnet" not in Made().host.counts()


def test_ticks() -> None:
    """Those of the CPU that is asked for, without a name looked up."""
    made = Made()
    keep(made.rings, 1, tick(5))
    assert (list(made.host.ticks(1)), list(made.host.ticks(0))) == ([tick(5)], [])
    assert made.symbols.asked == []


def test_ticks_are_a_copy() -> None:
    """What the kernel writes later does not change what was looked at."""
    made = Made()
    ticks = made.host.ticks(0)
    keep(made.rings, 0, tick(5))
    assert list(ticks) == []


def test_polled() -> None:
    """What the CPU polled in that stall, as long as it is its newest."""
    made = Made()
    made.maps.cpus[1].seq = 7
    made.rings._slots[NAPI_SLOTS] = NapiSlot(
        napi=1, ifindex=2, name=b"eth0", seq=7, stall_polls=3, stall_packets=30
    )
    assert made.host.polled(1, 7) == {(2, b"eth0"): Polled(3, 30, 0)}
    assert made.host.polled(1, 6) is None


def test_explain() -> None:
    """The stack of a tick is one that an interrupt took."""
    made = Made()
    found = made.host.explain(tick(5, stack=(1, 2)))
    assert found == (tick(5, stack=(1, 2)), "kernel", ("f1+0x1", "f2+0x1"))
    assert made.symbols.asked == [((1, 2), "tick")]


def test_explain_again() -> None:
    """A tick is named once, as long as the names stay; another one of the same time is its own."""
    made = Made()
    ticks = tick(5, stack=(1, 2)), tick(5, stack=(3,))
    for each in (ticks[0], ticks[0], ticks[1]):
        assert made.host.explain(each).sample is each
    assert [asked for asked, _ in made.symbols.asked] == [(1, 2), (3,)]
    made.symbols.version += 1
    assert made.host.explain(ticks[1]).frames == ("f3+0x1",)
    assert [asked for asked, _ in made.symbols.asked] == [(1, 2), (3,), (3,)]


@pytest.mark.parametrize(
    ("changes", "mode", "frames"),
    [
        ({"kind": TickKind.USER, "stack": ()}, "user", ()),
        ({"kind": TickKind.ADDRESS, "stack": (7,)}, "kernel", ("f7+0x1",)),
        ({"kind": TickKind.ADDRESS, "stack": (7,), "serving": 4}, "softirq", ("f7+0x1",)),
        ({"kind": TickKind.ADDRESS, "stack": (7,), "tid": 0}, "idle", ("f7+0x1",)),
    ],
)
def test_explain_without_a_walk(
    changes: dict[str, Any], mode: str, frames: tuple[str, ...]
) -> None:
    """User code has no stack; of the kernel the address is named, and what was in service."""
    made = Made()
    assert made.host.explain(tick(5, **changes))[1:] == (mode, frames)
    assert made.symbols.asked == []


def test_serves_inline() -> None:
    """As the shared state has learned."""
    made = Made()
    assert made.host.serves_inline() is None
    made.maps.cpus[1].inline_served = 3
    assert made.host.serves_inline() is True


@pytest.mark.parametrize(
    ("virtual", "version", "told"),
    [(False, 0, True), (True, 0, False), (True, 2, True), (True, 0xFFFFFFFF, True)],
)
def test_tells_steal(virtual: bool, version: int, told: bool) -> None:
    """A guest needs a hypervisor that counts its updates on that CPU; a real machine none."""
    made = Made(virtual)
    made.maps.cpus[1].steal_version = version
    assert made.host.tells_steal(1) is told
    assert made.host.tells_steal(0) is not virtual


FRAMES = ("own+0x1", "task+0x1")


@pytest.mark.parametrize(
    ("mode", "own", "tid", "found"),
    [
        ("softirq", 1, 7, "kernel"),
        ("softirq", 2, 7, "user"),
        ("softirq", 1, 0, "idle"),
        ("softirq", 2, 0, "idle"),
        ("hardirq", 1, 7, "kernel"),
        ("hardirq", 2, 7, "user"),
        ("hardirq", 1, 0, "idle"),
        ("kernel", 2, 7, None),
        ("user", 0, 7, None),
        ("idle", 2, 0, None),
        (None, 2, 7, None),
    ],
)
def test_below(mode: Mode | None, own: int, tid: int, found: str | None) -> None:
    """What an interrupt or softirq came over; what is neither came over nothing."""
    assert below(Trimmed(FRAMES, mode, mode is not None, 0, own), tid) == found


class TestVirtual:
    """Whether a hypervisor may take the CPUs away."""

    CPUINFO = "processor\t: 0\nmodel name\t: hypervisor inside\nflags\t\t: fpu vme{}\nbugs\t\t:\n"
    STAT = "cpu  10 0 20 3000 5 0 1 {} 0 0\ncpu0 10 0 20 3000 5 0 1 9 0 0\n"

    def made(self, root: Path, flag: str = "", stolen: int = 0) -> tuple[str, str]:
        """A /proc and a /sys."""
        (root / "proc").mkdir()
        (root / "sys").mkdir()
        (root / "proc/cpuinfo").write_text(self.CPUINFO.format(flag))
        (root / "proc/stat").write_text(self.STAT.format(stolen))
        return str(root / "proc"), str(root / "sys")

    def test_a_real_machine(self, tmp_path: Path) -> None:
        """No flag, no hypervisor's file, nothing stolen; a model's name says nothing."""
        assert not is_virtual(*self.made(tmp_path))

    def test_the_flag(self, tmp_path: Path) -> None:
        """x86 has a flag for it, and only a whole word counts."""
        assert is_virtual(*self.made(tmp_path, " hypervisor lahf_lm"))

    def test_a_flag_that_is_called_alike(self, tmp_path: Path) -> None:
        """Part of another word is not that flag."""
        assert not is_virtual(*self.made(tmp_path, " hypervisors"))

    @pytest.mark.parametrize("path", ["sys/hypervisor/type", "proc/device-tree/hypervisor"])
    def test_files(self, tmp_path: Path, path: str) -> None:
        """Xen and device trees have a file."""
        roots = self.made(tmp_path)
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).touch()
        assert is_virtual(*roots)

    def test_stolen_time(self, tmp_path: Path) -> None:
        """Time that was stolen from any CPU proves it."""
        assert is_virtual(*self.made(tmp_path, stolen=1))

    @pytest.mark.parametrize("line", ["cpu  10 0 20 3000", "cpu  10 0 20 3000 5 0 1"])
    def test_an_old_stat(self, tmp_path: Path, line: str) -> None:
        """A line without that column tells nothing."""
        proc, sys = self.made(tmp_path)
        Path(proc, "stat").write_text(f"{line}\n")
        assert not is_virtual(proc, sys)

    def test_this_machine(self) -> None:
        """The real files are read without an error."""
        assert is_virtual() in (True, False)


def test_threads_serve_softirqs() -> None:
    """Then nothing is served inline, whatever was seen."""
    made = Made(threaded=True)
    made.maps.cpus[0].inline_served = 100
    assert made.host.serves_inline() is False
    made = Made()
    made.maps.cpus[0].inline_served = 100
    assert made.host.serves_inline() is True


@pytest.mark.parametrize(
    ("version", "cmdline", "threaded"),
    [
        ("Linux version 6.12 #1 SMP PREEMPT_DYNAMIC Debian", "quiet", False),
        ("Linux version 6.12 #1 SMP PREEMPT_RT Debian", "quiet", True),
        ("Linux version 6.12 #1 SMP PREEMPT_DYNAMIC Debian", "quiet threadirqs", True),
    ],
)
def test_who_serves_softirqs(tmp_path: Path, version: str, cmdline: str, threaded: bool) -> None:
    """PREEMPT_RT, or the kernel's command line."""
    (tmp_path / "version").write_text(version)
    (tmp_path / "cmdline").write_text(f"{cmdline}\n")
    assert threads_softirqs(str(tmp_path)) is threaded


@pytest.mark.parametrize(
    ("text", "cpus"), [("2-4,7\n", {2, 3, 4, 7}), ("\n", set()), ("(null)\n", set())]
)
def test_stopped_ticks(tmp_path: Path, text: str, cpus: set[int]) -> None:
    """As the kernel lists them; older ones write "(null)" where there is none."""
    place = tmp_path / "devices/system/cpu/nohz_full"
    place.parent.mkdir(parents=True)
    place.write_text(text)
    assert nohz_full(str(tmp_path)) == cpus
    assert nohz_full(str(tmp_path / "none")) == set()
