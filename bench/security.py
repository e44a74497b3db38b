"""How exposed the unit is, as systemd itself rates it.

    python -m bench.security

Against a unit without any sandbox, and against that of Red Hat's stalld. Of the latter's
directives (rt-linux-tools/stalld, systemd/stalld.service) systemd rates those that stand here;
all others there are commands and an EnvironmentFile=.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.bpf import BenchError
from bench.command import run
from bench.processes import ROOT, tool
from bench.row import Figure, Goal, Row, plain, ratio, row

UNIT = ROOT / "systemd" / "softirq-stalld.service"
GOAL = Goal(2.0, "of 10")
OTHERS = {
    "a unit without sandbox": "ExecStart=/bin/true",
    "Red Hat stalld's unit": "ExecStart=/bin/true\nRuntimeDirectory=stalld\n"
    "RuntimeDirectoryMode=0700\nRestart=always",
}


def exposure(unit: Path) -> Figure:
    """0 to 10."""
    done = subprocess.run(
        [tool("systemd-analyze", "systemd"), "security", "--offline=true", "--no-pager", unit],
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    if not found:
        raise BenchError(f"systemd-analyze security: {done.stderr.strip()}")
    return plain(float(found[1]), "of 10")


def measure() -> list[Row]:
    """Against both; and whether it runs as root."""
    ours = exposure(UNIT)
    text = UNIT.read_text()
    users = re.findall(r"^User=(.+)$", text, re.MULTILINE)
    root = users not in (["softirq-stalld"],)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as work:
        for name, directives in OTHERS.items():
            unit = Path(work, "other.service")
            unit.write_text(f"[Service]\n{directives}\n")
            theirs = exposure(unit)
            against = ratio(ours, theirs)
            # One figure, so one goal.
            goal = None if rows else GOAL
            rows.append(
                row(f"exposure, against {name}", ours, reference=theirs, against=against, goal=goal)
            )
    user = ", ".join(users) or "root"
    return [*rows, Row("user of the unit", user, "root", "", "never root", not root)]


if __name__ == "__main__":
    sys.exit(run(__doc__, measure))
