//! Devices on the move between hosts.

pub mod codec;
