//! Tests of the store as its users see it: real requests to a real S3 server, to a local folder, and
//! to a store in memory where clients die.

mod basics;
mod collection;
mod copying;
mod crash;
mod faults;
mod keys;
mod lines;
mod support;
