// SPDX-License-Identifier: GPL-2.0-only
/*
 * sched_wakeup, sched_switch: since when has ksoftirqd/N been runnable without
 * running? Both return at once unless ksoftirqd is concerned or waits.
 */

/* A pointer may outlive its task: believe it only while the pid agrees. */
static __always_inline bool is_ksoftirqd(struct cpu_state *st, struct task_struct *task)
{
	u32 pid = 0;

	bpf_probe_read_kernel(&pid, sizeof(pid), &task->pid);
	return pid && pid == st->ksoftirqd_pid;
}

static __always_inline void wait_begins(struct cpu_state *st)
{
	if (!st->active)
		st->switches = 0;
	st->ksoftirqd_since = bpf_ktime_get_ns();
}

int handle_sched_wakeup(struct bpf_raw_tracepoint_args *ctx)
{
	struct cpu_state *st = this_cpu_state();
	u64 task = ctx->args[0];

	if (!st)
		return 0;
	if (task != st->ksoftirqd) {
		/* Not learned yet: only then look at the pid. */
		if (st->ksoftirqd || !st->ksoftirqd_pid)
			return 0;
		if (!is_ksoftirqd(st, (struct task_struct *)task))
			return 0;
		st->ksoftirqd = task;
	} else if (!is_ksoftirqd(st, (struct task_struct *)task)) {
		st->ksoftirqd = 0;
		st->ksoftirqd_since = 0;
		st->stale++;
		return 0;
	}
	/* Woken while it runs, on its way to sleep: it has the CPU. */
	if (st->ksoftirqd_since || bpf_get_current_task() == task)
		return 0;
	wait_begins(st);
	return 0;
}

static __always_inline bool still_runnable(struct bpf_raw_tracepoint_args *ctx)
{
#ifdef SCHED_SWITCH_HAS_PREV_STATE
	return (u32)ctx->args[3] == 0;
#else
	struct task_struct *prev = (struct task_struct *)ctx->args[1];
	u64 state = 0;

	bpf_probe_read_kernel(&state, sizeof(prev->STALLD_TASK_STATE), &prev->STALLD_TASK_STATE);
	return state == 0;
#endif
}

/*
 * A kernel that defers to a runnable ksoftirqd leaves vectors pending across a
 * tick and a context switch; one that serves them inline cannot, since neither
 * the interrupt's end nor local_bh_enable() would have passed them by.
 * HI and TASKLET are served at once by either.
 */
static __always_inline void note_deferral(struct cpu_state *st)
{
	u64 tick = st->last_tick_ns;
	int vec;

	if (st->ksoftirqd_since >= tick || st->serving)
		return;
	for (vec = 0; vec < VEC_COUNT; vec++) {
		if (vec == VEC_HI || vec == VEC_TASKLET)
			continue;
		if (st->raised[vec] && st->raised[vec] < tick) {
			st->deferred++;
			return;
		}
	}
}

int handle_sched_switch(struct bpf_raw_tracepoint_args *ctx)
{
	struct cpu_state *st = this_cpu_state();
	struct watch_config *cfg;
	u32 type = RECORD_SAMPLE;
	u64 now, wait;
	u32 pid = 1;

	if (!st)
		return 0;
	if (!st->ksoftirqd_since && ctx->args[1] != st->ksoftirqd && !st->active)
		return 0;

	if (ctx->args[1] == st->ksoftirqd) {
		st->ksoftirqd_since = 0;
		if (still_runnable(ctx))
			wait_begins(st);
		return 0;
	}
	if (st->ksoftirqd_since)
		note_deferral(st);
	if (ctx->args[2] != st->ksoftirqd || !st->ksoftirqd_since) {
		st->switches++;
		bpf_probe_read_kernel(&pid, sizeof(pid),
				      &((struct task_struct *)ctx->args[2])->pid);
		if (!pid && st->ksoftirqd_since) {
			/* The idle task runs only when nobody waits. */
			st->ksoftirqd_since = 0;
			st->missed++;
		}
		return 0;
	}

	cfg = watch();
	if (!cfg)
		return 0;
	now = bpf_ktime_get_ns();
	wait = age(st->ksoftirqd_since, now);
	if (cfg->threshold_ns && wait >= cfg->threshold_ns) {
		begin(st, cfg, now - wait);
		st->ksoftirqd_waited_ns = max_u63(st->ksoftirqd_waited_ns, wait);
	}
	st->ksoftirqd_since = 0;
	if (end(st, cfg, now))
		type = RECORD_CLOSE;
	else if (!st->active || st->sample_nr)
		return 0;
	/* Whoever gives way now is the last chance for a stack. */
	emit(ctx, st, type, SOURCE_SWITCH, now);
	return 0;
}
