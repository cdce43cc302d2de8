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

mod check;
mod local;

pub use check::check_machine;
pub(crate) use check::check_name;
pub use local::{Answer, Ask, Cursor, Drained, HomeStatus, MachineStatus, PairStatus, Status};
pub(crate) use local::{cursor, page};

use crate::{
    conntrack::Flow,
    datapath::{MachineNet, NetError, NetworkId},
    homes::{Home, HomeWord},
    plane::PathKind,
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

/// Bytes as text.
pub(crate) fn to_text(bytes: &[u8]) -> String {
    BASE64_STANDARD.encode(bytes)
}

/// Text as bytes; `None` if it is none of [`to_text`].
pub(crate) fn from_text(text: &str) -> Option<Vec<u8>> {
    BASE64_STANDARD.decode(text).ok()
}

#[cfg(test)]
mod tests;
