//! Conduit: connections that follow.
//!
//! A machine keeps its address and its flows when it lands on another host. The contract with
//! drafter is [`DataPath`]; [`NullDataPath`] serves machines without a network.

use std::{net::Ipv4Addr, os::fd::OwnedFd};

/// A machine as the network sees it: the same on every host.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct MachineNet {
    /// Name of the machine, for messages.
    pub machine: String,
    /// The machine's address, for life.
    pub address: Ipv4Addr,
    /// MAC of the guest's interface.
    pub mac: [u8; 6],
    /// MTU inside the guest.
    pub mtu: u16,
    /// Ports that the edge maps to the machine.
    pub ports: Vec<PortMapping>,
}

/// A port of the edge's public address that leads to a port of the machine.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PortMapping {
    /// `tcp` or `udp`.
    pub protocol: Protocol,
    /// Port on the edge.
    pub public: u16,
    /// Port in the machine.
    pub machine: u16,
}

/// Transport protocol of a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// Where a host is reached by its peers' data path (its overlay address); not a secret.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct HostEndpoint(pub Ipv4Addr);

/// Why the network did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The epoch is older than one already seen: somebody else owns the address now.
    #[error("machine \"{machine}\": epoch {asked} is over, the data path is at {current}")]
    StaleEpoch {
        /// Which machine.
        machine: String,
        /// The caller's epoch.
        asked: u64,
        /// The data path's epoch.
        current: u64,
    },
    /// Something failed.
    #[error("machine \"{machine}\": {operation}: {detail}")]
    Failed {
        /// Which machine.
        machine: String,
        /// What was attempted, with interface, address or peer.
        operation: String,
        /// The cause, with what to do.
        detail: String,
    },
}

/// An open tap of a machine on this host.
pub struct Tap {
    /// Interface name on this host.
    pub name: String,
    /// The descriptor that the monitor gets (a duplicate stays here, so that frames left behind
    /// can be drained).
    pub fd: OwnedFd,
}

/// What drafter asks of the network, in the order of a move. All calls are idempotent by epoch:
/// the same call with the same epoch again is a success that changes nothing; an older epoch is
/// refused. The epoch is a copy of the lease's, never a second authority.
pub trait DataPath: Send + Sync {
    /// This host's own endpoint, told to the source so that it can flip to it.
    fn endpoint(&self) -> HostEndpoint;

    /// Destination, before the pause (and a first boot): opens the tap with a long queue, so that
    /// frames which arrive before the machine runs wait in it, in order.
    fn prepare(&self, net: &MachineNet) -> Result<Tap, NetError>;

    /// Source, when the machine has paused: frames go to `to` from now on, here and at the edge,
    /// and what waits in the old tap's queue is sent after them. Returns the number of drained frames.
    fn pause(
        &self,
        net: &MachineNet,
        tap: &Tap,
        to: &HostEndpoint,
        epoch: u64,
    ) -> Result<u64, NetError>;

    /// The machine runs here: the owner at `epoch`. Frames for it come here.
    fn resume(&self, net: &MachineNet, epoch: u64) -> Result<(), NetError>;

    /// Source, after a failed move: the machine runs here again at `epoch` (newer than the one
    /// given to `pause`).
    fn abort(&self, net: &MachineNet, epoch: u64) -> Result<(), NetError> {
        self.resume(net, epoch)
    }

    /// The machine is not here any more (moved away long enough ago, or removed).
    fn forget(&self, net: &MachineNet, epoch: u64) -> Result<(), NetError>;
}
