/* SPDX-License-Identifier: (MIT OR Apache-2.0) OR GPL-2.0 */
/*
 * What is counted, one line each: EVENT(name, drop, meaning). build.rs makes the names for Rust
 * from this file; the order is part of the layout (abi.h).
 */
EVENT(to_tunnel, 0, "sent through the tunnel")
EVENT(to_tap, 0, "put into a machine's tap")
EVENT(to_stack, 0, "given to this host's own network stack")
EVENT(forwarded, 0, "sent on to where the machine went")
EVENT(held, 0, "put into the hold tap")
EVENT(replayed, 0, "taken out of the hold tap and sent")
EVENT(too_large, 0, "given to the stack, which tells the sender a smaller size")
EVENT(ahead, 0, "from the next owner of a machine, before its claim")
EVENT(malformed, 1, "cut short, or not Ethernet")
EVENT(not_ip, 1, "neither IP nor an ARP question of a machine")
EVENT(no_port, 1, "from a tap of no machine")
EVENT(spoofed_mac, 1, "a machine sent with another hardware address than its own")
EVENT(spoofed_source, 1, "a machine sent with another address than its own")
EVENT(not_owner, 1, "from a machine that this host, or the sending host, does not have")
EVENT(unknown_peer, 1, "through the tunnel from an address that is no host of this fleet")
EVENT(no_tunnel_key, 1, "through the tunnel without what it should carry")
EVENT(old_epoch, 1, "from a host whose word on the machine is too old")
EVENT(unknown_machine, 1, "for an address that no machine here has")
EVENT(no_edge, 1, "for the outside, and no edge is known")
EVENT(machine_gone, 1, "for a machine that was here and is gone")
EVENT(loop, 1, "sent on by a host that knows no newer place than this one")
EVENT(no_hold, 1, "for a machine that nobody has, and nothing is held here")
EVENT(link_local, 1, "this host's own talk to neighbours, of which a tunnel has none")
EVENT(tunnel_refused, 1, "the kernel took no tunnel key")
