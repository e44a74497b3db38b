"""bcc: compile, load, attach. Runs in the probe child only."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stalld.errors import MissingAbilityError, ProbeError
from stalld.probe import percpu
from stalld.probe.btf import Btf
from stalld.probe.capabilities import require_bpf
from stalld.probe.fentry import fentry_error
from stalld.probe.headers import WHO, distribution_headers, lacking, write_tree
from stalld.probe.percpu import Places
from stalld.probe.protocol import (
    NMI_SAMPLER,
    NO_NMI,
    OF_A_TASK,
    Attached,
    Description,
    Missing,
    Request,
)
from stalld.records import watched_bits

if TYPE_CHECKING:
    from bcc import BPF

SOURCES = (
    "records.h",
    "state.h",
    "softirq.c",
    "record.c",
    "task.c",
    "sched.c",
    "lookback.c",
    "tick.c",
    "napi.c",
    "nmi.c",
    "hotplug.c",
    "tasks.c",
)
"""One translation unit, in this order: bcc rewrites only its main file."""

PROGRAMS = {
    # What ends a wait is attached before what begins one, else an entry that
    # was not seen would leave its vector pending for good.
    "cpuhp_enter": "handle_cpuhp_enter",
    "softirq_exit": "handle_softirq_exit",
    "softirq_entry": "handle_softirq_entry",
    "sched_switch": "handle_sched_switch",
    "sched_wakeup": "handle_sched_wakeup",
    "softirq_raise": "handle_softirq_raise",
    "napi_poll": "handle_napi_poll",
    # Two on one hook: the kernel runs them in the order they were attached.
    "lookback": "handle_tick",
    "hrtimer_expire_entry": "handle_hrtimer_expire",
}
NO_ITERATOR = (
    "each ksoftirqd is watched only after it has worked once, other threads are not watched"
)
HOOKS = {"lookback": "hrtimer_expire_entry"}
"""Where a program is attached to, when it is not called after its hook."""
OPTIONAL = {
    "cpuhp_enter": "a CPU taken offline in mid-stall may be reported as stalled when it returns",
    "hrtimer_expire_entry": "no samples during a stall: stalls are seen when they end, "
    "with the stack of that moment",
    "lookback": "what ran before a stall is not known, and times with interrupts off are not seen",
    "napi_poll": "polls and packets per device are not counted, and a long NET_RX handler "
    "has no device",
}
"""Hooks the service can do without, and what that means."""

TAILS = (
    "handle_record",
    "handle_watched_wakeup",
    "handle_watched_switch",
    "handle_emit",
    "handle_task",
)
"""What the others end in when there is something to do: TAIL_* of ``bpf/state.h``."""

MAPS = ("cpus", "config", "events", "watched", "rings", "napis", "tails")
"""Of the last the daemon has no use, but the kernel empties it when nobody holds it."""

_BPF_TRACE_ITER = 28
# include/linux/kernel_stat.h: enum cpu_usage_stat
_CPUTIME_STEAL = 7


def load(request: Request, structs_dir: Path) -> tuple[Description, list[int]]:
    """Compile, load and attach everything this kernel allows.

    Returns:
        The description, and the descriptors it names, in its order.

    Raises:
        ProbeError: with the reason; the compiler's and the verifier's own
            words are on stderr.
    """
    require_bpf()
    _require_bcc()
    btf = open_btf(request.btf_path)
    missing: list[Missing] = []
    if btf is None:
        flags = distribution_headers()
    else:
        os.environ["BCC_KERNEL_SOURCE"] = str(structs_dir)
        flags = write_tree(structs_dir, btf)
    missing += _unknown_of_tasks(btf)
    for how in ("kfunc", "kprobe", "softirq"):
        reason = _cannot_trace_net_rx_action(how, btf)
        if reason is None:
            try:
                return _build(request, flags, how, btf, missing)
            except _NetRxActionError as error:
                reason = str(error)
        missing.append(
            Missing(
                f"net_rx_action by {how}",
                reason,
                "softirq_entry and softirq_exit of NET_RX stand in",
            )
        )
    raise AssertionError("softirq always stands in")


def _require_bcc() -> None:
    try:
        from bcc import BPF
    except (ImportError, OSError) as error:
        # OSError: bcc is there, its libbcc.so.0 is not.
        raise MissingAbilityError(
            f"cannot import BPF from bcc: {error}; install it: apt install python3-bpfcc, and use "
            "the distribution's python3 (the package bcc of PyPI is something else)"
        ) from error
    assert BPF


class _NetRxActionError(ProbeError):
    """Only net_rx_action could not be attached: another way may work."""


def open_btf(path: str) -> Btf | None:
    """The kernel's BTF; None where it has none, so that headers must serve."""
    if not Path(path).exists():
        return None
    return Btf(path)


def _nmi_sampler(request: Request, btf: Btf | None, missing: list[Missing]) -> bool:
    """Whether to load its program; the daemon opens the counters and attaches it."""
    if request.nmi == "never":
        return False
    devices = Path("/sys/bus/event_source/devices")
    # A hybrid processor has one device for each kind of core.
    pmu = any((devices / name).exists() for name in ("cpu", "cpu_core"))
    if platform.machine() != "x86_64":
        reason = f"not written for {platform.machine()}"
    elif not pmu and request.nmi != "always":
        reason = "no hardware counter of cycles (PMU) on this machine"
    else:
        return True
    missing[:] = [m for m in missing if m.ability != NMI_SAMPLER]
    missing.append(Missing(NMI_SAMPLER, reason, NO_NMI))
    return False


def _unknown_of_tasks(btf: Btf | None) -> list[Missing]:
    """What the programs do not tell of who had the CPU."""
    without = dict.fromkeys(WHO, "no BTF") if btf is None else lacking(btf)
    return [Missing(f"{WHO[p].what}{OF_A_TASK}", why, WHO[p].effect) for p, why in without.items()]


def percpu_places(variables: Places, btf: Btf) -> dict[str, int]:
    """See :class:`Description`; what the kernel does not have is left out.

    A raw tracepoint has no way to this CPU's variables, but the timer of the
    tick is one of them, and the hook passes its address.
    """
    timer = variables.percpu_offset("tick_cpu_sched", "sched_timer")
    if timer is None:
        return {}
    steal = variables.percpu_offset("steal_time", "steal")
    cpustat = variables.percpu_offset("kernel_cpustat", "cpustat")
    softnet = variables.percpu_offset("softnet_data", "processed")
    squeezed = variables.percpu_offset("softnet_data", "time_squeeze")
    places = {
        "regs": variables.percpu_offset("__irq_regs"),
        "steal": steal,
        "cpustat": None if cpustat is None else cpustat + _CPUTIME_STEAL * 8,
        # The program reads both with one load.
        "softnet": softnet if softnet is not None and squeezed == softnet + 4 else None,
        "received_rps": variables.percpu_offset("softnet_data", "received_rps"),
        "backlog": variables.percpu_offset("softnet_data", "input_pkt_queue", "qlen"),
        # Linux 6.18 counts drops by NUMA node, in two words.
        "dropped": _first(
            variables.percpu_offset("softnet_data", "dropped"),
            variables.percpu_offset("softnet_data", "drop_counters", "drops0"),
        ),
        "dropped_more": variables.percpu_offset("softnet_data", "drop_counters", "drops1"),
        "flow_limit": variables.percpu_offset("softnet_data", "flow_limit"),
    }
    known = {name: place - timer for name, place in places.items() if place is not None}
    count = _flow_count(btf) if "flow_limit" in known else None
    if count is None:
        known.pop("flow_limit", None)
        return known
    return known | {"flow_count": count}


def _first(*places: int | None) -> int | None:
    return next((place for place in places if place is not None), None)


def _flow_count(btf: Btf) -> int | None:
    """Where the low half of the count is in what softnet_data.flow_limit points to."""
    try:
        field = btf.field("sd_flow_limit", "count")
    except MissingAbilityError:
        return None
    return field.offset + (field.size - 4 if sys.byteorder == "big" else 0)


def _cannot_trace_net_rx_action(how: str, btf: Btf | None) -> str | None:
    if how == "kfunc":
        return fentry_error(btf, "net_rx_action") if btf else "no BTF"
    if how == "kprobe":
        pmu = Path("/sys/bus/event_source/devices/kprobe/type")
        return None if pmu.exists() else "no kprobe support in this kernel (CONFIG_KPROBES)"
    return None


def _build(
    request: Request, flags: list[str], how: str, btf: Btf | None, missing: list[Missing]
) -> tuple[Description, list[int]]:
    from bcc import BPF, __version__

    clock = time.monotonic()
    # -O1: bcc runs LLVM's own passes after clang's; unrolling in both costs time and size.
    flags = [
        *flags,
        f"-DSTALLD_CPUS={request.cpus}",
        f"-DWATCHED_BITS={watched_bits(request.cpus)}",
        "-O1",
        "-Wno-duplicate-decl-specifier",
    ]
    nmi = _nmi_sampler(request, btf, missing)
    if nmi:
        flags.append("-DSTALLD_NMI")
    if how != "softirq":
        flags += ["-DNET_RX_ACTION_TRACED", f"-DNET_RX_ACTION_{how.upper()}"]
    try:
        bpf = BPF(text=_source(Path(request.bpf_dir)).encode(), cflags=flags)
    except Exception as error:
        # bcc raises bare Exception for everything.
        if how == "kfunc" and "kfunc" in str(error):
            raise _NetRxActionError(str(error)) from error
        raise ProbeError(f"the BPF programs were refused: {error}") from error
    compiled = time.monotonic()

    fds = {f"map:{name}": _map_fd(bpf, name) for name in MAPS}
    attached: list[Attached] = []
    if how != "softirq":
        fds |= _attach_net_rx_action(bpf, how, attached)
    if btf is not None:
        fds["iter:task"] = _task_iterator(bpf, attached, missing)
    else:
        missing.append(Missing("task iterator", "this kernel has no BTF", NO_ITERATOR))
    for index, program in enumerate(TAILS):
        tail = _load_program(bpf, program, bpf.RAW_TRACEPOINT, program)
        _put(fds["map:tails"], index, tail.fd)
    if nmi:
        fds["prog:nmi"] = os.dup(_load_program(bpf, "handle_nmi", bpf.PERF_EVENT, "the NMI").fd)
    for hook in request.hooks or PROGRAMS:
        fd = _attach_raw_tracepoint(bpf, hook, PROGRAMS.get(hook, ""), missing)
        if fd is not None:
            fds[f"link:{hook}"] = fd
            place = HOOKS.get(hook, hook)
            name = hook if hook == place else f"{place}: {hook}"
            attached.append(Attached(name, "raw_tracepoint"))
    # A slot that could not be filled carries no descriptor.
    fds = {name: fd for name, fd in fds.items() if fd >= 0}
    description = Description(
        structs="btf" if btf else "headers",
        net_rx_action=how,
        attached=attached,
        missing=missing,
        fds=list(fds),
        bcc_version=str(__version__),
        compile_ms=round((compiled - clock) * 1e3, 1),
        attach_ms=round((time.monotonic() - compiled) * 1e3, 1),
        percpu=percpu_places(percpu.places(btf), btf) if btf else {},
    )
    return description, list(fds.values())


def _map_fd(bpf: BPF, name: str) -> int:
    # Not bpf[name], which builds Python types for everything in the map.
    from bcc.libbcc import lib

    return int(lib.bpf_table_fd(bpf.module, name.encode()))


def _put(map_fd: int, key: int, value: int) -> None:
    """Write one element of 32 bits into an array of such.

    Raises:
        ProbeError: the kernel refused it.
    """
    words = ctypes.c_uint32(key), ctypes.c_uint32(value)
    if _libbpf().bpf_map_update_elem(map_fd, *map(ctypes.byref, words), ctypes.c_uint64(0)):
        raise ProbeError(f"the kernel refused a program array: {os.strerror(ctypes.get_errno())}")


def _source(bpf_dir: Path) -> str:
    """All sources as one text, with lines that keep the compiler's messages true."""
    parts = [
        "#include <linux/types.h>\n#ifdef STALLD_STRUCTS_FROM_BTF\n"
        "#include <stalld_structs.h>\n#else\n#include <linux/sched.h>\n"
        "#include <linux/netdevice.h>\n#endif\n"
    ]
    for name in SOURCES:
        try:
            parts.append(f'#line 1 "bpf/{name}"\n{(bpf_dir / name).read_text()}')
        except OSError as error:
            raise ProbeError(f"cannot read the BPF source {bpf_dir / name}: {error}") from error
    return "\n".join(parts)


def _attach_raw_tracepoint(bpf: BPF, hook: str, program: str, missing: list[Missing]) -> int | None:
    function = _load_program(bpf, program, bpf.RAW_TRACEPOINT, hook)
    place = HOOKS.get(hook, hook)
    fd = int(_libbpf().bpf_raw_tracepoint_open(place.encode(), function.fd))
    if fd >= 0:
        return fd
    reason = os.strerror(ctypes.get_errno())
    if hook in OPTIONAL:
        missing.append(Missing(f"raw tracepoint {hook}", reason, OPTIONAL[hook]))
        return None
    raise MissingAbilityError(
        f"cannot attach to the raw tracepoint {hook}: {reason}; "
        "the service needs it, so this kernel (built without it?) is not supported"
    )


def _load_program(bpf: BPF, program: str, kind: int, hook: str) -> Any:
    try:
        return bpf.load_func(program.encode(), kind)
    except Exception as error:
        # bcc raises bare Exception; the verifier's words are on stderr.
        raise ProbeError(f"the kernel refused the program for {hook}: {error}") from error


def _attach_net_rx_action(bpf: BPF, how: str, attached: list[Attached]) -> dict[str, int]:
    if how == "kfunc":
        # bcc attached these two when it loaded the module.
        fds = {
            "link:net_rx_action": next(iter(bpf.kfunc_entry_fds.values())),
            "link:net_rx_action return": next(iter(bpf.kfunc_exit_fds.values())),
        }
    else:
        try:
            bpf.attach_kprobe(event=b"net_rx_action", fn_name=b"handle_net_rx_action")
            bpf.attach_kretprobe(event=b"net_rx_action", fn_name=b"handle_net_rx_action_return")
        except Exception as error:
            raise _NetRxActionError(str(error)) from error
        entry, leave = _kprobe_fds(bpf)
        fds = {"link:net_rx_action": entry, "link:net_rx_action return": leave}
    attached += [Attached("net_rx_action", how), Attached("net_rx_action return", how)]
    return fds


def _kprobe_fds(bpf: BPF) -> tuple[int, int]:
    """bcc 0.26 keeps event name → {program name → descriptor}."""
    fds: list[Any] = []
    for value in bpf.kprobe_fds.values():
        fds += value.values() if isinstance(value, dict) else [value]
    entry, leave = fds
    return int(entry), int(leave)


def _task_iterator(bpf: BPF, attached: list[Attached], missing: list[Missing]) -> int:
    """A link whose every iterator lists the kernel threads, or -1."""
    fd, reason = -1, ""
    try:
        function = _load_program(bpf, "bpf_iter__task", bpf.TRACING, "the task iterator")
    except ProbeError as error:
        reason = str(error)
    else:
        fd = int(_libbpf().bpf_link_create(function.fd, 0, _BPF_TRACE_ITER, None))
        reason = os.strerror(ctypes.get_errno()) if fd < 0 else ""
    if fd < 0:
        missing.append(Missing("task iterator", reason, NO_ITERATOR))
    else:
        attached.append(Attached("task", "iterator"))
    return fd


def _libbpf() -> ctypes.CDLL:
    return ctypes.CDLL("libbpf.so.1", use_errno=True)


def structs_directory() -> tempfile.TemporaryDirectory[str]:
    """Where the header tree is written; gone with the child."""
    return tempfile.TemporaryDirectory(prefix="softirq-stalld-")
