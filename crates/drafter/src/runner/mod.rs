//! The runner: one process that owns one machine on one host.

pub mod api;
pub mod config;
pub mod state;
