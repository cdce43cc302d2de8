//! Address translation at the edge: one nft table of our own, always applied whole and in one
//! transaction. Chains stay registered while their rules are replaced, so connections that are
//! under way are not disturbed.
//!
//! Inbound, a public port leads to a machine's port and the machine sees the client's own address.
//! Outbound, machines show the public address. Only translation state that lives here is ever
//! needed, so a move changes none of it.

use super::ledger::Entry;
use crate::{
    datapath::Protocol,
    exec::{self, KernelError},
};
use serde::Deserialize;
use std::{fmt::Write, net::Ipv4Addr};

/// The outside of an edge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outside {
    /// The address that clients use.
    pub(crate) address: Ipv4Addr,
    /// The interface that has it.
    pub(crate) interface: String,
}

impl Outside {
    /// Finds the interface that has `address`.
    pub(crate) fn find(address: Ipv4Addr) -> Result<Self, KernelError> {
        #[derive(Deserialize)]
        struct Link {
            ifname: Option<String>,
        }
        let operation = || format!("find the interface with the public address {address}");
        let text =
            exec::run("ip", &["-json", "address", "show", "to", &format!("{address}/32")], "")?;
        let links: Vec<Link> =
            serde_json::from_str(&text).map_err(|e| KernelError::new(operation(), e))?;
        let interface = links.into_iter().find_map(|l| l.ifname).ok_or_else(|| {
            KernelError::new(operation(), "this host has no such address; give one of its own")
        })?;
        // It goes into a script; the kernel allows more in a name than nft does in a string.
        if interface.contains(['"', '\n']) {
            return Err(KernelError::new(operation(), "its name has a quote in it; rename it"));
        }
        Ok(Self { address, interface })
    }
}

/// Applies the whole table; `tunnel` is the interface that machines are behind.
pub(crate) fn apply<'a>(
    outside: &Outside,
    tunnel: &str,
    machines: impl Iterator<Item = &'a Entry>,
) -> Result<(), KernelError> {
    exec::run("nft", &["-f", "-"], &script(outside, tunnel, machines)).map(drop)
}

/// Removes the table; connections that it translates end.
pub(crate) fn remove() -> Result<(), KernelError> {
    exec::run("nft", &["-f", "-"], "add table ip conduit\ndelete table ip conduit\n").map(drop)
}

fn script<'a>(outside: &Outside, vx: &str, machines: impl Iterator<Item = &'a Entry>) -> String {
    let (address, interface) = (outside.address, &outside.interface);
    let mut script = format!(
        "add table ip conduit
add set ip conduit machines {{ type ipv4_addr; }}
add map ip conduit tcp_ports {{ type inet_service : ipv4_addr . inet_service; }}
add map ip conduit udp_ports {{ type inet_service : ipv4_addr . inet_service; }}
add chain ip conduit inbound {{ type nat hook prerouting priority dstnat; policy accept; }}
add chain ip conduit outbound {{ type nat hook postrouting priority srcnat; policy accept; }}
add chain ip conduit transit {{ type filter hook forward priority filter; policy accept; }}
flush chain ip conduit inbound
flush chain ip conduit outbound
flush chain ip conduit transit
flush set ip conduit machines
flush map ip conduit tcp_ports
flush map ip conduit udp_ports
add rule ip conduit inbound ip daddr {address} dnat ip to tcp dport map @tcp_ports
add rule ip conduit inbound ip daddr {address} dnat ip to udp dport map @udp_ports
add rule ip conduit outbound ip saddr @machines oifname \"{interface}\" snat to {address}
add rule ip conduit transit iifname \"{vx}\" ip saddr != @machines drop
add rule ip conduit transit ct state established,related accept
add rule ip conduit transit iifname \"{interface}\" ct status dnat accept
add rule ip conduit transit iifname \"{interface}\" oifname \"{vx}\" drop
"
    );
    let mut add = |line: std::fmt::Arguments<'_>| {
        script.write_fmt(line).expect("writing to a string cannot fail");
    };
    for entry in machines {
        let machine = entry.net.address;
        add(format_args!("add element ip conduit machines {{ {machine} }}\n"));
        for port in &entry.net.ports {
            let map = match port.protocol {
                Protocol::Tcp => "tcp_ports",
                Protocol::Udp => "udp_ports",
            };
            let (public, inside) = (port.public, port.machine);
            add(format_args!(
                "add element ip conduit {map} {{ {public} : {machine} . {inside} }}\n"
            ));
        }
    }
    script
}
