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
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{Mutex, MutexGuard, PoisonError},
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
#[derive(Debug)]
pub(crate) struct Nat {
    outside: Outside<Ipv4Addr>,
    v6: OutsideV6,
    /// The interface that machines are behind.
    tunnel: &'static str,
    flows_per_network: u32,
    /// This edge's own home.
    own: Ipv4Addr,
    known: Mutex<Known>,
}

/// What is known of homes.
#[derive(Debug, Default)]
struct Known {
    homes: BTreeMap<Ipv4Addr, Publics>,
    /// Those that are served here.
    served: BTreeSet<Ipv4Addr>,
    /// Those whose connections are on their way here.
    settling: BTreeSet<Ipv4Addr>,
}

/// The public addresses of a home.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Publics {
    pub(crate) v4: Ipv4Addr,
    pub(crate) v6: Option<Ipv6Addr>,
    pub(crate) spare: Vec<IpAddr>,
}

impl Publics {
    /// As machines without an address of their own are seen, of both families.
    fn seen(&self) -> [Option<IpAddr>; 2] {
        [Some(self.v4.into()), self.v6.map(IpAddr::V6)]
    }
}

/// A machine, and its home: this edge's own if there is no other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Placed<'a> {
    net: &'a MachineNet,
    home: Option<Ipv4Addr>,
}

impl<'a> From<&'a Entry> for Placed<'a> {
    fn from(entry: &'a Entry) -> Self {
        Self { net: &entry.net, home: entry.home.map(|home| home.edge) }
    }
}

impl Nat {
    /// Finds the interfaces of the public addresses. With several edges they may be elsewhere, and the
    /// interface is given.
    pub(crate) fn find(
        own: Ipv4Addr,
        public: Ipv4Addr,
        options: &EdgeOptions,
        tunnel: &'static str,
    ) -> Result<Self, KernelError> {
        let interface_of = |address: IpAddr| match &options.beside {
            Some(beside) => Ok(beside.interface.clone()),
            None => interface_of(address),
        };
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
        let flows_per_network = options.flows_per_network;
        let publics = Publics { v4: public, v6: options.public_v6, spare: options.spare.clone() };
        let homes = BTreeMap::from([(own, publics)]);
        // The only edge serves its own home, always.
        let served = if options.beside.is_none() { BTreeSet::from([own]) } else { BTreeSet::new() };
        let known = Mutex::new(Known { homes, served, settling: BTreeSet::new() });
        Ok(Self { outside, v6, tunnel, flows_per_network, own, known })
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes the addresses of a home; true if they are news, and the table must be [started](Nat::start)
    /// again.
    pub(crate) fn know(&self, home: Ipv4Addr, publics: Publics) -> bool {
        self.known().homes.insert(home, publics.clone()) != Some(publics)
    }

    /// Before the table is started: this home was served here, and is.
    pub(crate) fn note_served(&self, home: Ipv4Addr) {
        self.known().served.insert(home);
    }

    /// Connections to a home's addresses begin here from now on, or no more.
    pub(crate) fn serve(&self, home: Ipv4Addr, served: bool) -> Result<(), KernelError> {
        let mut known = self.known();
        if served {
            known.served.insert(home);
        } else {
            known.served.remove(&home);
        }
        let text = self.elements_of_home("served", home, known.homes.get(&home), served);
        drop(known);
        run(&text).map(drop)
    }

    /// Connections of a home are on their way here: what is not known of it is dropped, not refused.
    pub(crate) fn settle(&self, home: Ipv4Addr, settling: bool) -> Result<(), KernelError> {
        let mut known = self.known();
        if settling {
            known.settling.insert(home);
        } else {
            known.settling.remove(&home);
        }
        let mut text = self.elements_of_home("settling", home, known.homes.get(&home), settling);
        text += &script::orphan_end(known.settling.is_empty());
        drop(known);
        run(&text).map(drop)
    }

    /// Makes the table, with these machines and no others.
    pub(crate) fn start<'a>(
        &self,
        machines: impl Iterator<Item = &'a Entry>,
    ) -> Result<(), KernelError> {
        let mut text = self.rules();
        for entry in machines {
            text += &self.machine(entry.into());
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
        before: Option<Placed<'_>>,
        after: Option<Placed<'_>>,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        NetworkId, PortMapping, Protocol,
        edge::ledger::ENTRY_VERSION,
        lab::Space,
        policy::{Limits, Policy},
    };
    use std::time::{Duration, Instant};

    fn nat() -> Nat {
        let outside = Outside { address: Ipv4Addr::new(203, 0, 113, 1), interface: "lo".into() };
        let v6 = Outside { address: "fd03::1".parse().unwrap(), interface: "lo".into() };
        let v6 = OutsideV6::Translated(v6);
        let own = Ipv4Addr::new(100, 64, 0, 1);
        let homes = BTreeMap::from([
            (own, publics([203, 0, 113, 1], "fd03::1")),
            (other_home(), publics([203, 0, 113, 2], "fd03::2")),
        ]);
        let served = BTreeSet::from([own]);
        let known = Mutex::new(Known { homes, served, settling: BTreeSet::new() });
        Nat { outside, v6, tunnel: "cd-tunnel", flows_per_network: 1000, own, known }
    }

    fn other_home() -> Ipv4Addr {
        Ipv4Addr::new(100, 64, 0, 9)
    }

    fn publics(v4: [u8; 4], v6: &str) -> Publics {
        Publics { v4: v4.into(), v6: v6.parse().ok(), spare: Vec::new() }
    }

    fn placed(net: &MachineNet) -> Option<Placed<'_>> {
        Some(Placed { net, home: None })
    }

    fn machine(number: u32) -> MachineNet {
        let mapping = |protocol, machine| {
            let public = 1024 + u16::try_from(number).unwrap();
            PortMapping { protocol, public, machine }
        };
        let address = Ipv4Addr::from(0x0a4d_0000 + number);
        let mac = [2, 0, 0, 0, 0, 1];
        MachineNet {
            network: NetworkId(1 + (number % 100) as u16),
            address_v6: Some(Ipv6Addr::from(0xfd77 << 112 | u128::from(number))),
            ports: vec![mapping(Protocol::Tcp, 80), mapping(Protocol::Udp, 53)],
            ..MachineNet::new(format!("m{number}"), address, mac, 1400)
        }
    }

    fn entry(net: MachineNet) -> Entry {
        let owner = Ipv4Addr::new(100, 64, 0, 2);
        Entry {
            version: ENTRY_VERSION,
            net,
            owner,
            epoch: 1,
            released: false,
            holder: None,
            home: None,
        }
    }

    /// What nft says of the table, without what differs each time.
    fn listing() -> String {
        exec::run("nft", &["-s", "list", "table", "inet", script::TABLE], "").unwrap()
    }

    #[test]
    fn a_machine_that_went_has_left_nothing_and_what_is_said_twice_changes_nothing() {
        Space::new().unwrap().run(|| {
            let (nat, one) = (nat(), entry(machine(1)));
            nat.start([&one].into_iter()).unwrap();
            let alone = listing();
            let policy = Policy {
                allow: vec![crate::policy::Allow {
                    to: None,
                    from: vec!["192.0.2.0/24".parse().unwrap(), "fd00::/8".parse().unwrap()],
                }],
                limits: Limits {
                    bytes_in: Some(1 << 20),
                    bytes_out: Some(1 << 20),
                    flows_in: Some(100),
                },
                ..Policy::default()
            };
            let other = MachineNet { policy, ..machine(101) };
            nat.change(None, placed(&other)).unwrap();
            let both = listing();
            assert_ne!(both, alone);
            for _ in 0..2 {
                nat.change(placed(&other), placed(&other)).unwrap();
                assert_eq!(listing(), both);
            }
            for _ in 0..2 {
                nat.change(placed(&other), None).unwrap();
                assert_eq!(listing(), alone);
            }
            nat.start([&one].into_iter()).unwrap();
            assert_eq!(listing(), alone, "a restarted edge has the same rules");
            remove().unwrap();
            assert!(exec::run("nft", &["list", "tables"], "").unwrap().is_empty());
        });
    }

    #[test]
    fn homes_are_served_and_left_without_a_trace_in_the_rest_of_the_table() {
        Space::new().unwrap().run(|| {
            let nat = nat();
            let net = machine(7);
            let there = Some(Placed { net: &net, home: Some(other_home()) });
            nat.start(std::iter::empty()).unwrap();
            nat.change(None, there).unwrap();
            let before = listing();
            assert!(before.contains("203.0.113.2 . 1031 : 10.77.0.7 . 80"), "{before}");
            assert!(before.contains("reject with tcp reset"), "{before}");
            for _ in 0..2 {
                nat.serve(other_home(), true).unwrap();
                nat.settle(other_home(), true).unwrap();
            }
            let during = listing();
            assert!(!during.contains("reject with tcp reset"), "{during}");
            for _ in 0..2 {
                nat.settle(other_home(), false).unwrap();
                nat.serve(other_home(), false).unwrap();
            }
            assert_eq!(listing(), before);
            assert!(nat.know(other_home(), publics([203, 0, 113, 3], "fd03::3")));
            assert!(!nat.know(other_home(), publics([203, 0, 113, 3], "fd03::3")));
            remove().unwrap();
        });
    }

    #[test]
    fn hop_check_26_with_ten_thousand_machines_one_more_takes_as_long_as_the_first() {
        Space::new().unwrap().run(|| {
            let nat = nat();
            let time = |nat: &Nat, number| {
                let start = Instant::now();
                nat.change(None, placed(&machine(number))).unwrap();
                start.elapsed()
            };
            nat.start(std::iter::empty()).unwrap();
            let first = (20_001..20_010).map(|n| time(&nat, n)).min().unwrap();
            let entries: Vec<Entry> = (1..=10_000).map(|n| entry(machine(n))).collect();
            let start = Instant::now();
            nat.start(entries.iter()).unwrap();
            let all = start.elapsed();
            let one_more = (10_001..10_010).map(|n| time(&nat, n)).min().unwrap();
            eprintln!("10000 machines: {all:?}; the first: {first:?}; one more: {one_more:?}");
            assert!(one_more < first * 4 + Duration::from_millis(20), "{one_more:?}, {first:?}");
        });
    }
}
