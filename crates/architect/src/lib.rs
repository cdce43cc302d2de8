//! Architect: the parts of the command people type.

pub mod baseline;
pub mod bench;
pub mod doctor;
pub mod load;
pub mod table;
