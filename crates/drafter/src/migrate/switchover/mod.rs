//! Authority during a move: who may run the machine.
//!
//! Two state machines, one at each end, without any input or output of their own: the runner feeds
//! them events (a message, an answer of the store, a timer) and does the actions that they return,
//! in order. The same code runs in a simulator (`simulator/`) under seeds that delay, drop and
//! reorder everything and crash either end at any step, and in a model (`model/`) that is checked to the end.
//! The protocol in prose, with the argument
//! why one flight is safe: `docs/protocol.md`.
//!
//! Callers: `migrate::source` and `migrate::destination`, and the runner when it starts again.
//!
//! # The source
//!
//! ```text
//!            WantSwitchover          hand-over written,          machine paused,
//!            and a fresh offer       offer still fresh           offer still fresh
//!  Copying ────────────────▶ WritingHandOver ─────▶ Pausing ────────────────▶ AwaitingVerdict
//!    │  ▲ ╲ no fresh offer     │        ▲              │                        │  │       │
//!    │  │  ▼                   │        │              │          refused, or   │  │       │
//!    │  └─ AwaitingOffer ──────┼────────┘              │    provably not sent   │  │expiry │
//!    │        (gives up)       │                       │   ┌────────────────────┘  ▼       │
//!    │ cancel, peer lost,      │      any failure      ▼   ▼                  TakingBack   │
//!    └─ refused ───────────────┴─────────────────▶ Aborted (runs here)        won│   │lost │
//!                                                                     Resumed ◀──┘   │     │confirmed
//!                                                  (runs here, next epoch)           ▼     ▼
//!                                          Released ◀──────── durable ─────────── ServingPages
//! ```
//!
//! * *Copying → WritingHandOver*: the lease must say where the machine goes before it pauses; if
//!   the store does not answer, there is no switchover and the machine keeps running.
//! * *WritingHandOver → Pausing*: only with an offer young enough that the destination can still use
//!   it after the pause; else the source waits in AwaitingOffer for the next.
//! * *Pausing → AwaitingVerdict*: the token names the newest offer. From the moment that
//!   [`SourceAction::SendToken`] is returned the token counts as out, whatever became of it. Any
//!   failure before that resumes the machine at once.
//! * *AwaitingVerdict*: the machine is paused and its pages are served. It ends by a refusal (the
//!   destination will never run this attempt: resume, or take back, if this runner came after one that
//!   died: that one may have asked the store already), by a confirmation, or by the expiry of the
//!   named offer, counted from its receipt and stretched for the drift of both clocks.
//! * *TakingBack*: the store decides between the two ends. Won: run here at the next epoch. Lost:
//!   the destination owns the machine. No answer: stay paused, keep everything, ask again.
//! * *ServingPages → Released*: every block is durable elsewhere; the copy here may go.
//! * *Stopped* (not drawn): the store shows another owner while we thought to be it. Nothing here
//!   may run; a person decides.
//!
//! # The destination
//!
//! ```text
//!  Preparing ──▶ Offering ──token names a valid offer──▶ Loading ──runs──▶ Unconfirmed
//!      │            │                                       │                │      │ offer ends
//!      │            │ token late or wrong,                  │ load failed,   │      ▼
//!      │            │ cancel                                │ offer ended    │  FrozenUnconfirmed
//!      │            ▼                                       ▼                │      │
//!      │         Refused ◀──────────────────────────────────┘             won├──────┤lost
//!      └─ peer lost ──▶ Discarded                                            ▼      ▼
//!                                                 Settled ◀── all present ── Owner  Lost
//! ```
//!
//! * *Offering*: an offer every quarter of its life; each is a promise not to run by this attempt
//!   after its end without having won the lease.
//! * *Loading*: the token named an offer that holds long enough on our clock. Nothing is written to
//!   the lease yet, so a failure here is a refusal and the source resumes at once.
//! * *Unconfirmed*: the guest runs, frames come in and none leaves; the lease is being taken.
//! * *FrozenUnconfirmed*: the offer has ended before the store answered. Frozen, everything kept;
//!   the store is asked until it answers.
//! * *Owner*: the lease is ours. Frames leave once the source's early-acknowledged flushes are
//!   durable.
//! * *Refused*, *Discarded*, *Lost*: this copy never runs (again).

mod destination;
mod source;
mod source_events;
mod terms;
mod write;

#[cfg(test)]
pub(crate) mod model;
#[cfg(test)]
mod simulator;
#[cfg(test)]
mod tests;

pub use destination::{
    DestinationAction, DestinationAuthority, DestinationEvent, DestinationParts, DestinationState,
};
pub use source::SourceAuthority;
pub use source_events::{SourceAction, SourceEvent, SourceParts, SourceState};
pub use terms::{FlipEpoch, Holding, Terms};
pub use write::{LeaseAnswer, LeaseCall, LeasePurpose, OperationId};

use crate::lease::{AttemptId, Nonce, OfferSerial, Record};
use std::time::Duration;

/// Where nonces come from: [`Nonce::random`] in life, the seed in the simulator.
pub type Nonces = Box<dyn NonceSource>;

/// Draws nonces, each different from all that were ever drawn. (A clone draws what the original would
/// have: only the model, which follows several futures of one machine, makes any.)
pub trait NonceSource: FnMut() -> Nonce + Send + Sync {
    /// The same once more.
    fn again(&self) -> Nonces;
}

impl<F: FnMut() -> Nonce + Clone + Send + Sync + 'static> NonceSource for F {
    fn again(&self) -> Nonces {
        Box::new(self.clone())
    }
}

impl Clone for Nonces {
    fn clone(&self) -> Self {
        (**self).again()
    }
}

/// The destination's promise not to run later than `good_for` after it sent this, by its own clock,
/// unless it has won the lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// The move it belongs to.
    pub attempt: AttemptId,
    /// Its position: 1, 2, 3, …
    pub serial: OfferSerial,
    /// Its life, from sending.
    pub good_for: Duration,
}

/// The right to run, conditional on one offer; travels with the machine's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// The move it belongs to.
    pub attempt: AttemptId,
    /// The offer that it takes up.
    pub serial: OfferSerial,
    /// The lease as the source wrote it; what the destination must find there to take it.
    pub handed: Record,
    /// The source has acknowledged flushes that are not durable yet: the destination lets no frame
    /// out before it hears that they are.
    pub flush_owed: bool,
}
