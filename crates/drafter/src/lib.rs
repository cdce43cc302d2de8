//! Drafter: machines that move.
//!
//! A machine is started from a [`package`] by a [`driver`], talked to through its [`guest`]
//! channel, and moved by [`migrate`] under the authority of a [`lease`]. One [`runner`] process
//! owns one machine on one host.

pub mod checkpoint;
pub mod cli;
pub mod driver;
pub mod guest;
pub mod migrate;
pub mod package;
pub mod runner;
pub mod tenure;

mod keeper;
mod socket;

pub use lease;
