/* SPDX-License-Identifier: (MIT OR Apache-2.0) OR GPL-2.0 */
/*
 * For whoever looks on: `conduit flows` has frames counted by flow, `conduit trace` has them told one
 * by one. A program calls look() at its end, and only while somebody looks on; what it does costs
 * frames nothing otherwise, and decides nothing.
 */
#ifndef CONDUIT_WATCH_H
#define CONDUIT_WATCH_H

#include "kernel.h"
#include "abi.h"
#include "frame.h"

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(pinning, PIN_BY_NAME);
	__type(key, __u32);
	__type(value, struct cd_watch);
} watch SEC(".maps");

/* Filled only while somebody looks on, and emptied by the last who did. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1 << 16);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, PIN_BY_NAME);
	__type(key, struct cd_flow_key);
	__type(value, struct cd_flow);
} flows SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 18);
	__uint(pinning, PIN_BY_NAME);
} trace SEC(".maps");

/* The start of what IP carries: ports and numbers of TCP, ports and data of UDP, an echo's. */
struct inner {
	__u32 ports;
	__u32 seq;
	__u32 ack;
	__u32 flags;
};

#define HASH(hash, word) ((hash) = ((hash) ^ (word)) * 0x01000193U)

/* Reads a frame again, which the program may have changed. The hash is of what no hop changes
 * (time to live, checksums and the length of what was cut or put together are). */
INLINE int read_frame(struct __sk_buff *skb, struct cd_flow_key *key, __u32 *hash, __u8 *tcp_flags)
{
	struct inner in = {};
	__u32 id = 0, at, h = 0x811c9dc5U;
	const __u32 *words;

	if (skb->protocol == be16(ETH_P_IP)) {
		struct ipv4 ip;

		if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof(ip)))
			return -1;
		map_v4(key->src, ip.src);
		map_v4(key->dst, ip.dst);
		key->proto = ip.next;
		id = ip.id;
		/* A later piece has no ports. */
		at = ip.frag & be16(0x1fff) ? 0 : ETH_HLEN + (ip.first & 0xf) * 4;
	} else if (skb->protocol == be16(ETH_P_IPV6)) {
		struct ipv6 ip;

		if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof(ip)))
			return -1;
		__builtin_memcpy(key->src, ip.src, 16);
		__builtin_memcpy(key->dst, ip.dst, 16);
		key->proto = ip.next;
		at = ETH_HLEN + sizeof(ip);
	} else {
		return -1;
	}
	words = (const __u32 *)key->src;
	HASH(h, words[0] ^ words[1]);
	HASH(h, words[2] ^ words[3]);
	words = (const __u32 *)key->dst;
	HASH(h, words[0] ^ words[1]);
	HASH(h, words[2] ^ words[3]);
	HASH(h, id << 8 | key->proto);
	/* Cut short: what is there counts. */
	if (at && bpf_skb_load_bytes(skb, at, &in, sizeof(in)))
		bpf_skb_load_bytes(skb, at, &in, 8);
	switch (key->proto) {
	case 6: /* TCP */
		key->sport = in.ports;
		key->dport = in.ports >> 16;
		*tcp_flags = in.flags >> 8;
		HASH(h, in.ports);
		HASH(h, in.seq);
		HASH(h, in.ack);
		break;
	case 17: /* UDP */
		key->sport = in.ports;
		key->dport = in.ports >> 16;
		HASH(h, in.ports);
		HASH(h, in.ack);
		HASH(h, in.flags);
		break;
	case 1: /* ICMP, ICMPv6: type and code, and an echo's identifier and number */
	case 58:
		key->sport = in.seq;
		HASH(h, in.ports & 0xffff);
		HASH(h, in.seq);
		break;
	default:
		break;
	}
	*hash = h;
	return 0;
}

INLINE void count_flow(struct __sk_buff *skb, const struct cd_flow_key *key, int dropped)
{
	struct cd_flow *flow = bpf_map_lookup_elem(&flows, key), fresh = {};
	__u32 packets = skb->gso_segs ? skb->gso_segs : 1;

	if (!flow) {
		/* Somebody else may be first; if there is no room, this one is not counted. */
		bpf_map_update_elem(&flows, key, &fresh, BPF_NOEXIST);
		flow = bpf_map_lookup_elem(&flows, key);
		if (!flow)
			return;
	}
	if (dropped) {
		__sync_fetch_and_add(&flow->dropped, 1);
		return;
	}
	__sync_fetch_and_add(&flow->packets, packets);
	__sync_fetch_and_add(&flow->bytes, skb->len);
}

/* Whether the filter takes this frame. */
INLINE int wanted(const struct cd_watch *who, const struct cd_flow_key *key, int dropped)
{
	if (who->drops && !dropped)
		return 0;
	if (who->net && who->net != key->net)
		return 0;
	if (who->proto && who->proto != key->proto)
		return 0;
	if (who->port && who->port != key->sport && who->port != key->dport)
		return 0;
	return zero16(who->addr) || same16(who->addr, key->src) || same16(who->addr, key->dst);
}

#endif
