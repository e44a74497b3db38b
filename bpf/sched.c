// SPDX-License-Identifier: GPL-2.0-only
/*
 * sched_wakeup, sched_switch: since when has a watched kernel thread been
 * runnable without running? Both return at once unless one is concerned or
 * waits. They run under the lock of the run queue that the thread is on, so
 * that a wake-up from another CPU and a switch do not meet.
 */
#define HASH_FACTOR 0x9e3779b97f4a7c15ULL

/* A pointer may outlive its task: believe it only while the pid agrees. */
static __always_inline bool is_pid(struct task_struct *task, u32 pid)
{
	u32 found;

	READ(found, task, pid);
	return pid && found == pid;
}

/* Its own place, where it has one, else a free one; WAITERS: there is none. */
static __always_inline u32 place_of(struct cpu_state *st, u64 task)
{
	u32 slot, found = WAITERS;

#pragma unroll
	for (slot = WAITERS - 1; slot > KSOFTIRQD; slot--) {
		if (!st->waiters[slot].since_ns)
			found = slot;
	}
#pragma unroll
	for (slot = 0; slot < WAITERS; slot++) {
		if (st->waiters[slot].task == task)
			found = slot;
	}
	return found;
}

static __always_inline void wait_begins(struct cpu_state *st, u64 task, u32 pid, u64 now)
{
	u32 slot = place_of(st, task);
	struct waiter *waiter;

	if (slot >= WAITERS) {
		st->unwatched++;
		return;
	}
	slot &= WAITERS - 1;
	waiter = &st->waiters[slot];
	if (!any_waiting(st) && !st->active)
		st->switches = 0;
	waiter->task = task;
	waiter->pid = pid;
	/*
	 * Whoever is woken did not wait before, but that it was preempted on its way
	 * to sleep: then work has come only now. What else stood here was stale.
	 */
	waiter->since_ns = now;
	st->waiting[slot] = 1;
}

/* Where in its bucket a woken task stands; BUCKET_TASKS: it is not watched. */
static __always_inline u32 bucket_place(struct watched_bucket *bucket, u64 task)
{
	u32 place;

#pragma unroll
	for (place = 0; place < BUCKET_TASKS; place++) {
		if (bucket->task[place] == task)
			break;
	}
	return place;
}

int handle_sched_wakeup(struct bpf_raw_tracepoint_args *ctx)
{
	u32 hash = ctx->args[0] * HASH_FACTOR >> (64 - WATCHED_BITS);
	struct watched_bucket *bucket = watched.lookup(&hash);

	/* Most are empty: their first place is. */
	if (bucket && bucket->task[0] && bucket_place(bucket, ctx->args[0]) < BUCKET_TASKS)
		tails.call(ctx, TAIL_WAKEUP);
	return 0;
}

int handle_watched_wakeup(struct bpf_raw_tracepoint_args *ctx)
{
	u64 task = ctx->args[0];
	u32 hash = task * HASH_FACTOR >> (64 - WATCHED_BITS);
	struct watched_bucket *bucket = watched.lookup(&hash);
	struct cpu_state *st;
	u32 place, pid, cpu, on_cpu;

	if (!bucket)
		return 0;
	place = bucket_place(bucket, task);
	if (place >= BUCKET_TASKS)
		return 0;
	place &= BUCKET_TASKS - 1;
	pid = bucket->pid[place];
	if (!is_pid((struct task_struct *)task, pid)) {
		bucket->task[place] = 0;
		st = this_cpu_state();
		if (st)
			st->stale++;
		return 0;
	}
	cpu = bucket->cpu[place];
	if (cpu == CPU_ANY)
		READ(cpu, (struct task_struct *)task, wake_cpu);
	st = cpus.lookup(&cpu);
	if (!st)
		return 0;
	READ(on_cpu, (struct task_struct *)task, on_cpu);
	if (on_cpu) {
		/* Woken while it runs, on its way to sleep: it stays. */
		st->running = task;
		st->runs = 1;
	} else {
		wait_begins(st, task, pid, bpf_ktime_get_ns());
	}
	return 0;
}

static __always_inline bool still_runnable(struct bpf_raw_tracepoint_args *ctx)
{
	/* Preempted, perhaps on its way to sleep: it stays runnable whatever its state. */
	if (ctx->args[0] & 1)
		return true;
#ifdef SCHED_SWITCH_HAS_PREV_STATE
	return (u32)ctx->args[3] == 0;
#else
	struct task_struct *prev = (struct task_struct *)ctx->args[1];
	u64 state;

	READ(state, prev, STALLD_TASK_STATE);
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

	if (st->waiters[KSOFTIRQD].since_ns >= tick || st->serving)
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

/* Which waiter gets the CPU; WAITERS: none of them. */
static __always_inline u32 waiter_of(struct cpu_state *st, u64 task)
{
	u32 slot;

#pragma unroll
	for (slot = 0; slot < WAITERS; slot++) {
		if (st->waiters[slot].task == task && st->waiters[slot].since_ns)
			break;
	}
	return slot;
}

int handle_sched_switch(struct bpf_raw_tracepoint_args *ctx)
{
	struct cpu_state *st = this_cpu_state();

	/* active and runs, with one load. */
	if (st && (any_waiting(st) | *(u32 *)&st->active))
		tails.call(ctx, TAIL_SWITCH);
	return 0;
}

int handle_watched_switch(struct bpf_raw_tracepoint_args *ctx)
{
	struct cpu_state *st = this_cpu_state();
	struct waiter *waiter;
	u32 slot, pid = 1;
	u64 next, now, since;

	if (!st)
		return 0;
	if (st->runs) {
		if (st->running == ctx->args[1] && still_runnable(ctx)) {
			READ(pid, (struct task_struct *)ctx->args[1], pid);
			wait_begins(st, st->running, pid, bpf_ktime_get_ns());
		}
		st->runs = 0;
	}
	next = ctx->args[2];
	opaque(next);
	if (!any_waiting(st) && !st->active)
		return 0;
	now = bpf_ktime_get_ns();
	st->switched_ns = now;
	if (st->waiters[KSOFTIRQD].since_ns)
		note_deferral(st);
	slot = waiter_of(st, next);
	if (slot >= WAITERS) {
		st->switches++;
		READ(pid, (struct task_struct *)next, pid);
		/* The idle task runs only when nobody waits. */
		if (!pid && any_waiting(st))
			nobody_waits(st);
		return 0;
	}

	waiter = &st->waiters[slot & (WAITERS - 1)];
	since = waiter->since_ns;
	waiter->since_ns = 0;
	st->waiting[slot & (WAITERS - 1)] = 0;
	st->running = next;
	st->runs = 1;
	if (age(since, now) < st->threshold_ns)
		since = 0;
	if (since || st->active)
		record(ctx, st, SOURCE_SWITCH, since, slot, now);
	return 0;
}
