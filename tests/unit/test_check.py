"""``check`` without a kernel: what is concluded from what was found."""

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stalld.check import attached, host, kernel
from stalld.check.attached import described, nmi_sampler
from stalld.check.probes import behaviour_item, watched_threads
from stalld.check.report import Item, Report, State, render
from stalld.check.ticks import Look, look_back, softnet_counters, softnet_stat, steal_clock
from stalld.enrich.softnet import Softnet
from stalld.perf import SamplerError
from stalld.probe import capabilities
from stalld.probe.client import Probes
from stalld.probe.protocol import (
    NMI_SAMPLER,
    NO_NMI,
    OF_A_TASK,
    Attached,
    Description,
    Missing,
)
from tests.unit import make

BPF, PERFMON, SYSLOG, ADMIN = 1 << 39, 1 << 38, 1 << 34, 1 << 21


def report(*items: Item) -> Report:
    return Report("1.2", "6.1.0", items)


def item(name: str, state: State, *, required: bool = False) -> Item:
    return Item(name, state, f"about {name}", "the effect", "the remedy", required)


def description(how: str, *missing: Missing) -> Description:
    return Description(
        structs="btf",
        net_rx_action=how,
        attached=[Attached("sched_switch", "raw_tracepoint"), Attached("task", "iterator")],
        missing=list(missing),
        fds=[],
        bcc_version="0.26.0",
        compile_ms=200.5,
        attach_ms=12.0,
    )


@pytest.mark.parametrize(
    ("items", "verdict", "can_run", "summary"),
    [
        ([item("a", State.OK)], "full", True, "full"),
        (
            [item("a", State.OK), item("b", State.DEGRADED), item("c", State.MISSING)],
            "degraded",
            True,
            "degraded: b (degraded), c (missing)",
        ),
        (
            [item("b", State.DEGRADED, required=True)],
            "degraded",
            True,
            "degraded: b (degraded)",
        ),
        (
            [
                item("a", State.DEGRADED),
                item("b", State.MISSING, required=True),
                item("c", State.MISSING, required=True),
            ],
            "cannot run",
            False,
            "cannot run: about b; the remedy",
        ),
    ],
)
def test_verdict(items: list[Item], verdict: str, can_run: bool, summary: str) -> None:
    """Only a required ability that is missing keeps the service from running; the first counts."""
    found = report(*items)
    assert (found.verdict, found.can_run, found.summary) == (verdict, can_run, summary)


def test_table() -> None:
    """Details stand in one column, effect and remedy below them, the verdict comes last."""
    lines = render(report(item("a", State.OK), item("longer", State.MISSING))).splitlines()
    assert lines[0] == "softirq-stalld 1.2 on Linux 6.1.0"
    assert [line.find("about") for line in lines if "about" in line] == [18, 18]
    assert sum("do:" in line for line in lines) == 1
    assert sum("means:" in line for line in lines) == 2
    assert lines[-1] == "degraded: longer (missing)"
    assert not any(line.endswith(" ") for line in lines)


def test_table_keeps_the_compilers_lines() -> None:
    """What a compiler said keeps its lines, however long, each under the detail."""
    text = f"refused:\n{'x ' * 100}end\n  ^"
    lines = render(report(Item("BPF", State.MISSING, text))).splitlines()
    assert lines[2:5] == [
        "missing   BPF  refused:",
        f"               {'x ' * 100}end",
        "                 ^",
    ]


def test_long_details_wrap() -> None:
    """A long detail is wrapped under itself and loses no word."""
    words = [f"word{n}" for n in range(60)]
    text = render(report(Item("a", State.OK, " ".join(words))))
    assert max(map(len, text.splitlines())) <= 110
    assert [word for word in text.split() if word.startswith("word")] == words


def test_json() -> None:
    """JSON is one object on one line with everything the table says."""
    text = report(item("a", State.DEGRADED)).to_json()
    assert "\n" not in text
    found = json.loads(text)
    assert found["verdict"] == "degraded"
    assert found["can_run"] is True
    assert found["serves_inline"] is None
    assert found["items"] == [
        {
            "name": "a",
            "state": "degraded",
            "detail": "about a",
            "effect": "the effect",
            "remedy": "the remedy",
            "required": False,
        }
    ]


@pytest.mark.parametrize(
    ("mask", "missing"),
    [
        (0, ["CAP_BPF", "CAP_PERFMON", "CAP_SYSLOG"]),
        (BPF | PERFMON | SYSLOG, []),
        (BPF, ["CAP_PERFMON", "CAP_SYSLOG"]),
        (ADMIN, ["CAP_SYSLOG"]),
    ],
)
def test_lacking_capabilities(mask: int, missing: list[str]) -> None:
    """CAP_SYS_ADMIN holds CAP_BPF and CAP_PERFMON, yet not CAP_SYSLOG."""
    assert capabilities.lacking(mask, (*capabilities.LOADING, "CAP_SYSLOG")) == missing


@pytest.mark.parametrize(
    ("mask", "state"),
    [(0, State.MISSING), (BPF | PERFMON, State.DEGRADED), (BPF | PERFMON | SYSLOG, State.OK)],
)
def test_capabilities_item(mask: int, state: State) -> None:
    """Without CAP_SYSLOG the service runs degraded, without the others not at all."""
    assert host.granted(mask).state is state


@pytest.mark.parametrize(
    ("mask", "number", "states"),
    [
        (BPF, errno.EACCES, []),
        (PERFMON, 0, [State.OK]),
        (PERFMON, errno.EACCES, [State.MISSING]),
        (PERFMON | ADMIN, errno.EACCES, [State.DEGRADED]),
    ],
)
def test_perf_events_item(
    mask: int, number: int, states: list[State], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where CAP_PERFMON is not enough root can run it, yet the service cannot."""
    error = OSError(number, os.strerror(number)) if number else None
    monkeypatch.setattr(capabilities, "without_admin", lambda attempt: error)
    items = host.perf_events(mask)
    assert [item.state for item in items] == states
    for item in items:
        assert item.state is State.OK or "perf_event_paranoid=2" in item.remedy


@pytest.mark.skipif(os.geteuid() != 0, reason="CAP_SYS_ADMIN is needed, to do without it")
def test_without_admin() -> None:
    """An attempt is made without CAP_SYS_ADMIN, and this thread keeps it."""
    before = capabilities.effective("/proc/thread-self/status")
    seen: list[int] = []

    def attempt() -> None:
        seen.append(capabilities.effective("/proc/thread-self/status"))
        raise PermissionError(errno.EACCES, "no")

    error = capabilities.without_admin(attempt)
    assert error is not None
    assert error.errno == errno.EACCES
    assert seen == [before & ~ADMIN]
    assert capabilities.effective("/proc/thread-self/status") == before
    assert capabilities.without_admin(lambda: None) is None


def test_effective_capabilities(tmp_path: Path) -> None:
    """The effective set is read, not the permitted one; no file means no capability."""
    status = tmp_path / "status"
    status.write_text("Name:\tx\nCapPrm:\t000001ffffffffff\nCapEff:\t000000c400000000\n")
    assert capabilities.effective(str(status)) == BPF | PERFMON | SYSLOG
    assert capabilities.effective(str(tmp_path / "none")) == 0


@pytest.mark.parametrize(
    ("number", "mask", "wanted"),
    [
        (errno.EPERM, BPF, "CAP_PERFMON is missing"),
        (errno.EPERM, 0, "CAP_BPF and CAP_PERFMON are missing"),
        (errno.EPERM, BPF | PERFMON, "although the capabilities are there"),
        (errno.ENOSYS, ADMIN, "CONFIG_BPF_SYSCALL=y"),
        (errno.EINVAL, ADMIN, "not supported"),
    ],
)
def test_refusal(number: int, mask: int, wanted: str) -> None:
    """A refused system call names the missing capability, or else what may stand behind it."""
    text = capabilities.refusal("creating a BPF map", number, mask)
    assert wanted in text
    assert "creating a BPF map: " in text


DYNAMIC = "CONFIG_PREEMPT_NONE=y\nCONFIG_PREEMPT_DYNAMIC=y\n"


@pytest.mark.parametrize(
    ("debug", "cmdline", "config", "version", "model"),
    [
        ("none voluntary (full) lazy\n", "preempt=none", DYNAMIC, "", "full (now)"),
        ("", "quiet preempt=lazy ro", DYNAMIC, "", "lazy (kernel command line)"),
        ("", "preempt=full", "CONFIG_PREEMPT_NONE=y\n", "#1 SMP", "none (kernel configuration)"),
        ("", "", DYNAMIC, "#1 SMP PREEMPT_DYNAMIC", "none (kernel configuration)"),
        ("", "", "CONFIG_PREEMPT=y\n", "", "full (kernel configuration)"),
        ("", "", "CONFIG_PREEMPT_VOLUNTARY=y\n", "", "voluntary (kernel configuration)"),
        ("", "", "", "#1 SMP PREEMPT_RT 6.1", "rt (uname -v)"),
        ("", "", "", "#1 SMP PREEMPT 6.1", "full (uname -v)"),
        ("", "", "", "#1 SMP PREEMPT_DYNAMIC", ""),
        ("", "", "", "#1 SMP", ""),
    ],
)
def test_preemption_model(debug: str, cmdline: str, config: str, version: str, model: str) -> None:
    """The model in force beats the command line, that the configuration, that the version."""
    assert kernel.preemption_model(debug, cmdline, config, version) == model


@pytest.mark.parametrize(
    ("text", "state", "defers"),
    [
        ("0000000000000000 T _stext\n0000000000000000 t ksoftirqd_running\n", "degraded", True),
        ("ffffffff81000000 T _stext\nffffffff81000010 t run_ksoftirqd\n", "ok", False),
        ("ffffffff81000000 t ksoftirqd_running.isra.0\t[x]\n", "ok", True),
        ("", "degraded", False),
    ],
)
def test_symbols(tmp_path: Path, text: str, state: str, defers: bool) -> None:
    """Addresses that are all zero are hidden; ksoftirqd_running is found under any suffix."""
    path = tmp_path / "kallsyms"
    path.write_text(text)
    found = kernel.symbols(str(path))
    assert (found.item.state, found.defers) == (state, defers)


def test_no_symbols(tmp_path: Path) -> None:
    """A kernel without kallsyms degrades and is no traceback."""
    found = kernel.symbols(str(tmp_path / "none"))
    assert found.item.state is State.DEGRADED
    assert "No such file" in found.item.detail
    assert found.tick_functions == [0, 0]


@pytest.mark.parametrize(
    ("text", "addresses"),
    [
        ("ffffffff81000010 t tick_nohz_handler\n", [0xFFFFFFFF81000010, 0]),
        ("ffffffff81000020 T tick_sched_timer\n", [0, 0xFFFFFFFF81000020]),
        ("ffffffff81000020 t tick_sched_timer_dying\n", [0, 0]),
        ("0000000000000000 t tick_nohz_handler\n", [0, 0]),
        (
            "ffffffff81000010 t tick_nohz_handler\nffffffffc0000000 t tick_nohz_handler\t[x]\n",
            [0xFFFFFFFF81000010, 0],
        ),
    ],
)
def test_tick_functions(tmp_path: Path, text: str, addresses: list[int]) -> None:
    """The functions of the tick are found by their whole names, the kernel's own first."""
    path = tmp_path / "kallsyms"
    path.write_text(text)
    assert kernel.symbols(str(path)).tick_functions == addresses


def test_described() -> None:
    """Every hook is an item; where NET_RX stands in for net_rx_action, both reasons are told."""
    found = {
        item.name: item
        for item in described(
            description(
                "softirq",
                Missing("net_rx_action by kfunc", "EPERM", "x"),
                Missing("net_rx_action by kprobe", "none", "x"),
                Missing("raw tracepoint cpuhp_enter", "gone", "the effect"),
            )
        )
    }
    assert found["raw tracepoint sched_switch"].state is State.OK
    assert found["task iterator"].state is State.OK
    assert found["raw tracepoint cpuhp_enter"].state is State.DEGRADED
    assert found["raw tracepoint cpuhp_enter"].effect == "the effect"
    assert found["raw tracepoint cpuhp_enter"].detail == "not attached: gone"
    assert found["net_rx_action"].state is State.DEGRADED
    assert found["net_rx_action"].detail == "kfunc: EPERM; kprobe: none"


def test_described_kprobe() -> None:
    """A kprobe where kfunc is refused is no degradation, and the refusal is told."""
    missing = Missing("net_rx_action by kfunc", "EPERM", "x")
    found = {item.name: item for item in described(description("kprobe", missing))}
    assert found["net_rx_action"].state is State.OK
    assert found["net_rx_action"].detail == "traced by kprobe (kfunc: EPERM)"


@pytest.mark.parametrize(
    ("inline", "state", "word"),
    [(True, "ok", "inline"), (False, "ok", "deferred"), (None, "degraded", "not observed")],
)
def test_behaviour(inline: bool | None, state: str, word: str) -> None:
    """What was not observed is said so, whatever the symbols suggest."""
    found = behaviour_item(inline, "counts", defers=True)
    assert (found.state, found.detail.partition(":")[0]) == (state, word)
    assert "counts" in found.detail
    assert "has a ksoftirqd_running()" in found.detail


def test_what_is_missing_has_a_remedy() -> None:
    """Whatever hook the kernel refuses: why, what that means, what to do. Never told twice."""
    hooks = ["raw tracepoint napi_poll", "raw tracepoint cpuhp_enter", "task iterator"]
    hooks.append(f"cgroup{OF_A_TASK}")
    elsewhere = ["raw tracepoint lookback", NMI_SAMPLER]
    answer = description("softirq", *(Missing(name, "why", "what") for name in hooks + elsewhere))
    found = {item.name: item for item in described(replace(answer, attached=[]))}
    assert set(found) == {"BPF programs", "net_rx_action", *hooks}
    for name in hooks:
        assert found[name].state is State.DEGRADED
        assert "why" in found[name].detail
        assert found[name].effect == "what"
        assert found[name].remedy


@pytest.mark.parametrize("lines", ["one", "first\n\tsecond"])
def test_nothing_controls_the_terminal(lines: str) -> None:
    """Names of devices, say, are anybody's choice; they may be no Unicode either."""
    hostile = f"{lines} \x1b[2J\x9b\u202e\udcff"
    said = Item("a", State.MISSING, hostile, hostile, hostile, required=True)
    shown = render(report(said))
    assert all(line.isprintable() for line in shown.split("\n"))
    assert "\\x1b[2J" in shown


def test_the_look_back_is_an_item_of_its_own() -> None:
    """The second program on its hook is not told as a hook."""
    answer = description("kprobe")
    answer.attached.append(Attached("hrtimer_expire_entry", "raw_tracepoint"))
    answer.attached.append(Attached("hrtimer_expire_entry: lookback", "raw_tracepoint"))
    names = [item.name for item in described(answer)]
    assert [name for name in names if "hrtimer" in name] == ["raw tracepoint hrtimer_expire_entry"]


PLACES = {"steal": 64, "cpustat": 128, "softnet": -64}


def look(**changes: Any) -> Look:
    """A look at a CPU whose ticks all came."""
    fields: dict[str, Any] = {
        "cpu": 3,
        "took_ms": 250,
        "refused": "",
        "hidden": False,
        "known": True,
        "arrived": 62,
        "ticks": [make.tick(0), make.tick(4, steal_ns=7_000_000, processed=1500, squeezed=2)],
        "before": Softnet(1000, 0, 1, 0, 0),
        "after": Softnet(1600, 0, 2, 0, 0),
        "places": PLACES,
        "steal_version": 6,
    }
    return Look(**(fields | changes))


def test_look_back() -> None:
    """Ticks that arrive are counted, with the price and how to be rid of it."""
    found = look_back(look(), "2000 ns a tick")
    assert found.state is State.OK
    assert found.detail == "62 ticks of CPU 3 arrived in 250 ms; 2000 ns a tick"
    assert "detect.lookback = false turns it off" in found.effect


@pytest.mark.parametrize(
    ("changes", "detail", "remedy"),
    [
        ({"refused": "gone", "known": False}, "hrtimer_expire_entry: gone", "this tracepoint"),
        ({"known": False, "hidden": True}, "hides the addresses", "see kernel symbols"),
        ({"known": False}, "do not name the function", "CONFIG_HIGH_RES_TIMERS=y"),
        ({}, "no tick came to the ring of CPU 3 in 250 ms", "high resolution timers"),
    ],
)
def test_no_look_back(changes: dict[str, Any], detail: str, remedy: str) -> None:
    """Without ticks in the ring: the first reason why, what is not seen, and what to do."""
    found = look_back(look(ticks=[], arrived=0, **changes), "no price")
    assert (found.name, found.state) == ("look-back", State.DEGRADED)
    assert detail in found.detail
    assert "nothing is known of what ran before" in found.effect
    assert "interrupts off are not seen" in found.effect
    assert remedy in found.remedy


@pytest.mark.parametrize(
    ("virtual", "changes", "state", "detail"),
    [
        (False, {"steal_version": 0}, State.OK, "no hypervisor"),
        (True, {}, State.OK, "7 ms of CPU 3 stolen"),
        (True, {"steal_version": 0, "places": {}}, State.DEGRADED, "does not tell where"),
        (True, {"steal_version": 0}, State.DEGRADED, "keeps no steal clock"),
        (True, {"steal_version": 0, "ticks": []}, State.DEGRADED, "not observed"),
    ],
)
def test_steal_clock(virtual: bool, changes: dict[str, Any], state: State, detail: str) -> None:
    """Only a virtual machine needs one; without one, what its verdicts then rest on is told."""
    found = steal_clock(look(**changes), virtual)
    assert found.state is state
    assert detail in found.detail
    if state is not State.OK:
        assert "only where the stack shows it, else the verdict is unknown" in found.effect
        assert found.remedy


@pytest.mark.parametrize(
    ("changes", "state", "detail"),
    [
        ({}, State.OK, "CPU 3: 600 packets"),
        (
            {"before": Softnet(2**32 - 100, 0, 1), "after": Softnet(1600, 0, 2)},
            State.OK,
            "CPU 3: 1700 packets",
        ),
        ({"before": None}, State.OK, "not readable"),
        ({"before": Softnet(1501, 0, 1)}, State.DEGRADED, "a tick read processed 1500"),
        ({"after": Softnet(1600, 0, 1)}, State.DEGRADED, "told 1 before and 1 after"),
        ({"places": PLACES | {"dropped": 8, "received_rps": 9, "flow_limit": 10}}, State.OK, ""),
        (
            {
                "places": PLACES | {"dropped": 8},
                "after": Softnet(1600, 3, 2),
                "ticks": [make.tick(4, processed=1500, squeezed=2, dropped=4)],
            },
            State.DEGRADED,
            "a tick read dropped 4",
        ),
        (
            {"places": PLACES | {"received_rps": 8}, "before": Softnet(1000, 0, 1, 5)},
            State.OK,
            "600 packets",
        ),
        ({"places": {}}, State.DEGRADED, "does not tell where"),
        ({"ticks": []}, State.DEGRADED, "not observed"),
    ],
)
def test_softnet_counters(changes: dict[str, Any], state: State, detail: str) -> None:
    """What a tick read must lie between what /proc told before and after, across a wrap too."""
    found = softnet_counters(look(**changes))
    assert found.state is state
    assert detail in found.detail
    if state is not State.OK:
        assert found.effect
        assert found.remedy


ROW = "{:08x} 00000000 {:08x} 0 0 0 0 0 0 0 0 00000000"


@pytest.mark.parametrize(
    ("rows", "cpu", "counters"),
    [
        ([ROW.format(10, 1), ROW.format(20, 2)], 0, (10, 1)),
        ([ROW.format(10, 1), ROW.format(20, 2)], 3, (20, 2)),
        ([ROW.format(10, 1) + " 0 0 0", ROW.format(20, 2) + " 3 0 0"], 3, (20, 2)),
        ([ROW.format(10, 1) + " 0 0 0"], 3, None),
        (["not hexadecimal"], 0, None),
        (["1"], 0, None),
    ],
)
def test_softnet_stat(
    tmp_path: Path, rows: list[str], cpu: int, counters: tuple[int, int] | None
) -> None:
    """Only online CPUs have a row; it names its CPU since 5.10, before that its place does."""
    path = tmp_path / "softnet_stat"
    path.write_text("\n".join(rows) + "\n")
    found = softnet_stat(cpu, [0, 3], str(path))
    assert (found and (found.processed, found.squeezed)) == counters


def test_no_softnet_stat(tmp_path: Path) -> None:
    """A /proc without it is no error."""
    assert softnet_stat(0, [0], str(tmp_path / "none")) is None


NAMES = [b"irq/24-ACPI:Ged", b"ksoftirqd/0", b"migration/0", b"ksoftirqd/1", b"migration/1"]


def test_watched_threads() -> None:
    """How many of each kind, in the order of the patterns."""
    found = watched_threads(NAMES, 0, True)
    assert (found.name, found.state) == ("watched threads", State.OK)
    assert found.detail == "5: ksoftirqd 2, migration 2, irq 1 (detect.kthreads)"


@pytest.mark.parametrize(
    ("names", "left_out", "iterated", "detail"),
    [
        (NAMES, 2, True, "2 more found no place"),
        ([], 0, False, "none; without the task iterator"),
    ],
)
def test_unwatched_threads(names: list[bytes], left_out: int, iterated: bool, detail: str) -> None:
    """Threads that found no place, and a kernel that lists none, are told."""
    found = watched_threads(names, left_out, iterated)
    assert found.state is State.DEGRADED
    assert detail in found.detail
    assert found.effect
    assert found.remedy


class Sampler:
    """Stands in for the NMI sampler: samples on two CPUs, or refuses."""

    refusal = ""
    closed = 0
    cpus = (0, 1)

    @classmethod
    def open(cls, program_fd: int, cpus: list[int], frequency_hz: int) -> "Sampler":
        assert program_fd == 9
        if cls.refusal:
            raise SamplerError(cls.refusal)
        return cls()

    def close(self) -> None:
        type(self).closed += 1


@pytest.fixture
def sampler(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Item]:
    """The item of a machine whose sampler starts, or refuses with these words."""

    def found(refusal: str) -> Item:
        monkeypatch.setattr(attached, "NmiSampler", type("Made", (Sampler,), {"refusal": refusal}))
        return nmi_sampler(Probes(description("kprobe"), {"prog:nmi": 9}))

    return found


def test_nmi_sampler(sampler: Callable[[str], Item]) -> None:
    """Where its program is loaded it is really opened, and closed again."""
    found = sampler("")
    assert found.state is State.OK
    assert "on 2 CPUs" in found.detail
    assert attached.NmiSampler.closed == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("refusal", "detail", "remedy"),
    [
        ("busy: pinned events; stop the profiler", "busy: pinned events", "stop the profiler"),
        ("refused: CAP_PERFMON is missing", "refused: CAP_PERFMON is missing", "see the reason"),
    ],
)
def test_refused_sampler(
    sampler: Callable[[str], Item], refusal: str, detail: str, remedy: str
) -> None:
    """A refusal is told with its remedy."""
    found = sampler(refusal)
    assert (found.state, found.effect) == (State.DEGRADED, NO_NMI)
    assert (found.detail, found.remedy) == (detail, remedy)


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [("no hardware counter of cycles (PMU) on this machine", "virtual PMU"), ("s390x", "none yet")],
)
def test_no_sampler(reason: str, remedy: str) -> None:
    """Where its program is not even loaded, the child said why."""
    answer = description("kprobe", Missing(NMI_SAMPLER, reason, NO_NMI))
    found = nmi_sampler(Probes(answer, {}))
    assert (found.state, found.detail, found.effect) == (State.DEGRADED, reason, NO_NMI)
    assert remedy in found.remedy
