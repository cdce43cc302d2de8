//! What is said on the wire: between a host's agent and the edge, and between a runner and its
//! agent. One JSON object a line, at most [`LINE_LIMIT`] bytes; the first message says the version.
//!
//! ```text
//!  agent → edge                        edge → agent
//!  hello {version, host, overlay, …}   welcome {version, edge, peers} | refused {id 0}
//!  claim {id, net, owner, epoch}       done {id} | refused {id, error}
//!  release {id, net, epoch}            done {id} | refused {id, error}
//!  candidate {id, net, host}           done {id}
//!  tunnel {id, tunnel}                 done {id} | refused {id, error}
//!  ping {id}                           done {id}
//!                                      peers {peers}            whenever a host joins
//!                                      tunnels {tunnels}        whenever keys change, if encrypted
//! ```
//!
//! A claim says who owns a machine's address at an epoch; either the old owner (when it pauses) or
//! the new one (when it resumes) may say it, and the second to say it changes nothing. A candidate is
//! the host that may have the machine next: its frames are believed, with a newer epoch than the
//! owner's, before its claim has come. A release by a host that is only a candidate says that
//! the machine will not come there.

use crate::{
    datapath::{MachineNet, NetError, NetworkId},
    plane::PathKind,
    policy::{Limits, Policy},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{
    collections::BTreeMap,
    io::{self, BufRead, Write},
    net::{Ipv4Addr, SocketAddr},
};

/// Version of both protocols.
pub const VERSION: u32 = 3;
/// Longest line; a longer one ends the connection.
pub const LINE_LIMIT: usize = 64 * 1024;

/// A host of the overlay: where its vxlan interface is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Peer {
    /// Its address inside the overlay.
    pub overlay: Ipv4Addr,
    /// Where its vxlan packets go.
    pub underlay: Ipv4Addr,
}

/// What others must know to send a host encrypted packets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelEnd {
    /// Its public keys, the newest first.
    pub keys: Vec<conduit_wg::PublicKey>,
    /// Where they go, by UDP.
    pub endpoint: SocketAddr,
}

/// What an agent says to the edge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "kebab-case")]
pub enum HostSays {
    /// The first message.
    Hello {
        /// See [`VERSION`].
        version: u32,
        /// The host's name; under TLS it must be the certificate's.
        host: String,
        /// Where the host is.
        #[serde(flatten)]
        peer: Peer,
        /// How its frames find their way: the edge's must be the same.
        path: PathKind,
    },
    /// `host` may have the machine next: its owner says so when it is about to give it away, and
    /// the next one when it was prepared.
    Candidate {
        /// Comes back in the answer.
        id: u64,
        /// The machine.
        net: MachineNet,
        /// Overlay address of the host.
        host: Ipv4Addr,
        /// It will stand still for long: its frames are held until it runs.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        long: bool,
    },
    /// `owner` has the machine at `epoch`.
    Claim {
        /// Comes back in the answer.
        id: u64,
        /// The machine.
        net: MachineNet,
        /// Overlay address of the owner.
        owner: Ipv4Addr,
        /// The machine's epoch.
        epoch: u64,
    },
    /// The machine is gone, and so are its ports.
    Release {
        /// Comes back in the answer.
        id: u64,
        /// The machine.
        net: MachineNet,
        /// The machine's epoch.
        epoch: u64,
    },
    /// How to reach the sender by encrypted packets; again whenever its keys change.
    Tunnel {
        /// Comes back in the answer.
        id: u64,
        /// Keys and address.
        tunnel: TunnelEnd,
    },
    /// Are you there?
    Ping {
        /// Comes back in the answer.
        id: u64,
    },
}

/// What the edge says to an agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "kebab-case")]
pub enum EdgeSays {
    /// The answer to a hello.
    Welcome {
        /// See [`VERSION`].
        version: u32,
        /// Where the edge itself is.
        edge: Peer,
        /// All hosts.
        peers: Vec<Peer>,
    },
    /// All hosts, after a change.
    Peers {
        /// The list.
        peers: Vec<Peer>,
    },
    /// How to reach everybody by encrypted packets, the edge included, by overlay address.
    Tunnels {
        /// All of them.
        tunnels: BTreeMap<Ipv4Addr, TunnelEnd>,
    },
    /// Done as asked, or done already.
    Done {
        /// Of which message.
        id: u64,
    },
    /// Not done.
    Refused {
        /// Of which message; 0 for the hello.
        id: u64,
        /// Why.
        error: NetError,
    },
}

/// What a runner asks of the agent on its host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case")]
pub enum Ask {
    /// The host's endpoint.
    Endpoint,
    /// See [`crate::DataPath::prepare`].
    Prepare {
        /// The machine.
        net: MachineNet,
        /// How long it is expected to stand still, if that is known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        blackout_ms: Option<u64>,
    },
    /// See [`crate::DataPath::divert`].
    Divert {
        /// The machine.
        net: MachineNet,
        /// Overlay address of the destination.
        to: Ipv4Addr,
        /// The epoch.
        epoch: u64,
    },
    /// What waited in the tap after a divert has been sent on: the edge may be told.
    Drained {
        /// The machine.
        net: MachineNet,
        /// The epoch of the divert.
        epoch: u64,
    },
    /// See [`crate::DataPath::resume`].
    Resume {
        /// The machine.
        net: MachineNet,
        /// The epoch.
        epoch: u64,
    },
    /// See [`crate::DataPath::settled`].
    Settled {
        /// The machine.
        net: MachineNet,
        /// The epoch.
        epoch: u64,
        /// How long to wait at most.
        limit_ms: u64,
    },
    /// See [`crate::DataPath::forget`].
    Forget {
        /// The machine.
        net: MachineNet,
        /// The epoch.
        epoch: u64,
    },
    /// Everything there is to know, for people; of the machines as many as fit.
    Status,
    /// The machines that come after this address, as many as fit.
    Machines {
        /// See above; from the first if there is none.
        after: Option<Cursor>,
    },
}

/// The agent's (or the edge's) answer on its own socket.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Done.
    Done,
    /// This host's overlay address.
    Endpoint(Ipv4Addr),
    /// The interface to open.
    Tap(String),
    /// The answer to [`Ask::Status`].
    Status(Status),
    /// The answer to [`Ask::Machines`], by address; none if there are no more.
    Machines(Vec<MachineStatus>),
    /// Not done.
    Failed(NetError),
}

/// An agent or edge as people see it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// `agent` or `edge`.
    pub role: String,
    /// Version of the wire protocol.
    pub version: u32,
    /// Name of the host; empty for an edge.
    pub host: String,
    /// Where it is.
    #[serde(flatten)]
    pub peer: Peer,
    /// Whether an agent has its edge; for an edge, how it listens.
    pub link: String,
    /// All other hosts that it can reach.
    pub peers: Vec<Peer>,
    /// Of these, the overlay addresses of hosts that an edge cannot reach at the moment: frames for
    /// their machines are held.
    #[serde(default)]
    pub silent: Vec<Ipv4Addr>,
    /// The machines that it knows, by address; only the first of them if they are many.
    pub machines: Vec<MachineStatus>,
    /// How many it knows.
    #[serde(default)]
    pub machine_count: usize,
    /// How frames find their way.
    pub path: PathKind,
    /// How packets between hosts are protected; empty if they are not.
    #[serde(default)]
    pub protection: String,
    /// What the BPF programs counted since they were first loaded, by name.
    #[serde(default)]
    pub counts: BTreeMap<String, u64>,
}

/// A machine in a [`Status`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineStatus {
    /// The machine.
    pub net: MachineNet,
    /// Its epoch.
    pub epoch: u64,
    /// Where its frames go: `here`, `candidate`, or an overlay address.
    pub place: String,
    /// What the edge knows: `confirmed`, `pending`, …; empty at the edge itself.
    pub edge: String,
}

/// Where a list of machines goes on: network and address of the last one.
pub type Cursor = (NetworkId, Ipv4Addr);

pub(crate) fn cursor(net: &MachineNet) -> Cursor {
    (net.network, net.address)
}

/// The machines that one answer holds: the first of them, whatever it has, and as many more as leave
/// half a line for the rest.
pub(crate) fn page(machines: impl Iterator<Item = MachineStatus>) -> Vec<MachineStatus> {
    let (mut size, mut found) = (0, Vec::new());
    for machine in machines {
        size += serde_json::to_vec(&machine).map_or(0, |text| text.len() + 1);
        if size > LINE_LIMIT / 2 && !found.is_empty() {
            break;
        }
        found.push(machine);
    }
    found
}

/// Sends one message.
pub fn send(to: &mut (impl Write + ?Sized), message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    if line.len() > LINE_LIMIT {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a message of {} bytes is over the limit of {LINE_LIMIT}", line.len()),
        ));
    }
    to.write_all(&line)?;
    to.flush()
}

/// Receives one message; `None` at the end of the stream.
pub fn receive<T: DeserializeOwned>(from: &mut (impl BufRead + ?Sized)) -> io::Result<Option<T>> {
    let mut line = Vec::new();
    let size = io::Read::take(&mut *from, LINE_LIMIT as u64).read_until(b'\n', &mut line)?;
    if size == 0 {
        return Ok(None);
    }
    if line.pop() != Some(b'\n') {
        let what = if size == LINE_LIMIT { "is too long" } else { "was cut short" };
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a line {what} after {size} bytes"),
        ));
    }
    serde_json::from_slice(&line)
        .map(Some)
        .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, format!("not a message: {e}")))
}

/// Checks what came from outside before anything is done with it.
pub fn check_machine(net: &MachineNet) -> Result<(), NetError> {
    let fail = |detail: String| Err(NetError::failed(net, "check its network settings", detail));
    let name_fits = !net.machine.is_empty() && net.machine.len() <= 128;
    if !name_fits || net.machine.chars().any(char::is_control) {
        return fail("a machine's name has 1 to 128 printable characters".into());
    }
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

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
