//! A machine's policy as rules: who may reach it, and how much.

use super::NEW;
use crate::{
    datapath::MachineNet,
    policy::{Allow, Limits, Policy, Prefix},
};
use std::collections::{BTreeMap, BTreeSet};

/// Whether what comes to the machine has a chain of its own.
pub(super) fn bounds_in(net: &MachineNet) -> bool {
    let Limits { bytes_in, flows_in, .. } = net.policy.limits;
    !net.policy.allow.is_empty() || bytes_in.is_some() || flows_in.is_some()
}

/// Drops what is more than so many bytes a second.
pub(super) fn over_bytes(amount: u64) -> String {
    format!("limit rate over {amount} bytes/second counter name over_rate drop")
}

/// Drops new connections that are more than so many a second.
fn over_flows(amount: u32) -> String {
    format!(
        "{NEW} limit rate over {amount}/second burst {amount} packets counter name over_rate \
         drop"
    )
}

pub(super) fn within(limits: &Limits) -> Vec<String> {
    let mut rules = Vec::new();
    rules.extend(limits.flows_in.map(over_flows));
    rules.extend(limits.bytes_in.map(over_bytes));
    rules.push("accept".into());
    rules
}

/// Who may: a port that rules speak of is open to those only.
pub(super) fn allowed(policy: &Policy, then: &str) -> Vec<String> {
    const REFUSE: &str = "counter name refused_source drop";
    let mut of_all = Vec::new();
    let mut of_ports: BTreeMap<_, Vec<Prefix>> = BTreeMap::new();
    for Allow { to, from } in &policy.allow {
        match to {
            Some(port) => of_ports.entry((port.protocol, port.port)).or_default().extend(from),
            None => of_all.extend(from),
        }
    }
    let mut rules = Vec::new();
    for ((protocol, port), mut from) in of_ports {
        from.extend(&of_all);
        let to = format!("meta l4proto {protocol} ct original proto-dst {port}");
        rules.extend(sources(&from).map(|from| format!("{to} {from} goto {then}")));
        rules.push(format!("{to} {REFUSE}"));
    }
    if policy.allow.iter().any(|rule| rule.to.is_none()) {
        rules.extend(sources(&of_all).map(|from| format!("{from} goto {then}")));
        rules.push(REFUSE.into());
    }
    rules.push(format!("goto {then}"));
    rules
}

/// A match for each family that has any. Networks nest or have nothing in common: what is inside
/// another one is left out, because nft takes no overlaps.
fn sources(from: &[Prefix]) -> impl Iterator<Item = String> {
    let from: BTreeSet<Prefix> = from.iter().copied().collect();
    let outermost = |p: &&Prefix| {
        !from.iter().any(|o| o != *p && o.bits() <= p.bits() && o.contains(p.address()))
    };
    let kept: Vec<Prefix> = from.iter().filter(outermost).copied().collect();
    [("ip", true), ("ip6", false)].into_iter().filter_map(move |(ip, v4)| {
        let of: Vec<String> =
            kept.iter().filter(|p| p.address().is_ipv4() == v4).map(ToString::to_string).collect();
        (!of.is_empty()).then(|| format!("{ip} saddr {{ {} }}", of.join(", ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_inside_others_are_left_out_because_nft_takes_no_overlaps() {
        let from: Vec<Prefix> =
            ["10.1.0.0/16", "10.0.0.0/8", "10.0.0.0/8", "fd00::/8", "9.0.0.0/8"]
                .iter()
                .map(|text| text.parse().unwrap())
                .collect();
        let found: Vec<_> = sources(&from).collect();
        assert_eq!(found, ["ip saddr { 9.0.0.0/8, 10.0.0.0/8 }", "ip6 saddr { fd00::/8 }"]);
    }
}
