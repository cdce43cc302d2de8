//! What reads bytes of guests, for `fuzz/` and nobody else.

use crate::{
    agent::guests::{Offer, dhcp},
    datapath::{MachineNet, NetworkId},
    edge::names::{Machines, Zone},
};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 5);

/// A DHCP message of a machine with the MAC 02:00:00:00:00:05 and the address 10.77.0.5.
pub fn fuzz_dhcp(bytes: &[u8]) {
    let net = MachineNet::new("fuzzed", ADDRESS, [2, 0, 0, 0, 0, 5], 1380);
    let offer = Offer { names: true, domain: Some("machine.internal".into()) };
    let _ = dhcp::answer(bytes, &net, &offer);
}

struct One;

impl Machines for One {
    fn by_name(&self, _: NetworkId, name: &str) -> Option<(Ipv4Addr, Option<Ipv6Addr>)> {
        (name == "a").then_some((ADDRESS, Some(Ipv6Addr::LOCALHOST)))
    }

    fn by_address(&self, _: NetworkId, address: IpAddr) -> Option<String> {
        (address == ADDRESS).then(|| "a".into())
    }

    fn is_inside(&self, address: IpAddr) -> bool {
        address == ADDRESS
    }
}

/// A question for a name, by UDP and by TCP, at an edge that forwards and at one that does not.
pub fn fuzz_names(bytes: &[u8]) {
    for (forwards, stream) in [(false, false), (true, true)] {
        if let Ok(zone) = Zone::new("a.internal", forwards) {
            let _ = zone.judge(bytes, NetworkId::COMMON, stream, &One);
        }
    }
}
