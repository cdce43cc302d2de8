//! The overlay: one vxlan interface per host and one on the edge, with an address each, no
//! learning and no flooding. Who is behind which underlay address is said by the edge and set
//! here; everything else is dropped by the kernel.
//!
//! Not encrypted by itself: let it run over WireGuard or a private network (`network.md` tiers).

use crate::{
    exec::{self, KernelError},
    netlink::{Netlink, interface_index},
    wire::Peer,
};
use serde::Deserialize;
use std::net::{IpAddr, Ipv4Addr};

/// Name of the vxlan interface.
pub const INTERFACE: &str = "vx-conduit";
/// Its network identifier, and the UDP port: our own, so that it shares nothing with the vxlan
/// of a container network on the same host.
pub const NETWORK_ID: u16 = 6472;
/// What vxlan adds to a frame on IPv4: 14 + 20 + 8 + 8 bytes.
pub const OVERHEAD: u32 = 50;

/// The MAC of the overlay interface with this address: unique per address, so that it need not
/// be told, and never the gateway's (vxlan drops frames that carry its own MAC as source).
#[must_use]
pub fn mac(overlay: Ipv4Addr) -> [u8; 6] {
    let [_, b, c, d] = overlay.octets();
    [0x02, 0x64, 0x78, b, c, d]
}

/// MAC as text.
#[must_use]
pub fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|b| format!("{b:02x}")).join(":")
}

/// Reads [`mac_text`].
pub(crate) fn mac_of_text(text: &str) -> Option<[u8; 6]> {
    let bytes: Option<Vec<u8>> = text.split(':').map(|b| u8::from_str_radix(b, 16).ok()).collect();
    bytes?.try_into().ok()
}

/// An interface as `ip -json` shows it.
#[derive(Debug, Deserialize)]
pub(crate) struct LinkFacts {
    #[serde(default)]
    pub(crate) address: String,
    pub(crate) mtu: u32,
    #[serde(default)]
    pub(crate) flags: Vec<String>,
    #[serde(default)]
    linkinfo: LinkInfo,
}

#[derive(Debug, Default, Deserialize)]
struct LinkInfo {
    #[serde(default)]
    info_kind: String,
    #[serde(default)]
    info_data: serde_json::Value,
}

/// What is known of an interface, or `None` if there is none of that name.
pub(crate) fn link_facts(name: &str) -> Result<Option<LinkFacts>, KernelError> {
    if interface_index(name).is_err() {
        return Ok(None);
    }
    let text = exec::run("ip", &["-json", "-details", "link", "show", "dev", name], "")?;
    let mut links: Vec<LinkFacts> = serde_json::from_str(&text)
        .map_err(|e| KernelError::new(format!("read what ip says of {name}"), e))?;
    Ok(links.pop())
}

impl LinkFacts {
    /// A vxlan device that is told per packet where to.
    pub(crate) fn is_metadata_vxlan(&self) -> bool {
        let external = self.linkinfo.info_data.get("external");
        self.linkinfo.info_kind == "vxlan"
            && external.and_then(serde_json::Value::as_bool) == Some(true)
    }

    pub(crate) fn is_up(&self) -> bool {
        self.flags.iter().any(|f| f == "UP")
    }
}

/// The MTU of the interface that carries `underlay`, which must be an address of this host.
pub(crate) fn underlay_mtu(underlay: IpAddr) -> Result<u32, KernelError> {
    #[derive(Deserialize)]
    struct Link {
        mtu: Option<u32>,
    }
    let operation = || format!("find the interface with underlay address {underlay}");
    let whole = format!("{underlay}/{}", if underlay.is_ipv4() { 32 } else { 128 });
    let text = exec::run("ip", &["-json", "address", "show", "to", &whole], "")?;
    let links: Vec<Link> =
        serde_json::from_str(&text).map_err(|e| KernelError::new(operation(), e))?;
    links.into_iter().find_map(|l| l.mtu).ok_or_else(|| {
        KernelError::new(operation(), "this host has no such address; give one of its own")
    })
}

/// Makes the overlay interface, or leaves it alone if it is as it should be (traffic on it is not
/// disturbed). Returns its index and MTU.
pub(crate) fn ensure(overlay: Ipv4Addr, underlay: Ipv4Addr) -> Result<(u32, u32), KernelError> {
    let mtu = underlay_mtu(underlay.into())?.saturating_sub(OVERHEAD).min(65_000);
    let wanted_mac = mac_text(mac(overlay));
    if let Some(link) = link_facts(INTERFACE)? {
        let local = link.linkinfo.info_data.get("local").and_then(|v| v.as_str());
        let same = link.linkinfo.info_kind == "vxlan"
            && local == Some(underlay.to_string().as_str())
            && link.address == wanted_mac;
        if !same {
            tracing::warn!(interface = INTERFACE, "interface differs from the settings, replacing");
            exec::run("ip", &["link", "del", INTERFACE], "")?;
        }
    }
    if interface_index(INTERFACE).is_err() {
        let id = NETWORK_ID.to_string();
        let local = underlay.to_string();
        #[rustfmt::skip]
        exec::run("ip", &[
            "link", "add", INTERFACE, "address", &wanted_mac, "type", "vxlan", "id", &id,
            "local", &local, "dstport", &id, "nolearning",
        ], "")?;
    }
    exec::sysctl(&format!("net/ipv6/conf/{INTERFACE}/disable_ipv6"), "1").or_else(no_ipv6)?;
    let script = format!(
        "link set dev {INTERFACE} mtu {mtu} up\naddress replace {overlay}/32 dev {INTERFACE}\n"
    );
    exec::run("ip", &["-batch", "-"], &script)?;
    Ok((interface_index(INTERFACE)?, mtu))
}

/// A kernel without IPv6 has nothing to switch off.
pub(crate) fn no_ipv6(error: KernelError) -> Result<(), KernelError> {
    if exec::read_sysctl("net/ipv6/conf/all/disable_ipv6").is_none() { Ok(()) } else { Err(error) }
}

/// Makes a peer reachable over the overlay interface `index`.
pub(crate) fn set_peer(netlink: &mut Netlink, index: u32, peer: &Peer) -> Result<(), KernelError> {
    netlink.set_tunnel(index, mac(peer.overlay), peer.underlay)?;
    netlink.set_neighbour(index, peer.overlay, mac(peer.overlay))
}

/// Removes the overlay interface, if there is one.
pub(crate) fn remove() -> Result<(), KernelError> {
    match interface_index(INTERFACE) {
        Ok(_) => exec::run("ip", &["link", "del", INTERFACE], "").map(drop),
        Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_overlay_address_has_its_own_mac_which_is_never_the_gateways() {
        let a = mac(Ipv4Addr::new(100, 64, 0, 1));
        assert_eq!(mac_text(a), "02:64:78:40:00:01");
        assert_ne!(a, mac(Ipv4Addr::new(100, 64, 0, 2)));
        assert_ne!(a[..3], crate::tap::GATEWAY_MAC[..3]);
    }
}
