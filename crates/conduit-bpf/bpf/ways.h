/* SPDX-License-Identifier: (MIT OR Apache-2.0) OR GPL-2.0 */
/* Reading a machine's entry, and each way that a frame may go: the tunnel, a tap, the stack, the holder. */
#ifndef CONDUIT_WAYS_H
#define CONDUIT_WAYS_H

#include "frame.h"
#include "maps.h"

/* What becomes of a frame: a verdict for the kernel, and the event to count it under. */
INLINE int outcome(__u32 event, int verdict)
{
	return (event + 1) << 8 | (verdict & 0xff);
}

INLINE int drop(__u32 event)
{
	return outcome(event, TC_ACT_SHOT);
}

INLINE const struct cd_config *settings(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&config, &zero);
}

INLINE __u32 check_of(const struct cd_key *key)
{
	const __u32 *words = (const __u32 *)key->addr;

	return key->net * 0x9e3779b1U ^ words[0] ^ words[1] * 3 ^ words[2] * 5 ^ words[3] * 7;
}

/* What a program needs of an entry, read at one moment. */
struct place {
	__u64 epoch;
	__u8 owner[16];
	__u8 candidate[16];
	__u32 ifindex;
	__u8 state;
	__u8 flags;
	__u8 mac[6];
};

INLINE int find(const struct cd_key *key, struct place *out)
{
	struct cd_entry *entry = bpf_map_lookup_elem(&forward, key);
	__u32 check;

	if (!entry)
		return 0;
	bpf_spin_lock(&entry->lock);
	check = entry->check;
	out->epoch = entry->epoch;
	__builtin_memcpy(out->owner, entry->owner, 16);
	__builtin_memcpy(out->candidate, entry->candidate, 16);
	out->ifindex = entry->ifindex;
	out->state = entry->state;
	out->flags = entry->flags;
	__builtin_memcpy(out->mac, entry->mac, 6);
	bpf_spin_unlock(&entry->lock);
	return check == check_of(key);
}

/* The underlay address of the edge that serves this machine's home; 0 if nobody has said. */
INLINE const __u8 *front_of(const struct cd_key *key)
{
	const __u32 *home = bpf_map_lookup_elem(&homes, key);
	const struct cd_front *front;

	if (!home)
		return 0;
	front = bpf_map_lookup_elem(&fronts, home);
	return front ? front->edge : 0;
}

/* Where frames to this address go now: behind those that were held, while they are given back; and
 * while its machine is stopping here, behind those that it leaves in its tap. */
INLINE __u8 way(const struct cd_config *cfg, const struct place *place)
{
	return place->flags & (CD_DRAIN | CD_LEAVING) && cfg->hold ? CD_HOLD : place->state;
}

/* Counts one more frame that waits. 0 if none has to any more: the last one was given back since the
 * caller read the entry. */
INLINE int waits(const struct cd_key *key)
{
	struct cd_entry *entry = bpf_map_lookup_elem(&forward, key);
	__u32 check = check_of(key);
	int counted = 0;

	if (!entry)
		return 0;
	bpf_spin_lock(&entry->lock);
	if (entry->check == check &&
	    (entry->state == CD_HOLD || entry->flags & (CD_DRAIN | CD_LEAVING))) {
		entry->waiting += 1;
		counted = 1;
	}
	bpf_spin_unlock(&entry->lock);
	return counted;
}

/* One frame that waited is given back; says where to. The last one opens the way for all. */
INLINE int given_back(const struct cd_key *key, struct place *out)
{
	struct cd_entry *entry = bpf_map_lookup_elem(&forward, key);
	__u32 check;

	if (!entry)
		return 0;
	bpf_spin_lock(&entry->lock);
	check = entry->check;
	out->epoch = entry->epoch;
	__builtin_memcpy(out->owner, entry->owner, 16);
	out->ifindex = entry->ifindex;
	out->state = entry->state;
	__builtin_memcpy(out->mac, entry->mac, 6);
	if (entry->waiting)
		entry->waiting -= 1;
	if (!entry->waiting)
		entry->flags &= ~CD_DRAIN;
	bpf_spin_unlock(&entry->lock);
	return check == check_of(key);
}

/* What the wire says of an epoch. */
INLINE __u16 wire_of(__u64 epoch)
{
	return (__u16)((epoch >> 16) * CD_WIRE_STEPS + (epoch & 0xffff));
}

/* How far `epoch` is ahead of what the wire said; negative if the wire is newer. Exact within half
 * of 16 bits. */
INLINE __s16 ahead(__u64 epoch, __u16 wire)
{
	return (__s16)(wire_of(epoch) - wire);
}

/* Says where the tunnel leads for this frame, and what its outer header says of the epoch. */
INLINE int set_key(struct __sk_buff *skb, const struct cd_config *cfg, __u32 net, const __u8 *to,
		   __u64 epoch, __u32 bits)
{
	struct bpf_tunnel_key key = {};
	__u64 flags = BPF_F_DONT_FRAGMENT;
	__u32 gbp = wire_of(epoch) | bits;

	key.tunnel_id = net;
	key.tunnel_ttl = 64;
	if (is_v4(to)) {
		key.remote_ipv4 = be32(((const __u32 *)to)[3]);
		key.local_ipv4 = be32(((const __u32 *)cfg->self)[3]);
		flags |= BPF_F_ZERO_CSUM_TX;
	} else {
		__builtin_memcpy(key.remote_ipv6, to, 16);
		__builtin_memcpy(key.local_ipv6, cfg->self, 16);
		flags |= BPF_F_TUNINFO_IPV6;
	}
	if (bpf_skb_set_tunnel_key(skb, &key, sizeof(key), flags) ||
	    bpf_skb_set_tunnel_opt(skb, &gbp, sizeof(gbp)))
		return -1;
	return 0;
}

INLINE int encap(struct __sk_buff *skb, const struct cd_config *cfg, __u32 net, const __u8 *to,
		 __u64 epoch, __u32 bits, __u32 event)
{
	if (set_key(skb, cfg, net, to, epoch, bits))
		return drop(EV_tunnel_refused);
	skb->mark = CD_MARK;
	return outcome(event, bpf_redirect(cfg->tunnel, 0));
}

/* Into a machine's tap, from the gateway that it knows. */
INLINE int deliver(struct __sk_buff *skb, const struct cd_config *cfg, const struct place *place)
{
	__u8 macs[12];

	__builtin_memcpy(macs, place->mac, 6);
	__builtin_memcpy(macs + 6, cfg->gateway, 6);
	if (bpf_skb_store_bytes(skb, 0, macs, sizeof(macs), 0))
		return drop(EV_malformed);
	return outcome(EV_to_tap, bpf_redirect(place->ifindex, 0));
}

/* Where a frame goes that found nothing to wait for any more. */
INLINE int behind_the_last(struct __sk_buff *skb, const struct cd_config *cfg,
			   const struct cd_key *key)
{
	struct place place = {};

	if (!find(key, &place))
		return drop(EV_unknown_machine);
	if (place.state == CD_LOCAL)
		return deliver(skb, cfg, &place);
	if (place.state != CD_REMOTE)
		return drop(EV_machine_gone);
	return encap(skb, cfg, key->net, place.owner, place.epoch,
		     cfg->role == CD_EDGE ? 0 : CD_FORWARDED, EV_to_tunnel);
}

/* Into the hold tap; the network goes with it as the last three bytes of the source address. */
INLINE int hold(struct __sk_buff *skb, const struct cd_config *cfg, const struct cd_key *key)
{
	__u32 net = key->net;
	__u8 from[6] = { 0x02, 0x63, CD_TAG_HELD, net >> 16, net >> 8, net };

	if (!cfg->hold)
		return drop(EV_no_hold);
	if (bpf_skb_store_bytes(skb, ETH_ALEN, from, sizeof(from), 0))
		return drop(EV_malformed);
	if (!waits(key))
		return behind_the_last(skb, cfg, key);
	return outcome(EV_held, bpf_redirect(cfg->hold, 0));
}

INLINE int to_stack(struct __sk_buff *skb, __u32 net, __u32 event)
{
	skb->mark = CD_NET_MARK | net;
	/* The frame is not addressed to this device, and the stack would leave it. */
	bpf_skb_change_type(skb, PACKET_HOST);
	return outcome(event, TC_ACT_OK);
}

/* Whether the stack must see it, which answers the sender with the size that fits. */
INLINE int too_large(struct __sk_buff *skb, __u32 ifindex)
{
	__u32 mtu = 0;

	return bpf_check_mtu(skb, ifindex, &mtu, 0, BPF_MTU_CHK_SEGS) > 0;
}

#endif
