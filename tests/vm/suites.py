"""Which tests run on a kernel.

An emulated CPU needs 20 s until the daemon has started, so a suite is a choice. ``guest_tests``
makes each kind of stall against one daemon. To that ``full`` adds the unit tests that ask the
running kernel something, and those kernel tests that stand for an ability. Left out are those of
volume and of speed, which an emulated CPU does not have, and those of single stalls that must all
be told to the millisecond. ``systemd`` is about the installed service and its unit.
"""

from __future__ import annotations

_EACH_KIND = ["tests/vm/guest_tests"]

_UNIT = [
    *("tests/unit/probe", "tests/unit/enrich", "tests/unit/test_layout.py"),
    # The overlay over the guest's files numbers directories in another way than a cgroup does.
    *("--deselect", "tests/unit/enrich/test_asking.py::test_search"),
]

_ABILITIES = [
    "tests/kernel/test_check.py::test_can_run",
    "tests/kernel/test_check.py::test_statistics_are_the_kernels",
    "tests/kernel/test_hotplug.py",
    "tests/kernel/test_kept.py::test_the_same_programs",
    "tests/kernel/test_kept.py::test_bcc_is_not_loaded",
    "tests/kernel/test_kept.py::test_net_rx_action_by_kprobe",
    "tests/kernel/test_kthreads.py",
    "tests/kernel/test_lookback.py",
    "tests/kernel/test_pointers.py",
    "tests/kernel/test_process.py::test_kill_leaves_nothing",
    "tests/kernel/test_symbols.py",
]

_SYSTEMD = ["tests/vm/systemd"]

SUITES: dict[str, dict[str, list[str]]] = {
    "short": {"kinds": _EACH_KIND},
    "full": {"kinds": _EACH_KIND, "abilities": _ABILITIES, "unit": _UNIT},
    "systemd": {"systemd": _SYSTEMD},
}
"""Suite → report → arguments of pytest, in the order in which they run."""

BOOTED = {"systemd"}
"""Suites for guests whose process 1 is systemd; not for the machine itself."""
