//! Memory that faults: a machine's memory that moves, and mounts of devices that are elsewhere.

pub mod machine;
pub mod mount;
pub mod staging;
pub mod sys;
