// SPDX-License-Identifier: GPL-2.0-only
/*
 * hrtimer_expire_entry: the scheduler tick as a sampler. It runs in hard
 * interrupt context on the CPU that is stuck, so its stack is the culprit's.
 * Of other timers some run with interrupts on: the tick would interrupt this
 * program by itself. They are left alone, once the tick's own timer is known.
 */

int handle_hrtimer_expire(struct bpf_raw_tracepoint_args *ctx)
{
	struct cpu_state *st = this_cpu_state();
	u64 now, pending;

	if (!st)
		return 0;
	/* active: whatever is overdue no more is closed at the tick at the latest. */
	pending = any_waiting(st) | st->active | st->serving | any_raised(st);
	if (!pending || !st->threshold_ns)
		return 0;
	if (st->tick_timer && st->tick_timer != ctx->args[0])
		return 0;
	now = bpf_ktime_get_ns();
	if (!st->tick_timer)
		st->last_tick_ns = now;
	record(ctx, st, SOURCE_TICK, 0, 0, now);
	return 0;
}
