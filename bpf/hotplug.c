// SPDX-License-Identifier: GPL-2.0-only
/*
 * cpuhp_enter: a CPU on its way up or down forgets what waited on it. Its
 * pending softirqs move elsewhere and its kthreads are parked or made anew.
 */
int handle_cpuhp_enter(struct bpf_raw_tracepoint_args *ctx)
{
	u32 cpu = ctx->args[0];
	struct cpu_state *st = cpus.lookup(&cpu);

	if (!st)
		return 0;
	__builtin_memset(st->raised, 0, sizeof(st->raised));
	if (st->active)
		st->ended_ns = bpf_ktime_get_ns();
	st->active = 0;
	st->ksoftirqd_since = 0;
	st->serving = 0;
	st->net_rx_since = 0;
	return 0;
}
