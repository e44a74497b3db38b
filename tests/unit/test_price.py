"""What the programs cost: the kernel's statistics, and what is made of them."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from stalld.check import price
from stalld.check.price import Cost, LinkInfo, Meter, ProgInfo

BPF = Path(__file__).parents[2] / "bpf"
TICK_NS = 4_000_000


@pytest.mark.parametrize("compiler", ["gcc", "clang-14"])
@pytest.mark.parametrize(
    ("name", "structure", "fields"),
    [
        ("bpf_link_info", LinkInfo, ["type", "id", "prog_id"]),
        ("bpf_prog_info", ProgInfo, ["run_time_ns", "run_cnt"]),
    ],
)
def test_layout(
    compiler: str, name: str, structure: type[ctypes.Structure], fields: list[str]
) -> None:
    """Each field is where the kernel's header has it."""
    assert shutil.which(compiler), f"{compiler} is not installed: run make test"
    lines = ["#include <linux/bpf.h>"]
    for field in fields:
        place = getattr(structure, field)
        lines += [
            f"_Static_assert(__builtin_offsetof(struct {name}, {field}) == {place.offset}, "
            f'"offset of {field}");',
            f"_Static_assert(sizeof(((struct {name} *)0)->{field}) == {place.size}, "
            f'"size of {field}");',
        ]
    done = subprocess.run(
        [compiler, "-Werror", "-fsyntax-only", "-x", "c", "-"],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_period() -> None:
    """The look-back's shortest distance of samples is that of the program."""
    source = (BPF / "lookback.c").read_text()
    found = re.search(r"^#define LOOKBACK_PERIOD_NS (\d+)$", source, re.MULTILINE)
    assert found
    assert int(found[1]) == price.LOOKBACK_PERIOD_NS


@pytest.mark.parametrize(("hz", "rate"), [(100, 100), (250, 250), (300, 150), (1000, 250)])
def test_samples(hz: int, rate: float) -> None:
    """A faster tick is sampled only as often as the program's period allows."""
    assert price.samples_per_s(round(1e9 / hz)) == pytest.approx(rate, rel=1e-3)


EMPTY = Cost(1000, 60_000)


def test_without_what_timing_takes() -> None:
    """What the empty program takes is no price of ours; nothing is cheaper than nothing."""
    costs = {
        price.EMPTY: EMPTY,
        "sched_switch": Cost(100, 6500),
        "tick": Cost(10, 590),
        "softirq_raise": Cost(0, 0),
        price.LOOKBACK: Cost(5, 5000),
    }
    item = price.price(costs, "")
    assert (item.name, item.state) == ("price", "ok")
    assert item.detail.startswith("ns a run: sched_switch 5, tick 0 (mean of 110 runs ")
    assert "without the 60 ns" in item.detail


def test_the_price_of_the_look_back() -> None:
    """All that its program took is shared among its samples: ns, and part of a busy CPU."""
    costs = {price.EMPTY: EMPTY, price.LOOKBACK: Cost(100, 100 * 60 + 50 * 2000)}
    said = price.lookback_price(costs, 50, TICK_NS, "")
    assert said == "2000 ns a tick, 0.05% of a busy CPU at 250 ticks/s"
    said = price.lookback_price(costs, 50, 1_000_000, "")
    assert said == "2000 ns a sample, 0.05% of a busy CPU at 250 samples/s"


@pytest.mark.parametrize(
    ("costs", "samples", "reason", "said"),
    [
        ({}, 50, "the reason", "the reason"),
        ({price.EMPTY: EMPTY, price.LOOKBACK: Cost(9, 900)}, 0, "", "it took no sample"),
    ],
)
def test_no_price(costs: dict[str, Cost], samples: int, reason: str, said: str) -> None:
    """What was not measured is said to be so, and why; that is no degradation."""
    told = price.lookback_price(costs, samples, TICK_NS, reason)
    assert told == f"price not measured: {said}"
    item = price.price(costs, reason)
    assert item.state == "ok"
    assert item.detail == f"not measured: {reason or 'no program ran'}"


class Kernel:
    """Stands in for libbpf: programs that run ``runs`` times, 100 ns each.

    Args:
        refuses: the call that fails, with EPERM unless another error is given.
        after: that many calls of it succeed first.
    """

    def __init__(self, refuses: str = "", error: int = errno.EPERM, after: int = 0) -> None:
        self.runs = 1000
        self.opened: list[int] = []
        self.asked: list[int] = []
        self._refuses = refuses
        self._error = error
        self._after = after

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            if name == self._refuses:
                self._after -= 1
                if self._after < 0:
                    ctypes.set_errno(self._error)
                    return -self._error
            if name == "bpf_obj_get_info_by_fd":
                return self._inform(*arguments)
            if name == "bpf_prog_get_fd_by_id":
                self.asked.append(arguments[0].value)
            self.opened.append(os.open("/dev/null", os.O_RDONLY))
            return self.opened[-1]

        return call

    def _inform(self, fd: int, place: Any, size: Any) -> int:
        info = place._obj
        assert size._obj.value == ctypes.sizeof(info)
        if isinstance(info, LinkInfo):
            info.prog_id = fd + 1000
        else:
            info.run_cnt = self.runs
            info.run_time_ns = self.runs * 100
        return 0


def metered(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> Meter:
    """A meter that saw one program run 50 times more."""
    monkeypatch.setattr(price, "load_libbpf", lambda: kernel)
    with Meter({"tick": 7}) as meter:
        kernel.runs += 50
    for fd in kernel.opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    return meter


def test_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what ran meanwhile counts; the link tells the program; nothing stays open."""
    kernel = Kernel()
    meter = metered(kernel, monkeypatch)
    assert meter.reason == ""
    assert meter.costs == {"tick": Cost(50, 5000), price.EMPTY: Cost(50, 5000)}
    assert set(kernel.asked) == {1007, 1000 + kernel.opened[2]}


CALLS = [
    "bpf_enable_stats",
    "bpf_prog_load",
    "bpf_raw_tracepoint_open",
    "bpf_prog_get_fd_by_id",
    "bpf_obj_get_info_by_fd",
]


@pytest.mark.parametrize(
    ("call", "after"), [*((call, 0) for call in CALLS), ("bpf_prog_get_fd_by_id", 2)]
)
def test_refused(call: str, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is refused, and when: nothing is measured, CAP_SYS_ADMIN named, all closed."""
    meter = metered(Kernel(call, after=after), monkeypatch)
    assert meter.costs == {}
    assert "CAP_SYS_ADMIN" in meter.reason


def test_other_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any other error is told with the call it came from."""
    meter = metered(Kernel("bpf_enable_stats", errno.EINVAL), monkeypatch)
    assert meter.reason == "bpf_enable_stats: Invalid argument"


def test_it_ends_with_what_it_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error inside passes, and nothing stays open."""
    kernel = Kernel()
    monkeypatch.setattr(price, "load_libbpf", lambda: kernel)
    with suppress(KeyError), Meter({"tick": 7}):
        raise KeyError
    assert len(kernel.opened) > 3
    for fd in kernel.opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
