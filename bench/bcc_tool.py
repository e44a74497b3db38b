"""What our service would be as a bcc tool: one process, a Python callback for each record.

    python -m bench.bcc_tool [--names]

The reference for throughput, memory and start-up. It compiles in its own process, as all of bcc's
tools do, the three programs of runqslower-bpfcc and the type of our records; reads its perf
buffer with `event()`; and prints each record with `json.dumps`: without verdicts, folding or a
queue, and without names for addresses unless told. Its maps have the names that
tests/injector/records.py looks for, so it gets the very same records. It needs no kernel
headers, which bcc's own tools compile at every start: it starts faster than they do.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from stalld.probe.btf import VMLINUX_BTF
from stalld.probe.client import possible_cpus
from stalld.probe.headers import write_tree
from stalld.probe.loader import open_btf
from stalld.reader import PAGES_PER_CPU

THRESHOLD_NS = 10_000_000
_HEADER = Path(__file__).parents[1] / "bpf" / "records.h"
_PROGRAMS = """
BPF_F_TABLE("array", u32, struct cpu_state, cpus, NR_CPUS, BPF_F_MMAPABLE);
BPF_PERCPU_ARRAY(scratch, struct stall_record, 1);
BPF_PERF_OUTPUT(events);
BPF_HASH(start, u32, u64);

static __always_inline u32 pid_of(void *task)
{
	u32 pid = 0;

	bpf_probe_read_kernel(&pid, sizeof(pid), &((struct task_struct *)task)->pid);
	return pid;
}

static __always_inline int runnable(void *task)
{
	u64 now = bpf_ktime_get_ns();
	u32 pid = pid_of(task);

	if (pid)
		start.update(&pid, &now);
	return 0;
}

int wakeup(struct bpf_raw_tracepoint_args *ctx)
{
	return runnable((void *)ctx->args[0]);
}

int wakeup_new(struct bpf_raw_tracepoint_args *ctx)
{
	return runnable((void *)ctx->args[0]);
}

int on_switch(struct bpf_raw_tracepoint_args *ctx)
{
	u32 pid = pid_of((void *)ctx->args[2]), zero = 0;
	u64 *since = start.lookup(&pid), now;
	struct stall_record *rec = scratch.lookup(&zero);

	if (ctx->args[0] & 1)
		runnable((void *)ctx->args[1]);
	if (!since || !rec)
		return 0;
	now = bpf_ktime_get_ns();
	if (now - *since > THRESHOLD_NS) {
		rec->time_ns = now;
		rec->started_ns = *since;
		rec->tid = pid;
		events.perf_submit(ctx, rec, offsetof(struct stall_record, kernel_stack));
	}
	start.delete(&pid);
	return 0;
}
"""
_HOOKS = {"wakeup": "sched_wakeup", "wakeup_new": "sched_wakeup_new", "on_switch": "sched_switch"}


def load() -> Any:
    """The module, its programs attached."""
    from bcc import BPF

    btf = open_btf(VMLINUX_BTF)
    if btf is None:
        sys.exit("this needs a kernel with BTF")
    text = f"#include <linux/types.h>\n#include <stalld_structs.h>\n{_HEADER.read_text()}"
    with tempfile.TemporaryDirectory() as tree:
        flags = write_tree(Path(tree), btf)
        os.environ["BCC_KERNEL_SOURCE"] = tree
        flags += [f"-DNR_CPUS={possible_cpus()}", f"-DTHRESHOLD_NS={THRESHOLD_NS}"]
        bpf = BPF(
            text=(text + _PROGRAMS).encode(), cflags=[*flags, "-Wno-duplicate-decl-specifier"]
        )
    for program, hook in _HOOKS.items():
        bpf.attach_raw_tracepoint(tp=hook.encode(), fn_name=program.encode())
    return bpf


def main() -> None:
    """Until it is ended."""
    bpf = load()
    table = bpf["events"]
    names = "--names" in sys.argv[1:]

    def stack(addresses: list[int]) -> list[int] | list[str]:
        if not names:
            return addresses
        return [bpf.ksym(address, show_offset=True).decode() for address in addresses]

    def print_event(cpu: int, data: object, size: int) -> None:
        event = table.event(data)
        line = {
            "cpu": event.cpu,
            "seq": event.seq,
            "time_ns": event.time_ns,
            "started_ns": event.started_ns,
            "late_ns": event.late_ns,
            "served_ns": event.served_ns,
            "steal_ns": event.steal_ns,
            "cgroup_id": event.cgroup_id,
            "wait_ns": list(event.wait_ns),
            "waiter_ns": list(event.waiter_ns),
            "waiter_pid": list(event.waiter_pid),
            "tgid": event.tgid,
            "tid": event.tid,
            "policy": event.policy,
            "prio": event.prio,
            "switches": event.switches,
            "sample_nr": event.sample_nr,
            "comm": event.comm.decode("utf-8", "replace"),
            "kernel_stack": stack(event.kernel_stack[: event.kernel_stack_bytes // 8]),
            "user_stack": list(event.user_stack[: event.user_stack_bytes // 8]),
        }
        print(json.dumps(line))

    def print_lost(count: int) -> None:
        print(json.dumps({"lost": count}))

    table.open_perf_buffer(print_event, page_cnt=PAGES_PER_CPU, lost_cb=print_lost)
    ended = threading.Event()
    # Not by KeyboardInterrupt: in a callback ctypes would swallow it.
    signal.signal(signal.SIGINT, lambda *_: ended.set())
    print(json.dumps({"event": "started"}), flush=True)
    while not ended.is_set():
        bpf.perf_buffer_poll()  # Which a signal ends.
        sys.stdout.flush()


if __name__ == "__main__":
    main()
