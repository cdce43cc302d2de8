//! The guard against guests that lie about their address, or talk to the host: an nft table.

use super::addresses;
use crate::datapath::MachineNet;

/// What the guard knows of a machine's tap, as elements of its sets.
pub(super) fn guarded(tap: &str, net: &MachineNet) -> impl Iterator<Item = String> {
    addresses(net).map(move |address| {
        let set = if address.is_ipv4() { "guests" } else { "guests6" };
        format!("inet conduit_host {set} {{ \"{tap}\" . {address} }}")
    })
}

/// The guard. Set elements stay as they are; the rest is replaced in one transaction. A host by
/// itself may be the client of its guests, so only its own answers to them are let in there too. What
/// guests ask the agent is bounded for each tap here, so that none of them can keep it busy.
pub(super) fn script(in_overlay: bool) -> String {
    let mut script = String::from(
        "add table inet conduit_host
add set inet conduit_host guests { type ifname . ipv4_addr; }
add set inet conduit_host guests6 { type ifname . ipv6_addr; }
add set inet conduit_host asking { type iface_index; size 65535; flags dynamic,timeout; timeout 1m; }
add set inet conduit_host asking_names { type iface_index; size 65535; flags dynamic,timeout; timeout 1m; }
add counter inet conduit_host asks_too_much
add chain inet conduit_host from_guest { type filter hook prerouting priority raw; policy accept; }
add chain inet conduit_host to_host { type filter hook input priority filter; policy accept; }
add chain inet conduit_host asks
flush chain inet conduit_host asks
add rule inet conduit_host asks update @asking { iif limit rate over 20/second burst 40 packets } counter name asks_too_much drop
add rule inet conduit_host asks accept
add chain inet conduit_host asks_names
flush chain inet conduit_host asks_names
add rule inet conduit_host asks_names update @asking_names { iif limit rate over 200/second burst 400 packets } counter name asks_too_much drop
add rule inet conduit_host asks_names accept
flush chain inet conduit_host from_guest
flush chain inet conduit_host to_host
add rule inet conduit_host from_guest iifname != \"dr-*\" accept
add rule inet conduit_host from_guest iifname . ip saddr @guests accept
add rule inet conduit_host from_guest iifname . ip daddr @guests accept
add rule inet conduit_host from_guest iifname . ip6 saddr @guests6 accept
add rule inet conduit_host from_guest iifname . ip6 daddr @guests6 accept
add rule inet conduit_host from_guest ip saddr 0.0.0.0 udp sport 68 udp dport 67 accept
add rule inet conduit_host from_guest ip6 saddr { fe80::/10, :: } ip6 daddr { fe80::/10, ff02::/16 } accept
add rule inet conduit_host from_guest drop
add rule inet conduit_host to_host iifname \"dr-*\" udp dport 67 jump asks
add rule inet conduit_host to_host iifname \"dr-*\" ip daddr 169.254.1.1 udp dport 53 jump asks_names
add rule inet conduit_host to_host iifname \"dr-*\" ip daddr 169.254.1.1 tcp dport 53 tcp flags & (syn | ack) == syn jump asks_names
add rule inet conduit_host to_host iifname \"dr-*\" ip6 hoplimit 255 icmpv6 type nd-router-solicit jump asks
add rule inet conduit_host to_host iifname \"dr-*\" icmp type { echo-request, echo-reply } accept
add rule inet conduit_host to_host iifname \"dr-*\" icmpv6 type { echo-request, echo-reply, nd-neighbor-solicit, nd-neighbor-advert } accept
add rule inet conduit_host to_host iifname \"dr-*\" tcp flags & (syn | ack) != syn accept
",
    );
    if in_overlay {
        script += "add rule inet conduit_host to_host iifname \"dr-*\" drop\n";
    } else {
        script += "add rule inet conduit_host to_host iifname \"dr-*\" meta l4proto tcp drop\n";
    }
    script
}
