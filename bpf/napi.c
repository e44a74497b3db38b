// SPDX-License-Identifier: GPL-2.0-only
/*
 * napi_poll: polls and packets of each device, per CPU. The tracepoint comes
 * when a poll is over, so a long one is known by name only then.
 */

/* A slot's name is read again after this long: pointers are used anew. */
#define CHECK_EVERY_JIFFIES 256

static __always_inline void identify(struct napi_slot *slot, struct napi_struct *napi)
{
	struct net_device *dev = NULL;

	READ(dev, napi, dev);
	READ(slot->ifindex, dev, ifindex);
	/* Wi-Fi polls through a device that is never registered, and so has no number. */
	if (dev && !slot->ifindex)
		slot->ifindex = NAPI_UNREGISTERED;
	bpf_probe_read_kernel(slot->name, sizeof(slot->name), dev->name);
}

static __always_inline void give_away(struct cpu_state *st, struct napi_slot *slot)
{
	st->napi_polls += slot->polls;
	st->napi_packets += slot->packets;
	slot->polls = 0;
	slot->packets = 0;
	slot->exhausted = 0;
	slot->seq = 0;
}

static __always_inline void count_in_stall(struct napi_slot *slot, u32 seq, u32 work,
					   bool exhausted)
{
	if (slot->seq != seq) {
		slot->seq = seq;
		slot->stall_polls = 0;
		slot->stall_packets = 0;
		slot->stall_exhausted = 0;
	}
	slot->stall_polls++;
	slot->stall_packets += work;
	slot->stall_exhausted += exhausted;
}

int handle_napi_poll(struct bpf_raw_tracepoint_args *ctx)
{
	u32 cpu = bpf_get_smp_processor_id();
	struct cpu_state *st = cpus.lookup(&cpu);
	u64 napi = ctx->args[0];
	u32 work = ctx->args[1], budget = ctx->args[2];
	u64 now = bpf_jiffies64();
	struct napi_slot *slot;
	u32 place, ifindex;
	/* netpoll (netconsole) polls for sent packets only: its budget is 0. */
	bool exhausted = budget && work >= budget;

	place = cpu * NAPI_SLOTS + (napi >> 6 ^ napi >> 10 ^ napi >> 14) % NAPI_SLOTS;
	slot = napis.lookup(&place);
	if (!slot || !st)
		return 0;
	if (slot->napi != napi && slot->napi && now - slot->checked < CHECK_EVERY_JIFFIES) {
		/* Two busy queues want one slot. */
		st->napi_polls++;
		st->napi_packets += work;
	} else {
		if (slot->napi != napi || now - slot->checked >= CHECK_EVERY_JIFFIES) {
			ifindex = slot->ifindex;
			identify(slot, (struct napi_struct *)napi);
			if (slot->napi && (slot->napi != napi || slot->ifindex != ifindex))
				give_away(st, slot);
			slot->napi = napi;
			slot->checked = now;
		}
		slot->polls++;
		slot->packets += work;
		slot->exhausted += exhausted;
		if (st->active)
			count_in_stall(slot, st->seq, work, exhausted);
	}
	if (st->napi_wanted && budget) {
		struct napi_slot polled = {};

		identify(&polled, (struct napi_struct *)napi);
		st->napi_wanted = 0;
		st->napi_ifindex = polled.ifindex;
		st->napi_work = work;
		st->napi_budget = budget;
		__builtin_memcpy(st->napi_name, polled.name, sizeof(st->napi_name));
	}
	return 0;
}
