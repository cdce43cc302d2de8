//! The driver's thread: asks the machine what is to be done, does it or has it done, and ends the
//! session.

use super::{Core, DestinationReport, Shared, chores, give_back};
use crate::{
    destination::backlog::Backlog,
    lane::lock,
    report::{MoveError, Phase},
    wire,
};
use silo_block::session::{
    LinkId,
    destination::{Action, Destination, Event, Phase as Step, WaiterId},
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
        if end.is_ok() {
            let _ = chores.send(chores::Job::Settle);
        }
        let (done, waited) = mpsc::channel();
        let _ = chores.send(chores::Job::Stop(done));
        let _ = waited.recv();
        self.quiet.store(true, Ordering::Release);
        self.finish(end)
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

    fn send(&self, link: LinkId, message: &ToSource) {
        if self.lanes.send(link, |control| wire::write_to_source(control, message)) {
            self.tell(Event::Cut(link));
        }
    }

    fn flush(&self) {
        if let Some(link) = self.lanes.flush() {
            self.tell(Event::Cut(link));
        }
    }

    pub(super) fn hang_up(&self, link: LinkId, trouble: Option<String>) {
        if self.lanes.hang_up(link, trouble) {
            self.tell(Event::Cut(link));
        }
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
