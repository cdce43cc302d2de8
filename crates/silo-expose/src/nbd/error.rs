//! What a server or a client could not do, in sentences.

use super::Endpoint;
use std::{io, time::Duration};

/// What went wrong with a server, an export or a client.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NbdError {
    /// The socket cannot be made.
    #[error("could not listen on {endpoint}: {source}")]
    Listen {
        /// Where.
        endpoint: Endpoint,
        /// The cause.
        source: io::Error,
    },
    /// Another process serves there.
    #[error("another server answers on {endpoint}; stop it, or choose another path")]
    Taken {
        /// Where.
        endpoint: Endpoint,
    },
    /// Requests did not end in time.
    #[error(
        "{threads} threads of the block server on {endpoint} were still at work after {limit:?}"
    )]
    StillWorking {
        /// Where.
        endpoint: Endpoint,
        /// How many.
        threads: usize,
        /// How long was waited.
        limit: Duration,
    },
    /// What clients were told is durable could not be made durable at the end.
    #[error("export \"{export}\" could not be flushed when its server stopped: {source}")]
    LastFlush {
        /// Which.
        export: String,
        /// The cause.
        source: io::Error,
    },
    /// Two exports of one name.
    #[error("there is an export \"{export}\" already; choose another name")]
    NameTaken {
        /// The name.
        export: String,
    },
    /// A name that the protocol has no room for.
    #[error("the name or description of an export has {bytes} bytes; NBD allows 4096")]
    LongName {
        /// How many.
        bytes: usize,
    },
    /// Another device cannot be put behind an export.
    #[error("export \"{export}\" keeps its device, because it could not be exchanged: {source}")]
    Swap {
        /// Which.
        export: String,
        /// The cause.
        source: io::Error,
    },
    /// The other device does not fit.
    #[error(
        "export \"{export}\" keeps its device of {old} bytes, because the new one has {new}; \
         clients know the size"
    )]
    Size {
        /// Which.
        export: String,
        /// In bytes.
        old: u64,
        /// In bytes.
        new: u64,
    },
    /// Requests did not end in time.
    #[error(
        "export \"{export}\" keeps its device, because {requests} requests were still in hand \
         after {limit:?}"
    )]
    Busy {
        /// Which.
        export: String,
        /// How many.
        requests: u32,
        /// How long was waited.
        limit: Duration,
    },
    /// No connection, or no agreement with the server.
    #[error("could not connect to {target}: {source}")]
    Connect {
        /// The server and the export.
        target: String,
        /// The cause.
        source: io::Error,
    },
    /// The server's device cannot be used.
    #[error("the export at {target} cannot be used: {reason}")]
    Unusable {
        /// The server and the export.
        target: String,
        /// Why.
        reason: String,
    },
    /// Something that names a server and an export does not.
    #[error("\"{uri}\" is not an NBD address: {reason}")]
    Uri {
        /// What was given.
        uri: String,
        /// Why.
        reason: &'static str,
    },
    /// The kernel's own client could not be used.
    #[error("could not {operation} {node}: {reason}")]
    Kernel {
        /// What was attempted.
        operation: &'static str,
        /// On which device node.
        node: String,
        /// Why, and what to do.
        reason: String,
    },
}
