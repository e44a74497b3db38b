"""Trimming of kernel stacks: real forms of 6.18 and those of older and other kernels."""

import pytest

from stalld.enrich.stack import Kind, Mode, is_entry, trim

TICK = (
    "bpf_prog_fe9a80bd28919bdf_tick bpf_trace_run2 __hrtimer_run_queues hrtimer_interrupt "
    "__sysvec_apic_timer_interrupt sysvec_apic_timer_interrupt asm_sysvec_apic_timer_interrupt "
)
READ_ZERO = "read_zero vfs_read ksys_read do_syscall_64 entry_SYSCALL_64_after_hwframe"
IDLE = (
    "pv_native_safe_halt default_idle default_enter_idle cpuidle_enter_state cpuidle_enter "
    "do_idle cpu_startup_entry start_secondary common_startup_64"
)
NET_RX = "process_backlog __napi_poll net_rx_action handle_softirqs "
IRQ_TAIL = "__irq_exit_rcu common_interrupt asm_common_interrupt "
SENDTO = (
    "__dev_queue_xmit ip_finish_output2 ip_output ip_push_pending_frames raw_sendmsg __sys_sendto "
    "__x64_sys_sendto do_syscall_64 entry_SYSCALL_64_after_hwframe"
)
BH_ENABLE = "do_softirq.part.0 __local_bh_enable_ip "
SPIN = (
    "read_tsc ktime_get_mono_fast_ns bpf_prog_c6c28b50b610e19b_injected_spin bpf_trace_run2 "
    "__bpf_trace_sys_enter syscall_trace_enter do_syscall_64 entry_SYSCALL_64_after_hwframe"
)
SMPBOOT = "smpboot_thread_fn kthread ret_from_fork ret_from_fork_asm"

# name: what the tick came over, and the frames that the tick itself put on top.
TICK_TOPS = {
    "6.18 x86": TICK,
    "6.18 x86, program not in the table yet": TICK.replace(
        "bpf_prog_fe9a80bd28919bdf_tick", "0xffffffffc0201234"
    ),
    "6.1 x86": "bpf_prog_0123456789abcdef_tick bpf_trace_run2 __bpf_trace_hrtimer_expire_entry "
    "__hrtimer_run_queues hrtimer_interrupt __sysvec_apic_timer_interrupt "
    "sysvec_apic_timer_interrupt asm_sysvec_apic_timer_interrupt ",
    "5.10 x86": "bpf_prog_0123456789abcdef_tick bpf_trace_run2 __bpf_trace_hrtimer_expire_entry "
    "__traceiter_hrtimer_expire_entry __hrtimer_run_queues hrtimer_interrupt "
    "__sysvec_apic_timer_interrupt asm_call_sysvec_on_stack sysvec_apic_timer_interrupt "
    "asm_sysvec_apic_timer_interrupt ",
    "4.19 x86": "bpf_get_stack_raw_tp bpf_prog_0123456789abcdef_tick bpf_trace_run2 "
    "__hrtimer_run_queues hrtimer_interrupt smp_apic_timer_interrupt apic_timer_interrupt ",
    "4.19 x86, timer by an external interrupt": "bpf_prog_0123456789abcdef_tick bpf_trace_run2 "
    "__hrtimer_run_queues hrtimer_interrupt tick_do_broadcast.constprop.0 timer_interrupt "
    "__handle_irq_event_percpu handle_irq_event_percpu handle_irq_event handle_edge_irq "
    "handle_irq do_IRQ common_interrupt ",
    "hyper-v": "bpf_prog_0123456789abcdef_tick bpf_trace_run2 __hrtimer_run_queues "
    "hrtimer_interrupt hv_stimer0_isr __sysvec_hyperv_stimer0 sysvec_hyperv_stimer0 "
    "asm_sysvec_hyperv_stimer0 ",
    "xen hvm": "bpf_prog_0123456789abcdef_tick bpf_trace_run2 __hrtimer_run_queues "
    "hrtimer_interrupt xen_timer_interrupt __handle_irq_event_percpu handle_irq_event_percpu "
    "handle_percpu_irq __evtchn_fifo_handle_events xen_evtchn_do_upcall sysvec_xen_hvm_callback "
    "asm_sysvec_xen_hvm_callback ",
    "xen hvm before 5.8": "bpf_prog_0123456789abcdef_tick bpf_trace_run2 __hrtimer_run_queues "
    "hrtimer_interrupt xen_timer_interrupt __handle_irq_event_percpu handle_irq_event_percpu "
    "handle_percpu_irq generic_handle_irq evtchn_2l_handle_events __xen_evtchn_do_upcall "
    "xen_hvm_evtchn_do_upcall xen_hvm_callback_vector ",
    "xen pv": "bpf_prog_0123456789abcdef_tick bpf_trace_run2 __hrtimer_run_queues "
    "hrtimer_interrupt xen_timer_interrupt __handle_irq_event_percpu handle_percpu_irq "
    "__xen_pv_evtchn_do_upcall exc_xen_hypervisor_callback asm_exc_xen_hypervisor_callback ",
    "6.9 x86 FRED": "bpf_prog_0123456789abcdef_tick bpf_trace_run2 __hrtimer_run_queues "
    "hrtimer_interrupt __sysvec_apic_timer_interrupt sysvec_apic_timer_interrupt "
    "asm_fred_entrypoint_kernel ",
    "6.12 arm64": "bpf_prog_0123456789abcdef_tick bpf_trace_run2 __bpf_trace_hrtimer_expire_entry "
    "__hrtimer_run_queues hrtimer_interrupt arch_timer_handler_virt handle_percpu_devid_irq "
    "generic_handle_domain_irq gic_handle_irq call_on_irq_stack do_interrupt_handler "
    "el1_interrupt el1h_64_irq_handler el1h_64_irq ",
    "5.10 arm64": "bpf_prog_0123456789abcdef_tick bpf_trace_run2 __traceiter_hrtimer_expire_entry "
    "__hrtimer_run_queues hrtimer_interrupt arch_timer_handler_virt handle_percpu_devid_irq "
    "generic_handle_irq __handle_domain_irq gic_handle_irq el1_irq ",
    "NMI": "bpf_prog_0123456789abcdef_nmi bpf_overflow_handler __perf_event_overflow "
    "x86_pmu_handle_irq perf_event_nmi_handler nmi_handle default_do_nmi exc_nmi asm_exc_nmi ",
}


def check(kind: Kind, stack: str, frames: str, mode: Mode | None, own: int | None = None) -> None:
    """Hold the outcome against what it should be; `own` None: all frames."""
    trimmed = trim(stack.split(), kind)
    assert trimmed.frames == tuple(frames.split())
    assert trimmed.mode == mode
    assert trimmed.recognised
    assert trimmed.cut == len(stack.split()) - len(frames.split())
    assert trimmed.own == (len(trimmed.frames) if own is None else own)


@pytest.mark.parametrize("top", TICK_TOPS.values(), ids=TICK_TOPS)
@pytest.mark.parametrize(
    ("below", "mode", "own"),
    [
        (READ_ZERO, "kernel", None),
        (SPIN, "kernel", None),
        (IDLE, "idle", None),
        (NET_RX + IRQ_TAIL + READ_ZERO, "softirq", 7),
        ("handle_edge_irq __common_interrupt common_interrupt asm_common_interrupt " + READ_ZERO,
         "hardirq", 4),
    ],
    ids=["kernel", "spin", "idle", "softirq", "hardirq"],
)  # fmt: skip
def test_every_way_in_is_cut(top: str, below: str, mode: Mode, own: int | None) -> None:
    """Whatever brought the tick in, exactly the interrupted frames remain, with their context."""
    check("tick", top + below, below, mode, own)


@pytest.mark.parametrize(
    "top",
    [top for name, top in TICK_TOPS.items() if "arm64" not in name and "FRED" not in name]
    + [
        TICK_TOPS["6.9 x86 FRED"].replace("_kernel", "_user"),
        "bpf_prog_0123456789abcdef_tick bpf_trace_run2 __hrtimer_run_queues hrtimer_interrupt "
        "arch_timer_handler_virt handle_percpu_devid_irq generic_handle_domain_irq gic_handle_irq "
        "call_on_irq_stack do_interrupt_handler el0_interrupt __el0_irq_handler_common "
        "el0t_64_irq_handler el0t_64_irq",
    ],
)
def test_nothing_below_the_way_in_is_user_mode(top: str) -> None:
    """A tick with no kernel frame below it interrupted user mode."""
    check("tick", top, "", "user")


def test_a_way_in_from_the_kernel_is_never_user_mode() -> None:
    """arm64 says in the stub's name that the kernel was interrupted, even if frames are lost."""
    check("tick", TICK_TOPS["6.12 arm64"], "", "kernel")


@pytest.mark.parametrize(
    ("below", "mode", "own"),
    [
        # softirqs: in the tail of a task's bottom-half section, in ksoftirqd, over idle
        (NET_RX + BH_ENABLE + SENDTO, "softirq", 6),
        (NET_RX + "run_ksoftirqd " + SMPBOOT, "softirq", 4),
        (NET_RX + IRQ_TAIL + IDLE, "softirq", 7),
        (NET_RX + IRQ_TAIL.strip(), "softirq", 7),
        ("net_rx_action __do_softirq irq_exit do_IRQ ret_from_intr " + READ_ZERO, "softirq", 5),
        ("net_rx_action __do_softirq irq_exit smp_apic_timer_interrupt apic_timer_interrupt "
         + READ_ZERO, "softirq", 5),
        ("net_rx_action __softirqentry_text_start asm_call_irq_on_stack do_softirq_own_stack "
         "irq_exit_rcu common_interrupt asm_common_interrupt " + READ_ZERO, "softirq", 7),
        ("net_rx_action handle_softirqs common_interrupt asm_common_interrupt " + READ_ZERO,
         "softirq", 4),
        ("net_rx_action __do_softirq ____do_softirq call_on_irq_stack do_softirq_own_stack "
         "__irq_exit_rcu irq_exit_rcu el1_interrupt el1h_64_irq_handler el1h_64_irq " + READ_ZERO,
         "softirq", 10),
        # so deep that the dispatcher was not recorded
        ("nft_do_chain ip_rcv __napi_poll net_rx_action", "softirq", None),
        # a softirq interrupted by another interrupt's handler
        ("handle_edge_irq common_interrupt asm_common_interrupt " + NET_RX + IRQ_TAIL + READ_ZERO,
         "hardirq", 3),
        # the task's own work on its way out of an interrupt
        ("task_work_run exit_to_user_mode_loop irqentry_exit_to_user_mode asm_common_interrupt",
         "kernel", None),
        ("finish_task_switch.isra.0 __schedule preempt_schedule_irq raw_irqentry_exit_cond_resched "
         "irqentry_exit asm_sysvec_apic_timer_interrupt " + READ_ZERO, "kernel", None),
        # page faults are the task's
        ("clear_page_erms handle_mm_fault exc_page_fault asm_exc_page_fault " + READ_ZERO,
         "kernel", None),
        ("exc_page_fault asm_exc_page_fault", "kernel", None),
        ("handle_mm_fault exc_page_fault asm_fred_entrypoint_kernel " + READ_ZERO, "kernel", None),
        # idle, and what idle does for others
        ("__schedule schedule_idle cpu_startup_entry rest_init start_kernel", "idle", None),
        ("arch_cpu_idle default_idle_call do_idle cpu_startup_entry secondary_start_kernel",
         "idle", None),
        ("slow_remote_call __flush_smp_call_function_queue flush_smp_call_function_queue do_idle "
         "cpu_startup_entry start_secondary", "kernel", None),
        # threaded NAPI is a task
        ("__napi_poll napi_threaded_poll_loop napi_threaded_poll kthread ret_from_fork",
         "kernel", None),
    ],
)  # fmt: skip
def test_context_below_the_tick(below: str, mode: Mode, own: int | None) -> None:
    """The innermost context decides, and `own` tells its frames from the task's below."""
    check("tick", TICK + below, below, mode, own)


def test_spin_of_another_program_is_kept() -> None:
    """A BPF program below the interrupt is what is sampled, with all that called it."""
    spin = "bpf_prog_0011223344556677_injected_spin " + SPIN.partition("injected_spin ")[2]
    check("tick", TICK + spin, spin, "kernel")


def test_timer_in_softirq_context() -> None:
    """A timer that expires in a softirq came by no interrupt; the softirq is what runs."""
    below = "__hrtimer_run_queues hrtimer_run_softirq handle_softirqs " + IRQ_TAIL + READ_ZERO
    check("tick", "bpf_prog_0011223344556677_tick bpf_trace_run2 " + below, below, "softirq", 6)


@pytest.mark.parametrize(
    ("glue", "below", "mode"),
    [
        (BH_ENABLE, SENDTO, "kernel"),
        (IRQ_TAIL, READ_ZERO, "kernel"),
        (IRQ_TAIL, "", "user"),
        (IRQ_TAIL, IDLE, "idle"),
        ("__irq_exit_rcu sysvec_irq_work asm_sysvec_irq_work ",
         "finish_task_switch.isra.0 __schedule schedule " + SMPBOOT, "kernel"),
        ("irq_exit do_IRQ ret_from_intr ", READ_ZERO, "kernel"),
        ("____do_softirq call_on_irq_stack do_softirq_own_stack irq_exit_rcu el0_interrupt "
         "__el0_irq_handler_common el0t_64_irq_handler el0t_64_irq ", "", "user"),
        ("", "run_ksoftirqd " + SMPBOOT, "kernel"),
        ("do_softirq_post_smp_call_flush ",
         "flush_smp_call_function_queue do_idle cpu_startup_entry", "kernel"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dispatch", ["handle_softirqs ", "__do_softirq "])
def test_softirq_entry(dispatch: str, glue: str, below: str, mode: Mode) -> None:
    """At the entry of a vector the dispatch is cut: what remains is what it came over."""
    top = "bpf_prog_8adb5fc0402c4a93_entry bpf_trace_run1 __traceiter_softirq_entry "
    check("entry", top + dispatch + glue + below, below, mode)


@pytest.mark.parametrize(
    ("hook", "below", "mode"),
    [
        ("__schedule schedule ", "anon_pipe_read " + READ_ZERO.partition(" ")[2], "kernel"),
        ("__schedule __cond_resched ", READ_ZERO, "kernel"),
        ("__schedule preempt_schedule_common _cond_resched ", READ_ZERO, "kernel"),
        ("__schedule ", "do_task_dead do_exit do_group_exit do_syscall_64", "kernel"),
        ("__schedule schedule ", "io_schedule folio_wait_bit_common filemap_fault", "kernel"),
        ("__schedule schedule irqentry_exit_to_user_mode asm_sysvec_apic_timer_interrupt ", "",
         "user"),
        ("__schedule schedule irqentry_exit_to_user_mode asm_exc_page_fault ", "", "user"),
        ("__schedule preempt_schedule_irq raw_irqentry_exit_cond_resched irqentry_exit "
         "sysvec_apic_timer_interrupt asm_sysvec_apic_timer_interrupt ", READ_ZERO, "kernel"),
        ("__schedule schedule ",
         "exit_to_user_mode_loop do_syscall_64 entry_SYSCALL_64_after_hwframe", "kernel"),
        ("__schedule schedule_idle ", "do_idle cpu_startup_entry start_secondary", "idle"),
        ("__schedule schedule ", SMPBOOT, "kernel"),
    ],
)  # fmt: skip
def test_switch(hook: str, below: str, mode: Mode) -> None:
    """At a context switch the scheduler is cut: what remains is where the task gave the CPU up."""
    check("switch", "bpf_prog_7203287ef6b70b82_sw bpf_trace_run4 " + hook + below, below, mode)


@pytest.mark.parametrize("kind", ["tick", "switch", "entry"])
@pytest.mark.parametrize(
    ("stack", "cut"),
    [
        ("", 0),
        ("bpf_prog_8adb5fc0402c4a93_x bpf_trace_run1 something new_entry " + READ_ZERO, 2),
        ("bpf_prog_8adb5fc0402c4a93_x " + READ_ZERO, 0),
        ("0xffffffff81000000 0xffffffff81000010", 0),
    ],
)
def test_unknown_forms_lose_only_tracing_frames(kind: Kind, stack: str, cut: int) -> None:
    """Where the hook's frames are not found, that is said and nothing is guessed away."""
    trimmed = trim(stack.split(), kind)
    assert trimmed == (tuple(stack.split()[cut:]), None, False, cut, len(stack.split()) - cut)


def test_formatted_frames_come_back_as_given() -> None:
    """Offsets, modules and compiler suffixes do not disturb and are not lost."""
    stack = [f"{name}+0x1f" for name in TICK.split()]
    stack[0] += " [bpf]"
    below = ["ixgbe_poll.cold+0x10 [ixgbe]", "__napi_poll+0x2", "net_rx_action+0x3"]
    below += ["handle_softirqs.llvm.123+0x4", "do_softirq.part.0+0x5", "__local_bh_enable_ip+0x6"]
    trimmed = trim(stack + below)
    assert trimmed.frames == tuple(below)
    assert (trimmed.mode, trimmed.own) == ("softirq", 6)


def test_subprograms_and_callbacks_of_ours_are_cut() -> None:
    """Our program may consist of several functions, some called back by a helper."""
    ours = "bpf_prog_01_callback bpf_loop bpf_prog_02_sub bpf_prog_03_tick bpf_trace_run2 "
    check("tick", ours + TICK.split(" ", 2)[2] + READ_ZERO, READ_ZERO, "kernel")


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("asm_sysvec_apic_timer_interrupt+0x16", True),
        ("asm_exc_page_fault", True),
        ("el1h_64_sync", True),
        ("entry_SYSCALL_64_after_hwframe", False),
        ("vfs_read+0x10", False),
    ],
)
def test_is_entry(name: str, entry: bool) -> None:
    """Below the stubs of interrupts and exceptions the address is the interrupted one."""
    assert is_entry(name) is entry
