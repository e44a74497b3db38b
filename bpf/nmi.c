// SPDX-License-Identifier: GPL-2.0-only
/*
 * A hardware counter's overflow: the one interrupt that cannot be held off, so
 * the one that shows what runs while interrupts are off. Compiled in where the
 * machine has a counter. It may interrupt any other program here; it begins a
 * stall only when the tick has long been due, which no program's run is.
 */
#ifdef STALLD_NMI

#ifdef STALLD_STRUCTS_FROM_BTF
struct bpf_perf_event_data {
	struct pt_regs regs;
};
#else
#include <uapi/linux/bpf_perf_event.h>
#endif

#define X86_EFLAGS_IF (1UL << 9)

int handle_nmi(struct bpf_perf_event_data *ctx)
{
	struct cpu_state *st = this_cpu_state();
	struct watch_config *cfg;
	struct stall_record *rec;
	u32 source = SOURCE_NMI;
	u64 now, late;

	/* The idle task waits with interrupts off, and that holds nothing up. */
	if (!st || ctx->regs.flags & X86_EFLAGS_IF || !(u32)bpf_get_current_pid_tgid())
		return 0;
	cfg = watch();
	if (!cfg || !cfg->threshold_ns || !st->last_tick_ns)
		return 0;
	now = bpf_ktime_get_ns();
	if (now - st->last_tick_ns < cfg->threshold_ns)
		return 0;
	late = tick_lateness(st, false, now);
	if (late < cfg->threshold_ns || has_turn(st, st->source))
		return 0;
	begin(st, cfg, now - late, now, any_waiting(st));
	st->late_ns = max_u63(st->late_ns, late);
	if (st->sample_nr >= cfg->max_samples || now < st->next_sample_ns)
		return 0;
	st->next_sample_ns = now + st->spacing_ns - cfg->tick_ns / 2;
	st->spacing_ns *= 2;
	rec = scratch.lookup(&source);
	if (rec)
		emit(ctx, st, cfg, rec, RECORD_SAMPLE, SOURCE_NMI, now);
	return 0;
}

#endif
