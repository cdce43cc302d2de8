//! The kill matrix, on real processes: the source, the destination and the line are cut at every
//! message boundary of a move (`common/killing.rs`).

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use common::killing::{Bare, Extras, Victim, child as play, matrix};

/// Not a test: what the parents start.
#[test]
fn child() {
    play(&Extras { bandwidth: None, source: |_| {}, destination: |_| {} });
}

#[test]
fn check_16_18_21_a_source_killed_at_every_boundary() {
    matrix(&mut Bare, Victim::Source);
}

#[test]
fn check_18_21_a_destination_killed_at_every_boundary() {
    matrix(&mut Bare, Victim::Destination);
}

#[test]
fn check_19_21_a_line_cut_at_every_boundary() {
    matrix(&mut Bare, Victim::Line);
}
