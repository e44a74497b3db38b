// SPDX-License-Identifier: GPL-2.0-only
/*
 * hrtimer_expire_entry: the scheduler tick as a sampler. It runs in hard
 * interrupt context on the CPU that is stuck, so its stack is the culprit's.
 */
int handle_hrtimer_expire(struct bpf_raw_tracepoint_args *ctx)
{
	struct cpu_state *st = this_cpu_state();
	struct watch_config *cfg;
	u32 type = RECORD_CLOSE;
	u64 now, oldest, waiting;
	int vec;

	if (!st)
		return 0;
	/* active: whatever is overdue no more is closed below at the latest. */
	waiting = st->ksoftirqd_since | st->active;
#pragma unroll
	for (vec = 0; vec < VEC_COUNT; vec++)
		waiting |= st->raised[vec];
	if (!waiting)
		return 0;

	cfg = watch();
	if (!cfg || !cfg->threshold_ns)
		return 0;
	now = bpf_ktime_get_ns();
	st->last_tick_ns = now;
	/* It runs: the switch to it was not seen. */
	if (st->ksoftirqd_since && bpf_get_current_task() == st->ksoftirqd) {
		st->ksoftirqd_since = 0;
		st->missed++;
	}
	oldest = oldest_overdue(st, cfg, now);
	if (oldest && !(u32)bpf_get_current_pid_tgid() && !st->serving) {
		/* An idle CPU has nothing pending: the service was not seen. */
		__builtin_memset(st->raised, 0, sizeof(st->raised));
		st->ksoftirqd_since = 0;
		st->missed++;
		oldest = 0;
	}
	if (oldest) {
		begin(st, cfg, now - oldest);
		if (st->sample_nr >= cfg->max_samples || now < st->next_sample_ns)
			return 0;
		/* Half a tick of grace, since ticks jitter. */
		st->next_sample_ns = now + st->spacing_ns - cfg->tick_ns / 2;
		st->spacing_ns *= 2;
		type = RECORD_SAMPLE;
	} else if (!end(st, cfg, now)) {
		return 0;
	}
	emit(ctx, st, type, SOURCE_TICK, now);
	return 0;
}
