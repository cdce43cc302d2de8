//! What can go wrong with the data path, with what to do.

use std::path::PathBuf;

/// A failure of the data path in the kernel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel has no BPF file system where pins could go.
    #[error(
        "pins at {}: {source}; conduit needs a BPF file system (CONFIG_BPF_SYSCALL, root): \
         mount -t bpf bpf /sys/fs/bpf",
        path.display()
    )]
    Pins {
        /// Where.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// Another process owns the data path of this network namespace.
    #[error("the data path at {} belongs to a process that still runs; end it first", path.display())]
    Owned {
        /// Its pins.
        path: PathBuf,
    },
    /// Nothing is pinned for this network namespace.
    #[error(
        "there is no data path in {}; does an agent or edge with --path bpf run in this network \
         namespace, of the same version, with the same --pins?",
        path.display()
    )]
    Absent {
        /// Where it would be.
        path: PathBuf,
    },
    /// Another process traces.
    #[error("another trace of the data path at {} is under way; end it first", path.display())]
    Traced {
        /// Its pins.
        path: PathBuf,
    },
    /// Pins of a newer version.
    #[error(
        "the data path at {} has layout {found}, this program knows {LAYOUT} and older; start the \
         newer program, or remove the folder (traffic of its machines ends)",
        path.display(), LAYOUT = crate::LAYOUT
    )]
    Newer {
        /// Its pins.
        path: PathBuf,
        /// Their layout.
        found: u32,
    },
    /// The kernel refused a program or a map.
    #[error(
        "{operation}: {detail}; the data path needs Linux 5.17 or newer with CONFIG_BPF_JIT, \
         CONFIG_NET_CLS_ACT, CONFIG_VXLAN and CONFIG_TUN (`conduit check` tries them)"
    )]
    Refused {
        /// What was attempted.
        operation: String,
        /// The kernel's words.
        detail: String,
    },
    /// An interface could not be used.
    #[error("{operation} interface #{interface}: {detail}")]
    Interface {
        /// What was attempted.
        operation: &'static str,
        /// Its ifindex.
        interface: u32,
        /// The cause.
        detail: String,
    },
    /// A map could not be read or written.
    #[error("{operation}: {detail}")]
    Map {
        /// What was attempted, on what.
        operation: String,
        /// The cause.
        detail: String,
    },
    /// The entry is at a newer epoch.
    #[error("{key}: epoch {asked} is over, the data path is at {current}")]
    Stale {
        /// Which address.
        key: crate::Key,
        /// The epoch that was asked for.
        asked: u64,
        /// The entry's.
        current: u64,
    },
    /// The epoch belongs to another host.
    #[error("{key}: epoch {epoch} already belongs to {owner}")]
    Taken {
        /// Which address.
        key: crate::Key,
        /// The epoch.
        epoch: u64,
        /// Who has it.
        owner: std::net::IpAddr,
    },
}

impl Error {
    #[allow(clippy::needless_pass_by_value, reason = "callers hand over an error")]
    pub(crate) fn map(operation: impl Into<String>, detail: impl ToString) -> Self {
        Self::Map { operation: operation.into(), detail: detail.to_string() }
    }
}

/// An error with its causes.
pub(crate) fn whole(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let next_text = next.to_string();
        if !text.contains(&next_text) {
            text = format!("{text}: {next_text}");
        }
        cause = next.source();
    }
    text
}
