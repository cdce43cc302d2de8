//! The `drafter` command.
fn main() {}
