//! The `architect` command.
fn main() {}
