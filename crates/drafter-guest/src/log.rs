//! Lines on the console, for init and agent.
//!
//! Not `eprintln!`: that panics when the console is gone, and an init must never panic.

use std::{fmt, io::Write};

/// Writes one line; a console that cannot take it is ignored.
pub(crate) fn line(message: fmt::Arguments<'_>) {
    let text = format!("drafter: {message}\n");
    let _ = std::io::stderr().write_all(text.as_bytes());
}

macro_rules! say {
    ($($words:tt)*) => { $crate::log::line(format_args!($($words)*)) };
}
pub(crate) use say;
