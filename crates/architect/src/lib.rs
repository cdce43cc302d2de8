//! Architect.

pub mod rig;
