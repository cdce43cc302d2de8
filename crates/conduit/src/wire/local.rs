//! What is said on the agent's and the edge's own sockets: questions of runners and of people, and the answers.

use super::{LINE_LIMIT, Peer};
use crate::{
    datapath::{MachineNet, NetError, NetworkId},
    homes::HomeWord,
    plane::PathKind,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, Ipv6Addr},
};

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
