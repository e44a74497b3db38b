"""The bench's instruments: what they attach runs, what they count is counted, nothing stays."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import pytest

from bench.bpf import Programs, costs, empty, statistics_enabled
from bench.hot_path import our_name
from bench.loads import Flood
from bench.processes import Daemon, Event, Tool, bcc_tool, our_programs
from stalld.probe.attacher import PROGRAMS
from tests.injector.records import RecordSource, Sent
from tests.kernel.daemon import STALLED_CPU as CPU
from tests.kernel.daemon import bpf_objects
from tests.kernel.test_process import gone_within

pytestmark = pytest.mark.kernel


def runs(side: Programs) -> dict[str, int]:
    """Hook and name → how often it has run."""
    return {f"{hook} {name}": cost.runs for (_, hook, name), cost in costs({"": side}).items()}


def grown(side: Programs) -> set[str]:
    """What runs within a tenth of a second of a machine that does something."""
    with statistics_enabled():
        before = runs(side)
        until = time.monotonic() + 0.1
        while time.monotonic() < until:
            time.sleep(0.001)
        return {name for name, count in runs(side).items() if count > before[name]}


def test_empty_programs() -> None:
    """They run while they are attached, and only then; afterwards they are gone."""
    before = bpf_objects()
    with empty(["sched_switch", "sched_wakeup"]) as side:
        loaded = bpf_objects() - before
        assert grown(side) == set()
        with side.attached():
            assert grown(side) == {"sched_switch empty", "sched_wakeup empty"}
            # The kernel counts no more.
            counted = [program.cost() for program in side.programs]
            time.sleep(0.05)
            assert [program.cost() for program in side.programs] == counted
        assert grown(side) == set()
    assert gone_within(2, {one for one in loaded if one[0] == "prog"})


def test_our_programs_outlive_their_daemon() -> None:
    """All that a daemon attaches is there, under its name, and works on without it."""
    before = bpf_objects()
    with our_programs() as side:
        loaded = bpf_objects() - before
        assert {our_name(p.hook, p.name) for p in side.programs if p.hook} == set(PROGRAMS)
        assert grown(side) == set()
        for _ in range(2):
            with side.attached():
                assert {name.split()[0] for name in grown(side)} >= {
                    *("sched_switch", "sched_wakeup", "hrtimer_expire_entry")
                }
        assert grown(side) == set()
    assert gone_within(5, {one for one in loaded if one[0] != "link"})


def test_flood() -> None:
    """Every packet is sent, and takes a believable time; its processes end, and with them all."""
    with Flood() as flood:
        assert 0.1 < flood.packet_us(10_000) < 1000
        assert running("bench-receiver")
    deadline = time.monotonic() + 5
    while running("bench-receiver"):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def running(name: str) -> list[str]:
    """The processes of that name."""
    found = []
    for comm in Path("/proc").glob("[0-9]*/comm"):
        with suppress(OSError):
            if comm.read_text() == f"{name}\n":
                found.append(comm.parent.name)
    return found


def test_the_reference_reads_the_same_records() -> None:
    """The bcc tool prints each record that is made for it, with its fields."""
    with bcc_tool() as tool:
        with RecordSource(tool.pid, CPU) as source:
            assert source.send(50) == Sent(50, 0)
        deadline = time.monotonic() + 5
        made: list[Event] = []
        while len(made) < 50 and time.monotonic() < deadline:
            time.sleep(0.05)
            made = [e for e in tool.lines.events() if e.get("comm") == "synthetic"]
    assert len(made) == 50
    assert {e["time_ns"] - e["started_ns"] for e in made} == {20_000_000}
    assert {e["cpu"] for e in made} == {CPU}


def test_a_tool_that_does_not_start() -> None:
    """It is said which, and in its own words why."""
    with pytest.raises(Exception, match=r"/bin/sh does not start: no such thing"):
        Tool("/bin/sh", "-c", "echo no such thing >&2; exit 1", ready=b"ready").__enter__()


def test_lines_are_timed() -> None:
    """The daemon's first line is its `started` event, read after it was started."""
    before_ns = time.monotonic_ns()
    with Daemon() as daemon:
        assert daemon.started["event"] == "started"
        assert before_ns < daemon.started["read_ns"] < time.monotonic_ns()
        assert daemon.stop()[-1]["event"] == "stopped"
