/* SPDX-License-Identifier: (MIT OR Apache-2.0) OR GPL-2.0 */
/*
 * Frames as the programs see them: addresses of 16 bytes, Ethernet, IPv4, IPv6 and ARP. Bounds are
 * checked by the verifier; parse() is the only place that looks into a packet directly.
 */
#ifndef CONDUIT_FRAME_H
#define CONDUIT_FRAME_H

#include "kernel.h"
#include "abi.h"

#define EVENT(name, drop, text) EV_##name,
enum cd_event {
#include "events.h"
	EV_COUNT,
};
#undef EVENT

/* Addresses are 16 bytes, aligned to four. */
INLINE int same16(const void *a, const void *b)
{
	const __u32 *x = a, *y = b;

	return x[0] == y[0] && x[1] == y[1] && x[2] == y[2] && x[3] == y[3];
}

INLINE int zero16(const void *a)
{
	const __u32 *x = a;

	return (x[0] | x[1] | x[2] | x[3]) == 0;
}

INLINE int same6(const __u8 *a, const __u8 *b)
{
	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3] && a[4] == b[4] && a[5] == b[5];
}

INLINE void map_v4(__u8 *to, __u32 address)
{
	__u32 *words = (__u32 *)to;

	words[0] = 0;
	words[1] = 0;
	words[2] = be32(0xffff);
	words[3] = address;
}

INLINE int is_v4(const __u8 *address)
{
	const __u32 *words = (const __u32 *)address;

	return words[0] == 0 && words[1] == 0 && words[2] == be32(0xffff);
}

struct headers {
	__u16 proto;
	__u8 source_mac[6];
	__u8 next;     /* IP protocol */
	struct cd_key src, dst;
};

struct ipv4 {
	__u8 first, tos;
	__u16 len, id, frag;
	__u8 ttl, next;
	__u16 check;
	__u32 src, dst;
};

struct ipv6 {
	__u32 first;
	__u16 len;
	__u8 next, hops;
	__u8 src[16], dst[16];
};

/* Reads the addresses of a frame; 0, or the event to drop it under. */
INLINE int parse(struct __sk_buff *skb, __u32 net, struct headers *h)
{
	void *data, *end;
	struct ethhdr *eth;

	/* What a network device gives is in the first part of the buffer nearly always. */
	if ((void *)(long)skb->data + sizeof(*eth) + sizeof(struct ipv6) > (void *)(long)skb->data_end) {
		__u32 want = sizeof(*eth) + sizeof(struct ipv6);

		bpf_skb_pull_data(skb, skb->len < want ? skb->len : want);
	}
	data = (void *)(long)skb->data;
	end = (void *)(long)skb->data_end;
	eth = data;
	if (data + sizeof(*eth) > end || skb->vlan_present)
		return EV_malformed;
	h->proto = eth->h_proto;
	__builtin_memcpy(h->source_mac, eth->h_source, 6);
	h->src.net = net;
	h->dst.net = net;
	h->next = 0;
	if (eth->h_proto == be16(ETH_P_IP)) {
		struct ipv4 *ip = data + sizeof(*eth);

		if ((void *)(ip + 1) > end || ip->first >> 4 != 4)
			return EV_malformed;
		map_v4(h->src.addr, ip->src);
		map_v4(h->dst.addr, ip->dst);
		h->next = ip->next;
		return 0;
	}
	if (eth->h_proto == be16(ETH_P_IPV6)) {
		struct ipv6 *ip = data + sizeof(*eth);

		if ((void *)(ip + 1) > end)
			return EV_malformed;
		__builtin_memcpy(h->src.addr, ip->src, 16);
		__builtin_memcpy(h->dst.addr, ip->dst, 16);
		h->next = ip->next;
		return 0;
	}
	return EV_not_ip;
}

/* Addresses that are this host's own business: link-local, and what goes to all or to many. */
INLINE int for_this_link(const struct headers *h)
{
	const __u8 *to = h->dst.addr;

	if (is_v4(to))
		return (to[12] == 169 && to[13] == 254) || to[12] >= 224;
	return (to[0] == 0xfe && (to[1] & 0xc0) == 0x80) || to[0] == 0xff;
}

struct arp {
	__u16 hw, proto;
	__u8 hw_len, proto_len;
	__u16 op;
	__u8 sender_mac[6];
	__u8 sender[4];
	__u8 target_mac[6];
	__u8 target[4];
};

#endif
