//! The text that nft gets.
//!
//! Machines of different tenants may have the same addresses. Three things keep them apart:
//!
//! - the *mark* of a packet says its machine's network ([`crate::host::mark`]): set by the program at the
//!   tunnel for what a machine says, and by the rules here, from the public port, for what is said to one;
//! - the *zone* of connection tracking is the network, on the machine's side of a connection only:
//!   outside, public addresses are unique. A connection that a machine opens is in the zone by its first
//!   tuple (`original`), one that a client opens by its second (`reply`). What a machine says from a
//!   mapped port may be either, so it counts as both, and leaves under its public port;
//! - the connection's mark says which network opened it, for what comes back; or, of what a client
//!   opened, which one it is for.
//!
//! ```text
//!  prerouting  raw      classify    the zone, and the mark of what is for a mapped port
//!              mangle   account     connections by network; answers only from who was asked
//!              dstnat   inbound     public port → machine's port
//!  input       filter   unclaimed   what comes for a home whose connections are still on their way here
//!  forward     filter   transit     leaving: a machine's own address, its bound on bytes
//!                                   arriving: the mark; who may; its bounds
//!  postrouting srcnat   outbound    machine → public address; also between machines (hairpin)
//!  output      raw      answers     what this edge's stack answers (a smaller size, for instance)
//! ```
//!
//! With several edges, every edge has the elements of every machine, each with the public addresses of its
//! machine's home; of the homes that are served here, `served` has the addresses, and only for these a
//! connection begins here. Connections that are known go on: what comes late, after another edge has
//! taken over, is translated as before.
//!
//! A machine's segment of a TCP connection that nobody here knows, from a port that is not mapped, has no
//! right translation (an edge that died has taken it along): it is answered with a reset. While a drain
//! is under way (`settling`), it is dropped instead, because its connection is about to come.

mod policy;

use self::policy::{allowed, bounds_in, over_bytes, within};
use super::{Nat, Outside, OutsideV6, Placed};
use crate::{
    datapath::{MachineNet, Protocol},
    host, tap,
};
use std::{collections::BTreeSet, fmt::Write, net::IpAddr};

pub(super) const TABLE: &str = "conduit";

/// What is counted, by name.
const COUNTERS: [&str; 8] = [
    "spoofed_source",
    "foreign_connection",
    "not_mapped",
    "refused_source",
    "over_rate",
    "over_connections",
    "orphan_reset",
    "settling",
];

/// Its first packet: of a flow that is not answered, all others are `new` too.
const NEW: &str = "ct state new ct status & confirmed == 0";

const PROTOCOLS: [Protocol; 2] = [Protocol::Tcp, Protocol::Udp];

/// A family's words.
struct Family {
    /// End of the names of its sets.
    end: &'static str,
    ip: &'static str,
    address: &'static str,
    public: Option<(IpAddr, String)>,
}

impl Nat {
    fn families(&self) -> [Family; 2] {
        let Outside { address, interface } = &self.outside;
        let v4 = Some((IpAddr::V4(*address), interface.clone()));
        let v6 = match &self.v6 {
            OutsideV6::Translated(o) => Some((IpAddr::V6(o.address), o.interface.clone())),
            OutsideV6::None | OutsideV6::Routed => None,
        };
        [
            Family { end: "", ip: "ip", address: "ipv4_addr", public: v4 },
            Family { end: "6", ip: "ip6", address: "ipv6_addr", public: v6 },
        ]
    }

    /// The table without machines.
    pub(super) fn rules(&self) -> String {
        let mut lines = Vec::new();
        let table = format!("inet {TABLE}");
        lines.push(format!("add table {table}"));
        for name in COUNTERS {
            lines.push(format!("add counter {table} {name}"));
        }
        for (kind, name, what) in self.sets() {
            lines.push(format!("add {kind} {table} {name} {{ {what} }}"));
            lines.push(format!("flush {kind} {table} {name}"));
        }
        for (name, hook, priority) in [
            ("classify", "prerouting", "raw"),
            ("account", "prerouting", "mangle"),
            ("unclaimed", "input", "filter"),
            ("transit", "forward", "filter"),
            ("answers", "output", "raw"),
        ] {
            lines.push(format!(
                "add chain {table} {name} {{ type filter hook {hook} priority {priority}; }}"
            ));
        }
        for (name, hook, priority) in
            [("inbound", "prerouting", "dstnat"), ("outbound", "postrouting", "srcnat")]
        {
            lines.push(format!(
                "add chain {table} {name} {{ type nat hook {hook} priority {priority}; }}"
            ));
        }
        for name in [
            "to_public",
            "from_machine",
            "two_sided",
            "one_sided",
            "hairpin_answer",
            "orphaned",
            "orphan_end",
            "leaving",
            "arriving",
        ] {
            lines.push(format!("add chain {table} {name}"));
        }
        lines.push(format!("flush table {table}"));
        // An older version's.
        lines.push(format!("add table ip {TABLE}\ndelete table ip {TABLE}"));
        let mut text = lines.join("\n");
        text.push('\n');
        for (chain, rule) in self.chains() {
            let _ = writeln!(text, "add rule {table} {chain} {rule}");
        }
        let known = self.known();
        for home in known.homes.keys() {
            text += &self.elements_of_home("publics", *home, known.homes.get(home), true);
        }
        for home in &known.served {
            text += &self.elements_of_home("served", *home, known.homes.get(home), true);
        }
        for home in &known.settling {
            text += &self.elements_of_home("settling", *home, known.homes.get(home), true);
        }
        text += &orphan_end(known.settling.is_empty());
        text
    }

    /// The text that puts a home's addresses into a set, or takes them out; also if they are not there.
    pub(super) fn elements_of_home(
        &self,
        set: &str,
        home: std::net::Ipv4Addr,
        addresses: Option<&super::Publics>,
        present: bool,
    ) -> String {
        let mut text = String::new();
        let Some(addresses) = addresses else {
            tracing::debug!(%home, set, "its addresses are not known yet");
            return text;
        };
        let spare = addresses.spare.iter().copied().filter(|_| set != "publics");
        for address in addresses.seen().into_iter().flatten().chain(spare) {
            let end = if address.is_ipv4() { "" } else { "6" };
            let element = format!("element inet {TABLE} {set}{end} {{ {address} }}");
            let _ = writeln!(text, "add {element}");
            if !present {
                let _ = writeln!(text, "delete {element}");
            }
        }
        text
    }

    /// `set` or `map`, its name, and what is in it.
    fn sets(&self) -> Vec<(&'static str, String, String)> {
        let mut sets = Vec::new();
        let mut set = |name: String, of: String| sets.push(("set", name, format!("type {of};")));
        set("counted".into(), "mark; flags dynamic; size 65535".into());
        // Only where addresses are seen as they are.
        set("routed_open".into(), "inet_proto . ipv6_addr . inet_service".into());
        for p in PROTOCOLS {
            set(format!("{p}_pairs"), "inet_service . mark".into());
        }
        for Family { end, address, .. } in self.families() {
            for name in ["publics", "served", "settling"] {
                set(format!("{name}{end}"), address.into());
            }
            set(format!("machines{end}"), format!("mark . {address}"));
            set(format!("whole_pairs{end}"), format!("{address} . mark"));
            set(format!("whole_owned{end}"), format!("mark . {address}"));
            for p in PROTOCOLS {
                set(format!("{p}_owned{end}"), format!("mark . {address} . inet_service"));
            }
        }
        let mut map = |name: String, key: &str, to: &str| {
            sets.push(("map", name, format!("type {key} : {to};")));
        };
        map("routed_networks".into(), "ipv6_addr", "mark");
        for p in PROTOCOLS {
            map(format!("{p}_networks"), "inet_service", "mark");
        }
        for Family { end, address, .. } in self.families() {
            let machine = format!("mark . {address}");
            map(format!("homes{end}"), &machine, address);
            map(format!("whole{end}"), address, address);
            map(format!("whole_networks{end}"), address, "mark");
            map(format!("whole_sources{end}"), &machine, address);
            map(format!("bounds_in{end}"), &machine, "verdict");
            map(format!("bounds_out{end}"), &machine, "verdict");
            map(format!("bounds_back{end}"), &machine, "verdict");
            let port = format!("{address} . inet_service");
            for p in PROTOCOLS {
                map(format!("{p}_ports{end}"), &port, &port);
                map(format!("{p}_sources{end}"), &format!("mark . {port}"), &port);
            }
        }
        sets.push(("map", "zones".into(), "typeof meta mark : ct zone;".into()));
        sets
    }

    fn chains(&self) -> Vec<(&'static str, String)> {
        let tunnel = format!("\"{}\"", self.tunnel);
        let mut rules: Vec<(&str, String)> = Vec::new();
        let mut add = |chain: &'static str, rule: String| rules.push((chain, rule));
        let families = self.families();

        if self.tunnel == crate::overlay::INTERFACE {
            // Routes know one network, and no program sets its mark.
            let common = host::mark(crate::datapath::NetworkId::COMMON);
            add("classify", format!("iifname {tunnel} meta mark set {common:#x}"));
        }
        add("classify", format!("iifname {tunnel} goto from_machine"));
        for Family { end, ip, public, .. } in &families {
            if public.is_some() {
                add("classify", format!("{ip} daddr @publics{end} goto to_public"));
            }
            add(
                "classify",
                format!(
                    "meta mark set {ip} daddr map @whole_networks{end} ct reply zone set meta mark map @zones"
                ),
            );
        }
        add("to_public", "meta mark set 0".into());
        for p in PROTOCOLS {
            add("to_public", format!("meta mark set {p} dport map @{p}_networks"));
        }
        add("to_public", "ct reply zone set meta mark map @zones".into());

        for Family { end, ip, public, .. } in &families {
            if public.is_some() {
                add("from_machine", format!("{ip} daddr @served{end} goto one_sided"));
            }
            add("from_machine", format!("{ip} daddr . meta mark @whole_pairs{end} goto two_sided"));
            for p in PROTOCOLS {
                add(
                    "from_machine",
                    format!("meta mark . {ip} saddr . {p} sport @{p}_owned{end} goto two_sided"),
                );
            }
            add("from_machine", format!("meta mark . {ip} saddr @whole_owned{end} goto two_sided"));
        }
        let errors = [
            "icmp type { destination-unreachable, time-exceeded, parameter-problem }",
            "icmpv6 type { destination-unreachable, packet-too-big, time-exceeded, parameter-problem }",
        ];
        for error in errors {
            add("from_machine", format!("{error} goto two_sided"));
            add("answers", format!("{error} ct zone set meta mark map @zones"));
        }
        add("from_machine", "goto one_sided".into());
        add("two_sided", "ct zone set meta mark map @zones".into());
        add("one_sided", "ct original zone set meta mark map @zones".into());

        let ours = format!("meta mark & 0xff000000 == {:#x}", conduit_bpf::NETWORK_MARK);
        let most = self.flows_per_network;
        // Nothing more is asked of what clients and servers say in a connection that is known.
        add("account", format!("iifname != {tunnel} ct state established,related accept"));
        add("account", format!("ct state new {ours} ct mark set meta mark"));
        add(
            "account",
            format!(
                "{NEW} {ours} add @counted {{ meta mark ct count over {most} }} counter name over_connections drop"
            ),
        );
        for Family { end, ip, public, .. } in &families {
            let answer = format!("iifname {tunnel} ct direction reply {ip} daddr");
            if public.is_some() {
                add("account", format!("{answer} @publics{end} jump hairpin_answer"));
            }
        }
        for p in PROTOCOLS {
            add(
                "hairpin_answer",
                format!("meta l4proto {p} ct original proto-dst . meta mark @{p}_pairs return"),
            );
        }
        for Family { end, ip, .. } in &families {
            add(
                "hairpin_answer",
                format!("ct original {ip} daddr . meta mark @whole_pairs{end} return"),
            );
        }
        add("hairpin_answer", "counter name foreign_connection drop".into());

        for Family { end, ip, public, .. } in &families {
            let served = format!("{ip} daddr @served{end} dnat {ip} to {ip} daddr");
            if public.is_some() {
                for p in PROTOCOLS {
                    add("inbound", format!("{served} . {p} dport map @{p}_ports{end}"));
                }
            }
            add("inbound", format!("{served} map @whole{end}"));
        }
        for Family { end, ip, .. } in &families {
            add(
                "unclaimed",
                format!("{ip} daddr @settling{end} ct state new counter name settling drop"),
            );
        }

        add("transit", format!("iifname {tunnel} jump leaving"));
        add("transit", format!("oifname {tunnel} jump arriving"));
        for (Family { end, ip, .. }, proto) in families.iter().zip(["ipv4", "ipv6"]) {
            add(
                "leaving",
                format!(
                    "meta nfproto {proto} meta mark . {ip} saddr != @machines{end} counter name spoofed_source drop"
                ),
            );
        }
        // Before the bounds, which may end the chain.
        add("leaving", format!("tcp flags & (fin | syn | rst | ack) != syn {NEW} jump orphaned"));
        for Family { end, ip, .. } in &families {
            add("leaving", format!("meta mark . {ip} saddr vmap @bounds_out{end}"));
            let own = format!("meta mark . {ip} saddr");
            add("orphaned", format!("{own} . tcp sport @tcp_owned{end} return"));
            add("orphaned", format!("{own} @whole_owned{end} return"));
        }
        if self.v6 == OutsideV6::Routed {
            add("orphaned", "meta nfproto ipv6 return".into());
        }
        add("orphaned", "goto orphan_end".into());

        // What is answered goes back to the network that asked.
        add("arriving", "ct direction reply meta mark set ct mark".into());
        for Family { end, ip, .. } in &families {
            let answer = "ct direction reply meta mark";
            add("arriving", format!("{answer} . {ip} daddr vmap @bounds_back{end}"));
        }
        add("arriving", "ct direction reply accept".into());
        add("arriving", format!("iifname != {tunnel} meta mark set ct mark"));
        // Between machines by a public address: from here on, the mark of the one that is asked.
        let asks = format!("iifname {tunnel} ct status dnat");
        for p in PROTOCOLS {
            let port = format!("meta l4proto {p} meta mark set ct original proto-dst");
            add("arriving", format!("{asks} {port} map @{p}_networks"));
        }
        for Family { end, ip, .. } in &families {
            let address = format!("meta mark set ct original {ip} daddr");
            add("arriving", format!("{asks} {address} map @whole_networks{end}"));
        }
        if self.v6 == OutsideV6::Routed {
            add("arriving", "meta mark set ip6 daddr map @routed_networks".into());
        }
        add("arriving", "ct state related accept".into());
        for Family { end, ip, .. } in &families {
            add("arriving", format!("meta mark . {ip} daddr vmap @bounds_in{end}"));
        }
        add("arriving", "ct status dnat accept".into());
        if self.v6 == OutsideV6::Routed {
            add("arriving", "meta l4proto . ip6 daddr . th dport @routed_open accept".into());
            add("arriving", "ip6 daddr . meta mark @whole_pairs6 accept".into());
            add(
                "arriving",
                format!("iifname != {tunnel} meta nfproto ipv6 counter name not_mapped drop"),
            );
        }
        for Family { public, .. } in &families {
            if let Some((_, interface)) = public {
                add("arriving", format!("iifname \"{interface}\" counter name not_mapped drop"));
            }
        }

        for Family { end, ip, public, .. } in &families {
            let Some((_, interface)) = public else { continue };
            // As the one that asks is seen by everybody; the mark is that of the one that is asked by now.
            add(
                "outbound",
                format!(
                    "iifname {tunnel} oifname {tunnel} ct status dnat snat {ip} to ct mark . {ip} saddr map @homes{end}"
                ),
            );
            let out = format!("oifname \"{interface}\"");
            add(
                "outbound",
                format!("{out} snat {ip} to meta mark . {ip} saddr map @whole_sources{end}"),
            );
            for p in PROTOCOLS {
                add(
                    "outbound",
                    format!(
                        "{out} snat {ip} to meta mark . {ip} saddr . {p} sport map @{p}_sources{end}"
                    ),
                );
            }
            add("outbound", format!("{out} snat {ip} to meta mark . {ip} saddr map @homes{end}"));
        }
        rules
    }

    /// A machine's elements: the set or map, the key, and the value.
    fn elements(&self, placed: Placed<'_>) -> Vec<(String, String, Option<String>)> {
        let net = placed.net;
        let mark = format!("{:#x}", host::mark(net.network));
        let mut found = vec![("zones".to_owned(), mark.clone(), Some(net.network.to_string()))];
        let addresses = [Some(IpAddr::V4(net.address)), net.address_v6.map(IpAddr::V6)];
        let known = self.known();
        let home = known.homes.get(&placed.home.unwrap_or(self.own));
        let seen = home.map_or([None; 2], super::Publics::seen);
        for ((family, address), seen) in self.families().into_iter().zip(addresses).zip(seen) {
            let Some(address) = address else { continue };
            let seen = seen.filter(|_| family.public.is_some());
            self.elements_of(net, (&family, seen), address, &mark, &mut found);
        }
        for port in &net.ports {
            let (p, public) = (port.protocol, port.public);
            found.push((format!("{p}_networks"), public.to_string(), Some(mark.clone())));
            found.push((format!("{p}_pairs"), format!("{public} . {mark}"), None));
        }
        found
    }

    fn elements_of(
        &self,
        net: &MachineNet,
        (family, seen): (&Family, Option<IpAddr>),
        address: IpAddr,
        mark: &str,
        found: &mut Vec<(String, String, Option<String>)>,
    ) {
        let end = family.end;
        let own = format!("{mark} . {address}");
        let mut set = |name: &str, key: String| found.push((format!("{name}{end}"), key, None));
        set("machines", own.clone());
        let same_family = |a: &&IpAddr| a.is_ipv4() == address.is_ipv4();
        let whole = net.policy.public.iter().find(same_family);
        let routed = self.v6 == OutsideV6::Routed && address.is_ipv6();
        if let Some(whole) = whole {
            set("whole_pairs", format!("{whole} . {mark}"));
            set("whole_owned", own.clone());
        }
        let mut map = |name: String, key: String, value: String| {
            found.push((format!("{name}{end}"), key, Some(value)));
        };
        if let Some(whole) = whole.filter(|whole| **whole != address) {
            map("whole".into(), whole.to_string(), address.to_string());
            map("whole_networks".into(), whole.to_string(), mark.to_owned());
            map("whole_sources".into(), own.clone(), whole.to_string());
        }
        if let Some(seen) = seen {
            map("homes".into(), own.clone(), seen.to_string());
        }
        if bounds_in(net) {
            map("bounds_in".into(), own.clone(), format!("goto {}", chain("in", net)));
        }
        if net.policy.limits.bytes_in.is_some() {
            map("bounds_back".into(), own.clone(), format!("goto {}", chain("within", net)));
        }
        if net.policy.limits.bytes_out.is_some() {
            map("bounds_out".into(), own.clone(), format!("jump {}", chain("out", net)));
        }
        // A machine's port that has two public ones leaves by the first.
        let mut owned = BTreeSet::new();
        for port in &net.ports {
            let (p, public, inside) = (port.protocol, port.public, port.machine);
            if let Some(outside) = seen {
                let key = format!("{outside} . {public}");
                map(format!("{p}_ports"), key, format!("{address} . {inside}"));
                if whole.is_none() && owned.insert((p, inside)) {
                    let own = format!("{own} . {inside}");
                    map(format!("{p}_sources"), own, format!("{outside} . {public}"));
                }
            }
        }
        for (p, inside) in owned {
            found.push((format!("{p}_owned{end}"), format!("{own} . {inside}"), None));
        }
        if routed {
            let key = address.to_string();
            found.push(("routed_networks".into(), key, Some(mark.to_owned())));
            for port in &net.ports {
                let key = format!("{} . {address} . {}", port.protocol, port.machine);
                found.push(("routed_open".into(), key, None));
            }
        }
    }

    /// The text that adds a machine.
    pub(super) fn machine(&self, placed: Placed<'_>) -> String {
        let net = placed.net;
        let mut text = String::new();
        let table = format!("inet {TABLE}");
        let mut bound = |kind: &str, rules: Vec<String>| {
            let chain = chain(kind, net);
            let _ = writeln!(text, "add chain {table} {chain}\nflush chain {table} {chain}");
            for rule in rules {
                let _ = writeln!(text, "add rule {table} {chain} {rule}");
            }
        };
        if bounds_in(net) {
            bound("within", within(&net.policy.limits));
            bound("in", allowed(&net.policy, &chain("within", net)));
        }
        if let Some(bytes) = net.policy.limits.bytes_out {
            bound("out", vec![over_bytes(bytes)]);
        }
        for (set, key, value) in self.elements(placed) {
            let value = value.map_or_else(String::new, |v| format!(" : {v}"));
            let _ = writeln!(text, "add element {table} {set} {{ {key}{value} }}");
        }
        text
    }

    /// The text that takes it away again; also if a part of it is not there. The zone of its network
    /// stays: others may be in it.
    pub(super) fn without(&self, placed: Placed<'_>) -> String {
        let net = placed.net;
        let mut text = String::new();
        let table = format!("inet {TABLE}");
        // Nothing removes "if there": what is added first is found.
        text += &self.machine(placed);
        for (set, key, _) in self.elements(placed).into_iter().filter(|(set, ..)| set != "zones") {
            let _ = writeln!(text, "delete element {table} {set} {{ {key} }}");
        }
        let mut chains = Vec::new();
        if bounds_in(net) {
            chains.extend([chain("in", net), chain("within", net)]);
        }
        if net.policy.limits.bytes_out.is_some() {
            chains.push(chain("out", net));
        }
        for chain in chains {
            let _ = writeln!(text, "flush chain {table} {chain}\ndelete chain {table} {chain}");
        }
        text
    }
}

/// What becomes of a segment of a connection that nobody knows.
pub(super) fn orphan_end(settled: bool) -> String {
    let end = if settled {
        "counter name orphan_reset reject with tcp reset"
    } else {
        "counter name settling drop"
    };
    let chain = format!("inet {TABLE} orphan_end");
    format!("flush chain {chain}\nadd rule {chain} {end}\n")
}

fn chain(kind: &str, net: &MachineNet) -> String {
    format!("{kind}_{}", tap::name(net.key()).trim_start_matches(tap::PREFIX))
}
