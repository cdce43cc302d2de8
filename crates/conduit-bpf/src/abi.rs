//! The kernel's view of what this crate writes and reads: `bpf/abi.h` in Rust, byte for byte, and
//! the types that the rest of the code uses instead.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Version of the pinned maps' layout: `CD_LAYOUT` in `bpf/abi.h`.
pub const LAYOUT: u32 = 2;

/// First byte of the marks of packets of machines in the host's stack, the machine's network after it:
/// `CD_NET_MARK` in `bpf/abi.h`.
pub const NETWORK_MARK: u32 = 0x6d00_0000;

/// `CD_WIRE_STEPS` in `bpf/abi.h`: flips that an epoch of the lease has room for on the wire.
pub(crate) const WIRE_STEPS: u64 = 64;
/// `CD_EPOCH_SLACK` in `bpf/abi.h`.
pub(crate) const EPOCH_SLACK: i16 = 8 * WIRE_STEPS as i16;

/// Where the change stands in the frame that the change program is run on.
pub(crate) const CHANGE_AT: usize = 16;

/// `struct cd_key`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub(crate) struct RawKey {
    pub(crate) net: u32,
    pub(crate) addr: [u8; 16],
}

/// `struct cd_entry`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct RawEntry {
    pub(crate) lock: u32,
    pub(crate) check: u32,
    pub(crate) epoch: u64,
    pub(crate) owner: [u8; 16],
    pub(crate) candidate: [u8; 16],
    pub(crate) ifindex: u32,
    pub(crate) state: u8,
    pub(crate) flags: u8,
    pub(crate) mac: [u8; 6],
    pub(crate) waiting: u32,
}

/// `struct cd_port`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct RawPort {
    pub(crate) net: u32,
    pub(crate) mac: [u8; 6],
    pub(crate) pad: [u8; 2],
    pub(crate) v4: [u8; 16],
    pub(crate) v6: [u8; 16],
}

/// `struct cd_config`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct RawConfig {
    pub(crate) this: [u8; 16],
    pub(crate) edge: [u8; 16],
    pub(crate) tunnel: u32,
    pub(crate) hold: u32,
    pub(crate) net: u32,
    pub(crate) role: u32,
    pub(crate) gateway: [u8; 6],
    pub(crate) out: u8,
    pub(crate) pad: u8,
}

/// `struct cd_front`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct RawFront {
    pub(crate) edge: [u8; 16],
    pub(crate) epoch: u64,
}

/// The edge that serves a home.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Front {
    /// Its underlay address.
    pub edge: IpAddr,
    /// Of the word that said so.
    pub epoch: u64,
}

impl From<Front> for RawFront {
    fn from(front: Front) -> Self {
        Self { edge: mapped(front.edge), epoch: front.epoch }
    }
}

impl From<RawFront> for Front {
    fn from(raw: RawFront) -> Self {
        Self { edge: unmapped(raw.edge), epoch: raw.epoch }
    }
}

/// `struct cd_change`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct RawChange {
    pub(crate) net: u32,
    pub(crate) addr: [u8; 16],
    pub(crate) verdict: u32,
    pub(crate) epoch: u64,
    pub(crate) owner: [u8; 16],
    pub(crate) candidate: [u8; 16],
    pub(crate) ifindex: u32,
    pub(crate) state: u8,
    pub(crate) flags: u8,
    pub(crate) mac: [u8; 6],
    pub(crate) waiting: u32,
}

/// `struct cd_watch`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct RawWatch {
    pub(crate) flows_until: u64,
    pub(crate) trace_until: u64,
    pub(crate) addr: [u8; 16],
    pub(crate) net: u32,
    /// Network byte order.
    pub(crate) port: [u8; 2],
    pub(crate) proto: u8,
    pub(crate) drops: u8,
}

/// `struct cd_flow_key`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(C)]
pub(crate) struct RawFlowKey {
    pub(crate) net: u32,
    pub(crate) src: [u8; 16],
    pub(crate) dst: [u8; 16],
    /// Network byte order, like the next.
    pub(crate) sport: [u8; 2],
    pub(crate) dport: [u8; 2],
    pub(crate) proto: u8,
    pub(crate) program: u8,
    pub(crate) pad: [u8; 2],
}

/// `struct cd_flow`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct RawFlow {
    pub(crate) packets: u64,
    pub(crate) bytes: u64,
    pub(crate) dropped: u64,
}

/// Bytes of `struct cd_seen`.
pub(crate) const SEEN: usize = 96;

const _: () = {
    assert!(size_of::<RawKey>() == 20);
    assert!(size_of::<RawEntry>() == 64);
    assert!(size_of::<RawPort>() == 44);
    assert!(size_of::<RawConfig>() == 56);
    assert!(size_of::<RawChange>() == 80);
    assert!(size_of::<RawWatch>() == 40);
    assert!(size_of::<RawFlowKey>() == 44);
    assert!(size_of::<RawFlow>() == 24);
    assert!(size_of::<RawFront>() == 24);
};

/// An address of a machine in a tenant's network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Network id, 24 bits: the VNI on the wire. Tenants have different ones.
    pub net: u32,
    /// The machine's address.
    pub address: IpAddr,
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} in network {}", self.address, self.net)
    }
}

impl From<Key> for RawKey {
    fn from(key: Key) -> Self {
        Self { net: key.net, addr: mapped(key.address) }
    }
}

impl From<RawKey> for Key {
    fn from(raw: RawKey) -> Self {
        Self { net: raw.net, address: unmapped(raw.addr) }
    }
}

/// Where the frames of an address go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Through the tunnel to the entry's owner. `leaving`: the machine is about to stop here, and
    /// what it still says may leave.
    Remote {
        /// See above.
        leaving: bool,
    },
    /// Into a tap here. `candidate`: the machine may come here, nothing leaves the tap yet, and
    /// nobody owns this epoch.
    Local {
        /// The tap's ifindex.
        tap: u32,
        /// See above.
        candidate: bool,
    },
    /// Into the hold tap, until somebody has the machine.
    Hold,
    /// Into the hold tap: the machine may come here, and nobody owns this epoch.
    Expected,
    /// Nowhere: it was here, and is gone.
    Drop,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Remote { leaving: false } => "remote",
            Self::Remote { leaving: true } => "leaving",
            Self::Local { candidate: false, .. } => "local",
            Self::Local { candidate: true, .. } => "candidate",
            Self::Hold => "hold",
            Self::Expected => "expected",
            Self::Drop => "drop",
        })
    }
}

/// The name of an entry's state, where only that is known.
pub(crate) fn state_name(state: u8) -> Option<&'static str> {
    match state {
        REMOTE => Some("remote"),
        LOCAL => Some("local"),
        HOLD => Some("hold"),
        DROP => Some("drop"),
        _ => None,
    }
}

pub(crate) const REMOTE: u8 = 1;
const LOCAL: u8 = 2;
pub(crate) const HOLD: u8 = 3;
pub(crate) const DROP: u8 = 4;
const CANDIDATE: u8 = 1;
pub(crate) const LEAVING: u8 = 2;
pub(crate) const DRAIN: u8 = 4;

/// One address in the forwarding map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The lease's epoch; it only grows.
    pub epoch: u64,
    /// Underlay address of the host that has the machine.
    pub owner: IpAddr,
    /// Of the host that is announced as next: an edge believes no other's newer epoch.
    pub candidate: Option<IpAddr>,
    /// Where frames go.
    pub place: Place,
    /// MAC of the guest's interface.
    pub mac: [u8; 6],
}

impl Entry {
    pub(crate) fn raw_place(&self) -> (u8, u8, u32) {
        match self.place {
            Place::Remote { leaving } => (REMOTE, if leaving { LEAVING } else { 0 }, 0),
            Place::Local { tap, candidate } => (LOCAL, if candidate { CANDIDATE } else { 0 }, tap),
            Place::Hold => (HOLD, 0, 0),
            Place::Expected => (HOLD, CANDIDATE, 0),
            Place::Drop => (DROP, 0, 0),
        }
    }

    pub(crate) fn change(&self, key: Key) -> RawChange {
        let RawKey { net, addr } = key.into();
        let (state, flags, ifindex) = self.raw_place();
        RawChange {
            net,
            addr,
            verdict: 0,
            epoch: self.epoch,
            owner: mapped(self.owner),
            candidate: self.candidate.map_or([0; 16], mapped),
            ifindex,
            state,
            flags,
            mac: self.mac,
            waiting: 0,
        }
    }

    /// `None` for a state that this version does not know.
    pub(crate) fn from_raw(raw: &RawEntry) -> Option<Self> {
        let place = match raw.state {
            REMOTE => Place::Remote { leaving: raw.flags & LEAVING != 0 },
            LOCAL => Place::Local { tap: raw.ifindex, candidate: raw.flags & CANDIDATE != 0 },
            HOLD if raw.flags & CANDIDATE != 0 => Place::Expected,
            HOLD => Place::Hold,
            DROP => Place::Drop,
            _ => return None,
        };
        Some(Self {
            epoch: raw.epoch,
            owner: unmapped(raw.owner),
            candidate: (raw.candidate != [0; 16]).then(|| unmapped(raw.candidate)),
            place,
            mac: raw.mac,
        })
    }
}

/// `check_of` of the programs: which key an entry is of.
pub(crate) fn check_of(key: &RawKey) -> u32 {
    let word = |at: usize| {
        u32::from_ne_bytes([key.addr[at], key.addr[at + 1], key.addr[at + 2], key.addr[at + 3]])
    };
    key.net.wrapping_mul(0x9e37_79b1)
        ^ word(0)
        ^ word(4).wrapping_mul(3)
        ^ word(8).wrapping_mul(5)
        ^ word(12).wrapping_mul(7)
}

/// The machine behind a tap: nothing else may come out of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Port {
    /// The tenant's network.
    pub net: u32,
    /// MAC of the guest's interface.
    pub mac: [u8; 6],
    /// Its IPv4 address.
    pub v4: Option<Ipv4Addr>,
    /// Its IPv6 address.
    pub v6: Option<Ipv6Addr>,
}

impl From<Port> for RawPort {
    fn from(port: Port) -> Self {
        Self {
            net: port.net,
            mac: port.mac,
            pad: [0; 2],
            v4: port.v4.map_or([0; 16], |a| mapped(a.into())),
            v6: port.v6.map_or([0; 16], |a| a.octets()),
        }
    }
}

/// What a host is in the tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Runs machines.
    Host,
    /// Owns public addresses; frames for the outside go there.
    Edge,
}

impl Role {
    pub(crate) fn raw(self) -> u32 {
        match self {
            Self::Host => 1,
            Self::Edge => 2,
        }
    }

    pub(crate) fn from_raw(raw: u32) -> Option<Self> {
        match raw {
            1 => Some(Self::Host),
            2 => Some(Self::Edge),
            _ => None,
        }
    }
}

/// What the programs of one host need to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// This host's underlay address.
    pub this: IpAddr,
    /// The edge's; `None` until it is known, and on an edge.
    pub edge: Option<IpAddr>,
    /// ifindex of the tunnel device.
    pub tunnel: u32,
    /// ifindex of the hold tap.
    pub hold: Option<u32>,
    /// Network of frames that come from this host's own stack.
    pub net: u32,
    /// What this host is.
    pub role: Role,
    /// The MAC that machines know as their gateway.
    pub gateway: [u8; 6],
    /// Machines' frames for the outside leave by this host's own routes, not by the edge.
    pub by_stack: bool,
}

impl Config {
    /// `None` for the zeros of a new map.
    pub(crate) fn from_raw(raw: &RawConfig) -> Option<Self> {
        let role = match raw.role {
            1 => Role::Host,
            2 => Role::Edge,
            _ => return None,
        };
        Some(Self {
            this: unmapped(raw.this),
            edge: (raw.edge != [0; 16]).then(|| unmapped(raw.edge)),
            tunnel: raw.tunnel,
            hold: (raw.hold != 0).then_some(raw.hold),
            net: raw.net,
            role,
            gateway: raw.gateway,
            by_stack: raw.out == 1,
        })
    }
}

impl From<Config> for RawConfig {
    fn from(config: Config) -> Self {
        Self {
            this: mapped(config.this),
            edge: config.edge.map_or([0; 16], mapped),
            tunnel: config.tunnel,
            hold: config.hold.unwrap_or(0),
            net: config.net,
            role: config.role.raw(),
            gateway: config.gateway,
            out: config.by_stack.into(),
            pad: 0,
        }
    }
}

pub(crate) fn mapped(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

pub(crate) fn unmapped(bytes: [u8; 16]) -> IpAddr {
    IpAddr::V6(Ipv6Addr::from(bytes)).to_canonical()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_the_same_after_the_way_through_the_kernels_form() {
        let owner = IpAddr::from([10, 88, 0, 2]);
        for place in [
            Place::Remote { leaving: false },
            Place::Remote { leaving: true },
            Place::Local { tap: 7, candidate: true },
            Place::Local { tap: 9, candidate: false },
            Place::Hold,
            Place::Expected,
            Place::Drop,
        ] {
            let candidate = Some("fd00::2".parse().unwrap());
            let entry = Entry { epoch: 1 << 40, owner, candidate, place, mac: [2, 0, 0, 0, 0, 5] };
            let raw = entry.change(Key { net: 5, address: "fd00::9".parse().unwrap() });
            let raw = RawEntry {
                epoch: raw.epoch,
                owner: raw.owner,
                candidate: raw.candidate,
                ifindex: raw.ifindex,
                state: raw.state,
                flags: raw.flags,
                mac: raw.mac,
                ..RawEntry::default()
            };
            assert_eq!(Entry::from_raw(&raw), Some(entry));
        }
        assert_eq!(Entry::from_raw(&RawEntry { state: 99, ..RawEntry::default() }), None);
    }

    #[test]
    fn a_host_is_what_it_was_said_to_be() {
        let config = Config {
            this: IpAddr::from([10, 88, 0, 2]),
            edge: Some("fd88::1".parse().unwrap()),
            tunnel: 3,
            hold: Some(4),
            net: 6472,
            role: Role::Edge,
            gateway: [2, 0, 0, 0, 0, 1],
            by_stack: true,
        };
        assert_eq!(Config::from_raw(&config.into()), Some(config));
        assert_eq!(Config::from_raw(&RawConfig::default()), None);
    }

    #[test]
    fn an_ipv4_address_is_written_as_mapped_and_read_as_ipv4() {
        let bytes = mapped(IpAddr::from([10, 77, 0, 1]));
        assert_eq!(bytes, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 77, 0, 1]);
        assert_eq!(unmapped(bytes), IpAddr::from([10, 77, 0, 1]));
    }
}
