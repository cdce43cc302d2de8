//! Tests of the store as its users see it: real requests to a real S3 server, to a local folder, and
//! to a store in memory where clients die.

#![allow(clippy::unwrap_used, reason = "in tests a panic is the message")]

mod basics;
mod collection;
mod copying;
mod crash;
mod faults;
mod keys;
mod lines;
mod moto;
mod pins;
mod rounds;
mod slow;
mod support;
