//! How commands print: for people or as JSON, and errors with their causes.

use serde::Serialize;

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
            Self::Json => println!("{}", serde_json::to_string_pretty(value)?),
            Self::Human => println!("{}", human()),
        }
        Ok(())
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
