//! Devices on the move between hosts: the machines of `silo_block::session` over real connections.
//!
//! ```text
//!  front ends ─► Volume (read, write, flush) ◄─ Outbound ─┐
//!                   │                                     │ codec, wire, peer
//!              BlockDevice                     Inbound ◄──┘
//!                                                 ▲
//!                                   assist: stores, other peers
//! ```
//!
//! [`Volume`] is a device that can move. [`Outbound`] gives volumes away, [`destination::Server`]
//! takes them; a volume that still misses blocks can be given on. Callers: `silo` and the machine
//! engine. What must hold is said at each module; for the whole: whatever is cut or killed, and
//! whenever, one side at most owns the devices, no acknowledged write is lost, and no wait is
//! without a deadline.

pub mod assist;
mod bounded;
mod clock;
pub mod codec;
pub mod destination;
mod lane;
pub mod ledger;
pub mod peer;
pub mod report;
pub mod source;
pub mod volume;
mod waits;
pub mod wire;

pub use destination::{Inbound, Server};
pub use silo_block::session::messages::SessionId;
pub use source::Outbound;
pub use volume::{Content, Volume};
pub use waits::WaitSummary;
