//! Init and agent.
fn main() {}
