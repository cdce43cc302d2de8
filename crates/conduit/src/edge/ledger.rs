//! What the edge knows: who has each machine's address, at which epoch. The same two rules as on
//! hosts ([`crate::book`]), judged on its own: an older epoch is refused, one epoch has one owner.
//! No I/O.
//!
//! Who may say what: a host may take a machine for itself with a newer epoch (the lease decides
//! who gets epochs, not the edge); it may give away only what it has.

use crate::{
    datapath::{MachineKey, MachineNet, NetError, NetworkId, Protocol},
    homes::Home,
    policy::Prefix,
    wire,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// Version of [`Entry`] as written today.
pub const ENTRY_VERSION: u32 = 2;

/// A machine in the ledger. This is also its state file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Version of the state file.
    pub version: u32,
    /// The machine.
    pub net: MachineNet,
    /// Overlay address of the host that has it.
    pub owner: Ipv4Addr,
    /// Its epoch.
    pub epoch: u64,
    /// It is gone; only its epoch is remembered.
    pub released: bool,
    /// Name of the host whose lease this epoch is of, where the edge reads leases.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holder: Option<String>,
    /// The edge that it belongs to; none where there is one edge only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub home: Option<Home>,
}

/// What a claim or a release changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// The route must be set (or removed).
    pub route: bool,
    /// Ports or the set of machines changed.
    pub ports: bool,
}

/// What the ledger accepts at all.
#[derive(Clone, Debug)]
pub struct Rules {
    /// Machines have addresses in this network.
    pub machines: (Ipv4Addr, u8),
    /// And IPv6 addresses in this one; none if there is none.
    pub machines_v6: Option<Prefix>,
    /// IPv6 addresses are seen as they are: two tenants cannot have the same.
    pub routed_v6: bool,
    /// Public addresses that a machine may have whole.
    pub spare: BTreeSet<IpAddr>,
    /// Public TCP ports that cannot be mapped: the edge's own.
    pub reserved: BTreeSet<u16>,
}

/// The ledger of one edge.
#[derive(Clone, Debug)]
pub struct Ledger {
    rules: Rules,
    entries: BTreeMap<MachineKey, Entry>,
    /// The machines that exist by network and name, in small letters.
    names: BTreeSet<(NetworkId, String, MachineKey)>,
    /// And by IPv6 address.
    v6: BTreeSet<(Ipv6Addr, MachineKey)>,
}

impl Ledger {
    /// An empty ledger.
    #[must_use]
    pub fn new(rules: Rules) -> Self {
        Self { rules, entries: BTreeMap::new(), names: BTreeSet::new(), v6: BTreeSet::new() }
    }

    /// Takes what a state file says.
    pub fn restore(&mut self, entry: Entry) {
        let key = entry.net.key();
        self.remove(key);
        if !entry.released {
            let name = entry.net.machine.to_lowercase();
            self.names.insert((key.network, name, key));
            self.v6.extend(entry.net.address_v6.map(|v6| (v6, key)));
        }
        self.entries.insert(key, entry);
    }

    fn remove(&mut self, key: MachineKey) {
        let Some(entry) = self.entries.remove(&key) else { return };
        self.names.remove(&(key.network, entry.net.machine.to_lowercase(), key));
        if let Some(v6) = entry.net.address_v6 {
            self.v6.remove(&(v6, key));
        }
    }

    /// The machines of a network that have this name, but for large and small letters.
    pub(crate) fn named(&self, network: NetworkId, name: &str) -> impl Iterator<Item = &Entry> {
        let first = MachineKey { network, address: Ipv4Addr::UNSPECIFIED };
        let name = name.to_lowercase();
        let from = (network, name.clone(), first);
        let found = self.names.range(from..).take_while(move |n| n.0 == network && n.1 == name);
        found.filter_map(|(_, _, key)| self.entries.get(key))
    }

    /// The machine of a network that has this IPv6 address.
    pub(crate) fn at_v6(&self, network: NetworkId, address: Ipv6Addr) -> Option<&Entry> {
        self.with_v6(address).find(|e| e.net.network == network)
    }

    fn with_v6(&self, address: Ipv6Addr) -> impl Iterator<Item = &Entry> {
        let first = MachineKey { network: NetworkId(0), address: Ipv4Addr::UNSPECIFIED };
        let found = self.v6.range((address, first)..).take_while(move |v| v.0 == address);
        found.filter_map(|(_, key)| self.entries.get(key))
    }

    /// Whether these are another machine's than that of this name.
    pub(crate) fn is_taken(&self, key: MachineKey, v6: Option<Ipv6Addr>, machine: &str) -> bool {
        let other = |e: &Entry| !e.released && e.net.machine != machine;
        let near = |e: &&Entry| self.rules.routed_v6 || e.net.network == key.network;
        self.get(key).is_some_and(other)
            || v6.is_some_and(|v6| self.with_v6(v6).filter(near).any(other))
    }

    /// Whether machines can have this address.
    pub(crate) fn is_inside(&self, address: IpAddr) -> bool {
        let (network, prefix) = self.rules.machines;
        let inside = |p: Prefix| p.contains(address);
        Prefix::new(network.into(), prefix).is_some_and(inside)
            || self.rules.machines_v6.is_some_and(inside)
    }

    /// Puts an address back to what it was, when a change could not be saved.
    pub(crate) fn undo(&mut self, key: MachineKey, before: Option<Entry>) {
        match before {
            Some(entry) => self.restore(entry),
            None => self.remove(key),
        }
    }

    /// Other edges have addresses that a machine may have whole, too.
    pub(crate) fn allow_spare(&mut self, addresses: impl Iterator<Item = IpAddr>) {
        self.rules.spare.extend(addresses);
    }

    /// What is known of an address.
    #[must_use]
    pub fn get(&self, key: impl Into<MachineKey>) -> Option<&Entry> {
        self.entries.get(&key.into())
    }

    /// The machines that exist.
    pub fn machines(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values().filter(|e| !e.released)
    }

    /// `by` says that `owner` has the machine at `epoch`.
    pub fn claim(
        &mut self,
        by: Ipv4Addr,
        net: &MachineNet,
        owner: Ipv4Addr,
        epoch: u64,
    ) -> Result<Change, NetError> {
        let operation = "take it to the edge";
        wire::check_machine(net)?;
        self.check_rules(net)?;
        let old = self.entries.get(&net.key());
        if let Some(old) = old {
            let current = old.epoch;
            if epoch < current {
                let machine = net.machine.clone();
                return Err(NetError::StaleEpoch { machine, asked: epoch, current });
            }
            if !old.released && old.net.machine != net.machine {
                let detail =
                    format!("machine \"{}\" has the address {}", old.net.machine, net.address);
                return Err(NetError::failed(net, operation, detail));
            }
            let taken = epoch == current && !old.released && old.owner != owner;
            if taken {
                let owner = old.owner.to_string();
                return Err(NetError::EpochTaken { machine: net.machine.clone(), epoch, owner });
            }
            // The second to say what is known already changes nothing: ports are the owner's word.
            if epoch == current && !old.released && (by != owner || old.net == *net) {
                return Ok(Change { route: false, ports: false });
            }
            if !old.released && by != owner && by != old.owner {
                let detail = format!("{by} cannot give away what {} has", old.owner);
                return Err(NetError::failed(net, operation, detail));
            }
        }
        // What the rules at the edge are made of: all but who has it.
        let ports = old.is_none_or(|o| o.released || o.net != *net);
        // Looks at every machine, so not at a move, which brings its ports along.
        if ports {
            self.check_others(net)?;
        }
        let route = old.is_none_or(|o| o.released || o.owner != owner);
        let entry = Entry {
            version: ENTRY_VERSION,
            net: net.clone(),
            owner,
            epoch,
            released: false,
            holder: None,
            home: old.filter(|o| !o.released).and_then(|o| o.home),
        };
        self.restore(entry);
        Ok(Change { route, ports })
    }

    /// A host says which home was chosen for a machine: of two the older one stands, and is returned.
    pub fn at_home(&mut self, key: impl Into<MachineKey>, home: Option<Home>) -> Option<Home> {
        let entry = self.entries.get_mut(&key.into()).filter(|e| !e.released)?;
        entry.home = match (entry.home, home) {
            (Some(known), Some(said)) => Some(known.older(said)),
            (known, said) => known.or(said),
        };
        entry.home
    }

    /// Notes whose lease the epoch of a claim is of.
    pub(crate) fn held_by(&mut self, key: MachineKey, holder: Option<String>) {
        if let Some(entry) = self.entries.get_mut(&key)
            && holder.is_some()
        {
            entry.holder = holder;
        }
    }

    /// `by`, which has it, says that the machine is gone.
    pub fn release(
        &mut self,
        by: Ipv4Addr,
        net: &MachineNet,
        epoch: u64,
    ) -> Result<Change, NetError> {
        let unchanged = Change { route: false, ports: false };
        let Some(entry) = self.entries.get(&net.key()) else { return Ok(unchanged) };
        if entry.released || entry.net.machine != net.machine {
            return Ok(unchanged);
        }
        if epoch < entry.epoch {
            let (machine, current) = (net.machine.clone(), entry.epoch);
            return Err(NetError::StaleEpoch { machine, asked: epoch, current });
        }
        if entry.owner != by {
            let owner = entry.owner.to_string();
            return Err(NetError::EpochTaken { machine: net.machine.clone(), epoch, owner });
        }
        let released = Entry { epoch, released: true, ..entry.clone() };
        self.restore(released);
        Ok(Change { route: true, ports: true })
    }

    /// Whether this edge would have such a machine at all.
    pub(crate) fn check_rules(&self, net: &MachineNet) -> Result<(), NetError> {
        let (network, prefix) = self.rules.machines;
        let inside = Prefix::new(network.into(), prefix);
        if !inside.is_some_and(|p| p.contains(net.address.into())) {
            let detail = format!("{} is not in this edge's {network}/{prefix}", net.address);
            return Err(NetError::failed(net, "check its address", detail));
        }
        if let Some(v6) = net.address_v6 {
            let detail = match self.rules.machines_v6 {
                None => format!("{v6}: this edge leads no IPv6; start it with --machines-v6"),
                Some(p) if !p.contains(v6.into()) => format!("{v6} is not in this edge's {p}"),
                Some(_) => String::new(),
            };
            if !detail.is_empty() {
                return Err(NetError::failed(net, "check its IPv6 address", detail));
            }
        }
        let routed = net.address_v6.filter(|_| self.rules.routed_v6).map(IpAddr::V6);
        let to_give = |a: &&IpAddr| self.rules.spare.contains(*a) || routed == Some(**a);
        if let Some(whole) = net.policy.public.iter().find(|a| !to_give(a)) {
            let detail = format!("{whole} is none of this edge's spare addresses (--spare)");
            return Err(NetError::failed(net, "give it a public address", detail));
        }
        let own = |p: &&crate::PortMapping| {
            p.protocol == Protocol::Tcp && self.rules.reserved.contains(&p.public)
        };
        if let Some(port) = net.ports.iter().find(own) {
            let detail = format!("tcp port {} is the edge's own; choose another", port.public);
            return Err(NetError::failed(net, "map its ports", detail));
        }
        Ok(())
    }

    /// What it wants for itself alone is nobody else's.
    fn check_others(&self, net: &MachineNet) -> Result<(), NetError> {
        for other in self.machines().filter(|e| e.net.key() != net.key()) {
            let taken = |operation: &str, what: String| {
                let name = &other.net.machine;
                let detail = format!("{what} is taken by machine \"{name}\"; choose another");
                Err(NetError::failed(net, operation, detail))
            };
            for port in &net.ports {
                let same =
                    |p: &crate::PortMapping| p.protocol == port.protocol && p.public == port.public;
                if other.net.ports.iter().any(same) {
                    let what = format!("{} port {}", port.protocol, port.public);
                    return taken("map its ports", what);
                }
            }
            let whole = |a: &&IpAddr| other.net.policy.public.contains(a);
            if let Some(address) = net.policy.public.iter().find(whole) {
                return taken("give it a public address", address.to_string());
            }
            let same_network = self.rules.routed_v6 || other.net.network == net.network;
            if let Some(v6) = net.address_v6
                && same_network
                && other.net.address_v6 == Some(v6)
            {
                return taken("check its IPv6 address", v6.to_string());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PortMapping;

    const A: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 2);
    const B: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 3);
    const C: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 4);

    fn ledger() -> Ledger {
        Ledger::new(Rules {
            machines: (Ipv4Addr::new(10, 77, 0, 0), 16),
            machines_v6: "fd77::/64".parse().ok(),
            routed_v6: false,
            spare: BTreeSet::from([IpAddr::from([203, 0, 113, 9])]),
            reserved: BTreeSet::from([7450]),
        })
    }

    fn net(last: u8, public: u16) -> MachineNet {
        let (address, mac) = (Ipv4Addr::new(10, 77, 0, last), [2, 0, 0, 0, 0, last]);
        MachineNet {
            ports: vec![PortMapping { protocol: Protocol::Tcp, public, machine: 80 }],
            ..MachineNet::new(format!("m{last}"), address, mac, 1400)
        }
    }

    #[test]
    fn a_move_changes_the_route_once_whoever_says_it_first() {
        let m = net(5, 80);
        for (first, second) in [(A, B), (B, A)] {
            let mut ledger = ledger();
            let new = ledger.claim(A, &m, A, 1).unwrap();
            assert_eq!(new, Change { route: true, ports: true });
            let flip = ledger.claim(first, &m, B, 2).unwrap();
            assert_eq!(flip, Change { route: true, ports: false });
            let again = ledger.claim(second, &m, B, 2).unwrap();
            assert_eq!(again, Change { route: false, ports: false });
            assert_eq!(ledger.get(m.key()).unwrap().owner, B);
        }
    }

    #[test]
    fn an_older_epoch_and_a_second_owner_of_one_epoch_are_refused() {
        let (m, mut ledger) = (net(5, 80), ledger());
        ledger.claim(A, &m, A, 3).unwrap();
        assert!(matches!(
            ledger.claim(B, &m, B, 2),
            Err(NetError::StaleEpoch { asked: 2, current: 3, .. })
        ));
        assert!(matches!(ledger.claim(B, &m, B, 3), Err(NetError::EpochTaken { .. })));
        assert_eq!(ledger.get(m.key()).unwrap().owner, A);
    }

    #[test]
    fn a_host_gives_away_only_what_it_has() {
        let (m, mut ledger) = (net(5, 80), ledger());
        ledger.claim(A, &m, A, 1).unwrap();
        let error = ledger.claim(C, &m, B, 2).unwrap_err().to_string();
        assert!(error.contains("cannot give away"), "{error}");
        ledger.claim(A, &m, B, 2).unwrap();
    }

    #[test]
    fn a_taken_port_is_refused_by_the_name_of_who_has_it_until_it_is_released() {
        let mut ledger = ledger();
        ledger.claim(A, &net(5, 80), A, 1).unwrap();
        let error = ledger.claim(B, &net(6, 80), B, 1).unwrap_err().to_string();
        assert!(error.contains("tcp port 80") && error.contains("\"m5\""), "{error}");
        assert!(ledger.get(net(6, 80).key()).is_none(), "nothing of it was taken");
        ledger.release(A, &net(5, 80), 1).unwrap();
        ledger.claim(B, &net(6, 80), B, 1).unwrap();
    }

    #[test]
    fn only_the_owner_releases_and_the_epoch_stays() {
        let (m, mut ledger) = (net(5, 80), ledger());
        ledger.claim(A, &m, A, 4).unwrap();
        assert!(ledger.release(B, &m, 5).is_err());
        assert!(ledger.release(A, &m, 3).is_err());
        assert_eq!(ledger.release(A, &m, 4).unwrap(), Change { route: true, ports: true });
        assert_eq!(ledger.release(A, &m, 4).unwrap(), Change { route: false, ports: false });
        assert_eq!(ledger.machines().count(), 0);
        assert!(matches!(ledger.claim(A, &m, A, 3), Err(NetError::StaleEpoch { .. })));
        ledger.claim(B, &m, B, 4).unwrap();
    }

    #[test]
    fn addresses_outside_the_machines_network_and_the_edges_own_port_are_refused() {
        let mut ledger = ledger();
        let mut stray = net(5, 80);
        stray.address = Ipv4Addr::new(8, 8, 8, 8);
        assert!(ledger.claim(A, &stray, A, 1).is_err());
        let error = ledger.claim(A, &net(5, 7450), A, 1).unwrap_err().to_string();
        assert!(error.contains("edge's own"), "{error}");
    }

    #[test]
    fn new_ports_of_the_same_owner_are_taken_at_the_same_epoch() {
        let mut ledger = ledger();
        ledger.claim(A, &net(5, 80), A, 1).unwrap();
        let change = ledger.claim(A, &net(5, 81), A, 1).unwrap();
        assert_eq!(change, Change { route: false, ports: true });
    }

    #[test]
    fn tenants_have_the_same_addresses_and_other_ports() {
        let mut ledger = ledger();
        let tenant = |machine: &str, network, public| MachineNet {
            machine: machine.into(),
            network: NetworkId(network),
            address_v6: "fd77::5".parse().ok(),
            ..net(5, public)
        };
        ledger.claim(A, &tenant("one", 7, 80), A, 1).unwrap();
        ledger.claim(A, &tenant("two", 9, 81), A, 1).unwrap();
        assert_eq!(ledger.machines().count(), 2);
        let error = ledger.claim(A, &tenant("three", 11, 80), A, 1).unwrap_err().to_string();
        assert!(error.contains("tcp port 80"), "{error}");
        let taken = MachineNet { address: Ipv4Addr::new(10, 77, 0, 6), ..tenant("four", 7, 82) };
        let error = ledger.claim(A, &taken, A, 1).unwrap_err().to_string();
        assert!(error.contains("fd77::5 is taken by machine \"one\""), "{error}");
    }

    #[test]
    fn a_whole_address_is_one_of_the_spare_ones_and_one_machines() {
        let whole = |last, public: [u8; 4]| MachineNet {
            policy: crate::policy::Policy { public: vec![public.into()], ..Default::default() },
            ..net(last, last.into())
        };
        let mut ledger = ledger();
        let error = ledger.claim(A, &whole(5, [203, 0, 113, 1]), A, 1).unwrap_err().to_string();
        assert!(error.contains("spare"), "{error}");
        ledger.claim(A, &whole(5, [203, 0, 113, 9]), A, 1).unwrap();
        let error = ledger.claim(A, &whole(6, [203, 0, 113, 9]), A, 1).unwrap_err().to_string();
        assert!(error.contains("\"m5\""), "{error}");
    }

    #[test]
    fn ipv6_addresses_are_in_the_edges_own_network() {
        let mut ledger = ledger();
        let v6 = |text: &str| MachineNet { address_v6: text.parse().ok(), ..net(5, 80) };
        let error = ledger.claim(A, &v6("2001:db8::5"), A, 1).unwrap_err().to_string();
        assert!(error.contains("fd77::/64"), "{error}");
        ledger.claim(A, &v6("fd77::5"), A, 1).unwrap();
    }

    #[test]
    fn machines_are_found_by_name_and_ipv6_address_in_their_network_until_they_are_gone() {
        let mut ledger = ledger();
        let web = |network, last| MachineNet {
            machine: "Web".into(),
            network: NetworkId(network),
            address_v6: "fd77::5".parse().ok(),
            ..net(last, u16::from(last) + network)
        };
        ledger.claim(A, &web(7, 5), A, 1).unwrap();
        ledger.claim(A, &web(9, 6), A, 1).unwrap();
        let found = |ledger: &Ledger, network| {
            let mut named = ledger.named(NetworkId(network), "wEB");
            let one = named.next().map(|e| e.net.address.octets()[3]);
            assert!(named.next().is_none());
            let v6 = ledger.at_v6(NetworkId(network), "fd77::5".parse().unwrap());
            assert_eq!(v6.map(|e| e.net.address.octets()[3]), one);
            one
        };
        assert_eq!([7, 8, 9].map(|n| found(&ledger, n)), [Some(5), None, Some(6)]);
        let v6 = "fd77::5".parse().ok();
        assert!(ledger.is_taken(web(7, 1).key(), v6, "other"));
        assert!(!ledger.is_taken(web(7, 1).key(), v6, "Web"));
        assert!(!ledger.is_taken(web(8, 1).key(), v6, "other"));
        ledger.release(A, &web(7, 5), 1).unwrap();
        assert_eq!([7, 9].map(|n| found(&ledger, n)), [None, Some(6)]);
    }

    #[test]
    fn the_state_file_is_fixed() {
        let mut ledger = ledger();
        ledger.claim(A, &net(5, 80), A, 1).unwrap();
        let text = serde_json::to_string(ledger.get(net(5, 80).key()).unwrap()).unwrap();
        assert_eq!(
            text,
            r#"{"version":2,"net":{"machine":"m5","address":"10.77.0.5","mac":[2,0,0,0,0,5],"mtu":1400,"ports":[{"protocol":"tcp","public":80,"machine":80}]},"owner":"100.64.0.2","epoch":1,"released":false}"#
        );
    }
}
