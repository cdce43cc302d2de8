//! Conduit: connections that follow.
//!
//! A machine keeps its address and its flows when it lands on another host. The contract with
//! drafter is [`DataPath`]; this crate has three implementations:
//!
//! | | reaches | needs |
//! |---|---|---|
//! | [`AgentDataPath`] | a fleet: hosts joined by an overlay, clients through an edge | `conduit agent` on this host, `conduit edge` somewhere |
//! | [`LocalDataPath`] | one host: a tap and a route | nothing but root |
//! | [`NullDataPath`] | nothing | nothing but root |
//!
//! The path of a frame:
//!
//! ```text
//!  client ── public address ── edge ══ vxlan ══ host A ── tap ── machine
//!                              NAT      ╚══════ host B ── tap (a long queue, open, not yet read)
//! ```
//!
//! BPF programs lead frames ([`PathKind::Bpf`], `docs/conduit.md`), or routes where the kernel
//! cannot ([`PathKind::Routes`]). A move changes one map entry, or two routes through an open
//! netlink socket. Frames that come before the machine runs at its destination wait in the
//! destination tap's queue; frames that still come to the source are sent on (the trombone); frames
//! that were left in the source tap's queue are taken out and sent after them ([`tap::drain`]). The
//! kernel keeps all of it when a daemon of ours dies.
//!
//! Every change carries the machine's epoch, a copy of the lease's: older ones are refused by each
//! host and by the edge on their own ([`book`], [`edge::ledger`]).

pub mod agent;
mod announce;
pub mod bench;
pub mod book;
pub mod check;
pub mod cli;
mod client;
pub mod conntrack;
mod datapath;
pub mod edge;
pub mod exec;
#[doc(hidden)]
pub mod fuzz;
pub mod holder;
pub mod homes;
pub mod host;
mod journal;
mod keys;
pub mod lab;
mod local;
pub mod look;
mod metrics;
pub mod netlink;
pub mod overlay;
mod plane;
pub mod policy;
pub mod probe;
mod recall;
pub mod secure;
mod store;
mod sys;
pub mod tap;
pub mod tunnel;
pub mod wg;
pub mod wire;

pub use announce::{Announce, BadAnnounce};
pub use client::{AgentDataPath, status};
pub use conduit_bpf::{ROOT as PINS, sweep as sweep_pins};
pub use datapath::{
    DataPath, HostEndpoint, LONG_BLACKOUT, MachineKey, MachineNet, NetError, NetworkId,
    NullDataPath, PortMapping, Protocol, Tap, mac_of,
};
pub use exec::KernelError;
pub use local::LocalDataPath;
pub use plane::{PathChoice, PathKind};
pub use tap::name as tap_name;
