//! The thread that runs the state machines of a runner's [`Tenure`](super::Tenure), and does what they say.

use super::{Callers, Deeds, Input, Known, LOOK, Shared};
use crate::{
    keeper::{Client, Said},
    lease::{BeatRef, BootClock, BootTime, Clock as _, Epoch, HostName, Record},
    tenure::{
        Holder, HolderAction, HolderEvent, HolderParts, HolderState, Pulse, PulseAction,
        PulseEvent, Times, View, random_nonces,
    },
};
use std::sync::{
    Arc,
    mpsc::{Receiver, RecvTimeoutError},
};

/// Where this host's sign of life comes from.
pub(super) enum Source {
    /// This runner keeps one of its own.
    Own(Box<Pulse>),
    /// The host's keeper does.
    Kept {
        /// The connection to it.
        client: Client,
        /// Up to which epoch it may have given up the machine.
        given_up: Option<Epoch>,
    },
}

impl Source {
    fn wake_at(&self) -> Option<BootTime> {
        match self {
            Self::Own(pulse) => pulse.wake_at(),
            Self::Kept { .. } => None,
        }
    }

    const fn given_up(&self) -> Option<Epoch> {
        match self {
            Self::Own(_) => None,
            Self::Kept { given_up, .. } => *given_up,
        }
    }
}

pub(super) struct Work {
    pub(super) shared: Arc<Shared>,
    pub(super) calls: Callers,
    pub(super) here: HostName,
    pub(super) times: Times,
    pub(super) source: Source,
    /// Until when this host's life holds.
    pub(super) view: Option<View>,
    pub(super) holder: Option<(Holder, Box<dyn Deeds>)>,
    /// Of the holder: answers to an earlier one's questions are nobody's.
    pub(super) number: u64,
}

impl Work {
    pub(super) fn run(mut self, first: Vec<PulseAction>, inputs: &Receiver<Input>) {
        self.beat(first);
        loop {
            let now = BootClock.now();
            let held = self.holder.as_ref().and_then(|(holder, _)| holder.wake_at());
            let wake = [self.source.wake_at(), held].into_iter().flatten().min();
            let rest = wake.map_or(LOOK, |at| at.since(now).min(LOOK));
            let input = match inputs.recv_timeout(rest) {
                Ok(input) => Some(input),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => break,
            };
            let now = BootClock.now();
            match input {
                Some(Input::End) => break,
                Some(Input::LetGo) => self.holder = None,
                Some(Input::Hold(record, known, deeds)) => {
                    self.hold(now, record, known, None, deeds);
                }
                Some(Input::Arrive(record, life, deeds, done)) => {
                    self.hold(now, record, Known::Surely, Some(life), deeds);
                    let may = |(holder, _): &(Holder, _)| holder.may_run(BootClock.now());
                    let _ = done.send(self.holder.as_ref().is_some_and(may));
                }
                Some(Input::Moving(moving, done)) => {
                    let may =
                        !moving || self.holder.as_ref().is_none_or(|(holder, _)| holder.settled());
                    if may {
                        self.feed(now, HolderEvent::Moving(moving));
                    }
                    let _ = done.send(may);
                }
                Some(Input::Holding(event)) => self.feed(now, event),
                Some(Input::Pulse(operation, answer)) => {
                    if let Source::Own(pulse) = &mut self.source {
                        let actions = pulse.on(now, PulseEvent::Answer { operation, answer });
                        self.beat(actions);
                    }
                }
                Some(Input::Keeper(said)) => self.hears(said),
                Some(Input::Holder(number, operation, answer)) if number == self.number => {
                    self.feed(now, HolderEvent::Answer { operation, answer });
                }
                Some(Input::Holder(..)) | None => {}
            }
            // Whatever came: what is due is done.
            let now = BootClock.now();
            if let Source::Own(pulse) = &mut self.source
                && pulse.wake_at().is_some_and(|at| now >= at)
            {
                let actions = pulse.on(now, PulseEvent::Tick);
                self.beat(actions);
            }
            let due = self.holder.as_ref().and_then(|(holder, _)| holder.wake_at());
            if due.is_some_and(|at| now >= at) {
                self.feed(now, HolderEvent::Tick);
            }
        }
        if let (Source::Kept { client, .. }, None) = (self.source, &self.holder) {
            client.goodbye();
        }
        self.shared.lock().ended = true;
        self.shared.changed.notify_all();
    }

    fn beat(&mut self, actions: Vec<PulseAction>) {
        for action in actions {
            match action {
                PulseAction::Store(call) => {
                    let _ = self.calls.pulse.send(call);
                }
                PulseAction::Report(text) => self.report(text),
                PulseAction::Tell(view) => {
                    let serial = {
                        let seen = self.shared.lock();
                        let same =
                            view.as_ref().map(|v| &v.of) == self.view.as_ref().map(|v| &v.of);
                        if same { seen.serial + 1 } else { 0 }
                    };
                    self.renewed(view, serial, BootClock.now());
                }
            }
        }
    }

    /// How this host's life is.
    fn renewed(&mut self, view: Option<View>, serial: u64, told: BootTime) {
        self.view.clone_from(&view);
        {
            let mut seen = self.shared.lock();
            (seen.serial, seen.told) = (serial, told);
            seen.beats += 1;
            seen.trouble = None;
        }
        self.feed(BootClock.now(), HolderEvent::View(view));
        self.show();
    }

    /// What others see: no life counts for a machine that may have been given up under it.
    fn show(&self) {
        let given_up = self.holder.as_ref().is_some_and(|(holder, _)| holder.is_given_up());
        self.shared.lock().view = self.view.clone().filter(|_| !given_up);
        self.shared.changed.notify_all();
    }

    /// What the keeper of this host's life says.
    fn hears(&mut self, said: Said) {
        let Source::Kept { given_up, .. } = &mut self.source else { return };
        match said {
            Said::Welcome { renewal, given_up: given } => {
                *given_up = given;
                self.shared.lock().renewal = renewal;
                if let Some(epoch) = given {
                    self.feed(BootClock.now(), HolderEvent::GivenUp(epoch));
                    self.show();
                }
            }
            Said::View { number, view, serial, told, trouble } => {
                self.renewed(view, serial, told);
                self.trouble(trouble);
                if let Source::Kept { client, .. } = &self.source {
                    client.took(number);
                }
            }
            Said::Trouble(text) => self.trouble(Some(text)),
        }
    }

    /// Told once, until it is another.
    fn trouble(&self, trouble: Option<String>) {
        let Some(text) = trouble else { return };
        let is_news = self.shared.lock().said.replace(text.clone()).is_none_or(|old| old != text);
        if is_news {
            tracing::warn!("{text}");
        }
        self.shared.lock().trouble = Some(text);
    }

    fn report(&self, text: String) {
        tracing::warn!("{text}");
        self.shared.lock().trouble = Some(text);
    }

    fn hold(
        &mut self,
        now: BootTime,
        record: Record,
        known: Known,
        arriving: Option<BeatRef>,
        deeds: Box<dyn Deeds>,
    ) {
        let doubt = (known == Known::Perhaps).then_some(record.epoch);
        let parts = HolderParts {
            record,
            here: self.here.clone(),
            view: self.view.clone(),
            given_up: self.source.given_up().max(doubt),
            times: self.times.clone(),
            nonces: random_nonces(),
        };
        self.number += 1;
        let (holder, first) = match arriving {
            Some(life) => Holder::arriving(now, parts, Some(life)),
            None => Holder::new(now, parts),
        };
        self.holder = Some((holder, deeds));
        self.act(first);
        self.show();
    }

    fn feed(&mut self, now: BootTime, event: HolderEvent) {
        let Some((holder, _)) = &mut self.holder else { return };
        let actions = holder.on(now, event);
        self.act(actions);
    }

    fn act(&mut self, actions: Vec<HolderAction>) {
        let Some((holder, deeds)) = &self.holder else { return };
        // Of one that stands still the guard is told nothing: its time has not come.
        if holder.state() == HolderState::Running {
            deeds.runs_until(holder.freeze_at());
        }
        let mut gone = false;
        for action in actions {
            match action {
                HolderAction::Freeze => deeds.freeze(),
                HolderAction::Thaw => deeds.thaw(),
                HolderAction::Held(record) => {
                    deeds.held(&record);
                    self.shared.lock().record = Some(record);
                    self.show();
                }
                HolderAction::Store(call) => {
                    let _ = self.calls.holder.send((self.number, call));
                }
                HolderAction::Discard { owner, epoch } => {
                    deeds.discard(&owner, epoch);
                    gone = true;
                }
                HolderAction::Report(text) => self.report(text),
            }
        }
        if gone {
            self.holder = None;
        }
    }
}
