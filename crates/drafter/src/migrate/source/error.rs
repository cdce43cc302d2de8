//! How a move ends that does not end well, in words for whoever asked for it.

use super::SendError;
use crate::migrate::protocol::WireError;

/// How a move ended otherwise: what happened, where the machine is, what to do.
#[derive(Debug, thiserror::Error)]
pub enum MoveError {
    /// The destination refused in prepare; the machine runs on here.
    #[error("host \"{host}\" refused the machine: {}; it is still running here", reasons.join("; "))]
    Refused {
        /// The destination.
        host: String,
        /// Its reasons.
        reasons: Vec<String>,
    },
    /// Something failed before the token; the machine runs on here.
    #[error(
        "the move failed during {phase}: {reason}; the machine is still running here, try again"
    )]
    Aborted {
        /// Which phase.
        phase: &'static str,
        /// What happened.
        reason: String,
    },
    /// The user cancelled; the machine runs on here.
    #[error("the move was cancelled during {phase}; the machine is still running here")]
    Cancelled {
        /// Which phase.
        phase: &'static str,
    },
    /// The destination owns the machine, and is not served any more though it may lack blocks.
    #[error(
        "the destination owns the machine (epoch {epoch}), but the connection was lost: {reason}; \
         {left} blocks have not been sent; this host keeps the frozen content: do not remove it"
    )]
    HandedOver {
        /// The destination's epoch.
        epoch: u64,
        /// What happened.
        reason: String,
        /// Blocks that were not sent.
        left: u64,
    },
    /// The destination was lost, and another host goes on with the machine.
    #[error(
        "the destination was lost with the machine, and host \"{owner}\" has taken it over (epoch {epoch}): \
         look there; what {here} had of it is not needed any more"
    )]
    TakenOver {
        /// The source.
        here: String,
        /// Who has it.
        owner: String,
        /// Since when.
        epoch: u64,
    },
    /// Nobody may run the machine until the lease store answers.
    #[error(
        "the machine is paused here and may run nowhere until the lease store tells who owns it: \
         {reason}; look at its lease: if the other host owns it, `drafter stop` it here; if this host does, `drafter stop` and start it from its disks with --keep-disks"
    )]
    Undecided {
        /// What happened.
        reason: String,
    },
    /// The machine should go on here but cannot.
    #[error("the move failed ({reason}) and the machine could not go on here: {cause}")]
    Stuck {
        /// Why the move failed.
        reason: String,
        /// Why the machine did not go on.
        cause: String,
    },
}

impl MoveError {
    /// Whether the machine runs on at the source.
    #[must_use]
    pub fn still_here(&self) -> bool {
        matches!(self, Self::Refused { .. } | Self::Aborted { .. } | Self::Cancelled { .. })
    }
}

/// Why a phase before the pause ended early.
#[derive(Debug, thiserror::Error)]
pub(super) enum Stop {
    #[error(transparent)]
    Send(#[from] SendError),
    #[error("{0}")]
    Peer(String),
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("cancelled")]
    Cancelled,
}

impl From<silo::device::DeviceError> for Stop {
    fn from(error: silo::device::DeviceError) -> Self {
        Self::Send(error.into())
    }
}

impl From<std::io::Error> for Stop {
    fn from(error: std::io::Error) -> Self {
        Self::Send(error.into())
    }
}
