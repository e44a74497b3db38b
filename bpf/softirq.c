// SPDX-License-Identifier: GPL-2.0-only
/*
 * softirq_raise, softirq_entry, softirq_exit: the age of every vector that is
 * raised and not served, and the vector in service.
 */

/* ksoftirqd_running() of kernels before 6.5 lets these two through. */
#define VEC_NOW_MASK ((1U << VEC_HI) | (1U << VEC_TASKLET))

int handle_softirq_raise(struct bpf_raw_tracepoint_args *ctx)
{
	struct cpu_state *st = this_cpu_state();
	u32 vec = ctx->args[0];

	if (!st || vec >= VEC_COUNT)
		return 0;
	if (st->raised[vec] || !(st->timed_mask >> vec & 1))
		return 0;
	st->raised[vec] = bpf_ktime_get_ns();
	return 0;
}

static __always_inline void net_rx_left(struct cpu_state *st, u64 took)
{
	st->net_rx_runs++;
	st->net_rx_ns += took;
	if (took > st->net_rx_max_ns)
		st->net_rx_max_ns = took;
}

int handle_softirq_entry(struct bpf_raw_tracepoint_args *ctx)
{
	struct cpu_state *st = this_cpu_state();
	struct watch_config *cfg;
	struct waiter *ksoftirqd;
	u32 vec = ctx->args[0];
	u64 now, wait;

	if (!st || vec >= VEC_COUNT)
		return 0;
	now = bpf_ktime_get_ns();
	wait = age(st->raised[vec], now);
	/* A raise from an interrupt up to here is served by this very run. */
	st->raised[vec] = 0;
	st->serving_since = now;
	st->serving = vec + 1;
	ksoftirqd = &st->waiters[KSOFTIRQD];
	if (!ksoftirqd->task && ksoftirqd->pid == (u32)bpf_get_current_pid_tgid())
		/* No task iterator told: it shows itself when it works. */
		ksoftirqd->task = bpf_get_current_task();
	if (ksoftirqd->since_ns && !(VEC_NOW_MASK & (1U << vec)) && !st->raised[VEC_HI] &&
	    !st->raised[VEC_TASKLET] && bpf_get_current_task() != ksoftirqd->task)
		st->inline_served++;

	if (wait < st->threshold_ns || !(st->vec_mask >> vec & 1))
		return 0;
	cfg = watch();
	if (!cfg || !cfg->threshold_ns)
		return 0;
	begin(st, cfg, now - wait, now);
	if (wait > st->waited_ns[vec])
		st->waited_ns[vec] = wait;
	if (end(st, cfg, now))
		emit(ctx, st, cfg, RECORD_CLOSE, SOURCE_ENTRY, now);
	return 0;
}

/* A handler that ran on while a stall was seen: was it the stall? */
static __always_inline int handler_left(struct bpf_raw_tracepoint_args *ctx,
					struct cpu_state *st, u64 now)
{
	struct watch_config *cfg = watch();
	u64 served = age(st->serving_since, now);

	if (!cfg)
		return 0;
	if (served >= cfg->threshold_ns && served > st->served_ns) {
		st->served_ns = served;
		st->served_vec = ctx->args[0];
	}
	if (end(st, cfg, now))
		emit(ctx, st, cfg, RECORD_CLOSE, SOURCE_EXIT, now);
	return 0;
}

int handle_softirq_exit(struct bpf_raw_tracepoint_args *ctx)
{
	struct cpu_state *st = this_cpu_state();

	if (!st)
		return 0;
	st->serving = 0;
#ifndef NET_RX_ACTION_TRACED
	if ((u32)ctx->args[0] == VEC_NET_RX)
		net_rx_left(st, bpf_ktime_get_ns() - st->serving_since);
#endif
	if (!st->active)
		return 0;
	return handler_left(ctx, st, bpf_ktime_get_ns());
}

#ifdef NET_RX_ACTION_TRACED
static __always_inline int net_rx_action_entered(void)
{
	struct cpu_state *st = this_cpu_state();

	if (st)
		st->net_rx_since = bpf_ktime_get_ns();
	return 0;
}

static __always_inline int net_rx_action_left(void)
{
	struct cpu_state *st = this_cpu_state();

	if (!st || !st->net_rx_since)
		return 0;
	net_rx_left(st, bpf_ktime_get_ns() - st->net_rx_since);
	st->net_rx_since = 0;
	return 0;
}
#endif

#ifdef NET_RX_ACTION_KFUNC
KFUNC_PROBE(net_rx_action)
{
	return net_rx_action_entered();
}

KRETFUNC_PROBE(net_rx_action)
{
	return net_rx_action_left();
}
#endif

#ifdef NET_RX_ACTION_KPROBE
int handle_net_rx_action(struct pt_regs *ctx)
{
	return net_rx_action_entered();
}

int handle_net_rx_action_return(struct pt_regs *ctx)
{
	return net_rx_action_left();
}
#endif
