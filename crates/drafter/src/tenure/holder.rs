//! When a machine must stand still on its owner's host, and how it is got back.

use super::{
    Answer, Call, Nonces, OperationId, Times, View,
    store::{Verdict, Write},
    times::Rule,
};
use crate::lease::{BeatRef, BootTime, Epoch, HostName, Record};

/// What a holder is made of.
#[cfg_attr(test, derive(Clone))]
pub struct HolderParts {
    /// The lease as this host holds it (for a machine that arrives: as handed to it).
    pub record: Record,
    /// This host.
    pub here: HostName,
    /// The life that runs here, if it has begun ([`Pulse::view`](super::Pulse::view)).
    pub view: Option<View>,
    /// As [`HolderEvent::GivenUp`], from the beginning.
    pub given_up: Option<Epoch>,
    /// The times.
    pub times: Times,
    /// For writes.
    pub nonces: Nonces,
}

/// What happens to a holder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HolderEvent {
    /// [`Holder::wake_at`] has come (or any other time).
    Tick,
    /// The pulse says: [`PulseAction::Tell`](super::PulseAction::Tell).
    View(Option<View>),
    /// The deadline thread has frozen the machine.
    Frozen,
    /// The lease of this machine is now this one, and this host owns it: a move's hand-over was
    /// written, the machine was taken back, it has arrived.
    Holds(Record),
    /// A move begins (`true`; only when [`Holder::settled`]) or has ended with the machine here
    /// (`false`). One that ended with the machine elsewhere ends the holder: drop it. A move whose
    /// machine is frozen before the token should be cancelled: nothing is got back before it ends.
    Moving(bool),
    /// Protect the machine from now on (`true`), or no more: the lease is bound to this host's life,
    /// or unbound. During a move it waits for its end. An unbound machine runs without a term.
    Protect(bool),
    /// Whoever keeps the sign of life of this host may have given up the lease, if it is of this epoch or
    /// an earlier one ([`Surrender`](super::Surrender)): whatever life it names here, the machine runs only
    /// after the lease was got back.
    GivenUp(Epoch),
    /// The store's answer to a [`HolderAction::Store`].
    Answer {
        /// The call.
        operation: OperationId,
        /// The answer.
        answer: Answer,
    },
}

/// What a holder wants done, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HolderAction {
    /// Stop every instruction of the guest, without asking its monitor, and keep it stopped for this
    /// reason until [`HolderAction::Thaw`]. Within [`Times::stop_margin`].
    Freeze,
    /// This reason to stand still is gone.
    Thaw,
    /// The lease is this one now: the next move starts from it, the network is told of its epoch.
    /// Before any `Thaw` that depends on it.
    Held(Record),
    /// Ask the store.
    Store(Call),
    /// Another host owns the machine: kill the copy here and forget it.
    Discard {
        /// Who.
        owner: HostName,
        /// Since when.
        epoch: Epoch,
    },
    /// Tell people.
    Report(String),
}

/// Where a holder is; see the drawing in the [module](super).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HolderState {
    /// The term holds, or there is none.
    Running,
    /// The life that the lease refers to has ended.
    Frozen,
    /// Another host has the machine.
    Gone,
}

/// What is being written to the lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// A new epoch under the new life.
    Reclaim,
    /// The same epoch under the present life.
    Bind,
    /// The same epoch under none.
    Unbind,
}

/// See the [module](super). The machine executes nothing that this holder does not allow.
#[cfg_attr(test, derive(Clone))]
pub struct Holder {
    pub(super) parts: HolderParts,
    state: HolderState,
    /// Under which life the arriving machine will be; until its lease is ours.
    pub(super) arriving: Option<BeatRef>,
    pub(super) moving: bool,
    pub(super) protect: bool,
    pub(super) write: Option<(Purpose, Write<Record>)>,
    next_operation: u64,
    /// The silence of the store has been told.
    told: bool,
}

impl Holder {
    /// For a machine that this host owns. If it is not within its term, it is frozen at once.
    #[must_use]
    pub fn new(now: BootTime, parts: HolderParts) -> (Self, Vec<HolderAction>) {
        Self::with(now, parts, None)
    }

    /// For a machine that arrives by a move and will be held under `life`
    /// (`DestinationParts::beat`): it is within this host's term from its first instruction, before
    /// the lease is won. [`HolderEvent::Holds`] says that it is; if the move ends otherwise, the
    /// holder is dropped. `parts.record` is the one in the token.
    #[must_use]
    pub fn arriving(
        now: BootTime,
        parts: HolderParts,
        life: Option<BeatRef>,
    ) -> (Self, Vec<HolderAction>) {
        let free = !parts.times.keeps(Rule::TermFromTheToken);
        let life = if free { None } else { life };
        let (mut this, out) = Self::with(now, parts, Some(life));
        this.moving = true;
        (this, out)
    }

    fn with(
        now: BootTime,
        parts: HolderParts,
        arriving: Option<Option<BeatRef>>,
    ) -> (Self, Vec<HolderAction>) {
        let mut parts = parts;
        let arriving = arriving.and_then(|life| {
            // The handed record is bound to its source's life, which is nothing to us.
            parts.record.beat.clone_from(&life);
            life
        });
        let protect = parts.record.beat.is_some();
        let mut this = Self {
            parts,
            state: HolderState::Running,
            arriving,
            moving: false,
            protect,
            write: None,
            next_operation: 0,
            told: false,
        };
        let mut out = Vec::new();
        this.settle(now, &mut out);
        (this, out)
    }

    /// Where it is.
    #[must_use]
    pub const fn state(&self) -> HolderState {
        self.state
    }

    /// The lease as this host holds it.
    #[must_use]
    pub const fn record(&self) -> &Record {
        &self.parts.record
    }

    /// Whether the machine may execute now; asked before it is resumed for any other reason.
    #[must_use]
    pub fn may_run(&self, now: BootTime) -> bool {
        self.state == HolderState::Running && self.end().is_none_or(|end| now < end)
    }

    /// When the machine must be frozen unless something happens before: for a thread that nothing can
    /// block, set anew after every event.
    #[must_use]
    pub fn freeze_at(&self) -> Option<BootTime> {
        self.end().filter(|_| self.state == HolderState::Running)
    }

    /// When the next [`HolderEvent::Tick`] is due. Must be asked again after every event.
    #[must_use]
    pub fn wake_at(&self) -> Option<BootTime> {
        let retry = self.write.as_ref().and_then(|(_, write)| write.wake_at());
        [self.freeze_at(), retry].into_iter().flatten().min()
    }

    /// Whether no write of ours to the lease is under way.
    #[must_use]
    pub const fn settled(&self) -> bool {
        self.write.is_none()
    }

    /// Whether the lease may have been given up since it was known: until it is got back no life that it
    /// names counts, for a source's tokens neither.
    #[must_use]
    pub fn is_given_up(&self) -> bool {
        self.parts.given_up.is_some_and(|epoch| self.parts.record.epoch <= epoch)
            && self.life().is_some()
            && self.parts.times.keeps(Rule::GivenUpIsGotBack)
    }

    /// Under which life the machine runs: the lease's, or the one that was asked for and may be there
    /// already.
    fn life(&self) -> Option<&BeatRef> {
        let asked = match &self.write {
            Some((Purpose::Bind, write)) if self.parts.times.keeps(Rule::BoundFromSending) => {
                write.new_record().beat.as_ref()
            }
            _ => None,
        };
        asked.or(self.parts.record.beat.as_ref())
    }

    /// When the machine must stand still: `None` for never, zero for always, because its life is not
    /// the one that is kept here.
    fn end(&self) -> Option<BootTime> {
        let life = self.life()?;
        if !self.parts.times.keeps(Rule::FreezeAtTermEnd) {
            return None;
        }
        if self.is_given_up() {
            return Some(BootTime::default());
        }
        let any = !self.parts.times.keeps(Rule::ReclaimBeforeRun);
        let view = self.parts.view.as_ref().filter(|view| any || view.of == *life);
        let until = view.map_or(BootTime::default(), |view| view.until);
        Some(until - self.parts.times.stop_margin)
    }

    /// Takes an event, returns what to do. `now` is this host's boot time.
    pub fn on(&mut self, now: BootTime, event: HolderEvent) -> Vec<HolderAction> {
        let mut out = Vec::new();
        if self.state == HolderState::Gone {
            return out;
        }
        // What is overdue comes first, even if the timer was late.
        self.freeze_if_over(now, &mut out);
        match event {
            HolderEvent::Tick => {
                let call = self.write.as_mut().and_then(|(_, write)| {
                    let call = write.retry(now, &mut self.next_operation)?;
                    Some(HolderAction::Store(call))
                });
                out.extend(call);
            }
            HolderEvent::View(view) => self.parts.view = view,
            HolderEvent::Frozen => self.state = HolderState::Frozen,
            HolderEvent::Holds(record) => {
                self.arriving = None;
                self.parts.record = record;
            }
            HolderEvent::Moving(moving) => self.moving = moving,
            HolderEvent::Protect(protect) => self.protect = protect,
            HolderEvent::GivenUp(epoch) => {
                self.parts.given_up = self.parts.given_up.max(Some(epoch));
            }
            HolderEvent::Answer { operation, answer } => {
                self.on_answer(now, operation, answer, &mut out);
            }
        }
        if self.state != HolderState::Gone {
            self.settle(now, &mut out);
        }
        out
    }

    fn freeze_if_over(&mut self, now: BootTime, out: &mut Vec<HolderAction>) {
        if self.state == HolderState::Running && self.end().is_some_and(|end| now >= end) {
            self.state = HolderState::Frozen;
            out.push(HolderAction::Freeze);
            let text = match &self.parts.view {
                _ if self.is_given_up() => "its lease may have been given up meanwhile",
                Some(view) if Some(&view.of) == self.life() => {
                    "its term has ended, because the lease store does not answer"
                }
                _ => "the life that its lease refers to has ended",
            };
            out.push(self.report(&format!("it stands still here: {text}")));
        }
    }

    /// What follows from all that is known.
    fn settle(&mut self, now: BootTime, out: &mut Vec<HolderAction>) {
        self.freeze_if_over(now, out);
        let margin = self.parts.times.start_margin;
        if self.state == HolderState::Frozen && self.end().is_none_or(|end| now + margin < end) {
            self.state = HolderState::Running;
            out.push(HolderAction::Thaw);
            out.push(self.report("it may run here again"));
        }
        self.write_what_is_due(now, out);
    }

    fn write_what_is_due(&mut self, now: BootTime, out: &mut Vec<HolderAction>) {
        let moving = self.moving && self.parts.times.keeps(Rule::NoReclaimWhileMoving);
        let given_up = self.is_given_up();
        if self.write.is_some() || moving || self.arriving.is_some() {
            return;
        }
        let HolderParts { record, here, view, times, nonces, .. } = &mut self.parts;
        // A life that is over soon is no ground to stand on.
        let alive = view.as_ref().filter(|view| now < view.until).map(|view| &view.of);
        let (purpose, new) = match (&record.beat, alive) {
            (Some(_), _) if !self.protect => (Purpose::Unbind, record.rebound(None, nonces())),
            (Some(life), Some(alive)) if life != alive || given_up => {
                let taken = record.taken(here.clone(), record.attempt, nonces());
                (Purpose::Reclaim, taken.bound(Some(alive.clone())))
            }
            (None, Some(alive)) if self.protect => {
                (Purpose::Bind, record.rebound(Some(alive.clone()), nonces()))
            }
            _ => return,
        };
        let expected = Some(record.clone());
        let (write, call) = Write::start(now, expected, new, times, &mut self.next_operation);
        self.write = Some((purpose, write));
        out.push(HolderAction::Store(call));
        self.freeze_if_over(now, out);
    }

    fn on_answer(
        &mut self,
        now: BootTime,
        operation: OperationId,
        answer: Answer,
        out: &mut Vec<HolderAction>,
    ) {
        let Some((_, write)) = &mut self.write else { return };
        match write.answer(now, operation, answer) {
            Verdict::Stale => {}
            Verdict::Unknown(why) => {
                if !std::mem::replace(&mut self.told, true) {
                    out.push(self.report(&format!("its lease cannot be written yet: {why}")));
                }
            }
            Verdict::Won => {
                let record = write.new_record().clone();
                self.write = None;
                self.told = false;
                self.parts.record = record.clone();
                out.push(HolderAction::Held(record));
            }
            Verdict::Lost(None) => {
                self.write = None;
                self.parts.view = None;
                out.push(self.report(
                    "the store has no lease for it any more; restore it, it stands still until then",
                ));
            }
            Verdict::Lost(Some(found)) => self.lost(found, out),
        }
    }

    fn lost(&mut self, found: Record, out: &mut Vec<HolderAction>) {
        self.write = None;
        let known = &self.parts.record;
        if found.owner == self.parts.here && found.epoch == known.epoch {
            // A write of an earlier attempt whose answer never came: that is what to build on.
            self.parts.record = found.clone();
            out.push(HolderAction::Held(found));
            return;
        }
        let (owner, epoch) = (found.owner, found.epoch);
        out.push(
            self.report(&format!("{owner} has taken it over ({epoch}); the copy here is dropped")),
        );
        if self.state == HolderState::Running {
            out.push(HolderAction::Freeze);
        }
        self.state = HolderState::Gone;
        out.push(HolderAction::Discard { owner, epoch });
    }

    fn report(&self, text: &str) -> HolderAction {
        HolderAction::Report(format!("machine \"{}\": {text}", self.parts.record.machine))
    }
}
