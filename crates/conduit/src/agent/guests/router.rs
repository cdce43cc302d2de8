//! What a host says as the router of its machines (RFC 4861): that it is there, the MTU, and a prefix from
//! which the kernel of a guest makes the machine's own address (RFC 4862). No I/O. Names are answered at the
//! IPv4 gateway, which every machine has.
//!
//! A guest's kernel can make one address of a prefix: that whose lower half follows from its MAC. So the
//! prefix is said only if that address is the machine's; pools give such addresses.

use crate::{datapath::MachineNet, tap::GATEWAY_MAC};
use std::net::Ipv6Addr;

const SOLICITATION: u8 = 133;
const ADVERTISEMENT: u8 = 134;
const HOPS: u8 = 64;
/// Seconds that a guest believes in its router without hearing from it; the longest that RFC 4861 has.
/// The next host says the same after a move, see [`super::EVERY`].
const LIFETIME_S: u16 = 9000;

/// The IPv6 address that a kernel makes of a /64 and its MAC (RFC 4291, appendix A).
#[must_use]
pub(crate) fn of_mac(prefix: Ipv6Addr, mac: [u8; 6]) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac;
    let host = u64::from_be_bytes([a ^ 2, b, c, 0xff, 0xfe, d, e, f]);
    let upper = u128::from(prefix) & !u128::from(u64::MAX);
    (upper | u128::from(host)).into()
}

/// Whether this is a question for routers (after the kernel has compared its checksum).
pub(crate) fn is_solicitation(message: &[u8]) -> bool {
    message.len() >= 8 && message[..2] == [SOLICITATION, 0]
}

/// What a machine is told; `None` for one without IPv6.
pub(crate) fn advertisement(net: &MachineNet) -> Option<Vec<u8>> {
    let address = net.address_v6?;
    // The kernel fills in the checksum.
    let mut said = vec![ADVERTISEMENT, 0, 0, 0, HOPS, 0];
    said.extend(LIFETIME_S.to_be_bytes());
    // Reachable time and retransmission timer: the guest's own.
    said.extend([0; 8]);
    said.extend([1, 1]);
    said.extend(GATEWAY_MAC);
    said.extend([5, 1, 0, 0]);
    said.extend(u32::from(net.mtu).to_be_bytes());
    if of_mac(address, net.mac) == address {
        const AUTONOMOUS: u8 = 0x40;
        said.extend([3, 4, 64, AUTONOMOUS]);
        // For life, by both lifetimes. Not on the link: all others are behind the router.
        said.extend([0xff; 8]);
        said.extend([0; 4]);
        said.extend(&address.octets()[..8]);
        said.extend([0; 8]);
    }
    Some(said)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    const MAC: [u8; 6] = [0x52, 0x54, 10, 77, 0, 5];

    fn net(v6: &str) -> MachineNet {
        MachineNet {
            address_v6: v6.parse().ok(),
            ..MachineNet::new("m", Ipv4Addr::new(10, 77, 0, 5), MAC, 1380)
        }
    }

    #[test]
    fn the_address_of_a_mac_is_what_kernels_make() {
        let made = of_mac("fd77::".parse().unwrap(), MAC);
        assert_eq!(made, "fd77::5054:aff:fe4d:5".parse::<Ipv6Addr>().unwrap());
    }

    #[test]
    fn what_is_said_is_fixed() {
        let said = advertisement(&net("fd77::5054:aff:fe4d:5")).unwrap();
        let hex: String = said.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(
            hex,
            concat!(
                "86000000400023280000000000000000",
                "01010264726166fe",
                "0501000000000564",
                "03044040ffffffffffffffff00000000fd770000000000000000000000000000"
            )
        );
        assert_eq!(said.len() % 8, 0);
    }

    #[test]
    fn an_address_that_does_not_follow_from_the_mac_has_no_prefix() {
        let said = advertisement(&net("fd77::5")).unwrap();
        assert_eq!(said.len(), 32);
        assert!(advertisement(&net("no IPv6")).is_none());
    }
}
