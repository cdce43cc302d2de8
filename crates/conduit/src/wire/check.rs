//! What came from outside is checked before anything is done with it.

use crate::{
    datapath::{MachineNet, NetError},
    policy::{Limits, Policy},
};

/// Whether this can be a machine's name.
pub(crate) fn check_name(machine: &str) -> Result<(), String> {
    if machine.is_empty() || machine.len() > 128 || machine.chars().any(char::is_control) {
        return Err("a machine's name has 1 to 128 printable characters".into());
    }
    Ok(())
}

/// Checks what came from outside before anything is done with it.
pub fn check_machine(net: &MachineNet) -> Result<(), NetError> {
    let fail = |detail: String| Err(NetError::failed(net, "check its network settings", detail));
    check_name(&net.machine).or_else(fail)?;
    let a = net.address;
    if a.is_unspecified() || a.is_loopback() || a.is_multicast() || a.is_broadcast() {
        return fail(format!("{a} cannot be a machine's address"));
    }
    if a.is_link_local() {
        return fail(format!("{a} is in the network of the machines' gateway (169.254.0.0/16)"));
    }
    if let Some(v6) = net.address_v6 {
        let own = v6.is_unspecified() || v6.is_loopback() || v6.is_multicast();
        if own || v6.is_unicast_link_local() || v6.to_ipv4_mapped().is_some() {
            return fail(format!("{v6} cannot be a machine's address"));
        }
        if net.mtu < 1280 {
            return fail(format!("IPv6 needs an MTU of at least 1280, not {}", net.mtu));
        }
    }
    if net.network.0 == 0 {
        return fail("network 0 is nobody's; networks are 1 to 65535".into());
    }
    if net.mac[0] & 1 == 1 || net.mac == [0; 6] || net.mac == crate::tap::GATEWAY_MAC {
        let mac = crate::overlay::mac_text(net.mac);
        return fail(format!("{mac} cannot be a machine's MAC"));
    }
    if !(576..=65_000).contains(&net.mtu) {
        return fail(format!("an MTU of {} is not between 576 and 65000", net.mtu));
    }
    if net.ports.len() > 256 {
        return fail(format!("{} port mappings are more than 256", net.ports.len()));
    }
    let mut seen = std::collections::BTreeSet::new();
    for port in &net.ports {
        if port.public == 0 || port.machine == 0 {
            return fail("port 0 cannot be mapped".into());
        }
        if !seen.insert((port.protocol, port.public)) {
            return fail(format!("{} port {} is mapped twice", port.protocol, port.public));
        }
    }
    check_policy(&net.policy).or_else(fail)
}

/// Bounds of what a machine may ask of an edge: rules and sources of one machine.
const RULES: usize = 64;
const SOURCES: usize = 1024;

fn check_policy(policy: &Policy) -> Result<(), String> {
    let families =
        [true, false].map(|v4| policy.public.iter().filter(|a| a.is_ipv4() == v4).count());
    if families.iter().any(|&n| n > 1) {
        return Err("a machine has at most one whole public address of each family".into());
    }
    let sources: usize = policy.allow.iter().map(|rule| rule.from.len()).sum();
    if policy.allow.len() > RULES || sources > SOURCES {
        return Err(format!(
            "{} rules with {sources} sources are more than {RULES} with {SOURCES}",
            policy.allow.len()
        ));
    }
    let Limits { bytes_in, bytes_out, flows_in } = policy.limits;
    // What nft takes in one bucket.
    let bytes_fit =
        |limit: Option<u64>| limit.is_none_or(|n| (1000..=u64::from(u32::MAX)).contains(&n));
    if !bytes_fit(bytes_in) || !bytes_fit(bytes_out) || flows_in == Some(0) {
        return Err("limits are 1000 to 4294967295 bytes, and at least one flow, a second".into());
    }
    Ok(())
}
