"""What shapes detection on this kernel: symbols, tick, preemption."""

from __future__ import annotations

import gzip
import os
import platform
import re
import time
from pathlib import Path
from typing import NamedTuple

from stalld.check.report import Item, State
from stalld.detector import TICK_FUNCTIONS
from stalld.enrich.cpus import list_of
from stalld.host import NO_TICK, nohz_full

PREEMPT_DEBUG = "/sys/kernel/debug/sched/preempt"
_MODELS = {"NONE": "none", "VOLUNTARY": "voluntary", "LAZY": "lazy", "RT": "rt"}


class Symbols(NamedTuple):
    """What kallsyms tells.

    Attributes:
        defers: the kernel has a function ksoftirqd_running.
        tick_functions: addresses of TICK_FUNCTIONS; 0 where it is hidden or there is none.
    """

    item: Item
    defers: bool
    tick_functions: list[int]


def symbols(path: str = "/proc/kallsyms") -> Symbols:
    """Are the addresses of kernel symbols visible, and which of those we look for are there?"""
    visible = defers = False
    count = 0
    reason = "the kernel shows every address as zero"
    ticks = dict.fromkeys(TICK_FUNCTIONS, 0)
    try:
        with open(path, "rb") as lines:
            for line in lines:
                count += 1
                address, _, rest = line.partition(b" ")
                visible = visible or address.strip(b"0") != b""
                # Compilers append .isra.0 and the like.
                name = rest[2:].split(maxsplit=1)[0] if rest[2:].strip() else b""
                defers = defers or name.partition(b".")[0] == b"ksoftirqd_running"
                if name in ticks:
                    ticks[name] = ticks[name] or int(address, 16)
    except OSError as error:
        reason = str(error)
    if visible:
        item = Item("kernel symbols", State.OK, f"visible, {count} of them")
        return Symbols(item, defers, list(ticks.values()))
    restrict = _read("/proc/sys/kernel/kptr_restrict").strip() or "unknown"
    item = Item(
        "kernel symbols",
        State.DEGRADED,
        f"hidden: {reason} (kernel.kptr_restrict={restrict})",
        "stacks are bare addresses; modes and verdicts are unknown",
        "grant CAP_SYSLOG, and set kernel.kptr_restrict to 0 or 1"
        if restrict == "2"
        else "grant CAP_SYSLOG",
    )
    return Symbols(item, defers, list(ticks.values()))


def tick(tick_ns: int) -> list[Item]:
    """Period of the tick, and whether it is a high resolution timer.

    Args:
        tick_ns: its period in nanoseconds.
    """
    period = tick_ns / 1e6
    items = [
        Item("tick", State.OK, f"{period:g} ms", f"stacks during a stall are {period:g} ms apart")
    ]
    stopped = nohz_full()
    if stopped:
        items.append(
            Item(
                "nohz_full",
                State.DEGRADED,
                f"CPUs {list_of(stopped)} stop their tick while a single task runs there",
                NO_TICK,
                "none is needed if no NIC's interrupts come to them; else take them off nohz_full=",
            )
        )
    # The kernel's hrtimer_resolution: 1 ns in high resolution mode, else one tick.
    resolution_ns = round(time.clock_getres(time.CLOCK_MONOTONIC) * 1e9)
    if resolution_ns == 1:
        items.append(Item("high resolution timers", State.OK, "active"))
    else:
        items.append(
            Item(
                "high resolution timers",
                State.DEGRADED,
                f"not active: timers have a resolution of {resolution_ns / 1e6:g} ms",
                "the tick is not seen, so no samples during a stall: stalls are seen when they end",
                "remove highres=off from the kernel's command line, use a clock source fit for it "
                "(see dmesg), CONFIG_HIGH_RES_TIMERS=y",
            )
        )
    return items


def preemption() -> Item:
    """The preemption model, from the most telling source that is readable."""
    model = preemption_model(
        _read(PREEMPT_DEBUG), _read("/proc/cmdline"), _config(), os.uname().version
    )
    effects = {
        "none": "a long system call keeps ksoftirqd from the CPU",
        "voluntary": "a long system call without cond_resched() keeps ksoftirqd from the CPU",
        "lazy": "a long system call keeps ksoftirqd from the CPU for up to a tick or two",
        "full": "ksoftirqd waits only for code with preemption or bottom halves off",
        "rt": "ksoftirqd waits for code with bottom halves off and for tasks of higher priority",
    }
    return Item(
        "preemption", State.OK, model or "unknown", effects.get(model.partition(" ")[0], "")
    )


def preemption_model(debug: str, cmdline: str, config: str, version: str) -> str:
    """``none``, ``voluntary``, ``full``, ``lazy`` or ``rt`` and its source; "" unknown.

    Args:
        debug: ``/sys/kernel/debug/sched/preempt``, the one in force in brackets.
        cmdline: the kernel's command line.
        config: the kernel's configuration.
        version: ``uname -v``.
    """
    if "PREEMPT_RT" in version:
        return "rt (uname -v)"
    chosen = re.search(r"\((\w+)\)", debug)
    if chosen:
        return f"{chosen[1]} (now)"
    dynamic = "PREEMPT_DYNAMIC" in version or "CONFIG_PREEMPT_DYNAMIC=y" in config
    asked = re.findall(r"(?:^|\s)preempt=(\w+)", cmdline)
    if dynamic and asked:
        return f"{asked[-1]} (kernel command line)"
    # With PREEMPT_DYNAMIC these hold the default.
    built = re.search(r"^CONFIG_PREEMPT(?:_(NONE|VOLUNTARY|LAZY|RT))?=y", config, re.MULTILINE)
    if built:
        return f"{_MODELS.get(built[1], 'full')} (kernel configuration)"
    if not dynamic and re.search(r"\bPREEMPT\b", version):
        return "full (uname -v)"
    return ""


def _config() -> str:
    try:
        with gzip.open("/proc/config.gz", "rt") as file:
            return file.read()
    except OSError:
        return _read(f"/boot/config-{platform.release()}")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
