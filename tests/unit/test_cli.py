"""The command line in a real process: reasons on stderr, exit codes, never a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from stalld import __version__, cli
from stalld.config import Config, Detect, Settings
from stalld.errors import ConfigError, MissingAbilityError, ProbeError, StalldError, UsageError


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
        (["run", "--config"], "expected one argument"),
        (["run", "--config", ""], "'' is not the name of a file"),
        (["check", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["check", "--config", ""], "'' is not the name of a file"),
        (["check", "--json", "--config", "F"], "not allowed with argument --json"),
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


@pytest.fixture
def bad_file(tmp_path: Path) -> str:
    """A configuration with three errors."""
    path = tmp_path / "bad.toml"
    path.write_text("[detect]\nthreshold_ms = true\nlockback = true\n[storms]\n")
    return str(path)


@pytest.mark.parametrize("name", ["run", "check"])
def test_bad_configuration(name: str, bad_file: str) -> None:
    """Exit 2, every error on a line of stderr, nothing on stdout, nothing started."""
    done = command(name, "--config", bad_file)
    assert (done.returncode, done.stdout) == (2, "")
    where = f"softirq-stalld: {bad_file}: "
    assert [line.removeprefix(where).split(";")[0] for line in done.stderr.splitlines()] == [
        "detect.threshold_ms: true is not a number",
        "detect.lockback: unknown key",
        "storms: unknown section",
    ]


def test_command_line_does_not_hide_errors(bad_file: str) -> None:
    """A value that the command line goes over must be right in the file all the same."""
    done = command("run", "--config", bad_file, "--threshold-ms", "5")
    assert done.returncode == 2
    assert "detect.threshold_ms: true is not a number" in done.stderr


@pytest.mark.parametrize("name", ["run", "check"])
def test_missing_configuration(name: str, tmp_path: Path) -> None:
    """A file that was named must exist."""
    path = tmp_path / "none.toml"
    done = command(name, "--config", str(path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"softirq-stalld: {path}: cannot be read: No such file or directory; "
        "it must be a file that this user may read\n"
    )


@pytest.mark.parametrize("name", [b"good.toml", "größe.toml".encode(), b"\xff.toml"])
def test_check_configuration(name: bytes, tmp_path: Path) -> None:
    """A valid file is called so, whatever its name; nothing else is looked at."""
    path = os.fsencode(tmp_path) + b"/" + name
    with open(path, "w") as file:
        file.write("[detect]\nthreshold_ms = 3\n")
    done = command("check", "--config", os.fsdecode(path))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == path.decode(errors="backslashreplace") + ": valid\n"


def test_checking_a_file_needs_no_library(tmp_path: Path) -> None:
    """No probe, event loop or bcc is loaded to look at a file: no root is needed."""
    path = tmp_path / "good.toml"
    path.write_text("")
    code = (
        "import sys, stalld.cli\n"
        f"assert stalld.cli.main(['check', '--config', {str(path)!r}]) == 0\n"
        "assert not {'bcc', 'uvloop', 'structlog', 'stalld.check'} & set(sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("text", "arguments", "settings"),
    [
        ("", [], Settings()),
        ("detect.threshold_ms = 3", [], Settings(Config(Detect(threshold_ms=3.0)))),
        (
            "detect = { threshold_ms = 3, max_samples = 2 }",
            ["--threshold-ms", "7", "--duration", "2"],
            Settings(Config(Detect(threshold_ms=7.0, max_samples=2)), 2.0),
        ),
        ("", ["--threshold-ms", "10"], Settings()),
        (
            "detect.threshold_ms = 3",
            ["--threshold-ms", "10"],
            Settings(Config(Detect(threshold_ms=10.0))),
        ),
    ],
)
def test_precedence(text: str, arguments: list[str], settings: Settings, tmp_path: Path) -> None:
    """Command line over file over default; the rest of the file stays."""
    path = tmp_path / "config.toml"
    path.write_text(text)
    parsed = cli._parser().parse_args(["run", "--config", str(path), *arguments])
    assert cli._settings(parsed) == replace(settings, source=str(path))


def test_events_without_stdout(tmp_path: Path) -> None:
    """With standard output closed the command says so and does not start."""
    path = tmp_path / "config.toml"
    path.write_text("")
    done = subprocess.run(
        [
            *("sh", "-c", 'exec "$@" >&-', "sh"),
            *(sys.executable, "-m", "stalld.cli", "run", "--config", str(path)),
        ],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 2
    assert done.stderr == (
        f"softirq-stalld: {path}: sinks.stdout.enabled: standard output is closed, so events have "
        "nowhere to go; open it, or set this to false and name another sink\n"
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StalldError, 1),
        (ProbeError, 1),
        (MissingAbilityError, 1),
        (UsageError, 2),
        (ConfigError, 2),
    ],
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
