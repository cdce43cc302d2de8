//! doctor
pub mod missing;
