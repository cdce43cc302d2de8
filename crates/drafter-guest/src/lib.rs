//! Messages between a guest and its host.
