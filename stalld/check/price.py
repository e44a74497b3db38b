"""What the BPF programs cost, by the kernel's own statistics of them.

While somebody asks for it (BPF_ENABLE_STATS) the kernel times every run of
every BPF program on the host. Looking at the clock takes longer than most of
ours run; what it takes is seen in a program that does nothing.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import NamedTuple, Self

from stalld.check.report import Item, State
from stalld.probe.libbpf import RETURN_ZERO, load_libbpf

HOT_PATH = {
    "sched_switch": "sched_switch",
    "sched_wakeup": "sched_wakeup",
    "softirq_raise": "softirq_raise",
    "softirq_entry": "softirq_entry",
    "softirq_exit": "softirq_exit",
    "napi_poll": "napi_poll",
    "tick": "hrtimer_expire_entry",
}
"""Programs that run all the time, as we call them here, and their links."""
EMPTY = "empty"
"""A program that does nothing, on one of those hooks."""
LOOKBACK = "lookback"
LOOKBACK_PERIOD_NS = 3_500_000
"""The look-back takes no sample sooner after the last one; as in ``bpf/lookback.c``."""

# include/uapi/linux/bpf.h: enum bpf_stats_type
_BPF_STATS_RUN_TIME = 0
_BPF_PROG_TYPE_RAW_TRACEPOINT = 17


class LinkInfo(ctypes.Structure):
    """``struct bpf_link_info``, as far as all links have it."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("prog_id", ctypes.c_uint32),
    )


class ProgInfo(ctypes.Structure):
    """``struct bpf_prog_info``, as far as we read it."""

    _fields_ = (
        ("before", ctypes.c_uint8 * 192),
        ("run_time_ns", ctypes.c_uint64),
        ("run_cnt", ctypes.c_uint64),
    )


class Cost(NamedTuple):
    """Runs of a program, and the time of all of them."""

    runs: int
    ns: int


class Meter:
    """In ``with``: counts what the programs behind some links cost.

    Args:
        links: name → descriptor of a link.

    Attributes:
        costs: name → cost while it counted, :data:`EMPTY` among them; empty
            where that cannot be had.
        reason: why it cannot; "" where it can.
    """

    def __init__(self, links: Mapping[str, int]) -> None:
        self.costs: dict[str, Cost] = {}
        self.reason = ""
        self._links = dict(links)
        self._lib = load_libbpf()
        self._resources = ExitStack()
        self._before: dict[str, Cost] = {}

    def __enter__(self) -> Self:
        try:
            self._own(self._call("bpf_enable_stats", ctypes.c_int(_BPF_STATS_RUN_TIME)))
            self._links[EMPTY] = self._attach_empty()
            self._before = self._read()
        except OSError as error:
            self.reason = refused(error)
        return self

    def __exit__(self, *_: object) -> None:
        with self._resources:
            if self.reason:
                return
            try:
                now = self._read()
            except OSError as error:
                self.reason = refused(error)
                return
            for name, before in self._before.items():
                self.costs[name] = Cost(now[name].runs - before.runs, now[name].ns - before.ns)

    def _attach_empty(self) -> int:
        count = ctypes.c_size_t(len(RETURN_ZERO) // 8)
        code = b"empty", b"GPL", RETURN_ZERO, count, None
        program = self._own(self._call("bpf_prog_load", _BPF_PROG_TYPE_RAW_TRACEPOINT, *code))
        return self._own(self._call("bpf_raw_tracepoint_open", b"softirq_exit", program))

    def _own(self, fd: int) -> int:
        self._resources.callback(os.close, fd)
        return fd

    def _read(self) -> dict[str, Cost]:
        return {name: self._cost(fd) for name, fd in self._links.items()}

    def _cost(self, link: int) -> Cost:
        about_link, about_program = LinkInfo(), ProgInfo()
        self._inform(link, about_link)
        program = self._call("bpf_prog_get_fd_by_id", ctypes.c_uint32(about_link.prog_id))
        try:
            self._inform(program, about_program)
        finally:
            os.close(program)
        return Cost(about_program.run_cnt, about_program.run_time_ns)

    def _inform(self, fd: int, info: LinkInfo | ProgInfo) -> None:
        size = ctypes.c_uint32(ctypes.sizeof(info))
        self._call("bpf_obj_get_info_by_fd", fd, ctypes.byref(info), ctypes.byref(size))

    def _call(self, function: str, *arguments: object) -> int:
        done: int = getattr(self._lib, function)(*arguments)
        if done < 0:
            raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")
        return done


def refused(error: OSError) -> str:
    """Why nothing could be measured."""
    if error.errno in (errno.EPERM, errno.EACCES):
        return "the kernel's statistics of BPF programs want CAP_SYS_ADMIN: run the check as root"
    return str(error.strerror)


def own_ns(cost: Cost, costs: Mapping[str, Cost]) -> float:
    """What all runs of a program took by themselves, without what timing them took."""
    return max(0.0, cost.ns - cost.runs * timing_ns(costs))


def timing_ns(costs: Mapping[str, Cost]) -> float:
    """What timing a run takes."""
    empty = costs.get(EMPTY, Cost(0, 0))
    return empty.ns / empty.runs if empty.runs else 0.0


def price(costs: Mapping[str, Cost], reason: str) -> Item:
    """What each program of the hot path costs a run."""
    hot = {name: cost for name, cost in costs.items() if name in HOT_PATH and cost.runs}
    if not hot:
        return Item("price", State.OK, f"not measured: {reason or 'no program ran'}")
    each = [f"{name} {own_ns(cost, costs) / cost.runs:.0f}" for name, cost in hot.items()]
    return Item(
        "price",
        State.OK,
        f"ns a run: {', '.join(each)} (mean of {sum(cost.runs for cost in hot.values())} runs "
        f"under the check's load, without the {timing_ns(costs):.0f} ns that timing one takes)",
    )


def samples_per_s(tick_ns: int) -> float:
    """How often the look-back samples a busy CPU."""
    ticks = -(-LOOKBACK_PERIOD_NS // tick_ns)
    return 1e9 / (ticks * tick_ns)


def lookback_price(costs: Mapping[str, Cost], samples: int, tick_ns: int, reason: str) -> str:
    """What the look-back costs, in words.

    Its program runs for every hrtimer; what passing the others by takes is
    added to the samples.

    Args:
        samples: how many it took meanwhile, on all CPUs.
    """
    cost = costs.get(LOOKBACK, Cost(0, 0))
    if not samples or not cost.runs:
        return f"price not measured: {reason or 'it took no sample'}"
    sample_ns = own_ns(cost, costs) / samples
    rate = samples_per_s(tick_ns)
    each = "tick" if tick_ns >= LOOKBACK_PERIOD_NS else "sample"
    return (
        f"{sample_ns:.0f} ns a {each}, {sample_ns * rate / 1e7:.2g}% of a busy CPU at "
        f"{rate:.0f} {each}s/s"
    )
