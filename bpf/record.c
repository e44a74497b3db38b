// SPDX-License-Identifier: GPL-2.0-only
/*
 * handle_record: the rare part of every program, called by record(). It finds
 * that there is nothing to tell, or ends in handle_emit, which writes a record
 * for user space; by way of handle_task (task.c), if the task is new.
 */

/*
 * Something was served at last, and the caller has cleared it. Ends the stall
 * unless something else is overdue; the caller then writes the closing record.
 */
static __always_inline bool end(struct cpu_state *st, struct watch_config *cfg, u64 now)
{
	if (!st->active || oldest_overdue(st, cfg, now))
		return false;
	st->ended_ns = now;
	st->active = 0;
	if (st->muted) {
		st->suppressed_ns += now - st->started_ns;
		st->suppressed++;
	}
	return true;
}

static __always_inline void fill_waits(struct stall_record *rec, struct cpu_state *st,
				       struct watch_config *cfg, u32 type, u64 now)
{
	struct waiter *waiter;
	u64 ongoing = type == RECORD_CLOSE ? 0 : ~0ULL;
	u64 here, longer;
	int i;

	opaque(ongoing);
	for (i = 0; i < VEC_COUNT; i++) {
		/* HI and TASKLET are timed also where they may not starve. */
		here = age(st->raised[i], now) & ongoing & -(u64)(cfg->vec_mask >> i & 1);
		rec->wait_ns[i] = here | (st->waited_ns[i] & ~ongoing);
	}
	for (i = 0; i < WAITERS; i++) {
		waiter = &st->waiters[i];
		here = age(waiter->since_ns, now) & ongoing;
		/* Whose wait is longer, the present one's or one that is over? */
		longer = (s64)(here - waiter->waited_ns) >> 63;
		opaque(longer);
		rec->waiter_ns[i] = (here & ~longer) | (waiter->waited_ns & longer);
		rec->waiter_pid[i] = (waiter->pid & ~longer) | (waiter->waited_pid & longer);
	}
}

static __always_inline void fill_service(struct stall_record *rec, struct cpu_state *st, u64 now)
{
	u64 served = service_age(st, now);

	rec->serving_vec = st->serving ? st->serving - 1 : VEC_NONE;
	rec->served_ns = st->served_ns;
	rec->served_vec = st->served_ns ? st->served_vec : VEC_NONE;
	if (served > st->served_ns) {
		rec->served_ns = served;
		rec->served_vec = rec->serving_vec;
	}
	rec->napi_ifindex = st->napi_ifindex;
	rec->napi_work = st->napi_work;
	rec->napi_budget = st->napi_budget;
	__builtin_memcpy(rec->napi_name, st->napi_name, sizeof(rec->napi_name));
}

static __always_inline void emit(void *ctx, struct cpu_state *st, struct watch_config *cfg,
				 struct stall_record *rec, u32 type, u32 source, u64 now)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	u64 id = bpf_get_current_pid_tgid();
	long kernel_bytes, user_bytes = 0;
	struct softnet_counts counts;

	if (st->muted)
		return;
	st->sample_nr += type == RECORD_SAMPLE;
	rec->type = type;
	rec->source = source;
	rec->cpu = bpf_get_smp_processor_id();
	rec->seq = st->seq;
	rec->time_ns = now;
	rec->started_ns = st->started_ns;
	rec->late_ns = st->late_ns;
	rec->steal_ns = steal_clock(st, cfg);
	rec->net_rx_ns = net_rx_so_far(st, now);
	rec->net_rx_runs = st->net_rx_runs;
	counts = softnet(st, cfg);
	rec->processed = counts.processed;
	rec->squeezed = counts.squeezed;
	rec->dropped = counts.dropped;
	rec->received_rps = counts.received_rps;
	rec->flow_limit = counts.flow_limit;
	rec->backlog = counts.backlog;
	fill_waits(rec, st, cfg, type, now);
	fill_service(rec, st, now);
	rec->switched_ns = st->switched_ns;
	rec->cgroup_id = bpf_get_current_cgroup_id();
	rec->tgid = id >> 32;
	rec->tid = id;
	READ(rec->task_flags, task, flags);
	READ(rec->policy, task, policy);
	READ(rec->prio, task, prio);
	rec->switches = st->switches;
	rec->sample_nr = st->sample_nr;
	rec->lost = st->lost;
	bpf_get_current_comm(rec->comm, sizeof(rec->comm));

	kernel_bytes = bpf_get_stack(ctx, rec->kernel_stack, sizeof(rec->kernel_stack), 0);
	if (kernel_bytes < 0)
		kernel_bytes = 0;
	if (source == SOURCE_TICK && !(rec->task_flags & PF_KTHREAD))
		user_bytes = bpf_get_stack(ctx, rec->user_stack, sizeof(rec->user_stack),
					   BPF_F_USER_STACK);
	if (user_bytes < 0)
		user_bytes = 0;
	/* The mask changes nothing; it shows the verifier the bound. */
	kernel_bytes &= KERNEL_STACK_DEPTH * sizeof(u64);
	rec->kernel_stack_bytes = kernel_bytes;
	rec->user_stack_bytes = user_bytes;
	if (events.perf_submit(ctx, rec,
			       offsetof(struct stall_record, kernel_stack) + kernel_bytes))
		st->lost++;
}

/*
 * A watched thread that may run elsewhere was perhaps moved there, and one
 * whose switch was not seen runs or sleeps: believe what the task says.
 */
static __always_inline u64 still_waits(struct waiter *waiter, u32 cpu)
{
	struct task_struct *task = (struct task_struct *)waiter->task;
	u32 pid, on_rq, on_cpu, wake_cpu;

	READ(pid, task, pid);
	READ(on_rq, task, on_rq);
	READ(on_cpu, task, on_cpu);
	READ(wake_cpu, task, wake_cpu);
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
		st->waiting[slot] = 0;
		st->missed++;
	}
}

/* What the tick finds: is anything overdue, and is it time for a sample? */
static __always_inline u32 look(struct cpu_state *st, struct watch_config *cfg, u64 now)
{
	u64 oldest;

	if (any_waiting(st))
		verify_waiters(st, cfg, now);
	oldest = oldest_overdue(st, cfg, now);
	if (oldest && !(u32)bpf_get_current_pid_tgid() && !st->serving) {
		/* An idle CPU has nothing pending: the service was not seen. */
		forget_raises(st);
		nobody_waits(st);
		oldest = 0;
	}
	if (!oldest)
		return end(st, cfg, now) ? RECORD_CLOSE : 0;

	begin(st, cfg, now - oldest, now, any_waiting(st));
	if (oldest >= SERIOUS_FACTOR * cfg->threshold_ns)
		st->muted = 0;
	if (st->serving == VEC_NET_RX + 1 && service_age(st, now) >= cfg->threshold_ns)
		st->napi_wanted = 1;
	if (st->sample_nr >= cfg->max_samples || now < st->next_sample_ns)
		return 0;
	/* Half a tick of grace, since ticks jitter. */
	st->next_sample_ns = now + st->spacing_ns - cfg->tick_ns / 2;
	st->spacing_ns *= 2;
	return RECORD_SAMPLE;
}

/* A wait of the threshold or longer is over. */
static __always_inline void waited(struct cpu_state *st, struct watch_config *cfg,
				   struct stall_record *rec, u32 source, u32 vec)
{
	struct waiter *waiter = &st->waiters[rec->sample_nr & (WAITERS - 1)];
	u64 wait = rec->time_ns - rec->started_ns;

	begin(st, cfg, rec->started_ns, rec->time_ns, any_waiting(st) || source == SOURCE_SWITCH);
	if (source == SOURCE_ENTRY && vec < VEC_COUNT) {
		if (wait > st->waited_ns[vec])
			st->waited_ns[vec] = wait;
	} else if (source == SOURCE_SWITCH && wait > waiter->waited_ns) {
		waiter->waited_ns = wait;
		waiter->waited_pid = waiter->pid;
	}
}

/* Has user space been told in this stall who this is? Of a stall that is over, one is enough. */
static __always_inline bool is_told(struct cpu_state *st, u32 type)
{
	u64 told = st->told_task;
	u32 tid = bpf_get_current_pid_tgid();

	if (!tid)
		return true;
	if (type == RECORD_CLOSE)
		return told >> 32 == st->seq;
	return told == ((u64)st->seq << 32 | tid);
}

int handle_record(struct bpf_raw_tracepoint_args *ctx)
{
	struct cpu_state *st = this_cpu_state();
	struct watch_config *cfg = watch();
	u32 type = 0, source, vec = ctx->args[0];
	struct stall_record *rec;
	u64 now, served;

	if (!st || !cfg)
		return 0;
	source = st->source;
	rec = scratch.lookup(&source);
	if (!rec)
		return 0;
	now = rec->time_ns;
	served = st->serving == vec + 1 ? now - st->serving_since : 0;
	if (source == SOURCE_ENTRY && vec < VEC_COUNT)
		service_begins(st, vec, now);
	else if (source == SOURCE_EXIT)
		service_ends(st, vec, now);
	if (!cfg->threshold_ns)
		goto out;
	if (source == SOURCE_TICK) {
		/* What it interrupted has left things half done: the next tick looks. */
		if (has_turn(st, rec->source)) {
			st->yields++;
			goto out;
		}
		st->yields = 0;
		rec->source = SOURCE_TICK;
		type = look(st, cfg, now);
	} else {
		if (rec->started_ns)
			waited(st, cfg, rec, source, vec);
		if (source == SOURCE_EXIT && served >= cfg->threshold_ns &&
		    served > st->served_ns) {
			st->served_ns = served;
			st->served_vec = vec;
		}
		if (end(st, cfg, now))
			type = RECORD_CLOSE;
		else if (source == SOURCE_SWITCH && st->active && !st->sample_nr)
			/* Whoever gives way now is the last chance for a stack. */
			type = RECORD_SAMPLE;
	}
	if (type && !st->muted) {
		rec->type = type;
		rec->seq = st->seq;
		if (!is_told(st, type))
			tails.call(ctx, TAIL_TASK);
		tails.call(ctx, TAIL_EMIT);
	}
out:
	st->source = rec->source;
	return 0;
}

int handle_emit(struct bpf_raw_tracepoint_args *ctx)
{
	struct cpu_state *st = this_cpu_state();
	struct watch_config *cfg = watch();
	struct stall_record *rec;
	u32 source, before;

	if (!st || !cfg)
		return 0;
	source = st->source;
	rec = scratch.lookup(&source);
	if (!rec)
		return 0;
	before = rec->source;
	/* A tick that did not wait began the next stall: what is known is of that one. */
	if (rec->seq != st->seq)
		st->lost++;
	else
		emit(ctx, st, cfg, rec, rec->type, source, rec->time_ns);
	/* Only now: until then no tick begins another stall. */
	st->source = before;
	return 0;
}
