"""``check`` without a kernel: what is concluded from what was found."""

import errno
import json
from pathlib import Path

import pytest

from stalld.check import host, kernel
from stalld.check.probes import behaviour_item, described
from stalld.check.report import Item, Report, State, render
from stalld.probe import capabilities
from stalld.probe.protocol import Attached, Description, Missing

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
    found, has = kernel.symbols(str(path))
    assert (found.state, has) == (state, defers)


def test_no_symbols(tmp_path: Path) -> None:
    """A kernel without kallsyms degrades and is no traceback."""
    found, _ = kernel.symbols(str(tmp_path / "none"))
    assert found.state is State.DEGRADED
    assert "No such file" in found.detail


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
