//! What the end-to-end tests share: a stage (namespaces, daemons, runners), a guest that is busy
//! in every way that a move could break, the `drafter` command as a person types it, and scripted
//! peers that speak the migration protocol and misbehave on purpose.
//!
//! Used by `tests/*.rs` only. What must hold: one stage at a time on a computer ([`Stage::open`]
//! waits for the one before), a test that panics leaves no process and no namespace behind, and
//! what a killed test left is removed by the next one.
#![allow(
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    reason = "helpers of tests, which end by panicking"
)]

pub mod busy;
pub mod command;
pub mod copies;
pub mod full;
pub mod gate;
pub mod moves;
pub mod peer;
pub mod place;
pub mod protected;
pub mod proxy;
pub mod reception;
pub mod soak;
mod stage;
pub mod sys;
pub mod wire;
pub mod writers;

pub use stage::{Stage, program};

use std::time::{Duration, Instant};

/// How long a guest may take to boot under translation on a busy computer.
pub const BOOT: Duration = Duration::from_secs(90);

/// Waits until `done` says so; panics with `what` at the deadline.
#[track_caller]
pub fn eventually(what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !done() {
        assert!(Instant::now() < deadline, "not within {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
