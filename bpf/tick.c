// SPDX-License-Identifier: GPL-2.0-only
/*
 * hrtimer_expire_entry: the scheduler tick as a sampler. It runs in hard
 * interrupt context on the CPU that is stuck, so its stack is the culprit's.
 */

/*
 * A watched thread that may run elsewhere was perhaps moved there, and one
 * whose switch was not seen runs or sleeps: believe what the task says.
 */
static __always_inline u64 still_waits(struct waiter *waiter, u32 cpu)
{
	struct task_struct *task = (struct task_struct *)waiter->task;
	u32 pid = 0, on_rq = 0, on_cpu = 1, wake_cpu = cpu;

	bpf_probe_read_kernel(&pid, sizeof(pid), &task->pid);
	bpf_probe_read_kernel(&on_rq, sizeof(on_rq), &task->on_rq);
	bpf_probe_read_kernel(&on_cpu, sizeof(on_cpu), &task->on_cpu);
	bpf_probe_read_kernel(&wake_cpu, sizeof(wake_cpu), &task->wake_cpu);
	return pid == waiter->pid && on_rq && !on_cpu && wake_cpu == cpu;
}

static __always_inline void verify_waiters(struct cpu_state *st, struct watch_config *cfg, u64 now)
{
	u32 cpu = bpf_get_smp_processor_id();
	struct waiter *waiter;
	u32 slot;

	for (slot = 0; slot < WAITERS; slot++) {
		waiter = &st->waiters[slot];
		if (age(waiter->since_ns, now) < cfg->threshold_ns || still_waits(waiter, cpu))
			continue;
		waiter->since_ns = 0;
		st->waiting &= ~(1 << slot);
		st->missed++;
	}
}

int handle_hrtimer_expire(struct bpf_raw_tracepoint_args *ctx)
{
	struct cpu_state *st = this_cpu_state();
	struct watch_config *cfg;
	u32 type = RECORD_CLOSE;
	u64 now, oldest, pending, late;
	int vec;

	if (!st)
		return 0;
	/* active: whatever is overdue no more is closed below at the latest. */
	pending = st->waiting | st->active | st->serving;
#pragma unroll
	for (vec = 0; vec < VEC_COUNT; vec++)
		pending |= st->raised[vec];
	if (!pending)
		return 0;

	cfg = watch();
	if (!cfg || !cfg->threshold_ns)
		return 0;
	now = bpf_ktime_get_ns();
	if (!st->tick_timer)
		st->last_tick_ns = now;
	if (st->waiting)
		verify_waiters(st, cfg, now);
	oldest = oldest_overdue(st, cfg, now);
	if (oldest && !(u32)bpf_get_current_pid_tgid() && !st->serving) {
		/* An idle CPU has nothing pending: the service was not seen. */
		__builtin_memset(st->raised, 0, sizeof(st->raised));
		nobody_waits(st);
		oldest = 0;
	}
	if (oldest) {
		begin(st, cfg, now - oldest, now);
		/* Another timer that came too late as well may be called before the tick's. */
		late = now - st->last_tick_ns < cfg->threshold_ns ? 0 :
			tick_lateness(st, false, now);
		if (late >= cfg->threshold_ns)
			st->late_ns = max_u63(st->late_ns, late);
		if (oldest >= SERIOUS_FACTOR * cfg->threshold_ns)
			st->muted = 0;
		if (service_age(st, now) >= cfg->threshold_ns)
			st->napi_wanted = 1;
		if (st->sample_nr >= cfg->max_samples || now < st->next_sample_ns)
			return 0;
		/* Half a tick of grace, since ticks jitter. */
		st->next_sample_ns = now + st->spacing_ns - cfg->tick_ns / 2;
		st->spacing_ns *= 2;
		type = RECORD_SAMPLE;
	} else if (!end(st, cfg, now)) {
		return 0;
	}
	emit(ctx, st, cfg, type, SOURCE_TICK, now);
	return 0;
}
