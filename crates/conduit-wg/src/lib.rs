//! WireGuard in user space for conduit's overlay, as a process of its own (`conduit tunnel run`):
//! boringtun's core for the protocol and the ciphers, and our own I/O around it.
//!
//! ```text
//!  kernel ── tun (large segments, virtio_net_hdr) ── cut ── encrypt ── UDP_SEGMENT, sendmmsg ──►
//!         ◄─ tun (put together again) ── merge ── decrypt ── UDP_GRO, recvmmsg ◄──
//! ```
//!
//! | module | what |
//! |---|---|
//! | [`packet`] | cuts large segments into packets, puts packets together; no I/O |
//! | `engine`, `peers` | who is who, sessions, keys, timers; no devices |
//! | `udp`, `tun`, `sys` | devices and system calls |
//! | `device` | the loop: [`Tunnel`] |
//! | `control` | how it is asked: [`ask`], [`status`] |
//! | `handover` | from one process to the next without a packet lost |
//! | `state`, `key` | what outlives the process |
//!
//! It speaks WireGuard as it is, so the other end may as well be a kernel's or anybody else's.

mod control;
mod counters;
mod device;
mod engine;
mod error;
#[doc(hidden)]
pub mod fuzz;
mod handover;
mod key;
pub mod packet;
mod peers;
mod state;
mod sys;
mod tun;
mod udp;

pub use control::{Answer, Ask, Handed, PeerStatus, Status, ask, status, tell};
pub use counters::Counters;
pub use device::{End, Settings, Stopper, Tunnel};
pub use error::TunnelError;
pub use key::{PrivateKey, PublicKey};
pub use state::{Network, PeerConfig};
