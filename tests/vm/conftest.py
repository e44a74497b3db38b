"""The guests' tests are for ``make test-vm``: on this kernel tests/kernel looks closer."""

from __future__ import annotations

import os

collect_ignore = [] if "STALLD_TEST_EVIDENCE" in os.environ else ["guest_tests", "systemd"]
