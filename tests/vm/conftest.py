"""The guests' tests are for ``make test-vm``: on this kernel tests/kernel looks closer."""

from __future__ import annotations

import os

import pytest

_IN_A_RUN = "STALLD_TEST_EVIDENCE" in os.environ

collect_ignore = [] if _IN_A_RUN else ["guest_tests", "systemd"]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Say at once why a test failed: a guest that is ended for its time never comes to the end."""
    if _IN_A_RUN and report.failed:
        print(f"\n{report.longreprtext[-3000:]}", flush=True)
