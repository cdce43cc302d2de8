//! The tunnel device of the BPF data path: one vxlan device in collect-metadata mode per network
//! namespace. It has no peers of its own: for each frame a program says where to
//! (`crates/conduit-bpf`).
//!
//! Set up once by the host's agent or the edge; left alone if it is there, so that a restart
//! disturbs nothing.

use crate::{
    exec::{self, KernelError},
    netlink::{Netlink, interface_index},
    overlay::{link_facts, mac_text, no_ipv6, underlay_mtu},
    sys,
};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

/// Name of the device.
pub const INTERFACE: &str = "cd-tunnel";
/// UDP port of the tunnel: our own, so that it shares nothing with a container network's vxlan.
pub const PORT: u16 = 6472;
/// The network of machines that belong to no tenant.
pub const NETWORK: u32 = 6472;
/// The next hop of routes into the tunnel; nobody has it, and it is never asked for.
pub const NEXT_HOP: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 2);
/// The same for IPv6.
pub const NEXT_HOP_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);
/// Its MAC. What arrives is addressed anew, so it means nothing to anybody.
const NEXT_HOP_MAC: [u8; 6] = [0x02, 0x63, 0x64, 0x00, 0x00, 0xfe];

/// The least that a link must carry for IPv6; below it the device would lose its IPv6 routes.
const SMALLEST: u32 = 1280;
/// Less than the largest IP packet with everything around it.
const LARGEST: u32 = 65_000;

/// What vxlan adds to a frame: Ethernet, UDP and vxlan headers, and the outer IP header.
#[must_use]
pub fn overhead(underlay: IpAddr) -> u32 {
    match underlay {
        IpAddr::V4(_) => 50,
        IpAddr::V6(_) => 70,
    }
}

/// The device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tunnel {
    /// Its ifindex.
    pub index: u32,
    /// Largest packet that crosses it whole: the underlay's less the [`overhead`].
    pub mtu: u32,
}

/// Makes the device, or leaves it alone if it is as it should be. `underlay` is an address of this
/// host.
pub fn ensure(underlay: IpAddr) -> Result<Tunnel, KernelError> {
    let mtu = underlay_mtu(underlay)?.saturating_sub(overhead(underlay)).min(LARGEST);
    let facts = link_facts(INTERFACE)?;
    if facts.as_ref().is_some_and(|f| !f.is_metadata_vxlan()) {
        return Err(KernelError::new(
            format!("use the interface {INTERFACE}"),
            "somebody else's interface has this name; remove it (ip link del)",
        ));
    }
    if facts.is_none() {
        let port = PORT.to_string();
        #[rustfmt::skip]
        exec::run("ip", &[
            "link", "add", INTERFACE, "type", "vxlan", "external", "gbp", "dstport", &port,
            "nolearning",
        ], "")?;
    }
    // Link-local addresses and router solicitations of its own would only be dropped.
    exec::run("ip", &["link", "set", "dev", INTERFACE, "addrgenmode", "none"], "")
        .map(drop)
        .or_else(no_ipv6)?;
    exec::sysctl(&format!("net/ipv4/conf/{INTERFACE}/rp_filter"), "0")?;
    exec::sysctl(&format!("net/ipv4/conf/{INTERFACE}/send_redirects"), "0")?;
    if facts.is_none_or(|f| f.mtu != mtu || !f.is_up()) {
        let script = format!("link set dev {INTERFACE} mtu {mtu} up\n");
        exec::run("ip", &["-batch", "-"], &script)?;
    }
    let index = interface_index(INTERFACE)?;
    Netlink::open()?.set_neighbour(index, NEXT_HOP, NEXT_HOP_MAC)?;
    let mac = mac_text(NEXT_HOP_MAC);
    let v6 = NEXT_HOP_V6.to_string();
    #[rustfmt::skip]
    exec::run("ip", &[
        "-6", "neighbour", "replace", &v6, "lladdr", &mac, "dev", INTERFACE, "nud", "permanent",
    ], "").map(drop).or_else(no_ipv6)?;
    Ok(Tunnel { index, mtu })
}

/// Makes the device's MTU, which is `current`, fit the narrowest path to a peer, as far as this kernel
/// has been told (ICMP about the outer packets), so that senders are told in turn: vxlan itself does
/// not do so. Called every second or so; returns the MTU. Where nothing has changed it costs a few
/// system calls.
///
/// The guest's own MTU stays as it was made; its kernel learns of the path like any other.
pub fn fit(underlay: IpAddr, peers: &[IpAddr], current: u32) -> Result<u32, KernelError> {
    let mut outer = None;
    for &peer in peers {
        let fail = |e| KernelError::new(format!("ask for the path MTU to {peer}"), e);
        let socket = UdpSocket::bind((underlay, 0)).map_err(fail)?;
        // No route is no path: it has no MTU either.
        if socket.connect((peer, PORT)).is_ok() {
            let mtu = sys::path_mtu(&socket, peer.is_ipv6()).map_err(fail)?;
            outer = Some(outer.map_or(mtu, |outer: u32| outer.min(mtu)));
        }
    }
    let Some(outer) = outer else { return Ok(current) };
    let mtu = outer.saturating_sub(overhead(underlay)).clamp(SMALLEST, LARGEST);
    if mtu != current {
        tracing::info!(mtu, before = current, "the tunnel's MTU follows its path");
        exec::run("ip", &["link", "set", "dev", INTERFACE, "mtu", &mtu.to_string()], "")?;
    }
    Ok(mtu)
}

/// Removes the device, if it is there.
pub fn remove() -> Result<(), KernelError> {
    match interface_index(INTERFACE) {
        Ok(_) => exec::run("ip", &["link", "del", INTERFACE], "").map(drop),
        Err(_) => Ok(()),
    }
}
