//! What clients, machines and hosts see of a real edge: IPv6, tenants, policies, and who may flip.
//! Needs root; everything is in nameless network namespaces.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod addresses;
mod announce;
mod authority;
mod guests;
mod hold;
mod names;
mod notes;
mod policies;
mod rig;
mod sizes;
mod tenants;
mod v6;
