//! A move of a device group, sans I/O: events and the time go in, actions come out.
//!
//! What must hold whatever connections, hosts and stores do is listed in `docs/silo.md`.

pub mod messages;
