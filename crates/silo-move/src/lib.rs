//! Devices on the move between hosts.

pub mod assist;
pub mod codec;
pub mod peer;
pub mod wire;
