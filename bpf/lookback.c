// SPDX-License-Identifier: GPL-2.0-only
/*
 * hrtimer_expire_entry once more, for the tick itself: was it late, and what
 * runs? Attached before the program in tick.c, so that this one tells of a
 * stall that is over first. A program of its own, since it has its own price.
 */

/* The ring reaches back a quarter of a second, also where the tick is faster than 250 Hz. */
#define LOOKBACK_PERIOD_NS 3500000

/* The tick is the hrtimer with the tick's function; its place is per-CPU and fixed. */
static __always_inline void learn_tick(struct cpu_state *st, struct watch_config *cfg,
				       struct hrtimer *timer)
{
	u64 function;

	READ(function, timer, function);
	if (function && (function == cfg->tick_function[0] || function == cfg->tick_function[1]))
		st->tick_timer = (u64)timer;
}

static __always_inline void check_late(struct cpu_state *st, struct watch_config *cfg, u64 now)
{
	u64 late = tick_lateness(st, true, now);

	/* Whose rare part was interrupted when the tick was due: the CPU was away since. */
	if (late < cfg->threshold_ns || has_turn(st, st->source))
		return;
	begin(st, cfg, now - max_u63(late, oldest_overdue(st, cfg, now)), now, any_waiting(st));
	st->late_ns = max_u63(st->late_ns, late);
}

/*
 * To walk a stack takes 10 to 40 us when the tables for it are not in the
 * cache, and they are not. So user code is told by its registers, and kernel
 * code by its address alone, but for every fourth tick, and whenever something
 * waits: then it matters.
 */
#define WALK_EVERY 4

static __always_inline u32 tick_kind(struct cpu_state *st, struct watch_config *cfg, u64 ticks,
				     u64 *address)
{
#ifdef STALLD_REGISTERS
	struct pt_regs *regs = NULL;
	u64 segment = 0;

	if (!cfg->regs_offset)
		return TICK_STACK;
	bpf_probe_read_kernel(&regs, sizeof(regs),
			      (void *)(st->tick_timer + (s64)cfg->regs_offset));
	if (!regs)
		return TICK_STACK;
	bpf_probe_read_kernel(&segment, sizeof(u16), &regs->cs);
	if (segment & 3)
		return TICK_USER;
	if (any_waiting(st) || st->active || any_raised(st) || ticks % WALK_EVERY == 0)
		return TICK_STACK;
	bpf_probe_read_kernel(address, sizeof(*address), &regs->ip);
	return TICK_ADDRESS;
#else
	return TICK_STACK;
#endif
}

int handle_tick(struct bpf_raw_tracepoint_args *ctx)
{
	u32 cpu = bpf_get_smp_processor_id(), half, place;
	struct task_struct *task;
	struct watch_config *cfg;
	struct tick_sample *sample;
	struct cpu_state *st;
	struct softnet_counts counts;
	u64 now, last, id;
	long bytes;

	st = cpus.lookup(&cpu);
	if (!st)
		return 0;
	/* Another timer: most are, on some hosts. */
	if (st->tick_timer && st->tick_timer != ctx->args[0])
		return 0;
	cfg = watch();
	if (!cfg || !cfg->threshold_ns)
		return 0;
	if (!st->tick_timer) {
		learn_tick(st, cfg, (struct hrtimer *)ctx->args[0]);
		return 0;
	}
	now = bpf_ktime_get_ns();
	last = st->last_tick_ns;
	st->last_tick_ns = now;
	if (last && now - last >= cfg->threshold_ns)
		check_late(st, cfg, now);

	if (!cfg->lookback || now - st->last_lookback_ns < LOOKBACK_PERIOD_NS)
		return 0;
	half = st->ring & 1;
	place = (cpu * LOOKBACK_RINGS + half) * LOOKBACK_SAMPLES +
		st->ticks[half] % LOOKBACK_SAMPLES;
	sample = rings.lookup(&place);
	if (!sample)
		return 0;
	st->last_lookback_ns = now;
	id = bpf_get_current_pid_tgid();
	task = (struct task_struct *)bpf_get_current_task();
	counts = softnet(st, cfg);
	/* The reader takes no sample whose time is 0, or changed meanwhile. */
	*(volatile u64 *)&sample->time_ns = 0;
	barrier();
	sample->steal_ns = steal_clock(st, cfg);
	sample->net_rx_ns = net_rx_so_far(st, now);
	sample->net_rx_runs = st->net_rx_runs;
	sample->processed = counts.processed;
	sample->squeezed = counts.squeezed;
	sample->dropped = counts.dropped;
	sample->received_rps = counts.received_rps;
	sample->flow_limit = counts.flow_limit;
	sample->backlog = counts.backlog;
	sample->tgid = id >> 32;
	sample->tid = id;
	READ(sample->policy, task, policy);
	READ(sample->prio, task, prio);
	bpf_get_current_comm(sample->comm, sizeof(sample->comm));
	sample->serving = st->serving;
	sample->kind = tick_kind(st, cfg, st->ticks[half], &sample->stack[0]);
	bytes = sample->kind == TICK_ADDRESS ? sizeof(u64) : 0;
	if (sample->kind == TICK_STACK)
		bytes = bpf_get_stack(ctx, sample->stack, sizeof(sample->stack), 0);
	sample->stack_bytes = bytes > 0 ? bytes : 0;
	barrier();
	*(volatile u64 *)&sample->time_ns = now;
	st->ticks[half]++;
	return 0;
}
