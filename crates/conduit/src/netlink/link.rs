//! Interfaces and their addresses: what `ip link` and `ip address` do, without a process for each.

use super::{Netlink, family, whole};
use crate::exec::KernelError;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::{
    RouteNetlinkMessage,
    address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope},
    link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkMessage},
};
use std::net::IpAddr;

/// What is known of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    /// Its number.
    pub(crate) index: u32,
    /// Its hardware address.
    pub(crate) mac: Vec<u8>,
    /// Largest packet, bytes.
    pub(crate) mtu: u32,
    /// How many frames wait to be sent at most.
    pub(crate) queue: u32,
    /// Whether somebody has switched it on.
    pub(crate) up: bool,
}

impl Netlink {
    /// The interface of this name; `None` if there is none.
    pub(crate) fn link(&mut self, name: &str) -> Result<Option<Link>, KernelError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        let mut found = None;
        let asked = self.query(RouteNetlinkMessage::GetLink(message), |answer| {
            if let RouteNetlinkMessage::NewLink(link) = answer {
                found = Some(link_of(&link));
            }
        });
        match asked {
            Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            other => {
                other.map_err(|e| KernelError::new(format!("look at interface {name}"), e))?;
                Ok(found)
            }
        }
    }

    /// Gives an interface another hardware address. Its neighbours are forgotten by that.
    pub(crate) fn set_mac(&mut self, interface: u32, mac: [u8; 6]) -> Result<(), KernelError> {
        let attributes = vec![LinkAttribute::Address(mac.to_vec())];
        self.set_link(interface, false, attributes)
            .map_err(|e| KernelError::new(format!("set the MAC of #{interface}"), e))
    }

    /// Switches an interface on, with this MTU (bytes) and queue (frames).
    pub(crate) fn set_up(
        &mut self,
        interface: u32,
        mtu: u32,
        queue: u32,
    ) -> Result<(), KernelError> {
        let attributes = vec![LinkAttribute::Mtu(mtu), LinkAttribute::TxQueueLen(queue)];
        self.set_link(interface, true, attributes)
            .map_err(|e| KernelError::new(format!("switch #{interface} on, MTU {mtu}"), e))
    }

    /// The kernel makes no IPv6 address of its own for an interface (link-local neither) when it is
    /// switched on after this.
    pub(crate) fn make_no_address(&mut self, interface: u32) -> Result<(), KernelError> {
        let mode = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
        let attributes = vec![LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![mode])])];
        self.set_link(interface, false, attributes)
            .map_err(|e| KernelError::new(format!("have no addresses made for #{interface}"), e))
    }

    /// Gives an interface an address that is good on its link only, of a network of `prefix` bits. Nobody
    /// is asked whether it has the address, too.
    pub(crate) fn set_address(
        &mut self,
        interface: u32,
        address: IpAddr,
        prefix: u8,
    ) -> Result<(), KernelError> {
        debug_assert!(prefix <= whole(address));
        let mut message = AddressMessage::default();
        message.header.family = family(address);
        message.header.index = interface;
        message.header.prefix_len = prefix;
        message.header.scope = AddressScope::Link;
        if address.is_ipv6() {
            message.header.flags = AddressHeaderFlags::Nodad;
        }
        message.attributes.push(AddressAttribute::Local(address));
        message.attributes.push(AddressAttribute::Address(address));
        self.request(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_REPLACE)
            .map_err(|e| KernelError::new(format!("give #{interface} the address {address}"), e))
    }

    /// Removes an interface.
    pub(crate) fn remove_link(&mut self, interface: u32) -> Result<(), KernelError> {
        let mut message = LinkMessage::default();
        message.header.index = interface;
        self.request(RouteNetlinkMessage::DelLink(message), 0)
            .map_err(|e| KernelError::new(format!("remove interface #{interface}"), e))
    }

    fn set_link(
        &mut self,
        interface: u32,
        up: bool,
        attributes: Vec<LinkAttribute>,
    ) -> std::io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = interface;
        if up {
            message.header.flags = LinkFlags::Up;
            message.header.change_mask = LinkFlags::Up;
        }
        message.attributes = attributes;
        self.request(RouteNetlinkMessage::SetLink(message), 0)
    }
}

fn link_of(message: &LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        mac: Vec::new(),
        mtu: 0,
        queue: 0,
        up: message.header.flags.contains(LinkFlags::Up),
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Address(mac) => link.mac.clone_from(mac),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::TxQueueLen(queue) => link.queue = *queue,
            _ => {}
        }
    }
    link
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        exec,
        lab::Space,
        tap::{self, GATEWAY, GATEWAY_MAC, GATEWAY_V6},
    };

    #[test]
    fn a_tap_is_set_up_as_ip_shows_it_twice_over_and_removed() {
        let space = Space::new().unwrap();
        space.run(|| {
            let mut netlink = Netlink::open().unwrap();
            assert_eq!(netlink.link("dr-test").unwrap(), None);
            tap::create_persistent("dr-test").unwrap();
            let index = netlink.link("dr-test").unwrap().unwrap().index;
            for _ in 0..2 {
                netlink.make_no_address(index).unwrap();
                netlink.set_mac(index, GATEWAY_MAC).unwrap();
                netlink.set_up(index, 1380, 77).unwrap();
                netlink.set_address(index, GATEWAY.into(), 32).unwrap();
                netlink.set_address(index, GATEWAY_V6.into(), 64).unwrap();
            }
            let found = netlink.link("dr-test").unwrap().unwrap();
            let mac = GATEWAY_MAC.to_vec();
            assert_eq!(found, Link { index, mac, mtu: 1380, queue: 77, up: true });
            let shown = exec::run("ip", &["address", "show", "dev", "dr-test"], "").unwrap();
            assert_eq!(shown.matches("inet").count(), 2, "no address of the kernel's own: {shown}");
            for address in ["inet 169.254.1.1/32 scope link", "inet6 fe80::1/64 scope link"] {
                assert!(shown.contains(address), "{shown}");
            }
            netlink.remove_link(index).unwrap();
            assert_eq!(netlink.link("dr-test").unwrap(), None);
            let gone = netlink.set_up(index, 1380, 77).unwrap_err().to_string();
            assert!(gone.contains("switch #"), "{gone}");
        });
    }
}
