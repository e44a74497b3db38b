"""Makes the maps, loads the programs and attaches them: everything that this kernel allows."""

from __future__ import annotations

import os
import sys
import time

from stalld.errors import MissingAbilityError, ProbeError
from stalld.probe import compiler, libbpf
from stalld.probe.compiled import Compiled, with_maps
from stalld.probe.libbpf import Kind, RefusedError
from stalld.probe.protocol import Attached, Description, Missing, Request

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

NET_RX_ACTION = "net_rx_action"
ITERATES_TASKS = "bpf_iter_task"
"""The kernel's functions that TRACING programs are for."""

_RAW_TRACEPOINT = Kind(libbpf.RAW_TRACEPOINT)


class NetRxActionError(ProbeError):
    """Only net_rx_action could not be attached: another way may work."""


def attach(
    request: Request, compiled: Compiled, compile_ms: float | None
) -> tuple[Description, list[int]]:
    """Do it all, or nothing.

    Args:
        compile_ms: how long the compiler took; None: it was spared.

    Returns:
        See :func:`stalld.probe.loader.load`.

    Raises:
        NetRxActionError: see there.
        ProbeError: likewise.
    """
    clock = time.monotonic()
    loading = _Loading(compiled)
    try:
        fds = loading.everything(request)
    except BaseException:
        loading.close()
        raise
    description = Description(
        structs=compiled.structs,
        net_rx_action=compiled.net_rx_action,
        attached=loading.attached,
        missing=loading.missing,
        fds=list(fds),
        bcc_version=compiled.bcc_version,
        compile_ms=None if compile_ms is None else round(compile_ms, 1),
        attach_ms=round((time.monotonic() - clock) * 1e3, 1),
        percpu=compiled.percpu,
    )
    return description, list(fds.values())


class _Loading:
    """What has been made so far; :meth:`close` takes it back."""

    def __init__(self, compiled: Compiled) -> None:
        self.attached: list[Attached] = []
        self.missing = list(compiled.missing)
        self._compiled = compiled
        self._opened: list[int] = []
        self._maps: list[int] = []

    def close(self) -> None:
        while self._opened:
            os.close(self._opened.pop())

    def everything(self, request: Request) -> dict[str, int]:
        """Descriptors by their names in :class:`Description`."""
        names = [spec.name for spec in self._compiled.maps]
        for spec in self._compiled.maps:
            try:
                self._maps.append(self._own(libbpf.create_map(spec)))
            except RefusedError as error:
                raise ProbeError(f"the kernel refused the map {spec.name}: {error}") from error
        fds = {f"map:{name}": self._maps[names.index(name)] for name in MAPS}
        if self._compiled.net_rx_action != "softirq":
            fds |= self._net_rx_action(kprobe=self._compiled.net_rx_action == "kprobe")
        iterator = self._task_iterator()
        if iterator is not None:
            fds["iter:task"] = iterator
        for index, function in enumerate(TAILS):
            tail = self._program(function, _RAW_TRACEPOINT, function)
            try:
                libbpf.put(fds["map:tails"], index, tail)
            except RefusedError as error:
                raise ProbeError(f"the kernel refused a program array: {error}") from error
        if "handle_nmi" in self._compiled.programs:
            fds["prog:nmi"] = self._program("handle_nmi", Kind(libbpf.PERF_EVENT), "the NMI")
        for hook in request.hooks or PROGRAMS:
            link = self._raw_tracepoint(hook)
            if link is not None:
                fds[f"link:{hook}"] = link
        return fds

    def _own(self, fd: int) -> int:
        self._opened.append(fd)
        return fd

    def _program(self, function: str, kind: Kind, purpose: str) -> int:
        code = self._compiled.programs.get(function)
        if code is None:
            raise ProbeError(f"there is no program {function!r} for {purpose}")
        try:
            return self._own(
                libbpf.load_program(
                    function,
                    kind,
                    with_maps(code, self._maps.__getitem__),
                    self._compiled.license,
                    self._compiled.kern_version,
                )
            )
        except RefusedError as error:
            sys.stderr.write(error.log)
            raise ProbeError(f"the kernel refused the program for {purpose}: {error}") from error

    def _raw_tracepoint(self, hook: str) -> int | None:
        program = self._program(PROGRAMS.get(hook, ""), _RAW_TRACEPOINT, hook)
        place = HOOKS.get(hook, hook)
        try:
            link = self._own(libbpf.attach_raw_tracepoint(place, program))
        except RefusedError as error:
            if hook in OPTIONAL:
                self.missing.append(Missing(f"raw tracepoint {hook}", str(error), OPTIONAL[hook]))
                return None
            raise MissingAbilityError(
                f"cannot attach to the raw tracepoint {hook}: {error}; "
                "the service needs it, so this kernel (built without it?) is not supported"
            ) from error
        name = hook if hook == place else f"{place}: {hook}"
        self.attached.append(Attached(name, "raw_tracepoint"))
        return link

    def _net_rx_action(self, *, kprobe: bool) -> dict[str, int]:
        """Its entry and its return."""
        how = "kprobe" if kprobe else "kfunc"
        links = {}
        for name, attach_type in (
            (NET_RX_ACTION, libbpf.TRACE_FENTRY),
            (f"{NET_RX_ACTION} return", libbpf.TRACE_FEXIT),
        ):
            function = f"handle_{name.replace(' ', '_')}"
            try:
                if kprobe:
                    program = self._program(function, Kind(libbpf.KPROBE), name)
                    link = compiler.attach_kprobe(
                        program, NET_RX_ACTION, on_return=name != NET_RX_ACTION
                    )
                else:
                    kind = Kind(libbpf.TRACING, attach_type, self._compiled.btf_ids[NET_RX_ACTION])
                    link = libbpf.attach_raw_tracepoint(None, self._program(function, kind, name))
            except (OSError, RefusedError, ProbeError) as error:
                raise NetRxActionError(f"{name}: {error}") from error
            links[f"link:{name}"] = self._own(link)
            self.attached.append(Attached(name, how))
        return links

    def _task_iterator(self) -> int | None:
        """A link whose every iterator lists the kernel threads, or None."""
        btf_id = self._compiled.btf_ids.get(ITERATES_TASKS)
        if self._compiled.structs != "btf":
            reason = "this kernel has no BTF"
        elif btf_id is None:
            reason = f"{ITERATES_TASKS} is not in this kernel's BTF"
        else:
            kind = Kind(libbpf.TRACING, libbpf.TRACE_ITER, btf_id)
            try:
                program = self._program("bpf_iter__task", kind, "the task iterator")
                link = self._own(libbpf.link_iterator(program))
            except (RefusedError, ProbeError) as error:
                reason = str(error)
            else:
                self.attached.append(Attached("task", "iterator"))
                return link
        self.missing.append(Missing("task iterator", reason, NO_ITERATOR))
        return None
