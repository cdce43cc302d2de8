//! Init and agent inside the guest, and what a guest and its host agree on.
//!
//! * [`config`]: the file that a package carries for its init, and the kernel command line by which
//!   a host tells an instance its name and address. The package builder and the driver write
//!   them, the init reads them.
//! * [`protocol`]: the messages between agent and host, used by both.
//! * [`init`]: process 1 of the initramfs and of the root.
//! * [`agent`]: answers the host; a process of the guest, and in tests a thread behind a socket.

pub mod agent;
pub mod config;
pub mod init;
mod log;
mod process;
pub mod protocol;
mod sys;
mod users;
