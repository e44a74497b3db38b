"""What is loaded and attached, as far as that is decided without a kernel."""

from __future__ import annotations

import platform
import re
from types import SimpleNamespace
from typing import Any

import pytest

from stalld.errors import MissingAbilityError
from stalld.probe.attacher import HOOKS, MAPS, OPTIONAL, PROGRAMS
from stalld.probe.btf import Field
from stalld.probe.client import bpf_directory
from stalld.probe.compiler import SOURCES
from stalld.probe.loader import _nmi_sampler, percpu_places
from stalld.probe.protocol import NMI_SAMPLER, Missing, Request

TEXT = "\n".join((bpf_directory() / name).read_text() for name in SOURCES)


def test_every_source_is_compiled() -> None:
    """No file of bpf/ is forgotten, and each that is included is there."""
    files = {path.name for path in bpf_directory().glob("*.[ch]")}
    assert files == set(SOURCES)


@pytest.mark.parametrize("program", PROGRAMS.values())
def test_every_program_is_written(program: str) -> None:
    """What is attached is a function of the sources."""
    assert re.search(rf"^int {program}\(", TEXT, re.MULTILINE)


@pytest.mark.parametrize("name", MAPS)
def test_every_map_is_declared(name: str) -> None:
    """What is handed over is a map of the sources."""
    assert re.search(rf"^BPF_[A-Z_]+\(.*\b{name}\b", TEXT, re.MULTILINE)


def test_hooks() -> None:
    """What may be missing, or goes by another name, is a program; each says what that means."""
    assert set(OPTIONAL) <= set(PROGRAMS)
    assert set(HOOKS) <= set(PROGRAMS)
    assert all(OPTIONAL.values())


def test_the_order_of_attaching() -> None:
    """What ends a wait comes before what begins one; what tells of a late tick before the tick."""
    order = list(PROGRAMS)
    assert order.index("softirq_entry") < order.index("softirq_raise")
    assert order.index("sched_switch") < order.index("sched_wakeup")
    assert order.index("lookback") < order.index("hrtimer_expire_entry")


class TestNmi:
    """Whether the NMI sampler's program is loaded."""

    def asked(self, nmi: str) -> tuple[bool, list[str]]:
        """The answer, and what is said to be missing."""
        missing: list[Missing] = []
        wanted = _nmi_sampler(Request(1, "", "", nmi=nmi), missing)
        return wanted, [each.ability for each in missing]

    def test_never(self) -> None:
        """What is not wanted is not missed."""
        assert self.asked("never") == (False, [])

    @pytest.mark.skipif(platform.machine() != "x86_64", reason="the sampler is written for x86")
    def test_always(self) -> None:
        """A test may want it without a counter."""
        assert self.asked("always") == (True, [])

    def test_by_itself(self) -> None:
        """It is loaded, or else missed."""
        wanted, missing = self.asked("auto")
        assert missing == [NMI_SAMPLER] * (not wanted)


WHOLE = {
    ("tick_cpu_sched", "sched_timer"): 1000,
    ("steal_time", "steal"): 64,
    ("kernel_cpustat", "cpustat"): 2000,
    ("softnet_data", "processed"): 3000,
    ("softnet_data", "time_squeeze"): 3004,
}


@pytest.mark.parametrize(
    ("without", "changes", "places"),
    [
        (None, {}, {"steal": -936, "cpustat": 1056, "softnet": 2000}),
        ("tick_cpu_sched", {}, {}),
        ("steal_time", {}, {"cpustat": 1056, "softnet": 2000}),
        ("kernel_cpustat", {}, {"steal": -936, "softnet": 2000}),
        ("softnet_data", {}, {"steal": -936, "cpustat": 1056}),
        # The program reads both counters at once.
        (None, {("softnet_data", "time_squeeze"): 3008}, {"steal": -936, "cpustat": 1056}),
        (None, {("softnet_data", "time_squeeze"): None}, {"steal": -936, "cpustat": 1056}),
    ],
)
def test_places_that_are_missing(
    without: str | None, changes: dict[Any, Any], places: dict[str, int]
) -> None:
    """What a kernel does not have is left out, without its tick's timer all of it."""
    known = {path: at for path, at in (WHOLE | changes).items() if path[0] != without}
    made: Any = SimpleNamespace(percpu_offset=lambda *path: known.get(path))
    assert percpu_places(made, made) == places


SOFTNET = {
    ("softnet_data", "received_rps"): 3008,
    ("softnet_data", "input_pkt_queue", "qlen"): 3100,
    ("softnet_data", "flow_limit"): 3020,
}


@pytest.mark.parametrize(
    ("drops", "places"),
    [
        ({("softnet_data", "dropped"): 3060}, {"dropped": 2060}),
        (
            {
                ("softnet_data", "drop_counters", "drops0"): 3200,
                ("softnet_data", "drop_counters", "drops1"): 3264,
            },
            {"dropped": 2200, "dropped_more": 2264},
        ),
        ({}, {}),
    ],
)
@pytest.mark.parametrize("limits", [True, False])
def test_places_in_softnet_data(
    drops: dict[Any, int], places: dict[str, int], limits: bool
) -> None:
    """Drops are in one word or two; a flow limit without a count is of no use."""
    known = {("tick_cpu_sched", "sched_timer"): 1000} | SOFTNET | drops

    def field(name: str, member: str) -> Field:
        assert (name, member) == ("sd_flow_limit", "count")
        if not limits:
            raise MissingAbilityError("no struct sd_flow_limit")
        return Field("count", 16, 4, "u32 %s")

    made: Any = SimpleNamespace(percpu_offset=lambda *path: known.get(path), field=field)
    more = {"flow_limit": 2020, "flow_count": 16} if limits else {}
    assert percpu_places(made, made) == {"received_rps": 2008, "backlog": 2100} | places | more
