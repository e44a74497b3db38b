"""What a sampled kernel stack says: which frames are the interrupted work, and in what context.

A stack taken by bpf_get_stack starts with our own program and the tracing code that called it,
then come the frames of the hook (interrupt entry, softirq dispatch or the scheduler), then the
work we want to see. Names of x86-64 and arm64, from 4.19 to 6.18.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

# Which hook took the stack: the timer tick (or any other interrupt), a context switch,
# or the entry into a softirq vector.
Kind = Literal["tick", "switch", "entry"]
Mode = Literal["kernel", "user", "idle", "softirq", "hardirq"]


class Trimmed(NamedTuple):
    """What was going on below the hook.

    `frames`: innermost first. `mode`: the context of the innermost one; "user" when none is
    left, None when the hook's own frames were not `recognised` (then only tracing is cut).
    `cut`: how many frames were removed from the top. `own`: how many of `frames` belong to
    `mode` itself; those behind are the task that a softirq or interrupt came over, and which is
    not to blame.
    """

    frames: tuple[str, ...]
    mode: Mode | None
    recognised: bool
    cut: int
    own: int


def _names(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.VERBOSE | re.ASCII)


# Our program: itself, its subprograms, helpers it calls back from. "0x": loaded after the table.
_PROGRAM = _names(r"bpf_prog_.* | 0x[0-9a-f]+")
_HELPER = _names(r"bpf_loop | bpf_for_each_\w+ | (?:array|htab|hash)\w*_for_each\w*elem")
# What calls it, and what walks the stack for it.
_TRACING = _names(
    r"""
    bpf_trace_run\d+ | __bpf_trace_\w+ | __traceiter_\w+ | bpf_trampoline_\w+ | bpf_dispatcher_\w+
    | _*bpf_prog_run\w* | __bpf_prog_(?:enter|exit)\w* | bpf_overflow_handler
    | _*bpf_get_stack\w* | get_perf_callchain | perf_callchain\w* | stack_trace_save\w*
    | arch_stack_walk\w* | trace_call_bpf | perf_trace_\w+ | perf_(?:tp|swevent)_event\w*
    | k(?:ret)?probe_\w+ | aggr_pre_handler | opt(?:imized_callback|_pre_handler) | rethook_\w+
    | fprobe_\w+ | ftrace_\w+ | arch_ftrace_\w+ | do_int3 | exc_int3 | asm_exc_int3
    """
)
# The last frame of an interrupt's way in: the assembly stub. Exceptions are no interrupts: a
# page fault is work of the task.
_IRQ_ENTRY = _names(
    r"""
    # x86 since 5.8 (idtentry), FRED since 6.9 (see _is_irq)
    asm_sysvec_\w+ | asm_common_interrupt | asm_spurious_interrupt | asm_exc_nmi
    | asm_exc_xen_hypervisor_callback | asm_exc_hv_injection | asm_exc_machine_check
    | asm_fred_entry\w+
    # x86 before
    | apic_timer_interrupt | ret_from_intr | common_interrupt | spurious_interrupt
    | error_interrupt | thermal_interrupt | (?:deferred_error|threshold)_interrupt
    | re(?:schedule|boot)_interrupt | call_function(?:_single)?_interrupt | irq_work_interrupt
    | x86_platform_ipi | kvm_posted_intr\w*_ipi | irq_move_cleanup_interrupt
    | hyperv_callback_vector | hv_stimer0_callback_vector | hyperv_reenlightenment_vector
    | acrn_hv_callback_vector | xen_hvm_callback_vector | xen_do_(?:hypervisor_callback|upcall)
    | nmi | end_repeat_nmi
    # arm64
    | el[01]_(?:irq|fiq|interrupt)(?:_naked|_compat|_handler)? | __el[01]_(?:irq|fiq)_handler_common
    | el[01][ht]?_(?:64_|32_)?(?:irq|fiq)(?:_handler)?
    """
)
# C functions of an interrupt on its way in: where irq_exit was inlined into one of them, it
# stands directly below the softirq dispatcher.
_IRQ_HANDLER = _names(
    r"""
    _*sysvec_\w+ | _*common_interrupt | do_IRQ | smp_\w+_(?:interrupt|ipi) | fred_\w+
    | xen_(?:hvm_callback|pv_evtchn_do_upcall|evtchn_do_upcall) | _*exc_xen_hypervisor_callback
    | hyperv_vector_handler | handle_percpu_devid_irq | __handle_domain_irq | gic_\w+
    | handle_IPI | ipi_handler | do_handle_IPI | do_interrupt_handler
    """
)
_FRED_IRQ = _names(r"fred_extint | fred_sysvec_\w+ | _*sysvec_\w+ | _*common_interrupt | exc_nmi")
_EXCEPTION_ENTRY = _names(
    r"""
    asm_(?:exc|fred)_\w+ | (?:async_)?page_fault
    | el[01][ht]?_(?:64_|32_)?(?:sync|error)(?:_handler)?
    """
)
_DISPATCH = frozenset(
    ("handle_softirqs", "__do_softirq", "___do_softirq", "__softirqentry_text_start")
)
_DISPATCH_GLUE = _names(
    r"""
    _*do_softirq | _*do_softirq_own_stack | call_softirq | asm_call_\w+ | call_on_irq_stack
    | call_on_stack | invoke_softirq | _*irq_exit(?:_rcu)? | do_softirq_post_smp_call_flush
    | _*local_bh_enable(?:_ip)?
    """
)
_IRQ_EXIT = _names(r"_*irq_exit(?:_rcu)? | invoke_softirq")
_VECTOR_HANDLERS = frozenset(
    (
        "net_rx_action",
        "net_tx_action",
        "run_timer_softirq",
        "hrtimer_run_softirq",
        "tasklet_action",
        "tasklet_hi_action",
        "tasklet_action_common",
        "blk_done_softirq",
        "irq_poll_softirq",
        "rcu_core_si",
        "rcu_process_callbacks",
        "run_rebalance_domains",
        "sched_balance_softirq",
        "workqueue_softirq_action",
    )
)
# The task's own business although an interrupt's stub stands below: preemption, signals and
# task work on the way out of the interrupt.
_EXIT_WORK = _names(
    r"""
    exit_to_user_mode_(?:loop|prepare) | prepare_exit_to_usermode | exit_to_usermode_loop
    | (?:raw_|dynamic_)?irqentry_exit\w* | (?:arm64_)?preempt_schedule_irq
    | do_notify_resume | ret_to_user | work_pending | retint_(?:user|kernel)
    | _*exit_to_(?:kernel|user)_mode | arm64_exit_to_\w+
    """
)
_SCHEDULE = _names(
    r"""
    __schedule | schedule | schedule_idle | schedule_preempt_disabled | schedule_rtlock
    | __schedule_loop | preempt_schedule(?:_common|_notrace)? | _*preempt_schedule\w*thunk
    | ___preempt_schedule(?:_notrace)? | (?:dynamic_)?_*cond_resched | __cond_resched_\w+
    | dynamic_(?:might_resched|preempt_schedule\w*)
    """
)
_TASK_BASE = _names(
    r"""
    do_syscall_\w+ | entry_SYS\w+ | entry_INT80\w+ | do_fast_syscall_32 | x64_sys_call
    | ret_from_fork\w* | kthread | do_idle | cpu_startup_entry
    | el0_svc\w* | el0t_(?:64|32)_sync\w* | invoke_syscall
    """
)
_IDLE_LOOP = frozenset(("do_idle", "cpu_startup_entry", "cpu_idle_loop"))
# Work for others that the idle task does on its way out of idle.
_IDLE_WORK = _names(r"_*flush_smp_call_function\w* | sched_ttwu_pending | play_dead\w*")
# Of a way in that has several known frames, those that have another one below.
_PASSED_ON = _names(
    r"common_interrupt | spurious_interrupt | __el\w+ | el[01]_interrupt | el\w+_handler"
)
_FROM_KERNEL = _names(r"(?:__)?el1\w+ | asm_fred_entrypoint_kernel")
# Frames between the scheduler and the stub of the interrupt on whose way out it was called.
_LONGEST_EXIT = 8


def trim(names: Sequence[str], kind: Kind = "tick") -> Trimmed:
    """Cut the frames of `kind`'s hook off the top of a stack and tell what was below.

    `names` are innermost first, bare or as ``fn+0xoff [module]``; frames come back as given.
    """
    bare = [_bare(name) for name in names]
    top = _tracing_end(bare)
    end = _HOOK_ENDS[kind](bare, top)
    if end is None:
        return Trimmed(tuple(names[top:]), None, False, top, len(bare) - top)
    below = bare[end:]
    if below:
        mode, own = _classify(below)
    else:
        came_by_irq = (
            end > 0 and is_entry(bare[end - 1]) and not _FROM_KERNEL.fullmatch(bare[end - 1])
        )
        mode, own = "user" if came_by_irq else "kernel", 0
    return Trimmed(tuple(names[end:]), mode, True, end, own)


def below(stack: Trimmed, tid: int) -> str | None:
    """What a softirq or interrupt came over: kernel, user or idle; None where it was none."""
    if stack.mode not in ("softirq", "hardirq"):
        return None
    if not tid:
        return "idle"
    return "kernel" if len(stack.frames) > stack.own else "user"


def is_entry(name: str) -> bool:
    """Whether `name` is where an interrupt or exception came in.

    The address in the next outer frame is then the interrupted instruction, no return address.
    """
    bare = _bare(name)
    return bool(_IRQ_ENTRY.fullmatch(bare) or _EXCEPTION_ENTRY.fullmatch(bare))


def reaches_base(names: Sequence[str]) -> bool:
    """Whether a stack goes down to where a task begins or enters the kernel, or is user code."""
    return not names or any(
        _TASK_BASE.fullmatch(bare) or is_entry(bare) for bare in map(_bare, names[-6:])
    )


def leaves_interrupt(name: str) -> bool:
    """Whether `name` is on the way out of an interrupt, back to what that came over."""
    return bool(_EXIT_WORK.fullmatch(_bare(name)))


def _bare(name: str) -> str:
    """`name` without offset, module and the compiler's suffixes (.isra.0, .part.0, .cold)."""
    plain = name.partition(" ")[0].partition("+0x")[0]
    return plain.partition(".")[0] or plain


def _tracing_end(bare: list[str]) -> int:
    """How many frames on top are the sampling program, its callers and the stack walker."""
    at = _while(_TRACING, bare, 0)
    caller = at
    while caller < len(bare) and (
        _PROGRAM.fullmatch(bare[caller]) or _HELPER.fullmatch(bare[caller])
    ):
        caller += 1
    # A program that no tracing code called was not ours but is what was sampled.
    after = _while(_TRACING, bare, caller)
    return after if after > caller else at


def _tick_end(bare: list[str], at: int) -> int | None:
    for index in range(at, len(bare)):
        if bare[index] in _DISPATCH:
            return at  # a timer that expires in softirq context: no interrupt came in
        if _is_irq(bare, index):
            return _entry_end(bare, index)
        if _TASK_BASE.fullmatch(bare[index]):
            break
    return None


def _switch_end(bare: list[str], at: int) -> int | None:
    end = _while(_SCHEDULE, bare, at)
    if end == at:
        return None
    if end < len(bare) and _EXIT_WORK.fullmatch(bare[end]):
        for index in range(end, min(end + _LONGEST_EXIT, len(bare))):
            if _is_irq(bare, index):
                return _entry_end(bare, index)
            if _TASK_BASE.fullmatch(bare[index]):
                break
            if _EXCEPTION_ENTRY.fullmatch(bare[index]):
                return index + 1
    return end


def _softirq_entry_end(bare: list[str], at: int) -> int | None:
    if at < len(bare) and bare[at] in _DISPATCH:
        return _softirq_end(bare, at)
    return None


_HOOK_ENDS = {"tick": _tick_end, "switch": _switch_end, "entry": _softirq_entry_end}


def _classify(below: list[str]) -> tuple[Mode, int]:
    """The context of the innermost frame, and how many frames belong to it."""
    whole = len(below)
    for index, name in enumerate(below):
        if name in _DISPATCH:
            return "softirq", _softirq_end(below, index)
        if _EXIT_WORK.fullmatch(name):
            return "kernel", whole
        if _is_irq(below, index):
            return "hardirq", _entry_end(below, index)
    if not _VECTOR_HANDLERS.isdisjoint(below):
        return "softirq", whole  # too deep: the dispatcher was not recorded
    if not _IDLE_LOOP.isdisjoint(below) and not any(map(_IDLE_WORK.fullmatch, below)):
        return "idle", whole
    return "kernel", whole


def _softirq_end(bare: list[str], dispatch: int) -> int:
    """First frame of what the softirq came over: bh-enabling code, or an interrupted task."""
    at = dispatch
    on_irq_exit = False
    while at < len(bare) and (bare[at] in _DISPATCH or _DISPATCH_GLUE.fullmatch(bare[at])):
        on_irq_exit = on_irq_exit or _IRQ_EXIT.fullmatch(bare[at]) is not None
        at += 1
    if on_irq_exit or (at < len(bare) and _IRQ_HANDLER.fullmatch(bare[at])):
        for index in range(at, len(bare)):
            if _is_irq(bare, index):
                return _entry_end(bare, index)
            if _TASK_BASE.fullmatch(bare[index]):
                break
    return at


def _is_irq(bare: list[str], index: int) -> bool:
    if not _IRQ_ENTRY.fullmatch(bare[index]):
        return False
    if bare[index].startswith("asm_fred_"):
        # With FRED, system calls and exceptions come in through the same stub.
        return any(map(_FRED_IRQ.fullmatch, bare[max(index - 4, 0) : index]))
    return True


def _entry_end(bare: list[str], index: int) -> int:
    """Behind the last frame of the way in that starts at `index`."""
    while (
        index + 1 < len(bare)
        and _PASSED_ON.fullmatch(bare[index])
        and _IRQ_ENTRY.fullmatch(bare[index + 1])
    ):
        index += 1
    return index + 1


def _while(pattern: re.Pattern[str], bare: list[str], at: int) -> int:
    while at < len(bare) and pattern.fullmatch(bare[at]):
        at += 1
    return at
