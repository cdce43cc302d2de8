//! What can go wrong with the tunnel as a whole. What is wrong with one packet is counted instead.

use std::io;

/// A failure of the tunnel: what was attempted on what, and why it did not work.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// The system refused something.
    #[error("{operation}: {source}")]
    System {
        /// What was attempted, with the device, file or address.
        operation: String,
        /// Why not.
        source: io::Error,
    },
    /// A file or message is not what it should be.
    #[error("{what}: {detail}")]
    Invalid {
        /// The file, message or setting.
        what: String,
        /// What is wrong, and what to do.
        detail: String,
    },
}

impl TunnelError {
    pub(crate) fn system(operation: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let operation = operation.into();
        move |source| Self::System { operation, source }
    }

    #[allow(clippy::needless_pass_by_value, reason = "callers hand over text or an error")]
    pub(crate) fn invalid(what: impl Into<String>, detail: impl ToString) -> Self {
        Self::Invalid { what: what.into(), detail: detail.to_string() }
    }
}
