//! The machine's name and network, from the facts of the instance.
//!
//! The address is a /32 and the gateway a link-local address reached by a host route: nothing in
//! here depends on the host or its subnets, so nothing changes when the machine moves.

use crate::{
    config::{GATEWAY_V6, InstanceConfig},
    log::say,
    sys::Interface,
};
use std::{
    fmt::Write as _,
    fs::File,
    io,
    net::Ipv4Addr,
    os::unix::fs::FileExt as _,
    path::Path,
    time::{Duration, Instant},
};

/// How long the interface may take to appear after its driver is loaded.
const INTERFACE_LIMIT: Duration = Duration::from_secs(5);

/// `ARPHRD_ETHER` of `<linux/if_arp.h>`, as /sys shows it.
const ETHERNET: &str = "1";

/// Sets name and network. What fails is told on the console and left out.
pub(super) fn set_up(instance: &InstanceConfig) {
    if let Some(host) = &instance.host {
        said("the host name", nix::unistd::sethostname(host).map_err(io::Error::from));
        said("/etc/hostname", put(Path::new("/etc/hostname"), &format!("{host}\n")));
    }
    said("the loopback interface", Interface::open("lo").and_then(|lo| lo.up()));
    said("/etc/hosts", write_hosts(Path::new("/etc/hosts"), instance));
    if !instance.name_servers.is_empty() {
        said("/etc/resolv.conf", write_resolver(Path::new("/etc/resolv.conf"), instance));
    }
    if let Some(address) = instance.address {
        let interface = wait_for_interface(Path::new("/sys/class/net"), INTERFACE_LIMIT)
            .and_then(|name| Interface::open(&name));
        said("the network", interface.and_then(|interface| connect(&interface, instance, address)));
    }
}

fn said(what: &str, result: io::Result<()>) {
    if let Err(error) = result {
        say!("{what} could not be set up: {error}");
    }
}

fn connect(interface: &Interface, instance: &InstanceConfig, address: Ipv4Addr) -> io::Result<()> {
    let name = interface.name();
    let step = |what: &str, result: io::Result<()>| {
        result.map_err(|error| io::Error::new(error.kind(), format!("{name}: {what}: {error}")))
    };
    step("MTU", interface.set_mtu(instance.mtu))?;
    if instance.address_v6.is_some() {
        step("IPv6 settings", fix_ipv6(&Path::new("/proc/sys/net/ipv6/conf").join(&name)))?;
    }
    step("address", interface.set_address(address))?;
    step("up", interface.up())?;
    step("route to the gateway", interface.add_host_route(instance.gateway))?;
    step("default route", interface.add_default_route(instance.gateway))?;
    let Some(address) = instance.address_v6 else { return Ok(()) };
    step("IPv6 address", interface.set_address_v6(address))?;
    step("IPv6 default route", interface.add_default_route_v6(GATEWAY_V6))
}

/// Another name, for a copy of a machine: in the files that name `old`.
pub(crate) fn rename(old: &InstanceConfig, new: &InstanceConfig) -> io::Result<()> {
    if let Some(host) = &new.host {
        put(Path::new("/etc/hostname"), &format!("{host}\n"))?;
    }
    rewrite_hosts(Path::new("/etc/hosts"), old, new)
}

/// Other addresses, for a copy of a machine. Connections from the old ones can send nothing any more.
pub(crate) fn readdress(old: &InstanceConfig, new: &InstanceConfig) -> io::Result<()> {
    let (Some(was), Some(address)) = (old.address, new.address) else { return Ok(()) };
    let interface = match Interface::with_address(was)? {
        Some(interface) => interface,
        // Somebody has changed it.
        None => {
            Interface::open(&wait_for_interface(Path::new("/sys/class/net"), INTERFACE_LIMIT)?)?
        }
    };
    if let Some(address) = old.address_v6 {
        interface.remove_address_v6(address)?;
    }
    // Taking the last address of an interface takes its routes too: all of it is set up anew.
    connect(&interface, new, address)
}

/// In the hosts file, the lines that the init wrote for `old` are for `new`.
fn rewrite_hosts(path: &Path, old: &InstanceConfig, new: &InstanceConfig) -> io::Result<()> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let ours = |line: &&str| {
        let mut words = line.split_whitespace();
        let address = old.address.unwrap_or(Ipv4Addr::new(127, 0, 1, 1)).to_string();
        words.next() == Some(&address) && words.next() == old.host.as_deref()
    };
    let mut kept = String::new();
    for line in text.lines().filter(|line| !ours(line)) {
        kept.push_str(line);
        kept.push('\n');
    }
    let whole = with_names(kept, new);
    if whole == text { Ok(()) } else { put(path, &whole) }
}

/// Writes a small file over what is there. Not by emptying it first: such a file ext4 writes to its
/// disk as soon as it is closed (`auto_da_alloc`), which was a fifth of what a copy did until it had its
/// identity.
fn put(path: &Path, text: &str) -> io::Result<()> {
    let file = File::options().write(true).create(true).truncate(false).open(path)?;
    file.write_all_at(text.as_bytes(), 0)?;
    let length = text.len() as u64;
    if file.metadata()?.len() > length { file.set_len(length) } else { Ok(()) }
}

/// What the kernel would do by itself with IPv6: ask whether somebody else has the address (nobody has:
/// for a second nothing could be sent), and believe routers.
fn fix_ipv6(settings: &Path) -> io::Result<()> {
    for (key, value) in [("accept_dad", "0"), ("accept_ra", "0")] {
        std::fs::write(settings.join(key), value)?;
    }
    Ok(())
}

/// The first Ethernet interface by name; waits for one to appear.
fn wait_for_interface(class: &Path, limit: Duration) -> io::Result<String> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(name) = first_interface(class) {
            return Ok(name);
        }
        if Instant::now() >= deadline {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!(
                    "no Ethernet interface within {limit:?}; was the machine started with a \
                     network, and does the initramfs load virtio_net?"
                ),
            ));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn first_interface(class: &Path) -> Option<String> {
    let mut names: Vec<String> = class
        .read_dir()
        .ok()?
        .flatten()
        .filter(|entry| {
            let kind = std::fs::read_to_string(entry.path().join("type")).unwrap_or_default();
            // `dummy` and the like have no device behind them.
            kind.trim_end() == ETHERNET && entry.path().join("device").exists()
        })
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names.into_iter().next()
}

/// Writes the resolver's file in place of whatever is there, also a link to a service that does
/// not run in this machine.
fn write_resolver(path: &Path, instance: &InstanceConfig) -> io::Result<()> {
    let mut text = String::new();
    for server in &instance.name_servers {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "nameserver {server}");
    }
    if path.is_symlink() {
        std::fs::remove_file(path)?;
    }
    std::fs::write(path, text)
}

/// Makes sure that `localhost` and the machine's own name resolve; keeps what the package has.
fn write_hosts(path: &Path, instance: &InstanceConfig) -> io::Result<()> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let whole = with_names(text.clone(), instance);
    if whole == text { Ok(()) } else { put(path, &whole) }
}

/// A hosts file with the names that are missing in it.
fn with_names(mut text: String, instance: &InstanceConfig) -> String {
    let knows = |text: &str, name: &str| {
        text.lines()
            .map(|line| line.split('#').next().unwrap_or_default())
            .any(|line| line.split_whitespace().skip(1).any(|word| word == name))
    };
    let mut add = |name: &str, address: Ipv4Addr| {
        if knows(&text, name) {
            return;
        }
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{address} {name}");
    };
    add("localhost", Ipv4Addr::LOCALHOST);
    if let Some(host) = &instance.host {
        add(host, instance.address.unwrap_or(Ipv4Addr::new(127, 0, 1, 1)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn folder(name: &str) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!("drafter-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    fn instance() -> InstanceConfig {
        InstanceConfig::parse("drafter.host=a drafter.ip=10.9.0.5 drafter.dns=10.0.0.1,10.0.0.2")
            .unwrap()
    }

    #[test]
    fn the_first_real_ethernet_interface_is_taken() {
        let class = folder("net");
        for (name, kind, real) in
            [("eth1", "1", true), ("eth0", "1", true), ("dummy0", "1", false), ("lo", "772", false)]
        {
            std::fs::create_dir_all(class.join(name)).unwrap();
            std::fs::write(class.join(name).join("type"), format!("{kind}\n")).unwrap();
            if real {
                std::fs::create_dir_all(class.join(name).join("device")).unwrap();
            }
        }
        assert_eq!(first_interface(&class).as_deref(), Some("eth0"));
        std::fs::remove_dir_all(class.join("eth0")).unwrap();
        std::fs::remove_dir_all(class.join("eth1")).unwrap();
        let error = wait_for_interface(&class, Duration::from_millis(30)).unwrap_err();
        assert!(error.to_string().contains("virtio_net"), "{error}");
        std::fs::remove_dir_all(class).unwrap();
    }

    #[test]
    fn a_file_that_is_written_over_has_nothing_of_the_old_one() {
        let folder = folder("put");
        let path = folder.join("hostname");
        for text in ["a-long-name\n", "short\n", "a-longer-name\n", ""] {
            put(&path, text).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn an_interface_is_found_by_its_address() {
        let lo = Interface::with_address(Ipv4Addr::LOCALHOST).unwrap().unwrap();
        assert_eq!(lo.name(), "lo");
        // Of TEST-NET-1 (RFC 5737): nobody's.
        assert!(Interface::with_address(Ipv4Addr::new(192, 0, 2, 1)).unwrap().is_none());
    }

    #[test]
    fn a_dangling_resolver_link_is_replaced_by_a_file() {
        let folder = folder("resolv");
        let path = folder.join("resolv.conf");
        symlink("/no/such/stub", &path).unwrap();
        write_resolver(&path, &instance()).unwrap();
        assert_eq!(
            std::fs::read_to_string(&path).unwrap(),
            "nameserver 10.0.0.1\nnameserver 10.0.0.2\n"
        );
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_copy_is_in_the_hosts_file_under_its_own_name_and_address_only() {
        let folder = folder("renamed");
        let path = folder.join("hosts");
        std::fs::write(&path, "127.0.0.1 localhost\n10.1.1.1 a\n").unwrap();
        let old = InstanceConfig { host: Some("b".into()), ..instance() };
        write_hosts(&path, &old).unwrap();
        let mut new = InstanceConfig { host: Some("c".into()), ..old.clone() };
        new.address = Some(Ipv4Addr::new(10, 9, 0, 6));
        rewrite_hosts(&path, &old, &new).unwrap();
        let expected = "127.0.0.1 localhost\n10.1.1.1 a\n10.9.0.6 c\n";
        assert_eq!(std::fs::read_to_string(&path).unwrap(), expected);
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn hosts_keeps_what_is_there_and_a_second_boot_adds_nothing() {
        let folder = folder("hosts");
        let path = folder.join("hosts");
        std::fs::write(&path, "127.0.0.1\tlocalhost # me\n10.1.1.1 peer").unwrap();
        for _ in 0..2 {
            write_hosts(&path, &instance()).unwrap();
            assert_eq!(
                std::fs::read_to_string(&path).unwrap(),
                "127.0.0.1\tlocalhost # me\n10.1.1.1 peer\n10.9.0.5 a\n"
            );
        }
        std::fs::remove_dir_all(folder).unwrap();
    }
}
