//! Public addresses that come and go: with several edges, the addresses of a home are on the edge that
//! serves it, each by itself (`/32`, `/128`), and whoever is on the same link is told so by gratuitous
//! ARP and unsolicited neighbour advertisements. A routed fabric in front of edges needs what such a
//! fabric always needs: something that follows where an address is (a routing daemon that announces the
//! addresses of this interface, or a cloud's API).
//!
//! Called by [`super::fronts`]. What must hold: adding and removing again change nothing that is so.

use crate::{
    exec::{self, KernelError},
    netlink::interface_index,
    overlay, sys,
};
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

/// When it is said again that an address is here. A neighbour that has just learned an address takes no
/// other within a second (`locktime`).
const AGAIN: [Duration; 4] = [
    Duration::from_millis(50),
    Duration::from_millis(250),
    Duration::from_millis(1100),
    Duration::from_secs(3),
];

/// The interface's settings that addresses which move need.
pub(super) fn prepare(interface: &str) -> Result<(), KernelError> {
    interface_index(interface)?;
    // What comes late goes out where it came in: no reason to tell anybody of a shorter way.
    exec::sysctl(&format!("net/ipv4/conf/{interface}/send_redirects"), "0")
}

fn whole(address: IpAddr) -> String {
    format!("{address}/{}", if address.is_ipv4() { 32 } else { 128 })
}

/// Takes addresses, and says so.
pub(super) fn take(
    interface: &str,
    addresses: impl Iterator<Item = IpAddr>,
) -> Result<(), KernelError> {
    let addresses: Vec<IpAddr> = addresses.collect();
    let mut script = String::new();
    for address in &addresses {
        // Nobody else has it: whoever had it has left, or is dead.
        let nodad = if address.is_ipv6() { " nodad" } else { "" };
        script += &format!("address replace {} dev {interface}{nodad}\n", whole(*address));
    }
    exec::run("ip", &["-batch", "-"], &script)?;
    announce(interface, &addresses)?;
    let interface = interface.to_owned();
    crate::agent::spawn("announce", move || {
        for wait in AGAIN {
            std::thread::sleep(wait);
            // Gone again meanwhile, or the interface is: then there is nothing to say.
            let here: Vec<IpAddr> =
                addresses.iter().copied().filter(|a| has(&interface, *a)).collect();
            if let Err(error) = announce(&interface, &here) {
                tracing::debug!(%error, "not announced again");
            }
        }
    });
    Ok(())
}

/// Leaves addresses to somebody else.
pub(super) fn leave(
    interface: &str,
    addresses: impl Iterator<Item = IpAddr>,
) -> Result<(), KernelError> {
    let script: String = addresses
        .filter(|address| has(interface, *address))
        .map(|address| format!("address del {} dev {interface}\n", whole(address)))
        .collect();
    if script.is_empty() {
        return Ok(());
    }
    exec::run("ip", &["-batch", "-"], &script).map(drop)
}

/// Whether an interface has an address, by itself.
fn has(interface: &str, address: IpAddr) -> bool {
    let to = whole(address);
    exec::run("ip", &["-oneline", "address", "show", "dev", interface, "to", &to], "").is_ok_and(
        |text| text.contains(&format!(" {to} ")) || text.contains(&format!(" {address} ")),
    )
}

fn announce(interface: &str, addresses: &[IpAddr]) -> Result<(), KernelError> {
    let index = interface_index(interface)?;
    let facts = overlay::link_facts(interface)?;
    let Some(mac) = facts.as_ref().and_then(|f| mac_of(&f.address)) else { return Ok(()) };
    for address in addresses {
        let frame = match address {
            IpAddr::V4(v4) => gratuitous_arp(mac, *v4),
            IpAddr::V6(v6) => advertisement(mac, *v6),
        };
        sys::send_frame(index, &frame).map_err(|e| {
            KernelError::new(format!("say on {interface} that {address} is here"), e)
        })?;
    }
    Ok(())
}

fn mac_of(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        *byte = u8::from_str_radix(parts.next()?, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}

/// A question for one's own address, to everybody (RFC 5227, 3).
fn gratuitous_arp(mac: [u8; 6], address: Ipv4Addr) -> Vec<u8> {
    let ip = address.octets();
    let mut frame = Vec::with_capacity(42);
    frame.extend([0xff; 6]);
    frame.extend(mac);
    frame.extend([0x08, 0x06]);
    // Ethernet, IPv4, sizes, request.
    frame.extend([0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(mac);
    frame.extend(ip);
    frame.extend([0; 6]);
    frame.extend(ip);
    frame
}

/// A neighbour advertisement to all nodes that overrides what they know (RFC 4861, 7.2.6).
fn advertisement(mac: [u8; 6], address: Ipv6Addr) -> Vec<u8> {
    let to = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    // Type 136, and the flag "override"; then the target and the option with its hardware address.
    let mut icmp = vec![136, 0, 0, 0, 0x20, 0, 0, 0];
    icmp.extend(address.octets());
    icmp.extend([2, 1]);
    icmp.extend(mac);
    let length = u16::try_from(icmp.len()).expect("32 bytes");
    let mut sum = u32::from(length) + 58;
    for word in [address.octets(), to.octets()].concat().chunks_exact(2).chain(icmp.chunks_exact(2))
    {
        sum += u32::from(u16::from_be_bytes([word[0], word[1]]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    icmp[2..4].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    let mut frame = vec![0x33, 0x33, 0, 0, 0, 1];
    frame.extend(mac);
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
    frame.extend(length.to_be_bytes());
    frame.extend([58, 255]);
    frame.extend(address.octets());
    frame.extend(to.octets());
    frame.extend(icmp);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::{Space, wait_for};

    #[test]
    fn a_neighbour_learns_at_once_that_an_address_is_elsewhere() {
        let (client, switch) = (Space::new().unwrap(), Space::new().unwrap());
        switch.ip("link add br0 type bridge\nlink set br0 up\n").unwrap();
        let edges = [Space::new().unwrap(), Space::new().unwrap()];
        for (number, (space, name)) in
            [(&client, "client"), (&edges[0], "one"), (&edges[1], "two")].into_iter().enumerate()
        {
            space.join("eth0", &switch, name).unwrap();
            switch.ip(&format!("link set {name} master br0\n")).unwrap();
            let own = number + 10;
            space
                .ip(&format!(
                    "address add 203.0.113.{own}/24 dev eth0
                    address add fd03::{own}/64 dev eth0 nodad\n"
                ))
                .unwrap();
        }
        let public: [IpAddr; 2] = [[203, 0, 113, 1].into(), "fd03::1".parse().unwrap()];
        let mac =
            |space: &Space| space.run(|| overlay::link_facts("eth0").unwrap().unwrap().address);
        let knows = |mac: &str| {
            let text = client.run(|| exec::run("ip", &["neigh", "show"], "")).unwrap();
            public
                .iter()
                .all(|a| text.lines().any(|l| l.starts_with(&format!("{a} ")) && l.contains(mac)))
        };
        // Somebody there is asked, so that the client knows where the address is.
        let knock = || {
            client.run(|| {
                for address in public {
                    let limit = Duration::from_secs(20);
                    let _ = std::net::TcpStream::connect_timeout(&(address, 9).into(), limit);
                }
            });
        };
        edges[0].run(|| take("eth0", public.into_iter())).unwrap();
        knock();
        assert!(knows(&mac(&edges[0])));
        edges[0].run(|| leave("eth0", public.into_iter())).unwrap();
        edges[0].run(|| leave("eth0", public.into_iter())).unwrap();
        edges[1].run(|| take("eth0", public.into_iter())).unwrap();
        let second = mac(&edges[1]);
        assert!(wait_for(Duration::from_secs(30), || knows(&second)), "nobody told the client");
    }
}
