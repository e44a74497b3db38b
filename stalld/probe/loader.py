"""From sources to attached programs. Runs in the probe child only."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
from pathlib import Path

from stalld.errors import MissingAbilityError, ProbeError
from stalld.probe import cache, percpu
from stalld.probe.attacher import ITERATES_TASKS, NET_RX_ACTION, NetRxActionError, attach
from stalld.probe.btf import Btf
from stalld.probe.cache import Cache
from stalld.probe.capabilities import require_bpf
from stalld.probe.compiled import Compiled
from stalld.probe.compiler import compile_sources, require_bcc
from stalld.probe.fentry import fentry_error
from stalld.probe.headers import WHO, distribution_headers, lacking, write_tree
from stalld.probe.percpu import Places
from stalld.probe.protocol import NMI_SAMPLER, NO_NMI, OF_A_TASK, Description, Missing, Request
from stalld.records import watched_bits

# include/linux/kernel_stat.h: enum cpu_usage_stat
_CPUTIME_STEAL = 7


def load(request: Request, structs_dir: Path) -> tuple[Description, list[int]]:
    """Compile, or take what was kept of the last time; load and attach what this kernel allows.

    Returns:
        The description, and the descriptors it names, in its order.

    Raises:
        ProbeError: with the reason; the compiler's and the verifier's own
            words are on stderr.
    """
    require_bpf()
    kept, key, compiled = None, "", None
    trouble: list[Missing] = []
    # Where headers stand in for BTF, nobody tells whether they are still the same.
    if request.cache_dir and Path(request.btf_path).exists():
        kept = Cache(Path(request.cache_dir))
        try:
            key = cache.key(request, nmi=_nmi_sampler(request, []))
            compiled = kept.read(key)
        except OSError as error:
            kept = None
            trouble.append(cache.trouble(error))
    if compiled is not None:
        try:
            return attach(request, compiled, None)
        except ProbeError as error:
            # Whether something is really missing, a fresh attempt tells.
            sys.stderr.write(f"what was kept was refused: {error}\n")
    compiled, description, fds = _load_anew(request, structs_dir)
    # No places are known where the symbols are hidden, which may end.
    if kept is not None and compiled.percpu:
        try:
            kept.write(key, compiled)
        except OSError as error:
            trouble.append(cache.trouble(error))
    description.missing.extend(trouble)
    return description, fds


def _load_anew(request: Request, structs_dir: Path) -> tuple[Compiled, Description, list[int]]:
    require_bcc()
    btf = open_btf(request.btf_path)
    if btf is None:
        flags = distribution_headers()
    else:
        os.environ["BCC_KERNEL_SOURCE"] = str(structs_dir)
        flags = write_tree(structs_dir, btf)
    missing = _unknown_of_tasks(btf)
    nmi = _nmi_sampler(request, missing)
    for how in ("kfunc", "kprobe", "softirq"):
        reason = _cannot_trace_net_rx_action(how, btf)
        if reason is None:
            clock = time.monotonic()
            compiled = _compile(request, flags, how, nmi, btf, missing)
            took_ms = (time.monotonic() - clock) * 1e3
            try:
                return compiled, *attach(request, compiled, took_ms)
            except NetRxActionError as error:
                reason = str(error)
        missing.append(
            Missing(
                f"net_rx_action by {how}",
                reason,
                "softirq_entry and softirq_exit of NET_RX stand in",
            )
        )
    raise AssertionError("softirq always stands in")


def open_btf(path: str) -> Btf | None:
    """The kernel's BTF; None where it has none, so that headers must serve."""
    if not Path(path).exists():
        return None
    return Btf(path)


def _nmi_sampler(request: Request, missing: list[Missing]) -> bool:
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


def _compile(
    request: Request,
    flags: list[str],
    how: str,
    nmi: bool,
    btf: Btf | None,
    missing: list[Missing],
) -> Compiled:
    flags = [
        *flags,
        f"-DSTALLD_CPUS={request.cpus}",
        f"-DWATCHED_BITS={watched_bits(request.cpus)}",
        *["-DSTALLD_NMI"] * nmi,
        *["-DNET_RX_ACTION_TRACED"] * (how != "softirq"),
    ]
    module = compile_sources(Path(request.bpf_dir), flags)
    ids = {name: btf.function_id(name) for name in (ITERATES_TASKS, NET_RX_ACTION)} if btf else {}
    return Compiled(
        structs="btf" if btf else "headers",
        net_rx_action=how,
        percpu=percpu_places(percpu.places(btf), btf) if btf else {},
        missing=list(missing),
        btf_ids={name: number for name, number in ids.items() if number is not None},
        **module._asdict(),
    )


def structs_directory() -> tempfile.TemporaryDirectory[str]:
    """Where the header tree is written; gone with the child."""
    return tempfile.TemporaryDirectory(prefix="softirq-stalld-")
