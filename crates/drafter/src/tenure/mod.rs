//! Authority in time: how long a protected machine may run, and when another host may take it.
//!
//! Four state machines without any input or output of their own, driven as those of
//! [`switchover`](crate::migrate::switchover) are: feed an event, do the returned actions in order,
//! ask [`wake_at`](Holder::wake_at) again, send a `Tick` then. They run in the same simulator. The
//! argument why no two hosts run a machine: `docs/protocol.md`, "Terms and fencing".
//!
//! * [`Pulse`] keeps a host's (or a runner's) sign of life in the store: one compare-and-set every
//!   third of a term. It says until when this life holds: a [`View`].
//! * [`Holder`], one per machine, says when the machine must stand still because the life that its
//!   lease refers to has ended, and gets it back when a new life has begun.
//! * [`Taker`], on another host, watches, waits, fences, and takes.
//! * [`Surrender`] gives one machine up whose runner is gone, where the beat is its whole host's.
//!
//! ```text
//!  Pulse      Reading ──▶ Beginning ──won──▶ Alive ◀──won── Renewing ◀─┐ every T/3
//!                ▲            ▲                └──────────────▶│        ┘
//!                │            └──────── fenced by a taker ─────┘ (its life is over: the next begins)
//!
//!  Holder     Running ──the life's term ends──▶ Frozen ──renewed in the same life──▶ Running
//!                                                 │  └─ a new life ─▶ Reclaiming ─won─▶ Running
//!                                                 │                       │lost
//!                                                 └───────────────────────┴──────────▶ Gone
//!
//!  Taker      Looking ──▶ Watching ──unchanged for T(1+ρ)/(1−ρ)──▶ Fencing ──▶ Clearing ──▶ Ready
//!               ▲            │ ▲──────────── it has beaten ───────────┘      (offers end)     │
//!               └────────────┴── the lease has changed ◀──lost── Taking ◀── prepared, alive ──┘
//!                                                                  │won
//!                                                                  ▼
//!                                                                Taken
//! ```
//!
//! What the runner owes them:
//!
//! 1. [`Call`]s are made off the thread that runs the state machine ([`Call::perform`]) and bring
//!    exactly one answer each, within a bound.
//! 2. At [`Holder::freeze_at`] a thread (better: a process) that nothing can block stops the machine by
//!    cgroup or SIGSTOP, and then sends [`HolderEvent::Frozen`]. It must outlive a runner that hangs
//!    or dies while the monitor lives: a machine that nobody freezes is one that runs twice.
//! 3. The machine runs only while both say so: `tenure`'s hold and the switchover's are two separate
//!    reasons to stand still ([`HolderAction::Freeze`] and `DestinationAction::FreezeNow`), and each
//!    `Thaw` ends its own only. Before a machine is resumed by `SourceAction::ResumeHere`,
//!    [`Holder::may_run`] is asked.
//! 4. For a machine that arrives, the holder is made before `DestinationAction::LoadAndRun` is done
//!    ([`Holder::arriving`]), under the life in `DestinationParts::beat`.
//! 5. Whoever changes the lease says so: [`HolderEvent::Holds`]. A move in progress is announced
//!    ([`HolderEvent::Moving`]), and the source half is told of every new view
//!    (`SourceEvent::Term`): it sends no token after its term.
//! 6. One beat name, one process at a time. Times are `CLOCK_BOOTTIME` of the moment of the event or
//!    later; the answer to a call never carries a time before it came.

mod holder;
mod pulse;
mod store;
mod surrender;
mod taker;
mod times;

#[cfg(test)]
mod digest;
#[cfg(test)]
mod tests;

pub use holder::{Holder, HolderAction, HolderEvent, HolderParts, HolderState};
pub use pulse::{Pulse, PulseAction, PulseEvent, PulseParts, View};
pub use store::{Answer, Call, Content, OperationId};
pub use surrender::{Surrender, SurrenderAction, SurrenderEvent, SurrenderParts};
pub use taker::{Taker, TakerAction, TakerEvent, TakerParts, TakerState};
pub use times::Times;

#[cfg(test)]
pub(crate) use times::Rule;

pub use crate::migrate::switchover::Nonces;

use crate::lease::Nonce;

/// Random nonces for writes to leases and beats. The kernel's generator does not fail once it is seeded,
/// which it is before any service starts.
pub(crate) fn random_nonces() -> Nonces {
    Box::new(|| Nonce::random().expect("getrandom works after boot"))
}
