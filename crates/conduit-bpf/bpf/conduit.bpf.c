// SPDX-License-Identifier: (MIT OR Apache-2.0) OR GPL-2.0
/*
 * The data path of a host and of an edge. Five programs on three kinds of devices:
 *
 *   cd_tap     ingress of a machine's tap     out of the machine
 *   cd_decap   ingress of the tunnel device   from another host or the edge
 *   cd_stack   egress of the tunnel device    from this host's own stack (an edge after its NAT)
 *   cd_replay  ingress of the hold tap        frames that were held, given back
 *   cd_change  never attached; run by the agent to change one entry, epoch compared
 *
 * Encapsulation and its checksum, segmentation and path MTU are the kernel's (a vxlan device in
 * collect-metadata mode); a program only says where to. What must hold:
 *
 * - An entry is read and written whole, under its lock.
 * - Nothing leaves a tap but frames of its machine, and only while this host owns the machine.
 * - Nothing that comes through the tunnel is believed without a known sender; an edge believes a
 *   machine's frame only from the host that owns it at that epoch, or that is announced as next.
 * - No frame overtakes one that was held: while any is being given back, others go behind it.
 * - Every frame that ends here is counted under a name (events.h).
 *
 * Each program is a function that decides, and end(), which counts what was decided and shows it to
 * whoever looks on (watch.h).
 */
#include "kernel.h"
#include "abi.h"
#include "frame.h"
#include "watch.h"
#include "maps.h"
#include "ways.h"

/* Whether what a machine says may leave this host: it owns the machine, or the machine is about to
 * stop here. */
INLINE int may_send(const struct place *self)
{
	return self->state == CD_LOCAL ? !(self->flags & CD_CANDIDATE) :
					 self->state == CD_REMOTE && self->flags & CD_LEAVING;
}

/* A machine's talk with its gateway, which this host is. */
INLINE int to_link(struct __sk_buff *skb, __u32 net)
{
	count(EV_to_stack);
	skb->mark = CD_NET_MARK | net;
	return TC_ACT_OK;
}

INLINE int from_arp(struct __sk_buff *skb, const struct cd_port *port)
{
	struct arp arp;
	__u32 sender;

	if (bpf_skb_load_bytes(skb, ETH_HLEN, &arp, sizeof(arp)))
		return drop(EV_malformed);
	if (!same6(arp.sender_mac, port->mac))
		return drop(EV_spoofed_mac);
	__builtin_memcpy(&sender, arp.sender, 4);
	if (sender && sender != ((const __u32 *)port->v4)[3])
		return drop(EV_spoofed_source);
	return to_link(skb, port->net);
}

INLINE int at_tap(struct __sk_buff *skb)
{
	const struct cd_config *cfg = settings();
	__u32 ifindex = skb->ifindex;
	const struct cd_port *port = bpf_map_lookup_elem(&ports, &ifindex);
	struct place self = {}, place = {};
	const __u8 *edge;
	struct headers h;
	int bad;

	if (!cfg || !port)
		return drop(EV_no_port);
	bad = parse(skb, port->net, &h);
	if (bad == EV_not_ip && h.proto == be16(ETH_P_ARP) && same6(h.source_mac, port->mac))
		return from_arp(skb, port);
	if (bad)
		return drop(bad);

	/* What was left in the tap when the machine went away is given back to it by the agent: it
	 * follows the machine, and what came since waits for it. */
	if (same16(h.dst.addr, port->v4) || same16(h.dst.addr, port->v6)) {
		if (!find(&h.dst, &place) || place.state != CD_REMOTE)
			return drop(EV_loop);
		if (!(place.flags & CD_LEAVING) && way(cfg, &place) == CD_HOLD)
			return hold(skb, cfg, &h.dst);
		return encap(skb, cfg, port->net, place.owner, place.epoch, CD_FORWARDED, EV_forwarded);
	}

	if (!same6(h.source_mac, port->mac))
		return drop(EV_spoofed_mac);
	if (!same16(h.src.addr, port->v4) && !same16(h.src.addr, port->v6)) {
		/* Before it has its address, and for neighbour discovery: to this host only. */
		__u8 *src = h.src.addr;
		int unset = is_v4(src) ? ((__u32 *)src)[3] == 0 : zero16(src);
		int link = !is_v4(src) && src[0] == 0xfe && (src[1] & 0xc0) == 0x80;

		if (!for_this_link(&h) || !(unset || link))
			return drop(EV_spoofed_source);
		return to_link(skb, port->net);
	}
	if (for_this_link(&h))
		return to_link(skb, port->net);
	if (!find(&h.src, &self) || !may_send(&self))
		return drop(EV_not_owner);

	if (find(&h.dst, &place)) {
		switch (way(cfg, &place)) {
		case CD_LOCAL:
			if (too_large(skb, place.ifindex))
				return to_stack(skb, port->net, EV_too_large);
			return deliver(skb, cfg, &place);
		case CD_HOLD:
			return hold(skb, cfg, &h.dst);
		case CD_REMOTE:
			/* Through the edge, which judges the sender. */
			break;
		default:
			return drop(EV_machine_gone);
		}
	}
	if (cfg->out == CD_OUT_STACK)
		return to_stack(skb, port->net, EV_to_stack);
	edge = front_of(&h.src);
	if (!edge)
		edge = cfg->edge;
	if (zero16(edge))
		return drop(EV_no_edge);
	if (too_large(skb, cfg->tunnel))
		return to_stack(skb, port->net, EV_too_large);
	return encap(skb, cfg, port->net, edge, self.epoch, 0, EV_to_tunnel);
}

/* An edge believes a machine's frame from its owner at its epoch. With a newer epoch, whose claim
 * has not reached this edge yet, it believes the host that was announced as next; where none was, any
 * host of the fleet, as it would believe its claim. Where leases say who may be next, and nothing was
 * heard of the sender, its frame is early: it may wait for the word that makes it right. */
INLINE int judge_sender(const struct headers *h, const __u8 *outer, __u16 wire)
{
	struct place from = {};
	__s16 behind;
	int newer;

	if (!find(&h->src, &from))
		return EV_unknown_machine;
	if (from.state == CD_DROP)
		return EV_machine_gone;
	behind = ahead(from.epoch, wire);
	newer = behind < 0 && behind > -CD_EPOCH_SLACK;
	if (same16(outer, from.owner))
		return behind == 0 || newer ? 0 : EV_old_epoch;
	if (newer && (zero16(from.candidate) || same16(outer, from.candidate))) {
		count(EV_ahead);
		return 0;
	}
	return newer ? EV_early : EV_not_owner;
}

/* Into the hold tap until the sender is believed: the holder gives it back then, and throws it away if that
 * takes too long. Who sent it, and at which epoch, goes with it; there is no room for more than an IPv4
 * address. */
INLINE int hold_early(struct __sk_buff *skb, const struct cd_config *cfg, const struct headers *h,
		      const __u8 *outer, __u16 wire)
{
	__u32 net = h->src.net;
	__u8 macs[12] = { outer[12], outer[13], outer[14], outer[15], wire >> 8, wire,
			  0x02, 0x63, CD_TAG_EARLY, net >> 16, net >> 8, net };

	if (!cfg->hold || !is_v4(outer))
		return drop(EV_not_owner);
	if (bpf_skb_store_bytes(skb, 0, macs, sizeof(macs), 0))
		return drop(EV_malformed);
	return outcome(EV_early, bpf_redirect(cfg->hold, 0));
}

/* To the outside: by this edge, or by the one that serves the machine's home, if the host did not know
 * it. What another edge has sent on stays here: two that believe each other to be it make no circle. */
INLINE int outwards(struct __sk_buff *skb, const struct cd_config *cfg, const struct headers *h,
		    __u32 gbp)
{
	const __u8 *edge = gbp & CD_FORWARDED ? 0 : front_of(&h->src);
	struct place self = {};

	if (!edge || zero16(edge) || same16(edge, cfg->self) || !find(&h->src, &self))
		return to_stack(skb, h->src.net, EV_to_stack);
	return encap(skb, cfg, h->src.net, edge, self.epoch, CD_FORWARDED, EV_to_other_edge);
}

/* What a machine says, from a host that has it: to the outside or to another machine. */
INLINE int lead_on(struct __sk_buff *skb, const struct cd_config *cfg, const struct headers *h,
		   __u32 gbp)
{
	struct place place = {};

	if (!find(&h->dst, &place))
		return outwards(skb, cfg, h, gbp);
	switch (way(cfg, &place)) {
	case CD_REMOTE:
		return encap(skb, cfg, h->dst.net, place.owner, place.epoch, 0, EV_to_tunnel);
	case CD_HOLD:
		return hold(skb, cfg, &h->dst);
	default:
		return drop(EV_machine_gone);
	}
}

/* Through the tunnel into an edge. Other edges have judged the sender already. */
INLINE int at_edge(struct __sk_buff *skb, const struct cd_config *cfg, const struct headers *h,
		   const __u8 *outer, __u32 role, __u16 wire, __u32 gbp)
{
	int bad = !(gbp & CD_FORWARDED) ? judge_sender(h, outer, wire) : role == CD_EDGE ? 0 : EV_loop;

	if (bad == EV_early)
		return hold_early(skb, cfg, h, outer, wire);
	return bad ? drop(bad) : lead_on(skb, cfg, h, gbp);
}

/* An early frame that was given back: it goes on as if it had come out of the tunnel now. */
INLINE int given_early(struct __sk_buff *skb, const struct cd_config *cfg)
{
	__u32 net = skb->mark & ~CD_NET_MASK;
	struct headers h;
	int bad;

	skb->mark = 0;
	bad = parse(skb, net, &h);
	return bad ? drop(bad) : lead_on(skb, cfg, &h, 0);
}

INLINE int at_tunnel(struct __sk_buff *skb)
{
	const struct cd_config *cfg = settings();
	struct bpf_tunnel_key key = {};
	struct cd_address outer;
	struct place place = {};
	struct headers h;
	__u32 gbp = 0, *role;
	__s16 behind;
	__u16 wire;
	int bad;

	if (!cfg)
		return drop(EV_no_tunnel_key);
	if (!bpf_skb_get_tunnel_key(skb, &key, sizeof(key), 0))
		map_v4(outer.bytes, be32(key.remote_ipv4));
	else if (!bpf_skb_get_tunnel_key(skb, &key, sizeof(key), BPF_F_TUNINFO_IPV6))
		__builtin_memcpy(outer.bytes, key.remote_ipv6, 16);
	else if (cfg->role == CD_EDGE && (skb->mark & CD_NET_MASK) == CD_EARLY_MARK)
		return given_early(skb, cfg);
	else
		return drop(EV_no_tunnel_key);
	if (bpf_skb_get_tunnel_opt(skb, &gbp, sizeof(gbp)) < 0)
		return drop(EV_no_tunnel_key);
	wire = gbp & 0xffff;
	role = bpf_map_lookup_elem(&peers, &outer);
	if (!role)
		return drop(EV_unknown_peer);
	bad = parse(skb, key.tunnel_id, &h);
	if (bad)
		return drop(bad);

	if (cfg->role == CD_EDGE)
		return at_edge(skb, cfg, &h, outer.bytes, *role, wire, gbp);
	if (*role != CD_EDGE && !(gbp & CD_FORWARDED))
		return drop(EV_not_owner);
	if (!find(&h.dst, &place))
		return drop(EV_unknown_machine);
	behind = ahead(place.epoch, wire);
	if (behind > CD_EPOCH_SLACK)
		return drop(EV_old_epoch);
	switch (way(cfg, &place)) {
	case CD_LOCAL:
		return deliver(skb, cfg, &place);
	case CD_HOLD:
		return hold(skb, cfg, &h.dst);
	case CD_REMOTE:
		/* Only a newer word than the sender's may send it further: so it never circles. */
		if (behind <= 0)
			return drop(EV_loop);
		return encap(skb, cfg, key.tunnel_id, place.owner, place.epoch, CD_FORWARDED,
			     EV_forwarded);
	default:
		return drop(EV_machine_gone);
	}
}

INLINE int at_stack(struct __sk_buff *skb)
{
	const struct cd_config *cfg = settings();
	struct place place = {};
	const __u8 *edge;
	struct headers h;
	__u32 net;
	int bad;

	if (skb->mark == CD_MARK) {
		skb->mark = 0;
		return TC_ACT_OK;
	}
	if (!cfg)
		return drop(EV_no_tunnel_key);
	net = (skb->mark & CD_NET_MASK) == CD_NET_MARK ? skb->mark & ~CD_NET_MASK : cfg->net;
	/* The outer packet would take it over. */
	skb->mark = 0;
	bad = parse(skb, net, &h);
	if (bad)
		return drop(bad);
	if (find(&h.dst, &place)) {
		switch (way(cfg, &place)) {
		case CD_REMOTE:
			/* A host leads on what came to it although the machine has left. */
			if (set_key(skb, cfg, net, place.owner, place.epoch,
				    cfg->role == CD_EDGE ? 0 : CD_FORWARDED))
				return drop(EV_tunnel_refused);
			return outcome(EV_to_tunnel, TC_ACT_OK);
		case CD_LOCAL:
			return deliver(skb, cfg, &place);
		case CD_HOLD:
			return hold(skb, cfg, &h.dst);
		default:
			return drop(EV_machine_gone);
		}
	}
	if (for_this_link(&h))
		return drop(EV_link_local);
	/* Pieces of what was too large for cd_tap, cut by the stack on the way out. */
	edge = front_of(&h.src);
	if (!edge)
		edge = cfg->edge;
	if (zero16(edge) || !find(&h.src, &place))
		return drop(EV_unknown_machine);
	if (!may_send(&place))
		return drop(EV_not_owner);
	if (set_key(skb, cfg, net, edge, place.epoch, 0))
		return drop(EV_tunnel_refused);
	return outcome(EV_to_tunnel, TC_ACT_OK);
}

/* An early frame comes back out of the hold tap: it is judged again, and returned to the tunnel device, so
 * that the stack sees it where it sees all others. */
INLINE int early_again(struct __sk_buff *skb, const struct cd_config *cfg, struct headers *h, __u32 net)
{
	struct cd_address outer;
	__u8 to[6];
	int bad;

	if (bpf_skb_load_bytes(skb, 0, to, sizeof(to)))
		return drop(EV_malformed);
	map_v4(outer.bytes,
	       be32((__u32)to[0] << 24 | (__u32)to[1] << 16 | (__u32)to[2] << 8 | to[3]));
	h->src.net = net;
	bad = judge_sender(h, outer.bytes, (__u16)(to[4] << 8 | to[5]));
	if (bad)
		return drop(bad == EV_early ? EV_not_owner : bad);
	skb->mark = CD_EARLY_MARK | net;
	return outcome(EV_replayed, bpf_redirect(cfg->tunnel, BPF_F_INGRESS));
}

INLINE int at_hold(struct __sk_buff *skb)
{
	const struct cd_config *cfg = settings();
	struct place place = {};
	struct headers h;
	__u32 net;
	int bad;

	if (!cfg)
		return drop(EV_no_tunnel_key);
	bad = parse(skb, 0, &h);
	if (bad)
		return drop(bad);
	net = (__u32)h.source_mac[3] << 16 | (__u32)h.source_mac[4] << 8 | h.source_mac[5];
	if (h.source_mac[2] == CD_TAG_EARLY)
		return early_again(skb, cfg, &h, net);
	h.dst.net = net;
	if (!given_back(&h.dst, &place))
		return drop(EV_unknown_machine);
	switch (place.state) {
	case CD_REMOTE:
		return encap(skb, cfg, net, place.owner, place.epoch,
			     cfg->role == CD_EDGE ? 0 : CD_FORWARDED, EV_replayed);
	case CD_LOCAL:
		return deliver(skb, cfg, &place);
	case CD_HOLD:
		/* Into the same tap again would be for ever. */
		return drop(EV_loop);
	default:
		return drop(EV_machine_gone);
	}
}

/* The network of a frame whose way was decided. */
INLINE __u32 net_of(struct __sk_buff *skb, __u32 program)
{
	const struct cd_config *cfg = settings();
	__u32 ifindex = skb->ifindex;

	if (program == CD_AT_TAP) {
		const struct cd_port *port = bpf_map_lookup_elem(&ports, &ifindex);

		return port ? port->net : 0;
	}
	if (program == CD_AT_TUNNEL || program == CD_AT_STACK) {
		struct bpf_tunnel_key key = {};

		/* Where it came from, or where it was decided to go. */
		if (!bpf_skb_get_tunnel_key(skb, &key, sizeof(key), 0) ||
		    !bpf_skb_get_tunnel_key(skb, &key, sizeof(key), BPF_F_TUNINFO_IPV6))
			return key.tunnel_id;
	}
	if (program == CD_AT_HOLD) {
		__u8 net[3];

		if (bpf_skb_load_bytes(skb, ETH_ALEN + 3, net, sizeof(net)))
			return 0;
		return (__u32)net[0] << 16 | (__u32)net[1] << 8 | net[2];
	}
	return cfg ? cfg->net : 0;
}

/* The entry that a frame's way was decided by: its destination's, else its source's. */
INLINE void tell_entry(const struct cd_flow_key *key, struct cd_seen *seen)
{
	struct place place = {};
	struct cd_key at;

	at.net = key->net;
	__builtin_memcpy(at.addr, key->dst, 16);
	if (!find(&at, &place)) {
		__builtin_memcpy(at.addr, key->src, 16);
		if (!find(&at, &place)) {
			seen->epoch = 0;
			seen->state = 0;
			__builtin_memset(seen->owner, 0, 16);
			return;
		}
	}
	seen->epoch = place.epoch;
	seen->state = place.state;
	__builtin_memcpy(seen->owner, place.owner, 16);
}

/* For those who look on. A function of its own: the programs' stacks are theirs. */
static __attribute__((noinline)) int look(struct __sk_buff *skb, __u32 program, int what)
{
	__u32 zero = 0, hash = 0, event = ((__u32)what >> 8) - 1;
	const struct cd_watch *who = bpf_map_lookup_elem(&watch, &zero);
	int dropped = (what & 0xff) == TC_ACT_SHOT;
	__u64 now = bpf_ktime_get_ns();
	struct cd_flow_key key = {};
	struct cd_seen *seen;
	__u8 tcp_flags = 0;

	if (!who || (now >= who->flows_until && now >= who->trace_until))
		return 0;
	key.net = net_of(skb, program);
	key.program = program;
	/* Of what is not IP there is nothing to say but that it was here. */
	if (!read_frame(skb, &key, &hash, &tcp_flags) && now < who->flows_until)
		count_flow(skb, &key, dropped);
	if (now >= who->trace_until || !wanted(who, &key, dropped))
		return 0;
	seen = bpf_ringbuf_reserve(&trace, sizeof(*seen), 0);
	if (!seen) {
		count(EV_untold);
		return 0;
	}
	seen->at = now;
	__builtin_memcpy(seen->src, key.src, 16);
	__builtin_memcpy(seen->dst, key.dst, 16);
	seen->net = key.net;
	seen->hash = hash;
	seen->ifindex = skb->ifindex;
	seen->len = skb->len;
	seen->sport = key.sport;
	seen->dport = key.dport;
	seen->segments = skb->gso_segs;
	seen->proto = key.proto;
	seen->tcp_flags = tcp_flags;
	seen->program = program;
	seen->event = event;
	__builtin_memset(seen->pad, 0, sizeof(seen->pad));
	tell_entry(&key, seen);
	bpf_ringbuf_submit(seen, 0);
	return 0;
}

/* Counts what was decided, shows it to whoever looks on, and says it to the kernel. */
INLINE int end(struct __sk_buff *skb, __u32 program, int what)
{
	__u32 zero = 0, event = (__u32)what >> 8;
	const struct cd_watch *who;

	/* Decided by another program before, and counted there. */
	if (!event)
		return what;
	count(event - 1);
	who = bpf_map_lookup_elem(&watch, &zero);
	if (who && (who->flows_until | who->trace_until))
		look(skb, program, what);
	return what & 0xff;
}

SEC("classifier")
int cd_tap(struct __sk_buff *skb)
{
	return end(skb, CD_AT_TAP, at_tap(skb));
}

SEC("classifier")
int cd_decap(struct __sk_buff *skb)
{
	return end(skb, CD_AT_TUNNEL, at_tunnel(skb));
}

SEC("classifier")
int cd_stack(struct __sk_buff *skb)
{
	return end(skb, CD_AT_STACK, at_stack(skb));
}

SEC("classifier")
int cd_replay(struct __sk_buff *skb)
{
	return end(skb, CD_AT_HOLD, at_hold(skb));
}

/* Compare and set of one entry: the epoch only grows, and one epoch has one owner. */
SEC("classifier")
int cd_change(struct __sk_buff *skb)
{
	struct cd_change ask;
	struct cd_entry *entry, fresh = {};
	__u32 verdict = CD_CHANGED;
	__u32 waiting = 0;
	__u64 epoch;
	__u8 owner[16];
	int same;

	if (bpf_skb_load_bytes(skb, CD_CHANGE_AT, &ask, sizeof(ask)))
		return TC_ACT_SHOT;
	entry = bpf_map_lookup_elem(&forward, &ask.key);
	if (!entry && !ask.state)
		goto answer_waiting;
	if (!entry) {
		fresh.check = check_of(&ask.key);
		fresh.epoch = ask.epoch;
		__builtin_memcpy(fresh.owner, ask.owner, 16);
		__builtin_memcpy(fresh.candidate, ask.candidate, 16);
		fresh.ifindex = ask.ifindex;
		fresh.state = ask.state;
		fresh.flags = ask.flags;
		__builtin_memcpy(fresh.mac, ask.mac, 6);
		ask.verdict = bpf_map_update_elem(&forward, &ask.key, &fresh, BPF_NOEXIST) ? CD_FULL :
											    CD_CHANGED;
		goto answer_waiting;
	}
	bpf_spin_lock(&entry->lock);
	epoch = entry->epoch;
	__builtin_memcpy(owner, entry->owner, 16);
	if (!ask.state) {
		/* The holder says that some will never come. */
		entry->waiting -= ask.waiting < entry->waiting ? ask.waiting : entry->waiting;
		if (!entry->waiting)
			entry->flags &= ~CD_DRAIN;
	} else if (ask.epoch < epoch) {
		verdict = CD_STALE;
	} else if (ask.epoch == epoch && !(entry->flags & CD_CANDIDATE) && !same16(ask.owner, owner)) {
		verdict = CD_TAKEN;
	} else {
		same = ask.epoch == epoch && same16(ask.owner, owner) &&
		       same16(ask.candidate, entry->candidate) && ask.ifindex == entry->ifindex &&
		       ask.state == entry->state && ask.flags == (entry->flags & ~CD_DRAIN) &&
		       same6(ask.mac, entry->mac);
		verdict = same ? CD_SAME : CD_CHANGED;
		entry->epoch = ask.epoch;
		__builtin_memcpy(entry->owner, ask.owner, 16);
		__builtin_memcpy(entry->candidate, ask.candidate, 16);
		entry->ifindex = ask.ifindex;
		entry->state = ask.state;
		entry->flags = ask.flags;
		if (entry->waiting && (ask.state == CD_REMOTE || ask.state == CD_LOCAL))
			entry->flags |= CD_DRAIN;
		__builtin_memcpy(entry->mac, ask.mac, 6);
		epoch = ask.epoch;
		__builtin_memcpy(owner, ask.owner, 16);
	}
	waiting = entry->waiting;
	bpf_spin_unlock(&entry->lock);
	ask.verdict = verdict;
	ask.epoch = epoch;
	__builtin_memcpy(ask.owner, owner, 16);
answer_waiting:
	ask.waiting = waiting;
	bpf_skb_store_bytes(skb, CD_CHANGE_AT, &ask, sizeof(ask), 0);
	return TC_ACT_OK;
}

char _license[] SEC("license") = "Dual MIT/GPL";
