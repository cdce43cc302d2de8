//! What a source is made of, what happens to it, what it wants done, and where it is.

use super::{FlipEpoch, Holding, LeaseAnswer, LeaseCall, Nonces, Offer, OperationId, Terms, Token};
use crate::{
    lease::{AttemptId, Epoch, HostName},
    tenure::View,
};

/// What a source is made of.
#[cfg_attr(test, derive(Clone))]
pub struct SourceParts {
    /// What this host holds; the machine runs here under it.
    pub holding: Holding,
    /// Where the machine shall go, by the peer's proven name.
    pub to: HostName,
    /// This move, a number never used before.
    pub attempt: AttemptId,
    /// Of a protected machine: this host's life, and until when it holds. No token is sent after.
    pub view: Option<View>,
    /// The times.
    pub terms: Terms,
    /// For writes to the lease.
    pub nonces: Nonces,
}

/// What happens to a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceEvent {
    /// [`SourceAuthority::wake_at`] has come (or any other time).
    Tick,
    /// The destination's offer has just been received; `now` is the time of receipt.
    Offer(Offer),
    /// Pre-copy has done what it can.
    WantSwitchover,
    /// The store's answer to a [`SourceAction::Lease`].
    LeaseAnswer {
        /// The call.
        operation: OperationId,
        /// The answer.
        answer: LeaseAnswer,
    },
    /// The machine is paused and its final state is at hand, ready to be sent.
    Paused {
        /// Flushes were acknowledged that are not durable yet; see [`Token::flush_owed`].
        flush_owed: bool,
    },
    /// Pausing or saving failed, with the reason.
    PauseFailed(String),
    /// No byte of the token's message has left, and none will: the connection was found dead before
    /// the first. In doubt this must not be said.
    TokenNotSent,
    /// The destination will never run this attempt.
    Refused {
        /// Which attempt it speaks of.
        attempt: AttemptId,
        /// Why.
        why: String,
    },
    /// The destination has won the lease.
    Confirmed {
        /// At which epoch.
        epoch: Epoch,
    },
    /// Every block is durable at the destination.
    Durable {
        /// At which epoch.
        epoch: Epoch,
    },
    /// The connection is gone.
    PeerLost,
    /// Of a protected machine: the end of this host's term has moved
    /// ([`PulseAction::Tell`](crate::tenure::PulseAction)), `None` if its life has ended.
    Term(Option<View>),
    /// A person calls it off.
    Cancel,
}

/// What a source wants done, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceAction {
    /// Ask the store.
    Lease(LeaseCall),
    /// Pause, save, collect the final dirty lists; turn the network to the destination under `flip`;
    /// then [`SourceEvent::Paused`] or [`SourceEvent::PauseFailed`].
    PauseMachine {
        /// The network's epoch.
        flip: FlipEpoch,
    },
    /// Send the switchover message with this token. From now on it counts as sent.
    SendToken(Token),
    /// Serve the frozen pages and disks to the destination.
    ServePages,
    /// Run the machine here again, under `epoch`, with the network turned back under `flip`, and
    /// tracking re-armed.
    ResumeHere {
        /// The lease's epoch.
        epoch: Epoch,
        /// The network's.
        flip: FlipEpoch,
    },
    /// Tell the destination that the attempt is over.
    SendCancel {
        /// The attempt.
        attempt: AttemptId,
    },
    /// Nothing may run here, and nothing here may be thrown away: a person decides.
    StayPaused {
        /// Why, and what to do.
        why: String,
    },
    /// The copy here is needed no more.
    Release,
    /// Tell people.
    Report(String),
}

/// Where a source is; see the drawing in the [module](super).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceState {
    /// The machine runs here; blocks are copied.
    Copying,
    /// The machine runs here; a fresh offer is awaited.
    AwaitingOffer,
    /// The machine runs here; the hand-over is being written.
    WritingHandOver,
    /// The machine is being paused.
    Pausing,
    /// The token is out.
    AwaitingVerdict,
    /// The offer is over; the store decides.
    TakingBack,
    /// The destination owns the machine and may need pages.
    ServingPages(Epoch),
    /// Done: nothing of the machine is needed here.
    Released,
    /// The attempt failed before it could run anywhere else; the machine runs here.
    Aborted,
    /// The attempt failed after the token; the machine runs here at a new epoch.
    Resumed(Epoch),
    /// The lease is not as this host believed; nothing runs here.
    Stopped,
}
