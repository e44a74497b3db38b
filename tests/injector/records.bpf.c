// SPDX-License-Identifier: GPL-2.0-only
/*
 * Synthetic closing records into the perf buffer of a running daemon, as fast
 * as wanted: load for its whole path, without a stall.
 *
 * Test run from another CPU, so in an IPI with interrupts off: no program of
 * the daemon comes in between on this CPU. Each record takes the next number
 * of the CPU's own stalls, for the tracker drops numbers that are not newer:
 * so real stalls after it are newer again. While a real one goes on nothing is
 * sent, since its records would get numbers of ours. (They do if the IPI comes
 * in the moment in which a real stall has ended and its record is not filled.)
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;
typedef __s32 s32;

#include "../../bpf/records.h"

/* Some 100 us with interrupts off. */
#define MAX_PER_RUN 128
#define WAIT_NS (20 * 1000 * 1000ULL)
#define STACK_DEPTH 24
/* Above PID_MAX_LIMIT: nobody's. */
#define FIRST_TID 5000000
#define ROOT_CGROUP 1
#define NICE_0 120

struct order {
	u32 count;
	u32 stack_bytes;
	u64 stack[STACK_DEPTH];
};

struct counts {
	u64 sent;
	u64 lost; /* there was no room for them */
};

/* The daemon's own stand in for these two before they are loaded. */
struct {
	__uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY);
	__uint(key_size, sizeof(u32));
	__uint(value_size, sizeof(u32));
} events SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct cpu_state);
} cpus SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct order);
} orders SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct counts);
} counted SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct stall_record);
} scratch SEC(".maps");

/* What all records of a run have in common; the rest is always 0. */
static __always_inline void fill(struct stall_record *rec, struct cpu_state *st,
				 struct order *order)
{
	rec->type = RECORD_CLOSE;
	rec->source = SOURCE_ENTRY;
	rec->cpu = bpf_get_smp_processor_id();
	rec->net_rx_ns = st->net_rx_ns;
	rec->net_rx_runs = st->net_rx_runs;
	rec->wait_ns[VEC_NET_RX] = WAIT_NS;
	rec->waiter_pid[KSOFTIRQD] = st->waiters[KSOFTIRQD].pid;
	rec->cgroup_id = ROOT_CGROUP;
	rec->prio = NICE_0;
	rec->serving_vec = VEC_NONE;
	rec->served_vec = VEC_NONE;
	rec->kernel_stack_bytes = order->stack_bytes;
	__builtin_memcpy(rec->comm, "synthetic", sizeof("synthetic"));
	__builtin_memcpy(rec->kernel_stack, order->stack, sizeof(order->stack));
}

SEC("raw_tp/sched_switch")
int send_records(struct bpf_raw_tracepoint_args *ctx)
{
	u32 zero = 0, cpu = bpf_get_smp_processor_id(), bytes;
	struct counts *counts = bpf_map_lookup_elem(&counted, &zero);
	struct stall_record *rec = bpf_map_lookup_elem(&scratch, &zero);
	struct order *order = bpf_map_lookup_elem(&orders, &zero);
	struct cpu_state *st = bpf_map_lookup_elem(&cpus, &cpu);

	if (!counts || !rec || !order || !st || st->active)
		return 0;
	bytes = order->stack_bytes;
	if (bytes > sizeof(order->stack))
		return 0;
	fill(rec, st, order);
	bytes += __builtin_offsetof(struct stall_record, kernel_stack);
	for (u32 i = 0; i < MAX_PER_RUN && i < order->count; i++) {
		st->seq++;
		rec->seq = st->seq;
		rec->tgid = FIRST_TID + counts->sent + counts->lost;
		rec->tid = rec->tgid;
		rec->lost = st->lost;
		rec->time_ns = bpf_ktime_get_ns();
		rec->started_ns = rec->time_ns - WAIT_NS;
		if (bpf_perf_event_output(ctx, &events, BPF_F_CURRENT_CPU, rec, bytes)) {
			counts->lost++;
			st->lost++;
		} else {
			counts->sent++;
		}
	}
	return 0;
}

char _license[] SEC("license") = "GPL";
