/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Maps, and the life of a stall: begin, sample, close.
 *
 * A program may be interrupted by another one on its CPU only upwards
 * (softirq_entry by the tick), never by itself (tick.c takes care of that, once
 * it knows the tick's timer), so plain loads and stores do; where the order
 * matters a comment says so. Whoever begins or ends a stall has the turn: record().
 */
#define PF_KTHREAD 0x00200000
#define NSEC_PER_SEC 1000000000ULL
/* A stall over the limit of its second is told after all from this many thresholds on. */
#define SERIOUS_FACTOR 10

BPF_F_TABLE("array", u32, struct cpu_state, cpus, STALLD_CPUS, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct watch_config, config, 1, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct watched_bucket, watched, 1 << WATCHED_BITS, BPF_F_MMAPABLE);
/* Not one ring or table an element: bcc spends time on every member of those. */
BPF_F_TABLE("array", u32, struct tick_sample, rings,
	    STALLD_CPUS * LOOKBACK_RINGS * LOOKBACK_SAMPLES, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct napi_slot, napis, STALLD_CPUS *NAPI_SLOTS, BPF_F_MMAPABLE);
/* One slot per source: a tick may interrupt softirq_entry's record. */
BPF_PERCPU_ARRAY(scratch, struct stall_record, SOURCE_COUNT);
BPF_PERCPU_ARRAY(task_scratch, struct task_record, SOURCE_COUNT);
BPF_PERF_OUTPUT(events);
/* All that is rare, so that the rest stays short: filled by stalld/probe/loader.py. */
#define TAIL_RECORD 0
#define TAIL_WAKEUP 1
#define TAIL_SWITCH 2
#define TAIL_EMIT 3
#define TAIL_TASK 4
BPF_PROG_ARRAY(tails, 5);

/*
 * A member of the kernel's, as wide as this kernel has it: on_cpu and on_rq were
 * ints for long, in 7.3 they are bytes beside others.
 */
#define READ(to, pointer, member)                                                             \
	do {                                                                                  \
		_Static_assert(sizeof((pointer)->member) <= sizeof(to), #member " is wider"); \
		(to) = 0;                                                                     \
		bpf_probe_read_kernel(&(to), sizeof((pointer)->member), &(pointer)->member);  \
	} while (0)

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
/* What was stored before this is stored before what comes after it. */
#define barrier() asm volatile("" ::: "memory")

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

/* Is any vector pending that is timed? */
static __always_inline u64 any_raised(struct cpu_state *st)
{
	u64 *words = (u64 *)st->pending;

	return words[0] | words[1];
}

static __always_inline u64 any_waiting(struct cpu_state *st)
{
	return *(u64 *)st->waiting;
}

static __always_inline void forget_raises(struct cpu_state *st)
{
	__builtin_memset(st->raised, 0, sizeof(st->raised));
	__builtin_memset(st->pending, 0, sizeof(st->pending));
}

static __always_inline u64 service_age(struct cpu_state *st, u64 now)
{
	return st->serving ? age(st->serving_since, now) : 0;
}

static __always_inline u64 oldest_overdue(struct cpu_state *st, struct watch_config *cfg, u64 now)
{
	u64 oldest = service_age(st, now);
	u64 mask = cfg->vec_mask;
	u64 watched_vec;
	int i;

	for (i = 0; i < WAITERS; i++)
		oldest = max_u63(oldest, age(st->waiters[i].since_ns, now));
	for (i = 0; i < VEC_COUNT; i++) {
		watched_vec = -(mask >> i & 1);
		opaque(watched_vec);
		oldest = max_u63(oldest, age(st->raised[i], now) & watched_vec);
	}
	return oldest >= cfg->threshold_ns ? oldest : 0;
}

static __always_inline void forget_waiters(struct cpu_state *st)
{
	int i;

	for (i = 0; i < WAITERS; i++)
		st->waiters[i].since_ns = 0;
	*(u64 *)st->waiting = 0;
}

/* The CPU is idle, so whatever was thought to wait does not. */
static __always_inline void nobody_waits(struct cpu_state *st)
{
	forget_waiters(st);
	st->missed++;
}

/*
 * How late the tick is: 0 while it is not due, and on an idle CPU that stopped
 * it. The timer is programmed in hardware and fires on time unless interrupts
 * are off, or the whole CPU is away. expiring: it is being called just now, so
 * it is in no queue any more.
 */
static __always_inline u64 tick_lateness(struct cpu_state *st, bool expiring, u64 now)
{
	struct hrtimer *timer = (struct hrtimer *)st->tick_timer;
	u64 expires = 0;
	u8 queued = 0;

	if (!timer)
		return 0;
	READ(expires, timer, _softexpires);
	if (!expiring)
		READ(queued, timer, STALLD_HRTIMER_QUEUED);
	return expiring || queued ? age(expires, now) : 0;
}

static __always_inline void begin(struct cpu_state *st, struct watch_config *cfg, u64 since,
				  u64 now, bool counts_switches)
{
	int i;

	if (st->active)
		return;
	__builtin_memset(st->waited_ns, 0, sizeof(st->waited_ns));
	for (i = 0; i < WAITERS; i++)
		st->waiters[i].waited_ns = 0;
	st->served_ns = 0;
	st->late_ns = 0;
	st->napi_budget = 0;
	st->napi_wanted = 0;
	st->started_ns = since;
	st->sample_nr = 0;
	st->next_sample_ns = 0;
	st->spacing_ns = cfg->tick_ns;
	if (!counts_switches)
		st->switches = 0;
	if (now - st->window_ns >= NSEC_PER_SEC) {
		st->window_ns = now;
		st->window_stalls = 0;
	}
	st->muted = cfg->max_stalls && st->window_stalls >= cfg->max_stalls;
	st->window_stalls++;
	st->ring ^= 1;
	st->seq++;
	st->active = 1;
}

/*
 * The steal clock of this CPU. KVM's own is exact; the kernel's account of any
 * hypervisor's lags behind by a tick. Where one is not kept it stays 0.
 */
static __always_inline u64 steal_clock(struct cpu_state *st, struct watch_config *cfg)
{
	struct {
		u64 steal;
		u32 version;
		u32 flags;
	} kvm = {};
	u64 accounted = 0;

	if (!st->tick_timer)
		return 0;
	if (cfg->steal_offset) {
		bpf_probe_read_kernel(&kvm, sizeof(kvm),
				      (void *)(st->tick_timer + (s64)cfg->steal_offset));
		st->steal_version = kvm.version;
	}
	if (!kvm.version && cfg->cpustat_offset)
		bpf_probe_read_kernel(&accounted, sizeof(accounted),
				      (void *)(st->tick_timer + (s64)cfg->cpustat_offset));
	return kvm.version ? kvm.steal : accounted;
}

/* What softnet_data says of this CPU. */
struct softnet_counts {
	u32 processed;
	u32 squeezed;
	u32 dropped;
	u32 received_rps;
	u32 flow_limit;
	u32 backlog;
};

static __always_inline u32 softnet_word(struct cpu_state *st, s32 offset)
{
	u32 word = 0;

	if (offset)
		bpf_probe_read_kernel(&word, sizeof(word), (void *)(st->tick_timer + (s64)offset));
	return word;
}

/* What this kernel does not have stays 0. */
static __always_inline struct softnet_counts softnet(struct cpu_state *st, struct watch_config *cfg)
{
	struct softnet_counts counts = {};
	u64 limit = 0;

	if (!st->tick_timer)
		return counts;
	/* time_squeeze stands behind processed. */
	if (cfg->softnet_offset)
		bpf_probe_read_kernel(&counts, sizeof(u64),
				      (void *)(st->tick_timer + (s64)cfg->softnet_offset));
	counts.dropped =
		softnet_word(st, cfg->dropped_offset) + softnet_word(st, cfg->dropped_more_offset);
	counts.received_rps = softnet_word(st, cfg->received_rps_offset);
	counts.backlog = softnet_word(st, cfg->backlog_offset);
	if (cfg->flow_limit_offset)
		bpf_probe_read_kernel(&limit, sizeof(limit),
				      (void *)(st->tick_timer + (s64)cfg->flow_limit_offset));
	/* No limit was ever set on most hosts. */
	if (limit)
		bpf_probe_read_kernel(&counts.flow_limit, sizeof(counts.flow_limit),
				      (void *)(limit + (s64)cfg->flow_count_offset));
	return counts;
}

static __always_inline u64 net_rx_so_far(struct cpu_state *st, u64 now)
{
#ifdef NET_RX_ACTION_TRACED
	return st->net_rx_ns + age(st->net_rx_since, now);
#else
	return st->net_rx_ns + (st->serving == VEC_NET_RX + 1 ? service_age(st, now) : 0);
#endif
}

/*
 * Is another program of this CPU in its rare part? It takes microseconds. Where programs can be
 * preempted in it (PREEMPT_RT, from Linux 7.0 on) it may take as long as whoever did that likes,
 * and turns are not given back in order: after some ticks in a row no tick waits any more.
 */
#define MAX_YIELDS 3

static __always_inline bool has_turn(struct cpu_state *st, u32 owner)
{
	return owner != SOURCE_TICK && st->yields < MAX_YIELDS;
}

/*
 * The rare part, in handle_record: this program ends here. since: when what
 * was waited for began, 0 if that is not yet known to be a stall. which: the
 * waiter, for SOURCE_SWITCH.
 */
static __always_inline void record(void *ctx, struct cpu_state *st, u32 source, u64 since,
				   u32 which, u64 now)
{
	struct stall_record *rec = scratch.lookup(&source);

	if (!rec)
		return;
	rec->time_ns = now;
	rec->started_ns = since;
	rec->sample_nr = which;
	/*
	 * The turn. Whom a tick interrupted gets it back when the tick's is over; SOURCE_TICK, which
	 * is 0: nobody was interrupted. While another one has it (has_turn()) no tick and no NMI
	 * begins a stall.
	 */
	rec->source = st->source;
	st->source = source;
	tails.call(ctx, TAIL_RECORD);
	st->source = rec->source;
}
