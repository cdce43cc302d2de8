//! How commands print: for people or as JSON, and errors with their causes.

use serde::Serialize;
use std::io::{ErrorKind, Write as _};

/// What the user wants to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Text.
    Human,
    /// One JSON document on standard output.
    Json,
}

impl Format {
    /// Prints `value` as JSON, or what `human` says.
    pub fn print<T: Serialize>(
        self,
        value: &T,
        human: impl FnOnce() -> String,
    ) -> anyhow::Result<()> {
        match self {
            Self::Json => say(&serde_json::to_string_pretty(value)?),
            Self::Human => say(&human()),
        }
        Ok(())
    }
}

/// Prints text and ends the line; see [`put`].
pub(super) fn say(text: &str) {
    put(&format!("{text}\n"));
}

/// Prints text. Whoever does not read it to its end (`| head`, `| grep -q`) ends nothing: what a command has
/// begun, it finishes.
pub(super) fn put(text: &str) {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            tracing::warn!(%error, "writing to standard output");
        }
        _ => {}
    }
}

/// Prints an error with its causes, the way every command of ours ends when it fails.
pub fn fail(error: &anyhow::Error) -> std::process::ExitCode {
    eprintln!("error: {error}");
    for cause in error.chain().skip(1) {
        eprintln!("  because: {cause}");
    }
    std::process::ExitCode::FAILURE
}

/// Bytes for people.
pub(super) fn bytes(count: u64) -> String {
    indicatif::BinaryBytes(count).to_string()
}

/// Logs go to standard error; `RUST_LOG` says which, warnings by default.
pub fn log_to_stderr() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| "warn,drafter=info".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
}
