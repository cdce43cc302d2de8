//! How a machine moves.

pub mod protocol;
pub mod switchover;
