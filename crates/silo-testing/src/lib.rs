//! What tests and benchmarks of silo need of an object store: a real S3 server in this process, with
//! faults on demand, another one that is not ours, and a store in memory whose client dies at a chosen
//! request.
//!
//! Not part of anything that is released: the crates depend on it in their tests, and `silo bench`.

mod dying;
mod faults;
mod moto;
mod server;

pub use dying::{Death, Dying};
pub use faults::{Fault, Faults, Request, Rule};
pub use moto::{Installed, Moto, missing};
pub use server::{S3Server, ServerError};
