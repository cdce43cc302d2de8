// SPDX-License-Identifier: (MIT OR Apache-2.0) OR GPL-2.0
/*
 * The maps of layout 1, and so much of its program that a frame for a local machine arrives: what
 * an upgrade must be able to take over.
 */
#include "kernel.h"
#include "abi.h"

struct entry_v1 {
	struct bpf_spin_lock lock;
	__u32 pad;
	__u64 epoch;
	__u8 remote[16];
	__u32 ifindex;
	__u8 state;
	__u8 flags;
	__u8 mac[6];
};
_Static_assert(sizeof(struct entry_v1) == 48, "layout 1");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, PIN_BY_NAME);
	__type(key, struct cd_key);
	__type(value, struct entry_v1);
} forward SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, PIN_BY_NAME);
	__type(key, __u32);
	__type(value, struct cd_port);
} ports SEC(".maps");

struct address {
	__u8 bytes[16];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, PIN_BY_NAME);
	__type(key, struct address);
	__type(value, __u32);
} peers SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(pinning, PIN_BY_NAME);
	__type(key, __u32);
	__type(value, struct cd_config);
} config SEC(".maps");

SEC("classifier")
int cd_decap(struct __sk_buff *skb)
{
	struct cd_key key = { .net = 6472 };
	__u32 *words = (__u32 *)key.addr;
	struct entry_v1 *entry;
	__u8 macs[12] = {};

	words[2] = be32(0xffff);
	if (bpf_skb_load_bytes(skb, ETH_HLEN + 16, &words[3], 4))
		return TC_ACT_SHOT;
	entry = bpf_map_lookup_elem(&forward, &key);
	if (!entry || entry->state != CD_LOCAL)
		return TC_ACT_SHOT;
	__builtin_memcpy(macs, entry->mac, 6);
	bpf_skb_store_bytes(skb, 0, macs, sizeof(macs), 0);
	return bpf_redirect(entry->ifindex, 0);
}

char _license[] SEC("license") = "Dual MIT/GPL";
