//! The contract between drafter and the network: [`DataPath`], its vocabulary, and the data path
//! that leads nowhere.

use crate::{policy::Policy, tap};
use serde::{Deserialize, Serialize};
use std::{
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
    os::fd::OwnedFd,
    time::Duration,
};

/// A tenant's network. Machines of different ones may have the same addresses, and do not reach each
/// other by them. 1 to 65535: the tunnel has room for 24 bits, connection tracking's zones for 16.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NetworkId(pub u16);

impl NetworkId {
    /// The network of machines that belong to no tenant.
    pub const COMMON: Self = Self(6472);

    fn is_common(&self) -> bool {
        *self == Self::COMMON
    }
}

impl Default for NetworkId {
    fn default() -> Self {
        Self::COMMON
    }
}

impl fmt::Display for NetworkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What names a machine in the data path: its address in its tenant's network. Written `10.77.0.5`, or
/// `10.77.0.5@7` in network 7.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MachineKey {
    /// The tenant's network.
    pub network: NetworkId,
    /// The machine's address in it.
    pub address: Ipv4Addr,
}

impl fmt::Display for MachineKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.network.is_common() {
            return self.address.fmt(f);
        }
        write!(f, "{}@{}", self.address, self.network)
    }
}

/// In the network of no tenant.
impl From<Ipv4Addr> for MachineKey {
    fn from(address: Ipv4Addr) -> Self {
        Self { network: NetworkId::COMMON, address }
    }
}

/// A machine as the network sees it: the same on every host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineNet {
    /// Name of the machine, for messages.
    pub machine: String,
    /// The machine's address, for life.
    pub address: Ipv4Addr,
    /// Its IPv6 address, for life, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address_v6: Option<Ipv6Addr>,
    /// The tenant's network that these addresses are of.
    #[serde(default, skip_serializing_if = "NetworkId::is_common")]
    pub network: NetworkId,
    /// MAC of the guest's interface.
    pub mac: [u8; 6],
    /// MTU inside the guest.
    pub mtu: u16,
    /// Ports that the edge maps to the machine.
    pub ports: Vec<PortMapping>,
    /// What else the edge lets through to it, and how much.
    #[serde(default, skip_serializing_if = "Policy::is_default")]
    pub policy: Policy,
}

impl MachineNet {
    /// A machine of no tenant, without IPv6 and ports.
    #[must_use]
    pub fn new(machine: impl Into<String>, address: Ipv4Addr, mac: [u8; 6], mtu: u16) -> Self {
        Self {
            machine: machine.into(),
            address,
            address_v6: None,
            network: NetworkId::COMMON,
            mac,
            mtu,
            ports: Vec::new(),
            policy: Policy::default(),
        }
    }

    /// Its name in the data path.
    #[must_use]
    pub fn key(&self) -> MachineKey {
        MachineKey { network: self.network, address: self.address }
    }
}

/// A MAC that follows from the address: unique where addresses are, locally administered.
#[must_use]
pub fn mac_of(address: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = address.octets();
    [0x52, 0x54, a, b, c, d]
}

/// A port of the edge's public address that leads to a port of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMapping {
    /// `tcp` or `udp`.
    pub protocol: Protocol,
    /// Port on the edge.
    pub public: u16,
    /// Port in the machine.
    pub machine: u16,
}

/// Transport protocol of a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// Where a host is reached by its peers' data path (its overlay address); not a secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostEndpoint(pub Ipv4Addr);

/// Why the network did not do as asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
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
    /// The same epoch was already given to somebody else: epochs were handed out twice.
    #[error(
        "machine \"{machine}\": epoch {epoch} already belongs to {owner}; \
         take a newer epoch from the lease and try again"
    )]
    EpochTaken {
        /// Which machine.
        machine: String,
        /// The epoch in question.
        epoch: u64,
        /// Who has it.
        owner: String,
    },
    /// The host that says so does not have the machine's lease at that epoch.
    #[error("machine \"{machine}\": host \"{host}\" may not say so at epoch {epoch}: {detail}")]
    Unauthorised {
        /// Which machine.
        machine: String,
        /// Who said it.
        host: String,
        /// The epoch in question.
        epoch: u64,
        /// What the lease says instead.
        detail: String,
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

impl NetError {
    #[allow(clippy::needless_pass_by_value, reason = "callers hand over text or an error")]
    pub(crate) fn failed(
        net: &MachineNet,
        operation: impl Into<String>,
        detail: impl ToString,
    ) -> Self {
        Self::failed_for(&net.machine, operation, detail)
    }

    /// Of a machine of which the name alone is known.
    #[allow(clippy::needless_pass_by_value, reason = "callers hand over text or an error")]
    pub(crate) fn failed_for(
        machine: &str,
        operation: impl Into<String>,
        detail: impl ToString,
    ) -> Self {
        Self::Failed {
            machine: machine.to_owned(),
            operation: operation.into(),
            detail: detail.to_string(),
        }
    }
}

/// An open tap of a machine on this host.
#[derive(Debug)]
pub struct Tap {
    /// Interface name on this host.
    pub name: String,
    /// The descriptor that the monitor gets (a duplicate stays here, so that frames left behind
    /// can be drained). Non-blocking; a duplicate shares that.
    pub fd: OwnedFd,
}

/// A machine that is expected to stand still for longer has its frames held where they can be given back
/// at a pace. In its tap's queue it would read them all at once.
pub const LONG_BLACKOUT: Duration = Duration::from_millis(200);

/// What drafter asks of the network, in the order of a move. All calls are idempotent by epoch:
/// the same call with the same epoch again is a success that changes nothing; an older epoch is
/// refused. The epoch is a copy of the lease's, never a second authority: one epoch, one owner.
///
/// ```text
///  destination                      source
///  prepare
///                                   divert      just before the processors stop
///                                   (the machine pauses)
///                                   pause       as soon as they have: drains what was left
///  resume
///  settled                          settled     before the source may go away
///                                   forget
/// ```
///
/// A move that failed after `divert`: the source takes a newer epoch and calls `abort`; the
/// destination calls `pause` towards the source with that epoch, which sends back the frames that
/// waited in its own tap, then `forget`.
pub trait DataPath: Send + Sync {
    /// This host's own endpoint, told to the source so that it can flip to it.
    fn endpoint(&self) -> HostEndpoint;

    /// Destination, before the pause (and a first boot): opens the tap with a long queue, so that
    /// frames which arrive before the machine runs wait in it, in order.
    fn prepare(&self, net: &MachineNet) -> Result<Tap, NetError>;

    /// Like [`DataPath::prepare`], for a machine that is expected to stand still for `blackout`. What
    /// comes in a long one is held where it can be given back at a pace, so that it does not overrun
    /// the machine's sockets when it runs again.
    fn prepare_for(&self, net: &MachineNet, blackout: Duration) -> Result<Tap, NetError> {
        let _ = blackout;
        self.prepare(net)
    }

    /// Destination, between [`DataPath::prepare_for`] and the source's divert: how long the machine will
    /// stand still is known better now. Its tap stays as it is.
    fn expect(&self, net: &MachineNet, blackout: Duration) -> Result<(), NetError> {
        let _ = (net, blackout);
        Ok(())
    }

    /// Source, optional, just before the processors stop: frames that come to this host go to `to`
    /// from now on, or wait to go there until [`DataPath::pause`] has sent on what is in the tap. Called this early, the guest itself still empties its tap's queue while it
    /// stops, and the monitor never takes a frame that its stopped guest cannot see (QEMU reads
    /// one such frame and drops it). [`DataPath::pause`] with the same arguments must follow, or
    /// [`DataPath::abort`]; without this call `pause` does this step too.
    fn divert(&self, net: &MachineNet, to: &HostEndpoint, epoch: u64) -> Result<(), NetError> {
        let _ = (net, to, epoch);
        Ok(())
    }

    /// Source, when the machine has paused: frames go to `to` from now on, what waits in the old
    /// tap's queue is sent there too, and then the edge is told (in this order, so that few frames
    /// overtake others). Returns the number of drained frames. Does not wait for the edge: until
    /// it answers, its frames come here and are routed on; see [`DataPath::settled`].
    fn pause(
        &self,
        net: &MachineNet,
        tap: &Tap,
        to: &HostEndpoint,
        epoch: u64,
    ) -> Result<u64, NetError>;

    /// The machine runs here: the owner at `epoch`. Frames for it come here. Does not wait for
    /// the edge.
    fn resume(&self, net: &MachineNet, epoch: u64) -> Result<(), NetError>;

    /// Source, after a failed move: the machine runs here again at `epoch` (newer than the one
    /// given to `pause`).
    fn abort(&self, net: &MachineNet, epoch: u64) -> Result<(), NetError> {
        self.resume(net, epoch)
    }

    /// Waits at most `limit` until the edge has confirmed what the last call with `epoch` said.
    /// The source may go away only after this succeeded (or the destination's did); a first boot
    /// learns here that a port is taken.
    fn settled(&self, net: &MachineNet, epoch: u64, limit: Duration) -> Result<(), NetError> {
        let _ = (net, epoch, limit);
        Ok(())
    }

    /// The machine is not here any more (moved away long enough ago, or removed). Removes its tap
    /// and its routes; a route that still forwards frames stays until the edge has confirmed.
    fn forget(&self, net: &MachineNet, epoch: u64) -> Result<(), NetError>;
}

/// A network that leads nowhere: the machine gets a tap with nothing behind it, so that its
/// interface exists and stays the same when it moves. Every other call succeeds and does nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NullDataPath;

impl DataPath for NullDataPath {
    fn endpoint(&self) -> HostEndpoint {
        HostEndpoint(Ipv4Addr::UNSPECIFIED)
    }

    fn prepare(&self, net: &MachineNet) -> Result<Tap, NetError> {
        tap::open_isolated().map_err(|e| NetError::failed(net, "open a tap that leads nowhere", e))
    }

    fn pause(
        &self,
        _net: &MachineNet,
        _tap: &Tap,
        _to: &HostEndpoint,
        _epoch: u64,
    ) -> Result<u64, NetError> {
        Ok(0)
    }

    fn resume(&self, _net: &MachineNet, _epoch: u64) -> Result<(), NetError> {
        Ok(())
    }

    fn forget(&self, _net: &MachineNet, _epoch: u64) -> Result<(), NetError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_machine_and_what_to_do() {
        let error =
            NetError::EpochTaken { machine: "redis".into(), epoch: 5, owner: "100.64.0.3".into() };
        assert_eq!(
            error.to_string(),
            "machine \"redis\": epoch 5 already belongs to 100.64.0.3; \
             take a newer epoch from the lease and try again"
        );
    }

    #[test]
    fn the_wire_form_of_an_error_is_fixed() {
        let error = NetError::StaleEpoch { machine: "m".into(), asked: 1, current: 2 };
        let text = serde_json::to_string(&error).unwrap();
        assert_eq!(text, r#"{"kind":"stale-epoch","machine":"m","asked":1,"current":2}"#);
        assert_eq!(serde_json::from_str::<NetError>(&text).unwrap(), error);
    }
}
