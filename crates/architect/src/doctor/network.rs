//! The network, tried in a fresh network namespace that only one thread is in and that is gone
//! when the thread ends.

use super::{Finding, command, sys};
use nix::sched::{CloneFlags, unshare};
use std::{path::Path, time::Duration};

const LIMIT: Duration = Duration::from_secs(5);

/// Runs `trial` on a thread of its own in a network namespace of its own.
fn in_fresh_namespace<T: Send>(
    trial: impl FnOnce() -> Result<T, String> + Send,
) -> Result<T, String> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)
                .map_err(|error| format!("no network namespace: {}", error.desc()))?;
            trial()
        });
        thread.join().unwrap_or_else(|_| Err("the trial panicked".into()))
    })
}

fn ip(arguments: &str) -> Result<String, String> {
    command::run("ip", &arguments.split(' ').collect::<Vec<_>>(), LIMIT)
}

pub(super) fn namespaces(_: &Path) -> Finding {
    let listed = in_fresh_namespace(|| ip("-brief link show"));
    match listed {
        Ok(links) if links.lines().all(|line| line.starts_with("lo ")) && !links.is_empty() => {
            Finding::ok("a fresh one holds nothing but lo")
        }
        // Some kernels put fallback tunnels into every namespace; harmless.
        Ok(links) => {
            let extra = links.lines().filter_map(|line| line.split_whitespace().next());
            let extra: Vec<_> = extra.filter(|name| *name != "lo").collect();
            Finding::ok(format!("a fresh one also holds {}", extra.join(" ")))
        }
        Err(error) => Finding::missing(error, "run as root, with iproute2 installed"),
    }
}

pub(super) fn tap(_: &Path) -> Finding {
    let made = in_fresh_namespace(|| {
        let tap = sys::tap("doctor0").map_err(|error| format!("/dev/net/tun: {error}"))?;
        ip("link set doctor0 up txqueuelen 16384")?;
        drop(tap);
        Ok(())
    });
    match made {
        Ok(()) => Finding::ok("made one with a long queue"),
        Err(error) => Finding::missing(
            error,
            "modprobe tun; in a container the device /dev/net/tun and CAP_NET_ADMIN must be given",
        ),
    }
}

pub(super) fn vxlan(_: &Path) -> Finding {
    let plain = in_fresh_namespace(|| {
        ip("link add doctor1 type vxlan id 7 dstport 4789 nolearning")?;
        ip("link set doctor1 up")
    });
    if let Err(error) = plain {
        return Finding::missing(error, "modprobe vxlan (CONFIG_VXLAN), and install iproute2");
    }
    match in_fresh_namespace(|| ip("link add doctor1 type vxlan external dstport 4789")) {
        Ok(_) => Finding::ok("made one, and one whose key is set per packet"),
        Err(_) => Finding::ok("made one; none whose key is set per packet"),
    }
}

pub(super) fn nftables(_: &Path) -> Finding {
    let rules = "add table ip doctor; \
        add chain ip doctor in { type nat hook prerouting priority -100; }; \
        add rule ip doctor in tcp dport 6379 dnat to 10.0.0.2:6379; \
        add chain ip doctor out { type nat hook postrouting priority 100; }; \
        add rule ip doctor out masquerade";
    match in_fresh_namespace(|| command::run("nft", &[rules], LIMIT)) {
        Ok(_) => Finding::ok("a port was mapped"),
        Err(error) => Finding::missing(
            error,
            "install nftables; the kernel needs nf_tables with NAT (modprobe nft_chain_nat)",
        ),
    }
}
