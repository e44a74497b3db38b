/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The ABI between the BPF programs and stalld/records.py.
 *
 * Every record starts with its type. All times are CLOCK_MONOTONIC
 * nanoseconds as bpf_ktime_get_ns() returns them. Only fixed-width types
 * stand here, ordered so that no compiler adds padding; the layout test
 * compares every offset with the Python side.
 */
#ifndef STALLD_RECORDS_H
#define STALLD_RECORDS_H

#define ABI_VERSION 1

/* Softirq vectors, in the order of include/linux/interrupt.h. */
#define VEC_HI 0
#define VEC_TIMER 1
#define VEC_NET_TX 2
#define VEC_NET_RX 3
#define VEC_BLOCK 4
#define VEC_IRQ_POLL 5
#define VEC_TASKLET 6
#define VEC_SCHED 7
#define VEC_HRTIMER 8
#define VEC_RCU 9
#define VEC_COUNT 10
#define VEC_NONE 0xffffffffU

#define COMM_LEN 16
/* As deep as perf goes. One below a power of two, so that a mask bounds it. */
#define KERNEL_STACK_DEPTH 127
#define USER_STACK_DEPTH 27

enum record_type {
	RECORD_SAMPLE = 1, /* the stall goes on; this is what runs now */
	RECORD_CLOSE = 2, /* nothing is overdue any more */
};

/* The hook that wrote a record: it says what the stack means. */
enum record_source {
	SOURCE_TICK = 0, /* interrupted while the stall goes on */
	SOURCE_SWITCH = 1, /* the task that gives the CPU to ksoftirqd */
	SOURCE_ENTRY = 2, /* the context in which the late vector is served */
	SOURCE_COUNT = 3,
};

struct stall_record {
	u32 type;
	u32 source;
	u32 cpu;
	u32 seq; /* number of the stall on this CPU */
	u64 time_ns;
	u64 started_ns; /* since when the oldest overdue work has waited */
	u64 ksoftirqd_wait_ns; /* 0: not runnable, or running */
	u64 serving_ns; /* age of the vector in service */
	u64 cgroup_id;
	u64 wait_ns[VEC_COUNT]; /* sample: age now; close: longest wait */
	u32 tgid;
	u32 tid;
	u32 task_flags; /* PF_* */
	u32 policy;
	u32 prio; /* kernel's scale: below 100 is real time */
	u32 serving_vec; /* VEC_NONE: no softirq in service */
	u32 ksoftirqd_pid;
	u32 switches; /* context switches since the wait began */
	u32 sample_nr; /* samples written or lost so far, this one included */
	u32 lost; /* records lost on this CPU, ever */
	u32 kernel_stack_bytes;
	u32 user_stack_bytes;
	char comm[COMM_LEN];
	u64 user_stack[USER_STACK_DEPTH];
	u64 kernel_stack[KERNEL_STACK_DEPTH]; /* sent only as far as filled */
};

/*
 * What one CPU knows about itself. Written by its own programs without locks
 * or atomics, read by user space through a shared mapping; user space writes
 * only ksoftirqd and ksoftirqd_pid. A multiple of 64 bytes, so that no two
 * CPUs share a cache line.
 */
struct cpu_state {
	u64 ksoftirqd; /* task pointer; 0: not known yet */
	u64 ksoftirqd_since; /* runnable and not running since; 0: no */
	u32 ksoftirqd_pid;
	u32 active; /* a stall goes on */
	u32 serving; /* vector in service plus 1; 0: none */
	u32 seq;
	u64 serving_since;
	u64 raised[VEC_COUNT]; /* oldest raise not served yet; 0: none */
	u64 started_ns;
	u64 next_sample_ns;
	u64 spacing_ns;
	u64 ended_ns; /* of the last stall */
	u64 last_tick_ns; /* last tick that found something waiting */
	u64 waited_ns[VEC_COUNT]; /* longest waits >= threshold of this stall */
	u64 ksoftirqd_waited_ns;
	u64 net_rx_since;
	u64 net_rx_runs;
	u64 net_rx_ns;
	u64 net_rx_max_ns;
	u32 sample_nr;
	u32 switches;
	u32 lost; /* records that the perf buffer had no room for */
	u32 sent;
	u32 inline_served; /* softirqs served elsewhere while ksoftirqd waited */
	u32 deferred; /* softirqs left to a waiting ksoftirqd */
	u32 stale; /* task pointers found to be somebody else's */
	u32 missed; /* raises whose service was not seen */
	u64 reserved[9];
};

/* One element, written by user space. threshold_ns 0: record nothing. */
struct watch_config {
	u64 threshold_ns;
	u64 tick_ns;
	u32 vec_mask; /* which vectors count as overdue */
	u32 max_samples; /* per stall */
};

/* What the task iterator writes for each kernel thread. */
struct task_entry {
	u64 task;
	u32 pid;
	u32 flags;
	char comm[COMM_LEN];
};

#endif
