/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Maps, and the life of a stall: begin, sample, close.
 *
 * A program may be interrupted by another one on its CPU only upwards
 * (softirq_entry by the tick), never by itself, so plain loads and stores do;
 * where the order matters a comment says so.
 */
#define PF_KTHREAD 0x00200000

BPF_F_TABLE("array", u32, struct cpu_state, cpus, NR_CPUS, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct watch_config, config, 1, BPF_F_MMAPABLE);
/* One slot per source: a tick may interrupt softirq_entry's record. */
BPF_PERCPU_ARRAY(scratch, struct stall_record, SOURCE_COUNT);
BPF_PERF_OUTPUT(events);

static __always_inline struct cpu_state *this_cpu_state(void)
{
	u32 cpu = bpf_get_smp_processor_id();

	return cpus.lookup(&cpu);
}

static __always_inline struct watch_config *watch(void)
{
	u32 zero = 0;

	return config.lookup(&zero);
}

/*
 * No branches in what is done for each vector: the verifier follows every
 * combination of them, which took it a second for ten vectors. The barrier
 * keeps clang from turning the arithmetic back into branches.
 */
#define opaque(value) asm volatile("" : "+r"(value))

static __always_inline u64 at_least_zero(s64 value)
{
	s64 sign = value >> 63;

	opaque(sign);
	return value & ~sign;
}

static __always_inline u64 max_u63(u64 a, u64 b)
{
	return a + at_least_zero(b - a);
}

/* 0 for since == 0, and never negative: clocks of two CPUs may disagree. */
static __always_inline u64 age(u64 since, u64 now)
{
	u64 known = (since | -since) >> 63;

	opaque(known);
	return at_least_zero(now - since) & -known;
}

static __always_inline u64 oldest_overdue(struct cpu_state *st, struct watch_config *cfg, u64 now)
{
	u64 oldest = age(st->ksoftirqd_since, now);
	u64 mask = cfg->vec_mask;
	u64 watched;
	int vec;

	for (vec = 0; vec < VEC_COUNT; vec++) {
		watched = -(mask >> vec & 1);
		opaque(watched);
		oldest = max_u63(oldest, age(st->raised[vec], now) & watched);
	}
	return oldest >= cfg->threshold_ns ? oldest : 0;
}

static __always_inline void begin(struct cpu_state *st, struct watch_config *cfg, u64 since)
{
	if (st->active)
		return;
	__builtin_memset(st->waited_ns, 0, sizeof(st->waited_ns));
	st->ksoftirqd_waited_ns = 0;
	st->started_ns = since;
	st->sample_nr = 0;
	st->next_sample_ns = 0;
	st->spacing_ns = cfg->tick_ns;
	if (!st->ksoftirqd_since)
		st->switches = 0;
	st->seq++;
	st->active = 1;
}

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
	return true;
}

static __always_inline void emit(void *ctx, struct cpu_state *st, u32 type, u32 source, u64 now)
{
	struct stall_record *rec = scratch.lookup(&source);
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	u64 id = bpf_get_current_pid_tgid();
	long kernel_bytes, user_bytes = 0;
	int vec;

	if (!rec)
		return;
	st->sample_nr += type == RECORD_SAMPLE;
	rec->type = type;
	rec->source = source;
	rec->cpu = bpf_get_smp_processor_id();
	rec->seq = st->seq;
	rec->time_ns = now;
	rec->started_ns = st->started_ns;
	if (type == RECORD_CLOSE) {
		rec->ksoftirqd_wait_ns = st->ksoftirqd_waited_ns;
		__builtin_memcpy(rec->wait_ns, st->waited_ns, sizeof(rec->wait_ns));
	} else {
		rec->ksoftirqd_wait_ns =
			max_u63(age(st->ksoftirqd_since, now), st->ksoftirqd_waited_ns);
		for (vec = 0; vec < VEC_COUNT; vec++)
			rec->wait_ns[vec] = age(st->raised[vec], now);
	}
	rec->serving_vec = st->serving ? st->serving - 1 : VEC_NONE;
	rec->serving_ns = st->serving ? age(st->serving_since, now) : 0;
	rec->cgroup_id = bpf_get_current_cgroup_id();
	rec->tgid = id >> 32;
	rec->tid = id;
	bpf_probe_read_kernel(&rec->task_flags, sizeof(rec->task_flags), &task->flags);
	bpf_probe_read_kernel(&rec->policy, sizeof(rec->policy), &task->policy);
	bpf_probe_read_kernel(&rec->prio, sizeof(rec->prio), &task->prio);
	rec->ksoftirqd_pid = st->ksoftirqd_pid;
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
	else
		st->sent++;
}
