"""The command line in a real process: reasons on stderr, exit codes, never a traceback."""

from __future__ import annotations

import subprocess
import sys

import pytest

from stalld import __version__, cli
from stalld.errors import MissingAbilityError, ProbeError, StalldError, UsageError


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it as a user would."""
    return subprocess.run(
        [sys.executable, "-m", "stalld.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
    )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "COMMAND"),
        (["watch"], "invalid choice: 'watch'"),
        (["run", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["run", "surplus"], "unrecognized arguments: surplus"),
        (["run", "--threshold-ms"], "expected one argument"),
        (["run", "--threshold-ms", "ten"], "'ten' is not a number"),
        (["run", "--threshold-ms", ""], "'' is not a number"),
        (["run", "--threshold-ms", "0"], "0 ms is out of range: 1 to 60000 ms"),
        (["run", "--threshold-ms", "0.5"], "0.5 ms is out of range"),
        (["run", "--threshold-ms", "-10"], "-10 ms is out of range"),
        (["run", "--threshold-ms", "60001"], "60001 ms is out of range"),
        (["run", "--threshold-ms", "nan"], "'nan' is not a finite number"),
        (["run", "--threshold-ms", "inf"], "'inf' is not a finite number"),
        (["run", "--threshold-ms", "1e999"], "'1e999' is not a finite number"),
        (["run", "--duration", "0"], "0 s is not a time to run"),
        (["run", "--duration", "-1"], "-1 s is not a time to run"),
        (["run", "--duration", "soon"], "'soon' is not a number"),
        (["run", "--format", "yaml"], "invalid choice: 'yaml'"),
        (["check", "--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_bad_usage(arguments: list[str], reason: str) -> None:
    """Exit 2, the reason on stderr, nothing on stdout."""
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert reason in done.stderr
    assert "usage: softirq-stalld" in done.stderr
    assert "Traceback" not in done.stderr


def test_version() -> None:
    """The version on stdout."""
    done = command("--version")
    assert (done.returncode, done.stdout) == (0, f"softirq-stalld {__version__}\n")


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["check", "--help"]])
def test_help(arguments: list[str]) -> None:
    """Help is no error."""
    done = command(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: softirq-stalld")


def test_usage_errors_need_no_library() -> None:
    """A slip of the hand is told at once: neither event loop nor bcc is loaded for it."""
    code = (
        "import sys, stalld.cli\n"
        "try:\n    stalld.cli.main(['run', '--nope'])\n"
        "except SystemExit as end:\n    code = end.code\n"
        "assert not {'bcc', 'uvloop', 'structlog', 'pyroute2'} & set(sys.modules)\n"
        "sys.exit(code)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 2


def test_events_without_stdout() -> None:
    """With standard output closed the command says so and does not start."""
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-m", "stalld.cli", "run"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 2
    assert done.stderr == ("softirq-stalld: standard output is closed: events have nowhere to go\n")


@pytest.mark.parametrize(
    ("error", "code"),
    [(StalldError, 1), (ProbeError, 1), (MissingAbilityError, 1), (UsageError, 2)],
)
def test_exit_codes(
    error: type[StalldError],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A foreseeable fault is one line on stderr and the code of its kind."""

    def fail(arguments: object) -> int:
        raise error("what is wrong; what to do")

    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main(["run"]) == code
    assert capsys.readouterr() == ("", "softirq-stalld: what is wrong; what to do\n")
