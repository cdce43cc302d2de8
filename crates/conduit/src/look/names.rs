//! Names for addresses: what the agent or edge here knows, if it answers.

use crate::{cli::RUN_DIR, client, wire::Status};
use std::{
    collections::BTreeMap,
    io,
    net::IpAddr,
    path::{Path, PathBuf},
};

/// Asks the agent or edge on a socket, or whichever is here.
pub(crate) fn find_status(socket: Option<&PathBuf>) -> io::Result<Status> {
    match socket {
        Some(socket) => client::status(socket),
        None => {
            let folder = Path::new(RUN_DIR);
            client::status(&folder.join("agent.sock"))
                .or_else(|agent| client::status(&folder.join("edge.sock")).map_err(|_| agent))
        }
    }
}

/// Names of machines and hosts.
#[derive(Default)]
pub(super) struct Names {
    /// By network and address: tenants may have the same addresses.
    machines: BTreeMap<(u32, IpAddr), String>,
    /// Overlay addresses by underlay addresses.
    hosts: BTreeMap<IpAddr, IpAddr>,
}

impl Names {
    pub(super) fn of(status: Option<&Status>) -> Self {
        let Some(status) = status else { return Self::default() };
        let machines = status.machines.iter().flat_map(|m| {
            let addresses = [Some(m.net.address.into()), m.net.address_v6.map(IpAddr::from)];
            let network = u32::from(m.net.network.0);
            addresses.into_iter().flatten().map(move |a| ((network, a), m.net.machine.clone()))
        });
        let hosts = status.peers.iter().chain([&status.peer]);
        Self {
            machines: machines.collect(),
            hosts: hosts.map(|p| (p.underlay.into(), p.overlay.into())).collect(),
        }
    }

    /// The machine with this address.
    pub(super) fn machine(&self, network: u32, address: IpAddr) -> Option<&str> {
        self.machines.get(&(network, address)).map(String::as_str)
    }

    /// The network of a machine, and its IPv4 address.
    pub(super) fn address(&self, machine: &str) -> Option<(u32, IpAddr)> {
        self.machines
            .iter()
            .find_map(|(&at, name)| (name == machine && at.1.is_ipv4()).then_some(at))
    }

    /// The overlay address of the host with this underlay address, else that itself.
    pub(super) fn host(&self, underlay: IpAddr) -> IpAddr {
        self.hosts.get(&underlay).copied().unwrap_or(underlay)
    }
}
