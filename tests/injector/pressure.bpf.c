// SPDX-License-Identifier: GPL-2.0-only
/*
 * Packet pressure: what a flooded packet costs its receiver. tc ingress on the
 * host end of a veth pair; runs in NET_RX on the CPU that RPS chose. Flooded
 * packets end here, all others pass.
 */
#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

/* Hundreds of packets make one NET_RX pass: they must stay cheap one by one. */
#define MAX_COST_NS (50 * 1000ULL)
#define MAX_STEPS 4000
#define FLOOD_PORT 9
#define IPV4_PROTOCOL 23
#define IPV4_UDP_PORT 36
#define UDP 17

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} cost_ns SEC(".maps");

__attribute__((noinline)) int injected_packet_cost(__u64 until_ns)
{
	for (int i = 0; i < MAX_STEPS; i++)
		if (bpf_ktime_get_ns() >= until_ns)
			return 1;
	return 0;
}

SEC("tc")
int flooded_packet(struct __sk_buff *skb)
{
	__u32 zero = 0;
	__u64 *cost = bpf_map_lookup_elem(&cost_ns, &zero);
	__u8 protocol = 0;
	__be16 port = 0;

	if (!cost || bpf_skb_load_bytes(skb, IPV4_PROTOCOL, &protocol, sizeof(protocol)) ||
	    protocol != UDP || bpf_skb_load_bytes(skb, IPV4_UDP_PORT, &port, sizeof(port)) ||
	    port != bpf_htons(FLOOD_PORT))
		return TC_ACT_OK;
	if (*cost && *cost <= MAX_COST_NS)
		injected_packet_cost(bpf_ktime_get_ns() + *cost);
	return TC_ACT_SHOT;
}

char _license[] SEC("license") = "GPL";
