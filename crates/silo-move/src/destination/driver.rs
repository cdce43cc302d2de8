//! The driver's thread: asks the machine what is to be done, does it or has it done, and ends the
//! session.

use super::{Core, DestinationReport, NOTES, Shared, chores, farewell::Outcome, give_back};
use crate::{
    destination::backlog::Backlog,
    lane::lock,
    report::{MoveError, Phase},
    wire,
};
use silo_block::session::{
    LinkId,
    destination::{Action, Destination, Phase as Step, WaiterId},
    messages::{Reason, ToSource},
};
use std::{
    sync::{Arc, PoisonError, atomic::Ordering, mpsc},
    time::{Duration, Instant},
};

/// How often it is noted what has come.
const CHECKPOINT: Duration = Duration::from_secs(2);

impl Shared {
    pub(super) fn drive(
        self: &Arc<Self>,
        chores: &mpsc::Sender<chores::Job>,
    ) -> Result<DestinationReport, MoveError> {
        let mut noted = (Instant::now(), 0);
        let end = loop {
            // Polls, so that deadlines are kept, and does what concerns readers.
            let step = self.with_machine(None, |machine, _| machine.phase().clone()).0;
            if let Some(step) = step {
                self.note_phase(&step);
            }
            self.checkpoint(&mut noted, chores);
            let mut core = lock(&self.core);
            if core.pending.is_empty() {
                let now = self.now();
                let wake = core.machine.as_ref().and_then(|machine| machine.wake(now));
                let wait = wake.map_or(CHECKPOINT, |wake| wake.saturating_sub(now));
                let wait = match self.options.ledger {
                    Some(_) => wait.min(CHECKPOINT.saturating_sub(noted.0.elapsed())),
                    None => wait,
                };
                let empty = |core: &mut Core| core.pending.is_empty();
                let waited = self.changed.wait_timeout_while(core, wait, empty);
                drop(waited.unwrap_or_else(PoisonError::into_inner));
                continue;
            }
            let actions: Vec<Action> = core.pending.drain(..).collect();
            drop(core);
            // One note says all that several would.
            let notes = actions.iter().filter(|action| matches!(action, Action::Note(_))).count();
            if notes > 0 && self.options.ledger.is_some() {
                let _ = chores.send(chores::Job::Note(notes));
            }
            let mut end = None;
            for action in actions {
                end = self.perform(action, chores).or(end);
            }
            self.flush();
            if let Some(end) = end {
                break end;
            }
        };
        self.remember(&end);
        self.ending.store(true, Ordering::Release);
        if end.is_ok() {
            let _ = chores.send(chores::Job::Settle);
        }
        let (done, waited) = mpsc::channel();
        let _ = chores.send(chores::Job::Stop(done));
        let limit = self.disks.limit * NOTES;
        let unsettled = match waited.recv_timeout(limit) {
            Ok(unsettled) => {
                self.quiet.store(true, Ordering::Release);
                unsettled
            }
            Err(_) => Some(format!("the last work of the session has not ended within {limit:?}")),
        };
        match (end, unsettled) {
            (Ok(()), Some(why)) => Err(self.end_unsettled(&why)),
            (end, _) => self.finish(end),
        }
    }

    /// From here on whoever comes is told how it ended. What a link was still to be told that came a
    /// moment earlier is said; after that moment no link is put to use.
    fn remember(&self, end: &Result<(), Reason>) {
        let outcome = match end {
            Err(reason) => Outcome::Never(reason.clone()),
            Ok(()) => Outcome::Arrived {
                attempt: self.attempt.load(Ordering::Acquire) as u32,
                epochs: self
                    .with_machine(None, |machine, _| machine.last_epochs())
                    .0
                    .unwrap_or_default(),
            },
        };
        *lock(&self.outcome) = Some(outcome);
        let late: Vec<Action> = lock(&self.core).pending.drain(..).collect();
        for action in late {
            if let Action::Send(link, message) = action {
                self.send(link, &message);
            }
        }
        self.flush();
    }

    /// All has come, but a restart would not know it. The volumes stay with this session, so that
    /// every flush makes a note of them: one that succeeds says all.
    fn end_unsettled(&self, why: &str) -> MoveError {
        self.lanes.set_over();
        self.backlogs.iter().for_each(Backlog::close);
        drop(lock(&self.assist).take());
        self.lanes.end();
        let text = format!(
            "all has come, but that cannot be noted: {why}; the devices can be used, and are to be \
             flushed before this process ends"
        );
        self.error(Reason::Cancelled(text), self.clock.phase())
    }

    /// Has it noted from time to time what has come, so that a crash costs no more than that.
    fn checkpoint(&self, last: &mut (Instant, u64), chores: &mpsc::Sender<chores::Job>) {
        let (at, then) = last;
        if self.options.ledger.is_none() || at.elapsed() < CHECKPOINT {
            return;
        }
        *at = Instant::now();
        let stored = self.stored.load(Ordering::Relaxed);
        if std::mem::replace(then, stored) != stored {
            let _ = chores.send(chores::Job::Note(0));
        }
    }

    fn perform(
        self: &Arc<Self>,
        action: Action,
        chores: &mpsc::Sender<chores::Job>,
    ) -> Option<Result<(), Reason>> {
        let job = match action {
            Action::Send(link, message) => {
                self.send(link, &message);
                return None;
            }
            Action::Hangup(link) => {
                self.hang_up(link, None);
                return None;
            }
            Action::Fetch { ticket, device, range, class, .. } => {
                self.fetch(ticket, device, range, class);
                return None;
            }
            Action::CancelFetch(ticket) => {
                self.cancel_fetch(ticket);
                return None;
            }
            // Answered to the thread that has the content; sent before the others.
            Action::Store { .. } | Action::Discard(_) | Action::Note(_) => return None,
            Action::Here(..) | Action::Wake(_) | Action::Fail(..) => {
                self.perform_local(action);
                return None;
            }
            Action::Run { attempt, state, flushes } => chores::Job::Run { attempt, state, flushes },
            Action::MakeDurable => chores::Job::MakeDurable,
            Action::Overdue(wait) => chores::Job::Overdue(wait.to_string()),
            Action::Trouble(reason) => chores::Job::Trouble(self.describe(&reason)),
            Action::Custom(custom) => chores::Job::Custom(custom),
            Action::Complete => return Some(Ok(())),
            Action::Failed(reason) => return Some(Err(reason)),
        };
        // The thread ends after this one.
        let _ = chores.send(job);
        None
    }

    // Of a link that is cut by these, the machine is told by who listens, when all is heard.
    fn send(&self, link: LinkId, message: &ToSource) {
        self.lanes.send(link, |control| wire::write_to_source(control, message));
    }

    fn flush(&self) {
        self.lanes.flush();
    }

    pub(super) fn hang_up(&self, link: LinkId, trouble: Option<String>) {
        self.lanes.hang_up(link, trouble);
    }

    fn note_phase(&self, step: &Step) {
        self.clock.enter(match step {
            Step::Receiving | Step::Failed(_) => return,
            Step::Starting => Phase::Switching,
            Step::Running => Phase::Following,
            Step::Durable | Step::Complete => Phase::Durable,
        });
    }

    fn finish(&self, end: Result<(), Reason>) -> Result<DestinationReport, MoveError> {
        self.lanes.set_over();
        // A flush that makes a note ends it first: what it made durable counts.
        let noting = self.notes.hold();
        let machine = {
            let mut core = lock(&self.core);
            // Nobody makes notes any more, and whoever has content finds that it is too late.
            core.notes = 0;
            core.machine.take()
        };
        self.noted.notify_all();
        let counters = machine.as_ref().map(Destination::counters).unwrap_or_default();
        if let Some(machine) = machine {
            give_back(&self.volumes, machine.into_devices());
        }
        drop(noting);
        self.backlogs.iter().for_each(Backlog::close);
        // Whoever waited finds the volumes settled.
        let waiters: Vec<WaiterId> = lock(&self.waiters).keys().copied().collect();
        self.wake(&waiters, &Ok(()));
        let (places, by_place) = match &*lock(&self.assist) {
            Some(assist) => (assist.counts(), assist.by_place()),
            None => Default::default(),
        };
        // Its threads end here, and wait for nobody who holds a lock of this session.
        let assist = lock(&self.assist).take();
        drop(assist);
        self.lanes.end();
        let reached = self.clock.phase();
        match end {
            Ok(()) => {
                let timings = self.clock.end();
                Ok(DestinationReport {
                    session: self.session,
                    peer: lock(&self.peer).clone(),
                    timings,
                    counters,
                    places,
                    by_place,
                    wire: self.lanes.wire.read(),
                    waits: self.waits.summary(),
                })
            }
            Err(reason) => Err(self.error(reason, reached)),
        }
    }
}
