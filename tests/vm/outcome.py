"""What a kernel's run left in its directory, read back."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

_FAILED = 1
"""Exit status of pytest where tests failed; above that it was interrupted, or found none."""


class Case(NamedTuple):
    """One test.

    Attributes:
        name: ``tests.kernel.test_stalls::test_softirq_hog``.
        result: ``passed``, ``failed`` or ``skipped``.
        reason: of what was skipped or failed, its first line.
        seconds: that it took.
    """

    name: str
    result: str
    reason: str
    seconds: float


class Outcome(NamedTuple):
    """One kernel's run.

    Attributes:
        name: of the kernel in the list.
        release: as ``uname -r`` says; empty if it never got that far.
        emulated: in a guest.
        failed: why there is no complete outcome; None if there is.
        checked: whether check was to run.
        check: the object of ``softirq-stalld check --json``.
        check_s, seconds: what check, and all inside the guest, took.
        wall_s: from QEMU's start to its end.
        cases: the tests.
    """

    name: str
    release: str
    emulated: bool
    failed: str | None
    checked: bool
    check: dict[str, Any] | None
    check_s: float
    seconds: float
    wall_s: float
    cases: list[Case]

    @property
    def good(self) -> bool:
        """It ran to its end, the service can run there, and no test failed."""
        return (
            self.failed is None
            and ((self.check is not None and self.check["can_run"]) or not self.checked)
            and self.count("passed") > 0
            and not self.count("failed")
        )

    def without_skips(self, allowed: Sequence[str]) -> Outcome:
        """The same, failed if a stall that this kernel can be given was skipped.

        Args:
            allowed: beginnings of the names that may be, as in ``kernels.toml``.
        """
        skipped = [
            name
            for case in self.cases
            if case.result == "skipped" and "guest_tests." in case.name
            for name in [case.name.rpartition("guest_tests.")[2]]
            if not name.startswith(tuple(allowed))
        ]
        if self.failed or not skipped:
            return self
        return self._replace(failed=f"skipped, which this kernel gives no reason for: {skipped}")

    def count(self, result: str) -> int:
        """How many tests ended so."""
        return sum(case.result == result for case in self.cases)


def read(name: str, results: Path, failed: str | None, wall_s: float) -> Outcome:
    """The outcome of one run; ``failed``: what is known to have gone wrong outside."""
    (results / "run.json").write_text(json.dumps({"failed": failed, "wall_s": wall_s}))
    path = results / "outcome.json"
    said: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if failed is None and not said:
        failed = f"nothing came back; see {results}/console.log and tests.log"
    cases = []
    try:
        cases = [case for report in sorted(results.glob("*.xml")) for case in _cases(report)]
    except ET.ParseError as error:
        failed = failed or f"a report of pytest is not whole: {error}"
    statuses: dict[str, int] = said.get("statuses", {})
    broken = {name: status for name, status in statuses.items() if not 0 <= status <= _FAILED}
    if failed is None and broken:
        failed = f"pytest did not run all tests, exit status by report: {broken}"
    return Outcome(
        name,
        said.get("release", ""),
        said.get("emulated", True),
        failed,
        "check" in said,
        said.get("check"),
        said.get("check_s", 0.0),
        said.get("seconds", 0.0),
        round(wall_s, 1),
        cases,
    )


def read_again(name: str, results: Path) -> Outcome | None:
    """The outcome of a run of before; None if there was none."""
    path = results / "run.json"
    return read(name, results, **json.loads(path.read_text())) if path.exists() else None


def _cases(report: Path) -> list[Case]:
    """What pytest's report of one run says."""
    found = []
    for case in ET.parse(report).iter("testcase"):
        result, reason = "passed", ""
        for child in case:
            if child.tag in ("failure", "error"):
                result = "failed"
                reason = (child.get("message") or "").partition("\n")[0]
            elif child.tag == "skipped":
                result, reason = "skipped", child.get("message") or ""
        name = f"{case.get('classname')}::{case.get('name')}"
        found.append(Case(name, result, reason, float(case.get("time") or 0)))
    return found
