//! What the machine wants from the host and from the volumes: on a thread of its own, in order.

use super::{Handover, Shared};
use crate::ledger::Standing;
use silo_block::{
    rounds::{Epoch, RoundError},
    session::{
        messages::{Custom, Reason, Wait},
        source::Event,
    },
};
use std::{
    sync::{
        Arc,
        mpsc::{Receiver, Sender},
    },
    time::Duration,
};

/// One thing to do.
pub(super) enum Job {
    CloseRound,
    Quiesce(u32),
    Resume,
    HandedOver,
    Released,
    Undecided,
    Custom(Custom),
    Overdue(String),
    /// No more; everything before is done when this is dropped.
    Stop(Sender<()>),
}

/// How often it is looked whether the move is over while writers do not end.
const SLICE: Duration = Duration::from_millis(100);

impl Shared {
    pub(super) fn do_chores(self: &Arc<Self>, jobs: &Receiver<Job>) {
        while let Ok(job) = jobs.recv() {
            match job {
                Job::CloseRound => match self.close_round() {
                    Ok(epochs) => self.tell(Event::RoundClosed(epochs)),
                    Err(reason) => self.tell(Event::Unable(reason)),
                },
                Job::Quiesce(ticket) => match self.quiesce(ticket) {
                    Ok(event) => self.tell(event),
                    Err(reason) => self.tell(Event::Unable(reason)),
                },
                Job::Resume => {
                    if self.volumes.iter().all(|volume| volume.is_left_to(self.session)) {
                        if let Err(error) = self.note(Standing::Here) {
                            // Safe: a restart finds that authority left, and asks the other end.
                            tracing::error!(session = %self.session, %error, "cannot note a return");
                        }
                        self.host.resume();
                    }
                    self.volumes.iter().for_each(|volume| volume.resume(self.session));
                }
                Job::Released => {
                    if let Err(error) = self.note(Standing::Away { session: self.session }) {
                        tracing::error!(session = %self.session, %error, "cannot note a release");
                    }
                }
                Job::HandedOver => {
                    for volume in &self.volumes {
                        volume.give_away();
                    }
                    self.host.handed_over();
                }
                Job::Undecided => {
                    if self.host.reclaimed() {
                        self.tell(Event::Reclaimed);
                    }
                }
                Job::Custom(custom) => {
                    self.host.custom(custom.kind, &custom.payload);
                    self.tell(Event::CustomHandled(custom.serial));
                }
                Job::Overdue(what) => self.host.overdue(&what),
                Job::Stop(done) => return drop(done),
            }
        }
    }

    fn close_round(&self) -> Result<Vec<Epoch>, Reason> {
        self.host.before_round().map_err(Reason::Cancelled)?;
        self.advance(Wait::Round)
    }

    /// Ends the open round of every device. Slow writers are waited for as long as answers are.
    fn advance(&self, what: Wait) -> Result<Vec<Epoch>, Reason> {
        let limit = self.options.session.patience.answer;
        let begin = self.now();
        let end_round = |volume: &Arc<crate::volume::Volume>| loop {
            match volume.rounds().advance(SLICE) {
                Ok(epoch) => return Ok(epoch),
                Err(RoundError::StillWriting { .. }) => {
                    let waited = self.now() - begin;
                    if waited >= limit || self.lanes.is_over() {
                        return Err(Reason::Deadline { what, after: waited });
                    }
                }
                Err(error @ RoundError::UsedUp) => {
                    return Err(Reason::Cancelled(error.to_string()));
                }
            }
        };
        self.volumes.iter().map(end_round).collect()
    }

    fn quiesce(&self, ticket: u32) -> Result<Event, Reason> {
        let (session, attempt) = (self.session, self.options.attempt);
        let handover = self.host.quiesce(session, attempt).map_err(Reason::Cancelled)?;
        let Handover { state, mut flushes } = handover;
        // From here on nothing is written: who comes now waits, who is inside ends before the
        // round does.
        let pause = |volume: &Arc<crate::volume::Volume>| volume.pause(session);
        let paused = self.volumes.iter().try_for_each(pause);
        paused.map_err(|error| Reason::Cancelled(error.to_string()))?;
        let last = self.host.before_round().map_err(Reason::Cancelled);
        let epochs = last.and_then(|()| self.advance(Wait::Quiesce))?;
        // Durable, with all that was written, before the token can be out.
        self.note(Standing::Leaving { session, attempt })
            .map_err(|error| Reason::Cancelled(format!("cannot note the handover: {error}")))?;
        flushes.resize(self.volumes.len(), Vec::new());
        let trouble = self.lanes.trouble();
        tracing::debug!(session = %self.session, ?trouble, "writers are paused");
        Ok(Event::Quiesced { ticket, epochs, flushes, state })
    }
}
