//! What a guest and its host agree on.
//!
//! * [`config`]: the file that a package carries for its init, and the kernel command line by which
//!   a host tells an instance its name and address. The package builder and the driver write
//!   them, the init reads them.

pub mod config;
