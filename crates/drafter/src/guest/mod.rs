//! The host's end of the guest channel.
//!
//! The runner makes one [`GuestChannel`] for a machine that runs here, from the driver's socket
//! (`Vm::guest_socket`), and drops it when the machine has left; the destination makes its own.
//! Nothing is kept between the two: a conversation begins anew with a hello, see
//! [`drafter_guest::protocol`].
//!
//! * Connects by itself and again when the monitor or the agent drops out. Until the agent has
//!   answered a hello, requests wait, up to their deadline.
//! * [`GuestChannel::call`] sends one request and waits for its final answer; calls from several
//!   threads run side by side. A request that was sent when the connection broke fails with
//!   [`GuestError::Lost`]: whether the guest did it is not known, so it is never sent twice.
//! * Every wait has a deadline that the caller names, also against a guest that reads nothing,
//!   says nonsense or floods: lines have a bound, and output is handed on through a queue of
//!   [`OUTPUT_QUEUE`] messages; who does not take it stops the reader, and so the guest.
//!
//! * Around a move the guest sees no change: [`GuestChannel::hush`] before the pause,
//!   [`GuestChannel::attach`] before the load, [`GuestChannel::speak_in`] after the run.
//!
//! ```text
//!  worker thread:  connect ──hello──► greeted ──answers──► callers' queues
//!                     ▲                  │ hang-up, broken line, new version
//!                     └── wait a little ◄┘ (all open requests: Lost)
//! ```

mod channel;
mod connection;

pub use channel::{GuestChannel, Output, Resume};
pub use drafter_guest::protocol::{
    Entry, EntryState, ExecRequest, ExitStatus, Failure, FailureCode, ProbeKind, Stream,
};

use std::{path::PathBuf, time::Duration};

/// How many answers to one request wait for their caller before the channel stops reading.
pub const OUTPUT_QUEUE: usize = 64;

/// Why the guest did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// No agent answered a hello before the deadline.
    #[error(
        "machine \"{machine}\": its agent did not answer within {limit:?} (asked for {operation}; \
         last seen on {}: {detail}); is the machine up? its console log says more", socket.display()
    )]
    NotConnected {
        /// Which machine.
        machine: String,
        /// What was asked.
        operation: &'static str,
        /// How long we waited.
        limit: Duration,
        /// The monitor's socket.
        socket: PathBuf,
        /// What happened at the last try.
        detail: String,
    },
    /// The agent got the request and did not answer in time.
    #[error("machine \"{machine}\": {operation} did not finish within {limit:?}")]
    Timeout {
        /// Which machine.
        machine: String,
        /// What was asked.
        operation: &'static str,
        /// How long we waited.
        limit: Duration,
    },
    /// The connection broke after the request was sent.
    #[error(
        "machine \"{machine}\": the guest channel broke during {operation} ({detail}); whether it \
         was done is not known"
    )]
    Lost {
        /// Which machine.
        machine: String,
        /// What was asked.
        operation: &'static str,
        /// The cause.
        detail: String,
    },
    /// The agent answered that it could not.
    #[error("machine \"{machine}\": {operation}: {}", failure.message)]
    Failed {
        /// Which machine.
        machine: String,
        /// What was asked.
        operation: &'static str,
        /// The agent's words.
        failure: Failure,
    },
    /// The machine is up and did not become ready in time.
    #[error(
        "machine \"{machine}\": not ready within {limit:?}: {detail}; its console log says more"
    )]
    NotReady {
        /// Which machine.
        machine: String,
        /// How long we waited.
        limit: Duration,
        /// What its readiness probe said last.
        detail: String,
    },
    /// The request cannot be sent as it is.
    #[error("machine \"{machine}\": {operation}: {detail}")]
    Invalid {
        /// Which machine.
        machine: String,
        /// What was asked.
        operation: &'static str,
        /// What is wrong with it.
        detail: String,
    },
    /// This host refused.
    #[error("machine \"{machine}\": {operation}: {source}")]
    Host {
        /// Which machine.
        machine: String,
        /// What was attempted.
        operation: &'static str,
        /// The cause.
        source: std::io::Error,
    },
}
