//! The `conduit` command.
fn main() {}
