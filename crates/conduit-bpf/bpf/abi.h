/* SPDX-License-Identifier: (MIT OR Apache-2.0) OR GPL-2.0 */
/*
 * What the programs and src/abi.rs agree on. Pinned maps outlive both, so a change of any size or
 * meaning here raises CD_LAYOUT there and here, and needs a way to carry old entries over
 * (src/layout.rs).
 */
#ifndef CONDUIT_ABI_H
#define CONDUIT_ABI_H

#define CD_LAYOUT 2

/* An address of a machine in a tenant's network. IPv4 is written as ::ffff:a.b.c.d. */
struct cd_key {
	__u32 net; /* network id: 24 bits, the VNI on the wire */
	__u8 addr[16];
};

/* Where the frames of an address go. */
enum cd_state {
	CD_REMOTE = 1, /* to the host `owner`, through the tunnel */
	CD_LOCAL = 2,  /* into the tap `ifindex` */
	CD_HOLD = 3,   /* into the hold tap, until somebody has the machine */
	CD_DROP = 4,   /* nowhere: it was here, and is gone */
};

/* The owner of an entry's epoch is not decided: the machine may come here. Frames go in, none out. */
#define CD_CANDIDATE 1
/* With CD_REMOTE: the machine is about to stop here, and what it still says may leave. What comes for it
 * waits in the hold tap, if there is one, until what it leaves in its own tap has been sent on. */
#define CD_LEAVING 2
/* With CD_REMOTE or CD_LOCAL: frames that were held are still being given back, and those that come
 * meanwhile wait behind them. Set and taken away by the programs alone: no frame overtakes another. */
#define CD_DRAIN 4

struct cd_entry {
	struct bpf_spin_lock lock; /* every reader and writer takes it: an entry is read whole */
	__u32 check;               /* of the key; a reader that finds another lost a race with reuse */
	__u64 epoch;               /* the lease's; only ever grows */
	__u8 owner[16];            /* underlay address of the host that has the machine */
	__u8 candidate[16];        /* of the host that is announced as next; zeros for none */
	__u32 ifindex;             /* CD_LOCAL */
	__u8 state;
	__u8 flags;
	__u8 mac[6]; /* the guest's */
	__u32 waiting; /* frames that were put into the hold tap and have not come back out */
};

/* The machine behind a tap, by the tap's ifindex: nothing else may come out of it. */
struct cd_port {
	__u32 net;
	__u8 mac[6];
	__u8 pad[2];
	__u8 v4[16]; /* zeros for none */
	__u8 v6[16];
};

/* Who may send through the tunnel, by underlay address. */
enum cd_role {
	CD_HOST = 1,
	CD_EDGE = 2,
};

struct cd_config {
	__u8 self[16];     /* this host's underlay address */
	__u8 edge[16];     /* where frames for the outside go; zeros: nowhere (an edge itself) */
	__u32 tunnel;      /* ifindex of the tunnel device */
	__u32 hold;        /* ifindex of the hold tap; 0: frames of CD_HOLD are dropped */
	__u32 net;         /* network of frames that come from this host's own stack */
	__u32 role;        /* of this host */
	__u8 gateway[6];   /* the MAC that machines know as their gateway */
	__u8 out;          /* enum cd_out */
	__u8 pad;
};

/* Where machines' frames for the outside go. */
enum cd_out {
	CD_OUT_EDGE = 0,  /* through the tunnel to the edge */
	CD_OUT_STACK = 1, /* this host's own routes: it announces its machines by itself */
};

/* The edge that serves a home. The maps `homes` and `fronts` were added to layout 2: where they are
 * empty, all machines use the edge of cd_config. */
struct cd_front {
	__u8 edge[16]; /* underlay address */
	__u64 epoch;   /* of the word that said so; compared by the agent, which alone writes here */
};

/* A change of one entry, as cd_change takes it at CD_CHANGE_AT of its frame, and answers it. */
struct cd_change {
	struct cd_key key;
	__u32 verdict; /* out */
	__u64 epoch;   /* in: the new one; out: the entry's */
	__u8 owner[16]; /* in: the new one; out: the entry's */
	__u8 candidate[16];
	__u32 ifindex;
	__u8 state;
	__u8 flags;
	__u8 mac[6];
	__u32 waiting; /* in, with state 0: that many which wait will never come; out: the entry's */
};

#define CD_CHANGE_AT 16

enum cd_verdict {
	CD_CHANGED = 1,
	CD_SAME = 2,   /* it was so already */
	CD_STALE = 3,  /* the entry's epoch is newer */
	CD_TAKEN = 4,  /* this epoch has another owner */
	CD_FULL = 5,   /* no room */
};

/* On the wire, vxlan's group policy field: 16 bits of an epoch, and this bit ("policy applied") on
 * frames that come from a host which had the machine before. */
#define CD_FORWARDED (1U << 19)
/* An epoch is a lease's epoch in the upper 48 bits and the flips of its owner in the lower 16
 * (docs/protocol.md). Owners flip a few times at most, so one epoch of the lease is this many steps on
 * the wire: what is newer is newer there too, modulo 512 epochs of the lease. */
#define CD_WIRE_STEPS 64
/* A sender whose word on a machine is this many steps behind is not believed any more: eight epochs
 * of the lease, as many failed moves in which the edge heard nothing. */
#define CD_EPOCH_SLACK (8 * CD_WIRE_STEPS)

/* Room for counters: events may be added at the end of events.h without a new layout. */
#define CD_EVENTS 64

/* Where a frame was when its way was decided. */
enum cd_program {
	CD_AT_TAP = 1,    /* cd_tap: out of a machine */
	CD_AT_TUNNEL = 2, /* cd_decap: out of the tunnel */
	CD_AT_STACK = 3,  /* cd_stack: from this host's own stack into the tunnel */
	CD_AT_HOLD = 4,   /* cd_replay: out of the hold tap */
};

/* Who looks on, and at what (bpf/watch.h). All zeros: nobody, and a frame costs what it costs. Times
 * are CLOCK_MONOTONIC in nanoseconds: whoever looks on says so again every second, so that one who was
 * killed looks on no longer. This map and the two below hold nothing that must outlive a layout. */
struct cd_watch {
	__u64 flows_until; /* frames are counted by flow until then */
	__u64 trace_until; /* frames that the filter takes are told one by one until then */
	__u8 addr[16];     /* the filter: either end; zeros for any */
	__u32 net;         /* 0 for any */
	__u16 port;        /* either end, network byte order; 0 for any */
	__u8 proto;        /* IP protocol; 0 for any */
	__u8 drops;        /* 1: only frames that end here */
};

struct cd_flow_key {
	__u32 net;
	__u8 src[16];
	__u8 dst[16];
	__u16 sport; /* network byte order; of ICMP the echo's identifier */
	__u16 dport;
	__u8 proto;
	__u8 program; /* enum cd_program */
	__u8 pad[2];
};

struct cd_flow {
	__u64 packets; /* as they are on the wire: the pieces of a large segment, each */
	__u64 bytes;   /* of frames as they are here */
	__u64 dropped; /* frames that ended here, which are not in the others */
};

/* One frame, as cd_trace tells it. */
struct cd_seen {
	__u64 at;      /* CLOCK_MONOTONIC, nanoseconds */
	__u64 epoch;   /* of the entry that decided; 0 if none did */
	__u8 src[16];
	__u8 dst[16];
	__u8 owner[16]; /* of that entry; zeros for none */
	__u32 net;
	__u32 hash;    /* of what no hop changes: the same frame has the same at every host */
	__u32 ifindex; /* where it was */
	__u32 len;     /* bytes with the Ethernet header */
	__u16 sport;
	__u16 dport;
	__u16 segments;
	__u8 proto;
	__u8 tcp_flags;
	__u8 program;
	__u8 event;    /* enum cd_event */
	__u8 state;    /* of that entry; 0 for none */
	__u8 pad[5];
};

/* Frames whose tunnel key is set already carry this mark from the redirect to the tunnel's own
 * program, and nowhere else. */
#define CD_MARK 0x63640001U

/* Packets of a machine that are given to the stack carry this in the first byte of their mark, and the
 * machine's network after it; packets that the stack sends into the tunnel may carry it likewise. */
#define CD_NET_MARK 0x6d000000U
/* Likewise, frames that came before their host was known to have the machine, when they are given back to
 * the tunnel device as if they had just come: the sender was judged. */
#define CD_EARLY_MARK 0x6e000000U
/* In the hold tap, the third byte of the source address: which of the two a frame is. Three bytes of network
 * follow. Of an early one the destination address is its host's, and 16 bits of the epoch. */
#define CD_TAG_HELD 0x64
#define CD_TAG_EARLY 0x65
#define CD_NET_MASK 0xff000000U

#endif
