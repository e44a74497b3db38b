// SPDX-License-Identifier: GPL-2.0-only
/*
 * softirq_raise, softirq_entry, softirq_exit: the age of every vector that is
 * raised and not served, and the vector in service.
 */

/* The end of NET_RX's handler is where its time is known. */
#ifdef NET_RX_ACTION_TRACED
#define NET_RX_TIMED(vec) false
#else
#define NET_RX_TIMED(vec) ((vec) == VEC_NET_RX)
#endif

/* ksoftirqd_running() of kernels before 6.5 lets these two through. */
#define VEC_NOW_MASK ((1U << VEC_HI) | (1U << VEC_TASKLET))

int handle_softirq_raise(struct bpf_raw_tracepoint_args *ctx)
{
	struct cpu_state *st = this_cpu_state();
	u32 vec = ctx->args[0];
	u64 now, jiffies;

	if (!st || vec >= VEC_COUNT)
		return 0;
	if (st->raised[vec] || !(st->timed_mask >> vec & 1))
		return 0;
	now = bpf_ktime_get_ns();
	jiffies = bpf_jiffies64();
	if (st->raise_jiffies != jiffies) {
		st->raise_jiffies = jiffies;
		st->jiffy_ns = now;
	}
	st->raised[vec] = now;
	st->pending[vec] = 1;
	return 0;
}

static __always_inline void net_rx_left(struct cpu_state *st, u64 took)
{
	st->net_rx_runs++;
	st->net_rx_ns += took;
	if (took > st->net_rx_max_ns)
		st->net_rx_max_ns = took;
}

/*
 * When a handler begins. Nearly always it was raised in this very jiffy, just
 * now: then that time will do, which is known, and the clock is not read again.
 * Jiffies stand still while the CPU that counts them is stuck, but then the
 * tick here finds what waits, and what has been found is timed exactly.
 */
static __always_inline u64 entry_time(struct cpu_state *st, u64 raised)
{
	if (raised >= st->jiffy_ns && st->raise_jiffies == bpf_jiffies64() && !st->active &&
	    st->timed_mask >> BRIEF_BIT)
		return raised;
	return bpf_ktime_get_ns();
}

/* pending first: never must an interrupt between leave a vector raised and not pending. */
static __always_inline void service_begins(struct cpu_state *st, u32 vec, u64 now)
{
	st->pending[vec] = 0;
	barrier();
	/* A raise from an interrupt up to here is served by this very run. */
	st->raised[vec] = 0;
	st->serving_since = now;
	st->serving = vec + 1;
}

/*
 * The kernel skips a program that is in the middle of another run on its CPU, which that may be
 * where programs can be preempted: then this service's begin was missed.
 */
static __always_inline void service_ends(struct cpu_state *st, u32 vec, u64 now)
{
	if (st->serving != vec + 1) {
		if (vec < VEC_COUNT && st->raised[vec]) {
			st->pending[vec] = 0;
			barrier();
			st->raised[vec] = 0;
			st->missed++;
		}
		return;
	}
	st->serving = 0;
	if (NET_RX_TIMED(vec))
		net_rx_left(st, now - st->serving_since);
}

int handle_softirq_entry(struct bpf_raw_tracepoint_args *ctx)
{
	struct cpu_state *st = this_cpu_state();
	struct waiter *ksoftirqd;
	u32 vec = ctx->args[0];
	u64 now, wait, raised;

	if (!st || vec >= VEC_COUNT)
		return 0;
	raised = st->raised[vec];
	now = entry_time(st, raised);
	wait = age(raised, now);
	ksoftirqd = &st->waiters[KSOFTIRQD];
	if (!ksoftirqd->task && ksoftirqd->pid && ksoftirqd->pid == (u32)bpf_get_current_pid_tgid())
		/* No task iterator told: it shows itself when it works. */
		ksoftirqd->task = bpf_get_current_task();
	if (ksoftirqd->since_ns && !(VEC_NOW_MASK & (1U << vec)) && !st->raised[VEC_HI] &&
	    !st->raised[VEC_TASKLET] && bpf_get_current_task() != ksoftirqd->task)
		st->inline_served++;

	/* Then the rare part says that service begins: a tick between would end the stall. */
	if (wait && wait >= st->threshold_ns && st->vec_mask >> vec & 1)
		record(ctx, st, SOURCE_ENTRY, now - wait, 0, now);
	service_begins(st, vec, now);
	return 0;
}

int handle_softirq_exit(struct bpf_raw_tracepoint_args *ctx)
{
	struct cpu_state *st = this_cpu_state();
	u32 vec = ctx->args[0];
	u64 now = 0;

	if (!st)
		return 0;
	if (st->active || NET_RX_TIMED(vec))
		now = bpf_ktime_get_ns();
	/* Was the stall that was seen meanwhile this handler? The rare part ends its service. */
	if (st->active)
		record(ctx, st, SOURCE_EXIT, 0, 0, now);
	service_ends(st, vec, now);
	return 0;
}

#ifdef NET_RX_ACTION_TRACED
/* As kfunc or as kprobe: neither looks at what it is handed. */
int handle_net_rx_action(void *ctx)
{
	struct cpu_state *st = this_cpu_state();

	if (st)
		st->net_rx_since = bpf_ktime_get_ns();
	return 0;
}

int handle_net_rx_action_return(void *ctx)
{
	struct cpu_state *st = this_cpu_state();

	if (!st || !st->net_rx_since)
		return 0;
	net_rx_left(st, bpf_ktime_get_ns() - st->net_rx_since);
	st->net_rx_since = 0;
	return 0;
}
#endif
