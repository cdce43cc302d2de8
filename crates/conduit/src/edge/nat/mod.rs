//! Address translation and policies at the edge: one nft table of our own. Its rules are made once, at
//! start, in one transaction; a machine is a handful of set elements, changed without touching the
//! others' ([`script`] says what they do). Chains stay registered while rules are replaced, so
//! connections that are under way are not disturbed.
//!
//! Called by the edge whenever a machine, its ports or its policy is new, never on the way of a move:
//! translation state lives here alone, and a move changes none of it.

mod script;

use super::{EdgeOptions, ledger::Entry};
use crate::{
    datapath::MachineNet,
    exec::{self, KernelError},
    policy::Prefix,
};
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// An address that clients use, and the interface that has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outside<A> {
    pub(crate) address: A,
    pub(crate) interface: String,
}

/// How machines' IPv6 addresses are seen from outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum OutsideV6 {
    /// Not at all: this edge leads no IPv6.
    None,
    /// As one public address, like IPv4.
    Translated(Outside<Ipv6Addr>),
    /// As they are: the network outside leads their prefix here.
    Routed,
}

/// The translation of one edge.
#[derive(Clone, Debug)]
pub(crate) struct Nat {
    outside: Outside<Ipv4Addr>,
    v6: OutsideV6,
    /// The interface that machines are behind.
    tunnel: &'static str,
    flows_per_network: u32,
}

impl Nat {
    /// Finds the interfaces of the public addresses.
    pub(crate) fn find(
        public: Ipv4Addr,
        options: &EdgeOptions,
        tunnel: &'static str,
    ) -> Result<Self, KernelError> {
        let outside = Outside { address: public, interface: interface_of(public.into())? };
        let v6 = match (options.machines_v6, options.public_v6) {
            (None, None) => OutsideV6::None,
            (None, Some(address)) => {
                return Err(KernelError::new(
                    format!("use the public address {address}"),
                    "no machine has IPv6 here; say which network their addresses are in \
                     (--machines-v6)",
                ));
            }
            (Some(_), None) => OutsideV6::Routed,
            (Some(_), Some(address)) => {
                let interface = interface_of(address.into())?;
                OutsideV6::Translated(Outside { address, interface })
            }
        };
        for &address in &options.spare {
            interface_of(address)?;
        }
        Ok(Self { outside, v6, tunnel, flows_per_network: options.flows_per_network })
    }

    /// Makes the table, with these machines and no others.
    pub(crate) fn start<'a>(
        &self,
        machines: impl Iterator<Item = &'a Entry>,
    ) -> Result<(), KernelError> {
        let mut text = self.rules();
        for entry in machines {
            text += &self.machine(&entry.net);
        }
        run(&text).map(drop).or_else(|error| {
            tracing::warn!(%error, "the table of another version is replaced whole");
            let table = script::TABLE;
            run(&format!("add table inet {table}\ndelete table inet {table}\n{text}")).map(drop)
        })
    }

    /// A machine is new, or other than it was, or gone.
    pub(crate) fn change(
        &self,
        before: Option<&MachineNet>,
        after: Option<&MachineNet>,
    ) -> Result<(), KernelError> {
        let mut text = String::new();
        if let Some(before) = before {
            text += &self.without(before);
        }
        if let Some(after) = after {
            text += &self.machine(after);
        }
        run(&text).map(drop)
    }

    /// What was dropped here, by name.
    pub(crate) fn counts() -> BTreeMap<String, u64> {
        #[derive(Deserialize)]
        struct Listing {
            nftables: Vec<Object>,
        }
        #[derive(Deserialize)]
        struct Object {
            counter: Option<Counter>,
        }
        #[derive(Deserialize)]
        struct Counter {
            name: String,
            packets: u64,
        }
        let listed =
            exec::run("nft", &["-j", "list", "counters", "table", "inet", script::TABLE], "");
        let listing: Option<Listing> = listed.ok().and_then(|t| serde_json::from_str(&t).ok());
        let objects = listing.into_iter().flat_map(|l| l.nftables);
        objects.filter_map(|o| o.counter).map(|c| (format!("nat_{}", c.name), c.packets)).collect()
    }
}

/// Removes the table; connections that it translates end.
pub(crate) fn remove() -> Result<(), KernelError> {
    let table = script::TABLE;
    run(&format!("add table inet {table}\ndelete table inet {table}\n")).map(drop)
}

fn run(text: &str) -> Result<String, KernelError> {
    exec::run("nft", &["-f", "-"], text)
}

/// The interface that has an address of this computer.
pub(crate) fn interface_of(address: IpAddr) -> Result<String, KernelError> {
    #[derive(Deserialize)]
    struct Link {
        ifname: Option<String>,
    }
    let operation = || format!("find the interface with the public address {address}");
    let whole = Prefix::new(address, if address.is_ipv4() { 32 } else { 128 })
        .map_or_else(String::new, |p| p.to_string());
    let text = exec::run("ip", &["-json", "address", "show", "to", &whole], "")?;
    let links: Vec<Link> =
        serde_json::from_str(&text).map_err(|e| KernelError::new(operation(), e))?;
    let interface = links.into_iter().find_map(|l| l.ifname).ok_or_else(|| {
        KernelError::new(operation(), "this host has no such address; give one of its own")
    })?;
    // It goes into a script; the kernel allows more in a name than nft does in a string.
    if interface.contains(['"', '\n']) {
        return Err(KernelError::new(operation(), "its name has a quote in it; rename it"));
    }
    Ok(interface)
}
