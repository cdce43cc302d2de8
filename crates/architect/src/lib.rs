//! Architect.
