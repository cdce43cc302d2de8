//! The runner: one process that owns one machine on one host.
