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

#define ABI_VERSION 3

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
#define VEC_PENDING 16 /* two words hold a byte for each */
#define VEC_NONE 0xffffffffU

#define COMM_LEN 16
/* As deep as perf goes. One below a power of two, so that a mask bounds it. */
#define KERNEL_STACK_DEPTH 127
#define USER_STACK_DEPTH 27
#define LOOKBACK_DEPTH 32

/* Watched kernel threads that may wait for one CPU at a time; ksoftirqd is the first. */
#define WAITERS 8
#define KSOFTIRQD 0
#define LOOKBACK_SAMPLES 64
/* Two rings a CPU: when a stall begins, the one that tells of before is left alone. */
#define LOOKBACK_RINGS 2
#define NAPI_SLOTS 16
#define NAPI_UNREGISTERED 0xffffffff /* ifindex of a device without a number */
#define BUCKET_TASKS 4
#define CPU_ANY 0xffffffffU
/* In timed_mask: the threshold is long enough that less than a tick is brief. */
#define BRIEF_BIT 31

/* Of who had the CPU: how much of the command line, how many names of a path, innermost first. */
#define ARGS_LEN 256
#define PATH_DEPTH 12
#define NAME_LEN 128
#define NAMES_LEN 2048

/* task_record.known: what could be read. */
#define KNOWN_ARGS 0x1
#define KNOWN_SYSCALL 0x2
#define KNOWN_CGROUP 0x4

enum record_type {
	RECORD_SAMPLE = 1, /* the stall goes on; this is what runs now */
	RECORD_CLOSE = 2, /* nothing is overdue any more */
	RECORD_HOTPLUG = 3, /* the CPU goes down or comes up: only type, source and cpu count */
	RECORD_TASK = 4, /* struct task_record: who the next record of this CPU is about */
};

/* The hook that wrote a record: it says what the stack means. */
enum record_source {
	SOURCE_TICK = 0, /* interrupted while the stall goes on */
	SOURCE_SWITCH = 1, /* the task that gives the CPU to a watched thread */
	SOURCE_ENTRY = 2, /* the context in which the late vector is served */
	SOURCE_EXIT = 3, /* what a long handler ran on top of */
	SOURCE_NMI = 4, /* interrupted although interrupts are off */
	SOURCE_HOTPLUG = 5,
	SOURCE_COUNT = 6,
};

struct stall_record {
	u32 type;
	u32 source;
	u32 cpu;
	u32 seq; /* number of the stall on this CPU */
	u64 time_ns;
	u64 started_ns; /* since when the oldest overdue work has waited */
	u64 late_ns; /* the longest that a tick of this stall came too late */
	u64 served_ns; /* longest service of one handler, the present one included */
	u64 steal_ns; /* the hypervisor's steal clock of this CPU; 0: none */
	u64 net_rx_ns; /* in net_rx_action, ever */
	u64 switched_ns; /* since when the task has had the CPU, if that began meanwhile */
	u64 cgroup_id;
	u64 wait_ns[VEC_COUNT]; /* sample: age now; close: longest wait */
	u64 waiter_ns[WAITERS]; /* runnable and not running, likewise */
	u32 waiter_pid[WAITERS];
	u32 tgid;
	u32 tid;
	u32 task_flags; /* PF_* */
	u32 policy;
	u32 prio; /* kernel's scale: below 100 is real time */
	u32 serving_vec; /* VEC_NONE: no softirq in service */
	u32 served_vec; /* of served_ns */
	u32 switches; /* context switches since the wait began */
	u32 sample_nr; /* samples written or lost so far, this one included */
	u32 lost; /* records lost on this CPU, ever */
	u32 net_rx_runs;
	u32 processed; /* of softnet_data, as /proc/net/softnet_stat shows them */
	u32 squeezed;
	u32 dropped;
	u32 received_rps;
	u32 flow_limit;
	u32 backlog; /* not a counter: what waits in input_pkt_queue now */
	u32 napi_ifindex; /* what a long NET_RX handler polled; 0: not known */
	u32 napi_work;
	u32 napi_budget;
	char napi_name[COMM_LEN];
	u32 kernel_stack_bytes;
	u32 user_stack_bytes;
	char comm[COMM_LEN];
	u64 user_stack[USER_STACK_DEPTH];
	u64 kernel_stack[KERNEL_STACK_DEPTH]; /* sent only as far as filled */
};

/* Paths of a task. */
enum task_path {
	PATH_CGROUP = 0, /* in the unified hierarchy */
	PATH_CONTROLLER = 1, /* that a controller has in a hierarchy of its own */
	PATH_EXE = 2,
	PATH_FILE = 3, /* if the first argument of the system call is a descriptor */
	PATH_COUNT = 4,
};

/*
 * Who a task is, once per stall and task, before its first record (but an NMI's,
 * which goes without). Of each path the names follow each other in names,
 * innermost first, each with its NUL.
 */
struct task_record {
	u32 type;
	u32 source;
	u32 cpu;
	u32 seq; /* number of the stall on this CPU */
	u64 time_ns;
	u64 file_inode;
	u32 known; /* KNOWN_* */
	u32 task_flags; /* PF_* */
	u32 tgid;
	u32 tid;
	u32 uid;
	u32 parent_pid; /* 0: not known */
	u32 ns_pid; /* of the process in its own pid namespace; 0: that is the first, or not known */
	u32 syscall; /* that it is in */
	u32 args_total; /* bytes of the whole command line */
	u32 args_bytes;
	u32 path_names[PATH_COUNT]; /* how many; 0: the root, or not known */
	u32 paths_cut; /* a bit for each path that has further names above */
	u32 names_bytes;
	char parent_comm[COMM_LEN];
	char file_system[COMM_LEN]; /* that the file is in */
	char args[ARGS_LEN]; /* each argument with its NUL */
	char names[NAMES_LEN]; /* sent only as far as filled */
};

/* A watched thread that waits for a CPU, or waited in the present stall. */
struct waiter {
	u64 task;
	u64 since_ns; /* runnable and not running since; 0: does not wait */
	u64 waited_ns; /* longest wait >= threshold of this stall, */
	u32 waited_pid; /* and whose */
	u32 pid;
};

/*
 * What one CPU knows about itself. Written by its own programs without locks
 * or atomics (waiters, running and runs under its run queue's lock, so perhaps by
 * another CPU; when it comes or goes, by the one that controls that), read by
 * user space through a shared mapping; user space writes only task and pid of
 * waiter KSOFTIRQD, threshold_ns and the masks. A multiple of 64 bytes, so that no
 * two CPUs share a cache line.
 */
struct cpu_state {
	/* Which waiters wait. Bytes: another CPU may wake one between a load and a store. */
	u8 waiting[WAITERS];
	u16 active; /* a stall goes on */
	u16 runs; /* a watched thread has the CPU: running */
	u32 serving; /* vector in service plus 1; 0: none */
	u32 vec_mask;
	u32 timed_mask; /* vectors whose raises are timed, and BRIEF */
	u64 serving_since;
	/* Which of raised are not 0. Bytes: interrupts may come between a load and a store. */
	u8 pending[VEC_PENDING];
	u64 raise_jiffies; /* of the last raise that was timed, */
	u64 jiffy_ns; /* and when the first in that jiffy was */
	/* So far the first cache line; the next holds what a raise and its service touch. */
	u64 raised[VEC_COUNT]; /* oldest raise not served yet; 0: none */
	u64 threshold_ns; /* as in watch_config, for the rare part; 0: record nothing */
	u64 net_rx_since;
	u64 net_rx_runs;
	u64 net_rx_ns;
	u64 net_rx_max_ns;
	u64 napi_polls; /* that found no slot, and those of slots given away */
	u64 napi_packets;
	struct waiter waiters[WAITERS];
	u64 started_ns;
	u64 next_sample_ns;
	u64 spacing_ns;
	u64 ended_ns; /* of the last stall */
	u64 switched_ns; /* last context switch while something waited */
	u64 waited_ns[VEC_COUNT]; /* longest waits >= threshold of this stall */
	u64 served_ns; /* longest service >= threshold of this stall */
	u64 late_ns; /* the longest that a tick of this stall came too late */
	u64 window_ns; /* the second in which window_stalls began */
	u64 suppressed_ns; /* of all suppressed stalls */
	u64 last_tick_ns;
	u64 last_lookback_ns;
	u64 ticks[LOOKBACK_RINGS]; /* samples ever; the next goes to ticks % LOOKBACK_SAMPLES */
	u64 tick_timer; /* hrtimer of this CPU's tick; 0: not known yet */
	u32 seq;
	u32 sample_nr;
	u32 switches;
	u32 served_vec;
	u32 muted; /* this stall is over the limit and sends nothing */
	u32 window_stalls;
	u32 suppressed; /* stalls that ended muted */
	u32 lost; /* records that the perf buffer had no room for, or that came too late */
	u32 yields; /* ticks in a row that found it another's turn: source */
	u32 inline_served; /* softirqs served elsewhere while ksoftirqd waited */
	u32 deferred; /* softirqs left to a waiting ksoftirqd */
	u32 stale; /* task pointers found to be somebody else's */
	u32 missed; /* waits whose end was not seen */
	u32 unwatched; /* wake-ups of watched threads beyond WAITERS */
	u32 steal_version; /* 0: the hypervisor keeps no steal clock */
	u32 hotplug; /* last target of a hotplug, plus 1 */
	u32 source; /* whose turn it is: handle_record makes its record */
	u32 ring; /* that is written now */
	u32 napi_wanted; /* the next poll to end is the one of a long handler */
	u32 napi_ifindex;
	u32 napi_work;
	u32 napi_budget;
	u64 running;
	char napi_name[COMM_LEN];
	u64 told_task; /* seq << 32 | tid of the task that a task_record was last written of */
};

/* One element, written by user space. threshold_ns 0: record nothing. */
struct watch_config {
	u64 threshold_ns;
	u64 tick_ns;
	u64 tick_function[2]; /* of the hrtimer that is the tick; 0: not known */
	u32 vec_mask; /* which vectors count as overdue */
	u32 max_samples; /* per stall */
	u32 max_stalls; /* per CPU and second; 0: no limit */
	u32 lookback; /* keep a ring of what ran */
	/* Places relative to the tick's hrtimer in per-CPU memory; 0: not known. */
	s32 steal_offset; /* struct kvm_steal_time */
	s32 cpustat_offset; /* kernel_cpustat.cpustat[CPUTIME_STEAL] */
	s32 softnet_offset; /* softnet_data.processed, and time_squeeze behind it */
	s32 regs_offset; /* __irq_regs: where to find what the interrupt came over */
	/* Further members of softnet_data. Drops may be counted in two words. */
	s32 dropped_offset;
	s32 dropped_more_offset;
	s32 received_rps_offset;
	s32 backlog_offset;
	s32 flow_limit_offset; /* of a pointer, */
	s32 flow_count_offset; /* and of the count in what it points to */
};

/* Watched threads whose pointers have one hash: one cache line. */
struct watched_bucket {
	u64 task[BUCKET_TASKS];
	u32 pid[BUCKET_TASKS];
	u32 cpu[BUCKET_TASKS]; /* CPU_ANY: ask the task */
};

/* What the stack of a tick's sample is. */
enum tick_kind {
	TICK_STACK = 0, /* as bpf_get_stack() walked it */
	TICK_ADDRESS = 1, /* only the address that was interrupted, in the kernel */
	TICK_USER = 2, /* none: user code was interrupted */
};

/* What ran when a tick came. Each CPU has LOOKBACK_RINGS rings of LOOKBACK_SAMPLES of them. */
struct tick_sample {
	u64 time_ns; /* 0: being written */
	u64 steal_ns;
	u64 net_rx_ns;
	u32 net_rx_runs;
	u32 processed;
	u32 squeezed;
	u32 dropped;
	u32 received_rps;
	u32 flow_limit;
	u32 backlog;
	u32 tgid;
	u32 tid;
	u32 policy;
	u32 prio;
	u32 kind; /* enum tick_kind */
	u32 serving; /* vector in service plus 1; 0: none */
	u32 stack_bytes;
	char comm[COMM_LEN];
	u64 stack[LOOKBACK_DEPTH];
};

/* What one CPU polled of one NAPI instance. */
struct napi_slot {
	u64 napi;
	u64 polls;
	u64 packets;
	u64 exhausted; /* polls that used their whole budget */
	u64 checked; /* jiffies when name and ifindex were read */
	u32 ifindex;
	u32 seq; /* the stall that these are of: */
	u32 stall_polls;
	u32 stall_packets;
	u32 stall_exhausted;
	u32 reserved;
	char name[COMM_LEN];
};

/* What the task iterator writes for each kernel thread. */
struct task_entry {
	u64 task;
	u32 pid;
	u32 flags;
	u32 cpus_allowed; /* on how many CPUs it may run */
	u32 cpu; /* that it is on */
	char comm[COMM_LEN];
};

#endif
