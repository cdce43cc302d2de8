//! The BPF data path against the kernel, in namespaces without names. Needs root.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod decisions;
mod fronts;
mod hold;
mod holder;
mod life;
mod paths;
mod rig;
mod sizes;
mod watch;
