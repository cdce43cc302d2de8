//! Subcommands, shared by `drafter` and `architect`.

pub mod package;
