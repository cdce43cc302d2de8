//! Architect: the parts of the command people type.

pub mod baseline;
pub mod demo;
pub mod doctor;
pub mod fleet;
pub mod load;
pub mod measure;
pub mod programs;
pub mod rig;
pub mod table;
