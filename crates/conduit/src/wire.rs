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
//!  address {id, machine, network}      given {id, address, …} | refused {id, error}
//!  resolve {id, network, question, …}  resolved {id, answer} | refused {id, error}
//!  note {to, note}                     note {from, note}        from one host to another: see `secure`
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
    conntrack::Flow,
    datapath::{MachineNet, NetError, NetworkId},
    homes::{Home, HomeWord},
    plane::PathKind,
    policy::{Limits, Policy},
    secure::Note,
};
use base64::prelude::{BASE64_STANDARD, Engine as _};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{
    collections::BTreeMap,
    io::{self, BufRead, Write},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
};

/// Version of both protocols.
pub const VERSION: u32 = 5;
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
    /// When this became so, in milliseconds since 1970 by the end's own clock: of what several edges
    /// say of it, the newest counts.
    #[serde(default)]
    pub since: u64,
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
        /// The edge that it belongs to, if there are several.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        home: Option<Home>,
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
    /// A machine comes without an address: which one is its own?
    Address {
        /// Comes back in the answer.
        id: u64,
        /// The machine's name.
        machine: String,
        /// The network that it is of.
        network: NetworkId,
    },
    /// A machine asks for a name.
    Resolve {
        /// Comes back in the answer.
        id: u64,
        /// The network that the machine is of.
        network: NetworkId,
        /// The DNS message, in base 64.
        question: String,
        /// It came by TCP: the answer may be long.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        stream: bool,
    },
    /// For another end of the tunnel, this edge or a host: passed on, or lost.
    Note {
        /// Overlay address of the end.
        to: Ipv4Addr,
        /// About the preshared key of the two.
        note: Note,
    },
    /// Are you there?
    Ping {
        /// Comes back in the answer.
        id: u64,
    },
    /// The first message of another edge: questions of [`Beside`] follow.
    Edge {
        /// See [`VERSION`].
        version: u32,
        /// The edge's name; under TLS it must be the certificate's.
        name: String,
        /// Where it is.
        #[serde(flatten)]
        peer: Peer,
    },
}

/// What one edge asks of another, one line each; the answer is a [`BesideAnswer`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "beside", rename_all = "kebab-case")]
pub enum Beside {
    /// Are you there? And what I know of homes.
    Ping {
        /// All of it.
        homes: Vec<HomeWord>,
        /// How I am reached by encrypted packets.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tunnel: Option<TunnelEnd>,
        /// About the preshared key of the two.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        notes: Vec<Note>,
    },
    /// A drain begins: will you serve this home?
    Offer {
        /// Which.
        home: HomeWord,
        /// The machines that it has.
        machines: usize,
    },
    /// Connections of it, new or changed.
    Flows {
        /// Some of them.
        flows: Vec<Flow>,
    },
    /// Connections of it that have ended meanwhile.
    Ended {
        /// Some of them.
        flows: Vec<Flow>,
    },
    /// Serve it from now on, at this epoch.
    Flip {
        /// See above.
        epoch: u64,
    },
    /// The last connections have been said.
    Settle,
}

/// The answer to a [`Beside`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum BesideAnswer {
    /// To a ping: what I know of homes.
    Words {
        /// Where I am.
        edge: Peer,
        /// All of it.
        homes: Vec<HomeWord>,
        /// How I am reached by encrypted packets.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tunnel: Option<TunnelEnd>,
    },
    /// Done.
    Done,
    /// As many connections were made or ended here, and as many could not be.
    Taken {
        /// See above.
        made: usize,
        /// See above.
        failed: usize,
    },
    /// Not done.
    Refused {
        /// Why, with what to do.
        detail: String,
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
        /// All homes, where there are several edges.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        homes: Vec<HomeWord>,
        /// Names of machines end with this; nothing if this edge answers none.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        domain: Option<String>,
    },
    /// The machine's address, for life.
    Given {
        /// Of which message.
        id: u64,
        /// The address.
        address: Ipv4Addr,
        /// Its IPv6 address, if this edge has some to give.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        address_v6: Option<Ipv6Addr>,
    },
    /// The answer to a question for a name.
    Resolved {
        /// Of which message.
        id: u64,
        /// The DNS message, in base 64.
        answer: String,
    },
    /// All hosts, after a change.
    Peers {
        /// The list.
        peers: Vec<Peer>,
    },
    /// How to reach everybody by encrypted packets, all edges included, by overlay address.
    Tunnels {
        /// All of them.
        tunnels: BTreeMap<Ipv4Addr, TunnelEnd>,
    },
    /// Another end of the tunnel says something.
    Note {
        /// Its overlay address, as its connection proves it.
        from: Ipv4Addr,
        /// About the preshared key of the two.
        note: Note,
    },
    /// The home of a machine, before the answer to what was said of it: where others have chosen
    /// before.
    Home {
        /// The machine.
        network: NetworkId,
        /// Its address.
        address: Ipv4Addr,
        /// Its home.
        home: Home,
    },
    /// All homes, after a change; only where there are several edges.
    Homes {
        /// The list.
        homes: Vec<HomeWord>,
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
    /// The address of a machine that comes without one.
    Address {
        /// The machine's name.
        machine: String,
        /// The network that it is of.
        network: NetworkId,
    },
    /// Hand this edge's homes over to another one.
    Drain {
        /// The other edge's name.
        to: String,
        /// Only this home (a name, or an overlay address); all that are served here, if not given.
        home: Option<String>,
        /// Say what would be done, and do nothing.
        dry_run: bool,
        /// How long it may take; undone if it is not over then.
        limit_ms: u64,
    },
    /// Change the keys of encrypted packets now.
    Rotate,
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
    /// The answer to [`Ask::Address`].
    Address {
        /// The address.
        address: Ipv4Addr,
        /// The IPv6 address, if the edge has some to give.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        address_v6: Option<Ipv6Addr>,
    },
    /// The answer to [`Ask::Status`].
    Status(Status),
    /// The answer to [`Ask::Machines`], by address; none if there are no more.
    Machines(Vec<MachineStatus>),
    /// The answer to [`Ask::Drain`].
    Drained(Vec<Drained>),
    /// Not done.
    Failed(NetError),
}

/// What the drain of one home did, or would do.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Drained {
    /// The home: overlay address of the edge that it is named by.
    pub home: String,
    /// Its public address.
    pub public: String,
    /// The edge that serves it now.
    pub to: String,
    /// Its machines.
    pub machines: usize,
    /// Connections that were handed over.
    pub flows: usize,
    /// Those that the other edge could not make.
    pub failed: usize,
    /// False if it was there already, or this was a dry run.
    pub changed: bool,
    /// From the first connection to the last, in seconds.
    pub seconds: f64,
    /// From the last copy before the flip to the last connection after it, in seconds.
    pub flip_seconds: f64,
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
    /// The preshared keys, where the kernel encrypts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pairs: Vec<PairStatus>,
    /// The edges' homes, where there are several.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub homes: Vec<HomeStatus>,
    /// What the BPF programs counted since they were first loaded, by name.
    #[serde(default)]
    pub counts: BTreeMap<String, u64>,
}

/// The preshared key of this end of the tunnel and another one, in a [`Status`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PairStatus {
    /// Overlay address of the other one.
    pub peer: Ipv4Addr,
    /// Number of the key; 0 if they have agreed on none yet.
    pub generation: u64,
    /// For how many seconds it has been in use.
    pub age: Option<u64>,
    /// It is being changed, or the other end has not said yet that it has it too.
    pub changing: bool,
    /// Seconds since the last handshake; nothing if there was none.
    pub handshake: Option<u64>,
}

/// A home in a [`Status`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HomeStatus {
    /// Its addresses, and who serves it.
    #[serde(flatten)]
    pub word: HomeWord,
    /// Of the edge that it is named by: `here`, `alive`, `hung` (its kernel answers, its process does
    /// not), `silent`; for an agent `connected` or why not.
    pub health: String,
    /// Of the machines known here.
    pub machines: usize,
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
    /// Its home, where there are several edges.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub home: Option<Ipv4Addr>,
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

/// Whether this can be a machine's name.
pub(crate) fn check_name(machine: &str) -> Result<(), String> {
    if machine.is_empty() || machine.len() > 128 || machine.chars().any(char::is_control) {
        return Err("a machine's name has 1 to 128 printable characters".into());
    }
    Ok(())
}

/// Bytes as text.
pub(crate) fn to_text(bytes: &[u8]) -> String {
    BASE64_STANDARD.encode(bytes)
}

/// Text as bytes; `None` if it is none of [`to_text`].
pub(crate) fn from_text(text: &str) -> Option<Vec<u8>> {
    BASE64_STANDARD.decode(text).ok()
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

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
