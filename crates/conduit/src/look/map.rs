//! `conduit map`: where each machine's frames go, as the kernel has it and as the agent or edge does.

use super::{Where, find_status, json_line, names::Names};
use crate::wire::{MachineStatus, Status};
use anyhow::{Result, bail};
use conduit_bpf::{Entry, Key, Place, View};
use serde::Serialize;
use std::{collections::BTreeMap, io::Write, net::IpAddr};

/// Settings of `conduit map`.
#[derive(Debug, clap::Args)]
pub struct MapArgs {
    /// Where to look.
    #[command(flatten)]
    pub at: Where,
}

/// One address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Line {
    /// The machine's name; absent if nobody knows it.
    #[serde(skip_serializing_if = "Option::is_none")]
    machine: Option<String>,
    /// Of the tenant.
    network: u32,
    address: IpAddr,
    /// What the kernel has; absent with routes.
    #[serde(skip_serializing_if = "Option::is_none")]
    kernel: Option<InKernel>,
    /// What the agent or edge has; absent if none answers, or it knows no such machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    book: Option<InBook>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct InKernel {
    /// `local`, `candidate`, `remote`, `leaving`, `hold`, `expected` (held for who comes) or `drop`.
    state: String,
    epoch: u64,
    /// Underlay address of the host that has it.
    owner: IpAddr,
    /// Of the host that may have it next.
    #[serde(skip_serializing_if = "Option::is_none")]
    candidate: Option<IpAddr>,
    /// Index of its tap here.
    #[serde(skip_serializing_if = "Option::is_none")]
    tap: Option<u32>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct InBook {
    epoch: u64,
    /// `here`, `candidate`, or the overlay address of the host that has it.
    place: String,
    /// What the edge knows of that; empty at the edge itself.
    edge: String,
    /// The edge that it belongs to, where there are several, by name.
    #[serde(skip_serializing_if = "Option::is_none")]
    home: Option<String>,
    /// Overlay address of the edge that serves it now.
    #[serde(skip_serializing_if = "Option::is_none")]
    served_by: Option<IpAddr>,
    ports: Vec<String>,
}

impl From<&Entry> for InKernel {
    fn from(entry: &Entry) -> Self {
        let tap = match entry.place {
            Place::Local { tap, .. } => Some(tap),
            _ => None,
        };
        let Entry { epoch, owner, candidate, .. } = *entry;
        Self { state: entry.place.to_string(), epoch, owner, candidate, tap }
    }
}

impl InBook {
    fn of(machine: &MachineStatus, status: &Status) -> Self {
        let ports = machine.net.ports.iter();
        let home = machine.home.and_then(|at| status.homes.iter().find(|h| h.word.home == at));
        Self {
            home: home.map(|home| home.word.name.clone()),
            served_by: home.map(|home| home.word.by.overlay.into()),
            epoch: machine.epoch,
            place: machine.place.clone(),
            edge: machine.edge.clone(),
            ports: ports.map(|p| format!("{}/{}→{}", p.public, p.protocol, p.machine)).collect(),
        }
    }
}

/// Both views, by network and address.
fn lines(entries: &[(Key, Entry)], status: Option<&Status>) -> Vec<Line> {
    let mut found = BTreeMap::new();
    for (key, entry) in entries {
        let (network, address, kernel) = (key.net, key.address, Some(InKernel::from(entry)));
        found.insert(
            (network, address),
            Line { machine: None, network, address, kernel, book: None },
        );
    }
    let known = status.into_iter().flat_map(|s| s.machines.iter().map(move |m| (s, m)));
    for (status, machine) in known {
        let network = u32::from(machine.net.network.0);
        let v6 = machine.net.address_v6.map(IpAddr::from);
        for address in [Some(IpAddr::from(machine.net.address)), v6].into_iter().flatten() {
            let empty = || Line { machine: None, network, address, kernel: None, book: None };
            let line = found.entry((network, address)).or_insert_with(empty);
            line.machine = Some(machine.net.machine.clone());
            line.book = Some(InBook::of(machine, status));
        }
    }
    found.into_values().collect()
}

/// Runs the command.
pub(crate) fn run(args: &MapArgs) -> Result<()> {
    let status = find_status(args.at.socket.as_ref());
    let view = View::open(&args.at.pins).and_then(|view| view.entries());
    let (status, entries) = match (status, view) {
        // A socket that was asked for by name must answer.
        (Err(error), _) if args.at.socket.is_some() => return Err(error.into()),
        (Err(error), Err(absent)) => bail!("{absent}; and {error}"),
        (status, entries) => (status.ok(), entries.unwrap_or_default()),
    };
    let mut out = std::io::stdout().lock();
    let lines = lines(&entries, status.as_ref());
    if args.at.json {
        for line in &lines {
            json_line(&mut out, line)?;
        }
        return Ok(());
    }
    print(&lines, &Names::of(status.as_ref()), &mut out)?;
    Ok(())
}

fn print(lines: &[Line], names: &Names, out: &mut dyn Write) -> std::io::Result<()> {
    writeln!(
        out,
        "{:<20} {:<16} {:<10} {:>10} {:<16} {:<10} PORTS",
        "MACHINE", "ADDRESS", "STATE", "EPOCH", "OWNER", "EDGE"
    )?;
    for line in lines {
        let name = line.machine.as_deref().unwrap_or("-");
        let address = match line.network {
            crate::tunnel::NETWORK => line.address.to_string(),
            tenant => format!("{}@{tenant}", line.address),
        };
        // With routes, the book's word.
        let (state, epoch, owner) = match (&line.kernel, &line.book) {
            (Some(k), _) => (k.state.clone(), k.epoch, names.host(k.owner).to_string()),
            (None, Some(b)) => match b.place.parse::<IpAddr>() {
                Ok(host) => ("remote".into(), b.epoch, host.to_string()),
                Err(_) => (b.place.clone(), b.epoch, "-".into()),
            },
            (None, None) => continue,
        };
        let edge = line.book.as_ref().map_or("", |b| &b.edge);
        let edge = if edge.is_empty() { "-" } else { edge };
        let ports = line.book.as_ref().map(|b| b.ports.join(" ")).unwrap_or_default();
        let text = format!(
            "{name:<20} {address:<16} {state:<10} {epoch:>10} {owner:<16} {edge:<10} {ports}"
        );
        writeln!(out, "{}", text.trim_end())?;
        if let Some(next) = line.kernel.as_ref().and_then(|k| k.candidate) {
            writeln!(out, "{:<20} may go to {}", "", names.host(next))?;
        }
        if let Some((home, by)) = line.book.as_ref().and_then(|b| b.home.as_ref().zip(b.served_by))
        {
            writeln!(out, "{:<20} belongs to edge {home}, served by {by}", "")?;
        }
        let behind = line.kernel.as_ref().zip(line.book.as_ref());
        if let Some((kernel, book)) = behind.filter(|(k, b)| k.epoch != b.epoch) {
            writeln!(
                out,
                "{:<20} the kernel is at {}, the book at {}",
                "", kernel.epoch, book.epoch
            )?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{MachineNet, PathKind, PortMapping, Protocol, wire::Peer};
    use std::net::Ipv4Addr;

    fn status() -> Status {
        let host = |at| Peer {
            overlay: Ipv4Addr::new(100, 64, 0, at),
            underlay: Ipv4Addr::new(10, 88, 0, at),
        };
        let address = Ipv4Addr::new(10, 77, 0, 5);
        let mut net = MachineNet::new("web", address, [2, 0, 0, 0, 0, 5], 1400);
        net.ports = vec![PortMapping { protocol: Protocol::Tcp, public: 80, machine: 8080 }];
        Status {
            role: "edge".into(),
            version: crate::wire::VERSION,
            host: String::new(),
            peer: host(1),
            link: String::new(),
            peers: vec![host(2), host(3)],
            silent: Vec::new(),
            machines: vec![MachineStatus {
                net,
                epoch: 4,
                place: "100.64.0.2".into(),
                edge: String::new(),
                home: None,
            }],
            homes: Vec::new(),
            pairs: Vec::new(),
            machine_count: 1,
            path: PathKind::Bpf,
            protection: String::new(),
            counts: BTreeMap::new(),
        }
    }

    fn entry(last: u8, epoch: u64) -> (Key, Entry) {
        let key = Key { net: crate::tunnel::NETWORK, address: IpAddr::from([10, 77, 0, last]) };
        let owner = IpAddr::from([10, 88, 0, 2]);
        let candidate = Some(IpAddr::from([10, 88, 0, 3]));
        let place = Place::Remote { leaving: false };
        (key, Entry { epoch, owner, candidate, place, mac: [2, 0, 0, 0, 0, last] })
    }

    fn text(entries: &[(Key, Entry)], status: Option<&Status>) -> String {
        let mut out = Vec::new();
        print(&lines(entries, status), &Names::of(status), &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_machine_is_shown_once_with_what_kernel_and_book_say() {
        let text = text(&[entry(5, 4), entry(6, 9)], Some(&status()));
        let web = text.lines().find(|l| l.starts_with("web")).unwrap();
        assert!(web.contains("10.77.0.5") && web.contains("remote") && web.contains("100.64.0.2"));
        assert!(web.ends_with("80/tcp→8080"), "{web}");
        assert!(text.contains("may go to 100.64.0.3"), "{text}");
        let other = text.lines().find(|l| l.contains("10.77.0.6")).unwrap();
        assert!(
            other.starts_with("- ") && other.contains(" 9 "),
            "an entry without a name: {other}"
        );
        assert!(!text.contains("the kernel is at"), "{text}");
    }

    #[test]
    fn a_book_that_is_behind_the_kernel_is_pointed_out() {
        assert!(
            text(&[entry(5, 6)], Some(&status())).contains("the kernel is at 6, the book at 4")
        );
    }

    #[test]
    fn with_routes_the_book_is_shown_and_without_an_agent_the_kernel() {
        let routes = text(&[], Some(&status()));
        assert!(routes.contains("remote") && routes.contains("100.64.0.2"), "{routes}");
        let alone = text(&[entry(5, 4)], None);
        assert!(alone.contains("10.88.0.2"), "the underlay address stands for the host: {alone}");
    }
}
