// SPDX-License-Identifier: GPL-2.0-only
/*
 * cpuhp_enter: a CPU on its way up or down forgets what waited on it. Its
 * pending softirqs move elsewhere and its kthreads are parked or made anew.
 * The first step of each way tells user space, whose buffer for that CPU the
 * kernel takes away when it goes.
 */
int handle_cpuhp_enter(struct bpf_raw_tracepoint_args *ctx)
{
	u32 source = SOURCE_HOTPLUG;
	u32 cpu = ctx->args[0];
	u32 target = (u32)ctx->args[1] + 1, offline = 1;
	u32 step = ctx->args[2];
	struct stall_record *rec = scratch.lookup(&source);
	struct cpu_state *st = cpus.lookup(&cpu);

	if (!st || !rec)
		return 0;
	/*
	 * A CPU that is up may go through a single step, as when a module is loaded. The first that
	 * we see of one that has ticked is no way down if it does not lie above the target; the boot
	 * CPU's target is offline, before Linux 6.2, though nothing goes down right to there at once.
	 */
	if (!st->hotplug && st->tick_timer && step < target)
		st->hotplug = target;
	if (!st->hotplug && target == offline)
		return 0;
	if (st->hotplug == target && target != offline)
		return 0;
	forget_raises(st);
	forget_waiters(st);
	st->runs = 0;
	st->serving = 0;
	st->net_rx_since = 0;
	st->last_tick_ns = 0;
	if (st->active)
		st->ended_ns = bpf_ktime_get_ns();
	st->active = 0;
	if (st->hotplug == target)
		return 0;
	rec->type = RECORD_HOTPLUG;
	rec->source = source;
	rec->cpu = cpu;
	rec->kernel_stack_bytes = 0;
	rec->user_stack_bytes = 0;
	/* Lost, it is told at the next step; it is no stall's. */
	if (!events.perf_submit(ctx, rec, offsetof(struct stall_record, kernel_stack)))
		st->hotplug = target;
	return 0;
}
