"""What the runner of the guests decides without a guest."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.vm import boot, outcome, report
from tests.vm.fetch import Archive
from tests.vm.kernels import KernelsError, chosen, supported

REPORT = """\
<testsuites><testsuite name="pytest">
<testcase classname="tests.vm.guest_tests.test_each_kind" name="test_softirq_hog" time="5.1"/>
<testcase classname="tests.kernel.test_check" name="test_table" time="1">
<failure message="assert 1 == 2&#10;and more">trace</failure></testcase>
<testcase classname="tests.kernel.test_symbols" name="test_known_function" time="0">
<skipped message="hidden"/></testcase>
</testsuite></testsuites>
"""


class Names(Archive):
    """An archive with these packages."""

    def __init__(self, *names: str) -> None:
        super().__init__(Path("/nowhere"), ["bookworm"])
        self._names = names

    def _run(self, *command: str, where: Path | None = None) -> str:
        return "\n".join(self._names)


def test_the_list_is_whole() -> None:
    """Each kernel of the list has a name of its own and, but for the running one, suites."""
    names = [kernel.name for kernel in supported()]
    assert len(set(names)) == len(names)
    assert [kernel.name for kernel in supported() if not kernel.suites] == ["running"]
    assert [kernel.name for kernel in chosen(["6.1"])] == ["6.1"]
    assert chosen([]) == supported()
    with pytest.raises(KernelsError, match=r"no kernel 4\.9"):
        chosen(["4.9"])


def test_newest_generic_image() -> None:
    """The newest version by its numbers; no cloud, unsigned or debug flavour, but the named one."""
    archive = Names(
        "linux-image-6.1.0-9-amd64",
        "linux-image-6.1.0-50-amd64",
        "linux-image-6.1.0-51-cloud-amd64",
        "linux-image-6.1.0-51-rt-amd64",
        "linux-image-6.1.0-51-amd64-unsigned",
        "linux-image-6.1.0-51-amd64-dbg",
        "linux-image-6.12.117+deb13-amd64",
        "linux-image-7.2.13+deb14-amd64",
        "linux-image-7.3-amd64",
    )
    assert archive.newest_image("6.1") == "6.1.0-50-amd64"
    assert archive.newest_image("6.12") == "6.12.117+deb13-amd64"
    assert archive.newest_image("7") == "7.3-amd64"
    assert archive.newest_image("6.1-rt") == "6.1.0-51-rt-amd64"
    with pytest.raises(KernelsError, match=r"no kernel 5\.10 in bookworm"):
        archive.newest_image("5.10")


def test_nothing_came_back(tmp_path: Path) -> None:
    """A guest that left nothing is a failure, whatever its exit status."""
    done = outcome.read("6.1", tmp_path, None, 3.0)
    assert not done.good
    assert done.failed is not None
    assert "NOT GOOD: did not boot" in report.summary(done)


def test_outcome(tmp_path: Path) -> None:
    """Tests, check and times are read back, and each has its place in the matrix."""
    (tmp_path / "outcome.json").write_text(
        '{"release": "6.1.0-50-amd64", "emulated": true, "check_s": 30, "seconds": 90, "check":'
        '{"can_run": true, "verdict": "degraded", "summary": "degraded: steal clock (degraded)",'
        '"serves_inline": false, "items": [{"name": "steal clock", "state": "degraded",'
        '"detail": "none", "effect": "less is told"}]}}'
    )
    (tmp_path / "kinds.xml").write_text(REPORT)
    done = outcome.read("6.1", tmp_path, None, 100.0)
    assert [case.result for case in done.cases] == ["passed", "failed", "skipped"]
    assert done.cases[1].reason == "assert 1 == 2"
    assert not done.good
    text = report.matrix([done], "short")
    assert "| steal clock | degraded |" in text
    assert "| `test_each_kind::test_softirq_hog` | passed |" in text
    assert "| `tests.kernel.test_check::test_table` | failed |" in text
    assert "deferred" in text
    assert "steal clock: none; less is told" in text
    good = done._replace(cases=[case for case in done.cases if case.result != "failed"])
    assert good.good


@pytest.mark.parametrize(
    ("kinds", "others", "happened"), [(0, 4, False), (0, 2, False), (-9, 1, False), (1, 1, True)]
)
def test_a_run_that_did_not_happen(tmp_path: Path, kinds: int, others: int, happened: bool) -> None:
    """What pytest did not find, or did not end, makes a kernel not good, whatever else passed."""
    statuses = {"kinds": kinds, "abilities": others}
    (tmp_path / "outcome.json").write_text(json.dumps({"statuses": statuses}))
    failed = outcome.read("6.1", tmp_path, None, 1.0).failed
    assert (failed is None) is happened
    assert happened or "did not run all tests" in (failed or "")


def test_half_a_report(tmp_path: Path) -> None:
    """A guest may have ended while pytest wrote."""
    (tmp_path / "outcome.json").write_text('{"release": "6.1"}')
    (tmp_path / "kinds.xml").write_text(REPORT[: len(REPORT) // 2])
    assert "not whole" in (outcome.read("6.1", tmp_path, None, 1.0).failed or "")


def waited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, timeout_s: float = 10
) -> tuple[bytes, str | None]:
    """What became of a program instead of a guest, which may be silent for half a second."""
    monkeypatch.setattr(boot, "SILENCE_S", 0.5)
    monkeypatch.setattr(boot, "_LOOK_EVERY_S", 0.05)
    command = ["sh", "-c", f"cd {tmp_path}; {script}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        return boot._wait(process, tmp_path, timeout_s)


def test_a_guest_that_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes, as long as its results grow."""
    script = "for n in 1 2 3 4; do sleep 0.3; echo >> tests.log; done; echo done"
    assert waited(tmp_path, monkeypatch, script) == (b"done\n", None)


def test_a_guest_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is ended, what it said is kept, and it may be booted again."""
    (tmp_path / "tests.log").touch()
    console, failed = waited(tmp_path, monkeypatch, "echo booted; sleep 60")
    assert (console, failed) == (b"booted\n", boot.SILENT)
    assert boot.emulator_failed(tmp_path, failed)


def test_a_guest_that_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is no failure of the emulator."""
    script = "while true; do sleep 0.1; echo >> tests.log; done"
    _, failed = waited(tmp_path, monkeypatch, script, timeout_s=1)
    assert failed == "not finished in 1 s"
    (tmp_path / "console.log").touch()
    assert not boot.emulator_failed(tmp_path, failed)


def test_a_kind_that_was_skipped() -> None:
    """A kernel is not good on which a stall was not made that can be made there."""
    case = outcome.Case("tests.vm.guest_tests.test_each_kind::test_x", "skipped", "seldom", 1.0)
    cases = [case._replace(result="passed"), case]
    done = outcome.Outcome("6.1", "6.1", True, None, False, None, 0.0, 1.0, 1.0, cases)
    assert done.good
    assert done.without_skips(["test_each_kind::test_x", "other"]).good
    assert not done.without_skips([]).good
    assert "test_each_kind::test_x" in str(done.without_skips([]).failed)
