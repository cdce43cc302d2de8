/* SPDX-License-Identifier: (MIT OR Apache-2.0) OR GPL-2.0 */
/* What the programs and the daemons share: the pinned maps, and their layouts. */
#ifndef CONDUIT_MAPS_H
#define CONDUIT_MAPS_H

#include "kernel.h"
#include "abi.h"

/* Layout 1 named the owner `remote` and had no candidate; src/layout.rs carries it over. */
_Static_assert(sizeof(struct cd_key) == 20, "layout");
_Static_assert(sizeof(struct cd_entry) == 64, "layout");
_Static_assert(sizeof(struct cd_port) == 44, "layout");
_Static_assert(sizeof(struct cd_config) == 56, "layout");
_Static_assert(sizeof(struct cd_change) == 80, "layout");
_Static_assert(EV_COUNT <= CD_EVENTS, "layout");
_Static_assert(sizeof(struct cd_watch) == 40, "layout");
_Static_assert(sizeof(struct cd_flow_key) == 44, "layout");
_Static_assert(sizeof(struct cd_flow) == 24, "layout");
_Static_assert(sizeof(struct cd_seen) == 96, "layout");
_Static_assert(sizeof(struct cd_front) == 24, "layout");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1 << 20);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, PIN_BY_NAME);
	__type(key, struct cd_key);
	__type(value, struct cd_entry);
} forward SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1 << 16);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, PIN_BY_NAME);
	__type(key, __u32);
	__type(value, struct cd_port);
} ports SEC(".maps");

struct cd_address {
	__u8 bytes[16];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1 << 16);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, PIN_BY_NAME);
	__type(key, struct cd_address);
	__type(value, __u32);
} peers SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(pinning, PIN_BY_NAME);
	__type(key, __u32);
	__type(value, struct cd_config);
} config SEC(".maps");

/* The home of a machine's address: the edge whose public addresses it has, for life. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1 << 20);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, PIN_BY_NAME);
	__type(key, struct cd_key);
	__type(value, __u32);
} homes SEC(".maps");

/* The edge that serves each home now: one change leads all machines of a home to another edge. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 256);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, PIN_BY_NAME);
	__type(key, __u32);
	__type(value, struct cd_front);
} fronts SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, CD_EVENTS);
	__uint(pinning, PIN_BY_NAME);
	__type(key, __u32);
	__type(value, __u64);
} counts SEC(".maps");

INLINE void count(__u32 event)
{
	__u64 *n = bpf_map_lookup_elem(&counts, &event);

	/* Of this processor alone, with preemption by nothing that counts here too. */
	if (n)
		*n += 1;
}

#endif
