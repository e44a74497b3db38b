"""``make install`` into a directory, and the program as it is there."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.kernel

ROOT = Path(__file__).parents[2]
# Nothing of the checkout: what is installed lies over /usr for this process alone.
RUN = """
set -e
mount -t overlay -o "lowerdir=$1/usr:/usr" overlay /usr
shift
cd /
exec "$@"
"""


def make(target: str, destination: Path, *variables: str) -> None:
    """Run make, quietly."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", target, f"DESTDIR={destination}", *variables],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def installed(destination: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command where the program is installed."""
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", RUN, "sh", destination, *command],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        check=False,
    )


def files(destination: Path) -> set[str]:
    """What lies there, but for the program's own directory."""
    found = {str(p.relative_to(destination)) for p in destination.rglob("*") if p.is_file()}
    return {name for name in found if not name.startswith("usr/lib/softirq-stalld/")}


def test_install(tmp_path: Path) -> None:
    """All is where systemd and logrotate look for it; the program runs without the checkout."""
    root = tmp_path / "root"
    configuration = root / "etc/softirq-stalld/config.toml"
    configuration.parent.mkdir(parents=True)
    configuration.write_text("# The administrator's own.\n")
    make("install", root, f"WHEELS={tmp_path / 'wheels'}")
    assert files(root) == {
        "etc/logrotate.d/softirq-stalld",
        "etc/softirq-stalld/config.toml",
        "usr/bin/softirq-stalld",
        "usr/lib/systemd/system/softirq-stalld.service",
        "usr/lib/sysusers.d/softirq-stalld.conf",
    }
    assert configuration.read_text() == "# The administrator's own.\n"
    library = root / "usr/lib/softirq-stalld"
    texts = [p.read_bytes() for p in library.rglob("*") if p.is_file()]
    assert not any(os.fsencode(tmp_path) in text or os.fsencode(ROOT) in text for text in texts)

    config = tmp_path / "quiet.toml"
    config.write_text("live.enabled = false\n")
    done = installed(root, "softirq-stalld", "run", "--config", str(config), "--duration", "0.2")
    assert done.returncode == 0, done.stderr
    events = [json.loads(line)["event"] for line in done.stdout.splitlines()]
    assert (events[0], events[-1]) == ("started", "stopped")
    done = installed(root, "systemd-analyze", "verify", "softirq-stalld.service")
    assert (done.returncode, done.stderr) == (0, "")

    make("uninstall", root)
    assert files(root) == {"etc/softirq-stalld/config.toml"}
    assert not library.exists()
