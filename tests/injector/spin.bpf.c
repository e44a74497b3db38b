// SPDX-License-Identifier: GPL-2.0-only
/*
 * Real, bounded stalls: each program burns time on the CPU it runs on, in the
 * context its hook gives it, and writes down when it began and ended.
 *
 *   preempt_off     raw_tp sys_enter, in one task's getppid(): preemption off
 *   bh_off          tc egress, inside sendto(): bottom halves off
 *   irqs_off        test run from another CPU: in an IPI, interrupts off
 *   irqs_off_timer  raw_tp local_timer_entry: in the tick, interrupts off (x86)
 *   softirq_hog     tc ingress: inside the NET_RX handler
 *
 * The loops are global functions: the verifier looks at each once, so that no
 * kernel newer than 5.10 is needed, and kallsyms and stacks show their names.
 */
#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>

#define MAX_SPIN_NS (500 * 1000 * 1000ULL)
#define USEC 1000ULL
/* The clock ends a spin; ROUNDS^3 only bounds it should the clock stand still. */
#define ROUNDS 400

/* The packet mark: which hook shall spin (top bits), for how many microseconds. */
#define MARK_US 0x00ffffff
#define MARK_BH_OFF 0x51000000
#define MARK_SOFTIRQ_HOG 0x52000000

struct task_struct {
	int pid;
	int tgid;
	char comm[16];
} __attribute__((preserve_access_index));

struct order {
	__u64 spin_ns; /* taken once, then 0; tc programs want it in the mark, too */
	__u32 tid; /* whose system call or tick */
	__s32 syscall; /* number of getppid on this machine */
};

struct truth {
	__u64 start_ns; /* CLOCK_MONOTONIC */
	__u64 end_ns;
	__u32 cpu;
	__u32 tgid; /* of the task that was current */
	__u32 tid;
	char comm[16];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct order);
} orders SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct truth);
} truths SEC(".maps");

/* Three nested loops that end when the clock says so; true then. */
#define DEFINE_SPIN(name)                                                          \
	__attribute__((noinline)) int injected_spin_##name##_step(__u64 until_ns)  \
	{                                                                          \
		for (int i = 0; i < ROUNDS; i++)                                   \
			if (bpf_ktime_get_ns() >= until_ns)                        \
				return 1;                                          \
		return 0;                                                          \
	}                                                                          \
	__attribute__((noinline)) int injected_spin_##name##_round(__u64 until_ns) \
	{                                                                          \
		for (int i = 0; i < ROUNDS; i++)                                   \
			if (injected_spin_##name##_step(until_ns))                 \
				return 1;                                          \
		return 0;                                                          \
	}                                                                          \
	__attribute__((noinline)) int injected_spin_##name(__u64 until_ns)         \
	{                                                                          \
		for (int i = 0; i < ROUNDS; i++)                                   \
			if (injected_spin_##name##_round(until_ns))                \
				return 1;                                          \
		return 0;                                                          \
	}

DEFINE_SPIN(preempt_off)
DEFINE_SPIN(bh_off)
DEFINE_SPIN(irqs_off)
DEFINE_SPIN(irqs_off_timer)
DEFINE_SPIN(softirq_hog)

static __always_inline struct order *the_order(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&orders, &zero);
}

/* tc programs may ask for the task on all kernels, for its pid only since 6.10. */
static __always_inline struct truth *begin(__u64 spin_ns)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	__u32 zero = 0;
	struct truth *truth = bpf_map_lookup_elem(&truths, &zero);

	if (!truth || !spin_ns || spin_ns > MAX_SPIN_NS)
		return 0;
	truth->cpu = bpf_get_smp_processor_id();
	truth->tgid = BPF_CORE_READ(task, tgid);
	truth->tid = BPF_CORE_READ(task, pid);
	BPF_CORE_READ_STR_INTO(&truth->comm, task, comm);
	truth->end_ns = 0;
	truth->start_ns = bpf_ktime_get_ns();
	return truth;
}

static __always_inline __u64 take(struct order *order)
{
	__u64 spin_ns = order->spin_ns;

	order->spin_ns = 0;
	return spin_ns;
}

SEC("raw_tp/sys_enter")
int stall_preempt_off(struct bpf_raw_tracepoint_args *ctx)
{
	struct order *order = the_order();
	struct truth *truth;
	__u64 spin_ns;

	if (!order || !order->spin_ns || (__s64)ctx->args[1] != order->syscall ||
	    (__u32)bpf_get_current_pid_tgid() != order->tid)
		return 0;
	spin_ns = take(order);
	truth = begin(spin_ns);
	if (!truth)
		return 0;
	injected_spin_preempt_off(truth->start_ns + spin_ns);
	truth->end_ns = bpf_ktime_get_ns();
	return 0;
}

/* Loaded and test run only, never attached: the IPI decides where it runs. */
SEC("raw_tp/sched_switch")
int stall_irqs_off(struct bpf_raw_tracepoint_args *ctx)
{
	struct order *order = the_order();
	struct truth *truth;
	__u64 spin_ns;

	if (!order)
		return 0;
	spin_ns = take(order);
	truth = begin(spin_ns);
	if (!truth)
		return 0;
	injected_spin_irqs_off(truth->start_ns + spin_ns);
	truth->end_ns = bpf_ktime_get_ns();
	return 0;
}

SEC("raw_tp/local_timer_entry")
int stall_irqs_off_timer(struct bpf_raw_tracepoint_args *ctx)
{
	struct order *order = the_order();
	struct truth *truth;
	__u64 spin_ns;

	if (!order || !order->spin_ns || (__u32)bpf_get_current_pid_tgid() != order->tid)
		return 0;
	spin_ns = take(order);
	truth = begin(spin_ns);
	if (!truth)
		return 0;
	injected_spin_irqs_off_timer(truth->start_ns + spin_ns);
	truth->end_ns = bpf_ktime_get_ns();
	return 0;
}

/* How long the packet's mark and the order agree to spin; 0 if they do not. */
static __always_inline __u64 ordered_by_mark(__u32 mark, __u32 hook)
{
	struct order *order = the_order();

	if ((mark & ~MARK_US) != hook || !order || order->spin_ns != (mark & MARK_US) * USEC)
		return 0;
	return take(order);
}

SEC("tc")
int stall_bh_off(struct __sk_buff *skb)
{
	__u64 spin_ns = ordered_by_mark(skb->mark, MARK_BH_OFF);
	struct truth *truth = begin(spin_ns);

	if (!truth)
		return TC_ACT_OK;
	injected_spin_bh_off(truth->start_ns + spin_ns);
	truth->end_ns = bpf_ktime_get_ns();
	return TC_ACT_OK;
}

SEC("tc")
int stall_softirq_hog(struct __sk_buff *skb)
{
	__u64 spin_ns = ordered_by_mark(skb->mark, MARK_SOFTIRQ_HOG);
	struct truth *truth = begin(spin_ns);

	if (!truth)
		return TC_ACT_OK;
	injected_spin_softirq_hog(truth->start_ns + spin_ns);
	truth->end_ns = bpf_ktime_get_ns();
	return TC_ACT_OK;
}

char _license[] SEC("license") = "GPL";
