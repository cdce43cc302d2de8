//! Architect: the parts of the command people type.

pub mod doctor;
pub mod load;
