// SPDX-License-Identifier: GPL-2.0-only
/*
 * When was one kthread woken, when did it get the CPU, when did it leave it?
 * The kthread is bound to a CPU and only that CPU wakes it, with interrupts
 * off: the log needs no atomics.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>

#define LOG_SIZE (1 << 15)

enum what {
	WOKEN = 1,
	GOT_CPU = 2,
	LEFT_CPU = 3,
	PREEMPTED = 4, /* left the CPU, still runnable */
};

struct task_struct {
	int pid;
	char comm[16];
	unsigned int __state;
} __attribute__((preserve_access_index));

/* Before commit 2f064a59a11f (5.14). */
struct task_struct___old {
	long state;
} __attribute__((preserve_access_index));

struct entry {
	__u64 time_ns; /* CLOCK_MONOTONIC */
	__u32 what;
	__u32 other_tid; /* who ran when it was woken, or before or after it */
	char other_comm[16];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} watched_pid SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} written SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, LOG_SIZE);
	__type(key, __u32);
	__type(value, struct entry);
} entries SEC(".maps");

static __always_inline __u32 pid_to_watch(void)
{
	__u32 zero = 0;
	__u32 *pid = bpf_map_lookup_elem(&watched_pid, &zero);

	return pid ? *pid : 0;
}

static __always_inline struct entry *append(enum what what)
{
	__u32 zero = 0, slot;
	__u64 *count = bpf_map_lookup_elem(&written, &zero);
	struct entry *entry;

	if (!count)
		return 0;
	slot = *count & (LOG_SIZE - 1);
	entry = bpf_map_lookup_elem(&entries, &slot);
	if (!entry)
		return 0;
	*count += 1;
	entry->time_ns = bpf_ktime_get_ns();
	entry->what = what;
	return entry;
}

static __always_inline void note_other(struct entry *entry, struct task_struct *other)
{
	entry->other_tid = BPF_CORE_READ(other, pid);
	BPF_CORE_READ_STR_INTO(&entry->other_comm, other, comm);
}

/* Preempted in whatever state, or woken on its way to sleep. */
static __always_inline int still_runnable(__u64 preempted, struct task_struct *prev)
{
	if (preempted)
		return 1;
	if (bpf_core_field_exists(prev->__state))
		return BPF_CORE_READ(prev, __state) == 0;
	return BPF_CORE_READ((struct task_struct___old *)prev, state) == 0;
}

SEC("raw_tp/sched_wakeup")
int watch_sched_wakeup(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *task = (void *)ctx->args[0];
	__u32 pid = pid_to_watch();
	struct entry *entry;

	if (!pid || BPF_CORE_READ(task, pid) != pid)
		return 0;
	entry = append(WOKEN);
	if (!entry)
		return 0;
	entry->other_tid = bpf_get_current_pid_tgid();
	bpf_get_current_comm(entry->other_comm, sizeof(entry->other_comm));
	return 0;
}

SEC("raw_tp/sched_switch")
int watch_sched_switch(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *prev = (void *)ctx->args[1];
	struct task_struct *next = (void *)ctx->args[2];
	__u32 pid = pid_to_watch();
	struct entry *entry;

	if (!pid)
		return 0;
	if (BPF_CORE_READ(next, pid) == pid) {
		entry = append(GOT_CPU);
		if (entry)
			note_other(entry, prev);
	} else if (BPF_CORE_READ(prev, pid) == pid) {
		entry = append(still_runnable(ctx->args[0], prev) ? PREEMPTED : LEFT_CPU);
		if (entry)
			note_other(entry, next);
	}
	return 0;
}

char _license[] SEC("license") = "GPL";
