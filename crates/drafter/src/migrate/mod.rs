//! How a machine moves.

pub mod switchover;
