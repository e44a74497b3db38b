"""``check`` and the refusals of ``run``, as real processes on the running kernel."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stalld.check import kernel, price, stimulus
from stalld.check.probes import try_probes
from stalld.detector import TICK_FUNCTIONS, tick_ns
from stalld.enrich.kallsyms import Kallsyms
from stalld.errors import MissingAbilityError, ProbeError
from stalld.probe import headers
from stalld.probe.btf import VMLINUX_BTF, Btf
from stalld.probe.client import ProbeChild, bpf_directory, possible_cpus
from stalld.probe.protocol import Request
from tests.kernel.daemon import COMMAND, bpf_objects, descriptors_of
from tests.service.surroundings import until
from tests.slowness import SLOWNESS, slow

pytestmark = pytest.mark.kernel

NOBODY = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
EVERYTHING = Request(possible_cpus(), str(bpf_directory()), VMLINUX_BTF)
BCC = "/usr/lib/python3/dist-packages/bcc"


def nobody(*names: str) -> list[str]:
    """Runs a command as nobody with exactly these capabilities."""
    caps = ",".join(["-all", *(f"+{name}" for name in names)])
    return [*NOBODY, f"--inh-caps={caps}", f"--ambient-caps={caps}", f"--bounding-set={caps}"]


def hiding(mount: str) -> list[str]:
    """Runs a command in a mount namespace of its own, after ``mount``."""
    return ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh"]


def run(*command: str, how: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*(how or []), COMMAND, *command],
        capture_output=True,
        text=True,
        timeout=slow(90),
        check=False,
    )


def check(how: list[str] | None = None) -> tuple[int, dict[str, Any], dict[str, dict[str, Any]]]:
    """Exit status, the object, its items by name; nothing may be on stderr."""
    done = run("check", "--json", how=how)
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    report = json.loads(done.stdout)
    return done.returncode, report, {item["name"]: item for item in report["items"]}


def refusal(kind: type[ProbeError], **changes: Any) -> str:
    """What the real child answers to a request that cannot work."""
    with pytest.raises(kind) as caught:
        ProbeChild(replace(EVERYTHING, **changes)).result()
    assert type(caught.value) is kind
    return str(caught.value)


def bpf_descriptors() -> list[str]:
    """BPF programs, maps and links that this process holds."""
    return [target for target in descriptors_of("self") if "bpf" in target]


@pytest.mark.parametrize("how", [[], nobody("bpf", "perfmon", "syslog")], ids=["root", "nobody"])
def test_can_run(how: list[str]) -> None:
    """With the three capabilities, root or not, everything attaches and the exit status is 0."""
    status, report, items = check(how)
    assert status == 0
    assert report["can_run"] is True
    assert report["verdict"] in ("full", "degraded")
    for name in ("sched_switch", "sched_wakeup", "softirq_raise", "softirq_entry", "softirq_exit"):
        assert items[f"raw tracepoint {name}"]["state"] == "ok"
    for name in ("capabilities", "libbpf", "bcc", "BPF programs", "perf buffers", "kernel symbols"):
        assert items[name]["state"] == "ok"
    for name in ("look-back", "softnet counters", "watched threads", "price"):
        assert items[name]["state"] == "ok"
    assert {"steal clock", "NMI sampler"} <= items.keys()
    for item in report["items"]:
        assert item["detail"]
        assert item["state"] == "ok" or (item["effect"] and item["remedy"])


def test_behaviour_is_observed() -> None:
    """Root's load shows how this kernel serves softirqs, in agreement with its symbols."""
    for _ in range(4):
        # On a busy machine 0.3 s may show nothing; the answer is then null, never wrong.
        _, report, items = check()
        if report["serves_inline"] is not None:
            break
    if "has a ksoftirqd_running()" in items["softirqs while ksoftirqd waits"]["detail"]:
        assert report["serves_inline"] is False
    elif tuple(int(n) for n in os.uname().release.split(".")[:2]) >= (6, 5):
        assert report["serves_inline"] is True


def test_prices() -> None:
    """Root is told what each program and a tick of the look-back cost; those are no fancies."""
    _, _, items = check()
    costs = dict(re.findall(r"(\w+) (\d+)[, ]", items["price"]["detail"].partition("(")[0]))
    assert set(costs) == set(price.HOT_PATH)
    assert all(int(ns) < 20_000 * SLOWNESS for ns in costs.values())
    found = re.search(
        r"(\d+) ns a (?:tick|sample), ([\d.]+)% of a busy CPU at (\d+)",
        items["look-back"]["detail"],
    )
    assert found
    assert 100 < int(found[1]) < 200_000 * SLOWNESS
    assert float(found[2]) == pytest.approx(int(found[1]) * int(found[3]) / 1e7, rel=0.1)


def test_no_prices() -> None:
    """Without CAP_SYS_ADMIN nothing is measured, which is said and is no degradation."""
    _, _, items = check(nobody("bpf", "perfmon", "syslog"))
    for name in ("price", "look-back"):
        assert items[name]["state"] == "ok"
        assert "not measured: " in items[name]["detail"]
        assert "CAP_SYS_ADMIN" in items[name]["detail"]


def test_statistics_are_the_kernels() -> None:
    """A meter counts the runs that bpftool shows, of the program behind the link."""
    probes = ProbeChild(EVERYTHING).result()
    try:
        link = probes.fds["link:sched_switch"]
        about = Path(f"/proc/self/fdinfo/{link}").read_text()
        number = re.search(r"^prog_id:\s+(\d+)$", about, re.MULTILINE)
        assert number
        with price.Meter({"sched_switch": link}) as meter:
            time.sleep(0.1)
            told = subprocess.run(
                ["bpftool", "--json", "prog", "show", "id", number[1]],
                capture_output=True,
                text=True,
                check=True,
            )
    finally:
        probes.close()
    runs = json.loads(told.stdout)["run_cnt"]
    assert 0 < runs <= meter.costs["sched_switch"].runs < 10 * runs
    assert meter.costs["sched_switch"].ns > 0
    assert meter.costs[price.EMPTY].runs > 0


def test_tick_functions() -> None:
    """The check finds the tick's functions where the service does."""
    kallsyms = Kallsyms.load()
    wanted = [kallsyms.address(name) for name in TICK_FUNCTIONS]
    assert kernel.symbols().tick_functions == wanted
    assert any(wanted)


def test_nmi_sampler_is_tried() -> None:
    """Where the program is loaded the counters are really opened: nothing else decides."""
    child = ProbeChild(replace(EVERYTHING, nmi="always"))
    items = {item.name: item for item in try_probes(tick_ns(), kernel.symbols(), child).items}
    found = items["NMI sampler"]
    if any(Path("/sys/bus/event_source/devices").glob("cpu*")):
        assert found.state == "ok"
    else:
        assert found.state == "degraded"
        assert "no performance counters" in found.detail
        assert "PMU" in found.remedy
    assert not bpf_descriptors()


def test_the_load_is_bounded() -> None:
    """When nothing is ever seen, the load ends at its limit and leaves no process."""
    before = time.monotonic()
    took_s = stimulus.stimulate(max(os.sched_getaffinity(0)), lambda: False)
    assert took_s == stimulus.LIMIT_S
    assert time.monotonic() - before < stimulus.LIMIT_S + 1
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.parametrize("interrupted", [False, True], ids=["done", "Ctrl-C"])
def test_nothing_stays(interrupted: bool) -> None:
    """`check` leaves no program loaded and no process, whether it is let do its work or not."""
    before = bpf_objects()
    with subprocess.Popen(
        [COMMAND, "check"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        if interrupted:
            # As a terminal does it: the whole group gets the signal.
            until(lambda: bpf_objects() - before, timeout_s=90, what="a program that is loaded")
            os.killpg(process.pid, signal.SIGINT)
        assert process.wait(slow(90)) == (130 if interrupted else 0)
        assert process.stderr is not None
        assert process.stderr.read() == ""
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    # Not while the kernel empties the program array: docs/decisions/0004.
    time.sleep(1)
    until(lambda: not bpf_objects() - before, what="the kernel forgets the programs")


def test_table() -> None:
    """For people the last line is the verdict."""
    done = run("check")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].startswith(("full", "degraded: "))


@pytest.mark.parametrize(
    ("held", "missing"),
    [
        ((), "CAP_BPF, CAP_PERFMON and CAP_SYSLOG are missing"),
        (("perfmon", "syslog"), "CAP_BPF is missing"),
        (("bpf", "syslog"), "CAP_PERFMON is missing"),
    ],
)
def test_check_names_missing_capabilities(held: tuple[str, ...], missing: str) -> None:
    """Without a capability: exit 1, its name and the remedy in the verdict."""
    status, report, items = check(nobody(*held))
    assert status == 1
    assert report["summary"].startswith(f"cannot run: {missing}; run as root, or grant CAP_")
    assert items["BPF programs"]["state"] == "missing"


@pytest.mark.parametrize(
    ("held", "missing"),
    [
        ((), "CAP_BPF and CAP_PERFMON are missing"),
        (("perfmon",), "CAP_BPF is missing"),
        (("bpf",), "CAP_PERFMON is missing"),
    ],
)
def test_run_names_missing_capabilities(held: tuple[str, ...], missing: str) -> None:
    """`run` without a capability: exit 1, no event, one line that names it and the remedy."""
    done = run("run", how=nobody(*held))
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("softirq-stalld: ")]
    assert line == done.stderr.splitlines()[-1]
    assert line.startswith(f"softirq-stalld: {missing} (")
    assert "grant CAP_" in line
    assert "Traceback" not in done.stderr


def test_without_syslog() -> None:
    """Without CAP_SYSLOG it can run, and `check` says that the symbols are hidden."""
    status, report, items = check(nobody("bpf", "perfmon"))
    assert status == 0
    assert items["capabilities"]["state"] == "degraded"
    if int(Path("/proc/sys/kernel/perf_event_paranoid").read_text()) > 1:
        assert items["kernel symbols"]["state"] == "degraded"
        assert "kernel symbols (degraded)" in report["summary"]
        for name in ("look-back", "softnet counters"):
            assert items[name]["state"] == "degraded"
            assert items[name]["effect"]
            assert items[name]["remedy"]
        assert "hides the addresses" in items["look-back"]["detail"]


MISSING = [
    pytest.param("mount -t tmpfs none /sys/kernel/btf", "BTF", "CONFIG_DEBUG_INFO_BTF", id="btf"),
    pytest.param(f"mount -t tmpfs none {BCC}", "bcc", "apt install python3-bpfcc", id="bcc"),
    pytest.param(
        "mount --bind /dev/null $(ldconfig -p | sed -n 's/.*libbpf.so.1 .*=> //p' | head -1)",
        "libbpf",
        "apt install libbpf1",
        id="libbpf",
    ),
]


@pytest.mark.parametrize(("mount", "name", "remedy"), MISSING)
def test_check_names_what_is_missing(mount: str, name: str, remedy: str) -> None:
    """Without BTF, bcc or libbpf: exit 1, which one and the remedy."""
    if name == "BTF" and has_headers():
        pytest.skip("the installed kernel headers stand in for BTF")
    status, report, items = check(hiding(mount))
    assert status == 1
    assert items[name]["state"] == "missing"
    assert remedy in report["summary"]


@pytest.mark.parametrize(("mount", "name", "remedy"), MISSING)
def test_run_names_what_is_missing(mount: str, name: str, remedy: str) -> None:
    """`run` without BTF, bcc or libbpf: exit 1 and one line with the remedy."""
    if name == "BTF" and has_headers():
        pytest.skip("the installed kernel headers stand in for BTF")
    done = run("run", how=hiding(mount))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert name in done.stderr
    assert remedy in done.stderr


def has_headers() -> bool:
    try:
        headers.distribution_headers()
    except MissingAbilityError:
        return False
    return True


RENAMED = f"""\
#!{sys.executable}
import sys
from stalld.probe.__main__ import main
from stalld.probe.attacher import PROGRAMS
PROGRAMS["no_such_tracepoint"] = PROGRAMS["softirq_exit"]
sys.exit(main())
"""


def test_unknown_tracepoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A raw tracepoint that the kernel refuses is named, and nothing stays attached."""
    child = tmp_path / "child"
    child.write_text(RENAMED)
    child.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(child))
    text = refusal(MissingAbilityError, hooks=["softirq_exit", "no_such_tracepoint"])
    assert "raw tracepoint no_such_tracepoint: No such file or directory" in text
    assert not bpf_descriptors()


def test_no_btf_and_no_headers(tmp_path: Path) -> None:
    """Neither BTF nor headers: both remedies are named."""
    if has_headers():
        pytest.skip("the installed kernel headers stand in for BTF")
    text = refusal(MissingAbilityError, btf_path=str(tmp_path / "none"))
    assert "CONFIG_DEBUG_INFO_BTF=y" in text
    assert f"linux-headers-{os.uname().release}" in text


def test_broken_btf(tmp_path: Path) -> None:
    """A file that is no BTF is refused by its name."""
    path = tmp_path / "vmlinux"
    path.write_bytes(b"\0" * 64)
    assert str(path) in refusal(MissingAbilityError, btf_path=str(path))


def test_unknown_field(monkeypatch: pytest.MonkeyPatch) -> None:
    """A field this kernel does not have is named with its struct."""
    monkeypatch.setitem(headers.FIELDS, "task_struct", (("pid",), ("no_such_field", "older")))
    btf = Btf()
    try:
        with pytest.raises(MissingAbilityError, match=r"task_struct\.no_such_field or older"):
            headers.structs(btf)
    finally:
        btf.close()


def doctored(tmp_path: Path, name: str, old: str, new: str) -> str:
    """A copy of the BPF sources in which the first ``old`` of a file is ``new``."""
    copy = tmp_path / "bpf"
    shutil.copytree(bpf_directory(), copy)
    text = (copy / name).read_text()
    assert old in text
    (copy / name).write_text(text.replace(old, new, 1))
    return str(copy)


def test_compiler_errors_come_back_whole(tmp_path: Path) -> None:
    """A syntax error comes back with clang's words, the file, the line and the source."""
    bpf_dir = doctored(tmp_path, "tick.c", "if (!pending", "oops if (!pending")
    text = refusal(ProbeError, bpf_dir=bpf_dir)
    number = 1 + (Path(bpf_dir) / "tick.c").read_text().split("oops")[0].count("\n")
    assert f"bpf/tick.c:{number}:" in text
    assert "error: " in text
    assert "oops if (!pending" in text


def test_verifier_errors_come_back_whole(tmp_path: Path) -> None:
    """A refused program comes back with its hook and the verifier's log."""
    bpf_dir = doctored(
        tmp_path,
        "tick.c",
        "	if (!pending",
        "	pending |= *(volatile u64 *)8;\n	if (!pending",
    )
    text = refusal(ProbeError, bpf_dir=bpf_dir)
    assert "the kernel refused the program for hrtimer_expire_entry" in text
    assert "invalid mem access" in text
    assert "processed " in text
