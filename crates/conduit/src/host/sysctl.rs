//! The kernel's settings that a host or an edge needs.

use crate::{
    exec::{self, KernelError},
    overlay, tap,
};

pub(crate) fn has_ipv6() -> bool {
    exec::read_sysctl("net/ipv6/conf/all/disable_ipv6").is_some()
}

/// Makes this computer a router, whose answers to a packet go the way of the packet's mark. With IPv6 it
/// would stop to believe other routers: interfaces that did, go on to do so (`accept_ra` 2).
pub(crate) fn forward() -> Result<(), KernelError> {
    exec::sysctl("net/ipv4/ip_forward", "1")?;
    exec::sysctl("net/ipv4/fwmark_reflect", "1")?;
    if !has_ipv6() {
        return Ok(());
    }
    exec::sysctl("net/ipv6/fwmark_reflect", "1")?;
    if exec::read_sysctl("net/ipv6/conf/all/forwarding").is_some_and(|v| v == "1") {
        return Ok(());
    }
    let list = |e| KernelError::new("list /proc/sys/net/ipv6/conf", e);
    for entry in std::fs::read_dir("/proc/sys/net/ipv6/conf").map_err(list)? {
        let entry = entry.map_err(list)?.file_name();
        let Some(name) = entry.to_str().filter(|n| !["all", "default"].contains(n)) else {
            continue;
        };
        let key = format!("net/ipv6/conf/{name}/accept_ra");
        if exec::read_sysctl(&key).is_some_and(|v| v == "1") {
            exec::sysctl(&key, "2")?;
        }
    }
    exec::sysctl("net/ipv6/conf/all/forwarding", "1")
}

/// Interfaces of ours neither filter by reverse path nor tell senders of shorter ways.
pub(crate) fn quiet_interface(name: &str) -> Result<(), KernelError> {
    exec::sysctl(&format!("net/ipv4/conf/{name}/rp_filter"), "0")?;
    exec::sysctl(&format!("net/ipv4/conf/{name}/send_redirects"), "0")
}

/// The kernel takes the larger of `all` and the interface's own value, so `all` must be 0 for our
/// interfaces to be free of it. The others keep what they had: the value moves down to them.
pub(crate) fn loosen_reverse_path_filter() -> Result<(), KernelError> {
    let read = |name: &str| -> u8 {
        exec::read_sysctl(&format!("net/ipv4/conf/{name}/rp_filter"))
            .and_then(|v| v.parse().ok())
            .unwrap_or(0)
    };
    let all = read("all");
    if all > 0 {
        let list = |e| KernelError::new("list /proc/sys/net/ipv4/conf", e);
        for entry in std::fs::read_dir("/proc/sys/net/ipv4/conf").map_err(list)? {
            let entry = entry.map_err(list)?.file_name();
            let Some(name) = entry.to_str().filter(|n| *n != "all") else { continue };
            if name != overlay::INTERFACE && !name.starts_with(tap::PREFIX) && read(name) < all {
                exec::sysctl(&format!("net/ipv4/conf/{name}/rp_filter"), &all.to_string())?;
            }
        }
        exec::sysctl("net/ipv4/conf/all/rp_filter", "0")?;
    }
    // Likewise an OR of both: redirects would tell an edge to leave the trombone.
    exec::sysctl("net/ipv4/conf/all/send_redirects", "0")
}
