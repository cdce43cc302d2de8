//! Drives this runner's sign of life and, while the machine is protected, the rules of its term
//! (`crate::tenure`).
//!
//! One thread feeds the state machines and does what they say at once; another asks the store, so that
//! nothing waits for it. What must hold: freezing waits for nothing but the kernel, and the guard
//! (`guard`) knows the end of the machine's time before the machine may run until then.

use crate::{
    checkpoint::description::LifeSign,
    lease::{
        BeatName, BeatRef, BootClock, BootTime, Clock as _, Epoch, HostName, LeaseStore, Nonce,
        Record,
    },
    tenure::{
        Answer, Call, Holder, HolderAction, HolderEvent, HolderParts, HolderState, OperationId,
        Pulse, PulseAction, PulseEvent, PulseParts, Times, View,
    },
};
use std::{
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// Longest time without a look.
const LOOK: Duration = Duration::from_secs(1);
/// A sign of life is written no more often than this, unless T is short.
const LEAST_RENEWAL: Duration = Duration::from_millis(200);
/// How long the thread of the state machines may take for an answer; it waits for nothing but the kernel.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// How long a lease holds, and how often the sign of life behind it is renewed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pace {
    /// T.
    pub(super) term: Duration,
    /// Between two renewals.
    pub(super) renewal: Duration,
}

impl Pace {
    /// For a machine with a generation this often: a stand-in knows when its owner ended, and so how much
    /// is lost, no better than from one sign of life to the next.
    pub(super) fn of(term: Duration, every: Duration) -> Self {
        Self { term, renewal: (every / 4).max(LEAST_RENEWAL).min(term / 4) }
    }

    /// The times that go with it.
    pub(super) fn times(self) -> Times {
        let Self { term, renewal } = self;
        Times {
            term,
            renew_every: renewal,
            poll: (renewal / 2).clamp(Duration::from_millis(20), Duration::from_millis(250)),
            stop_margin: (term / 20).clamp(Duration::from_millis(20), Duration::from_millis(100)),
            start_margin: (term / 10).clamp(Duration::from_millis(40), Duration::from_millis(200)),
            ..Times::default()
        }
    }
}

/// What the holder of a machine's term wants done.
pub(super) trait Deeds: Send {
    /// The machine must stand still at that time; `None`: never. Said before it may run until then.
    fn runs_until(&self, end: Option<BootTime>);

    /// It must stand still now. Returns when it does.
    fn freeze(&self);

    /// It may go on.
    fn thaw(&self);

    /// The lease is this one now.
    fn held(&self, record: &Record);

    /// Another host has it: it never runs here again.
    fn discard(&self, owner: &HostName, epoch: Epoch);
}

enum Input {
    Pulse(OperationId, Answer),
    Holder(u64, OperationId, Answer),
    Hold(Record, Box<dyn Deeds>),
    Arrive(Record, BeatRef, Box<dyn Deeds>, Sender<bool>),
    Moving(bool, Sender<bool>),
    Holding(HolderEvent),
    LetGo,
    End,
}

/// What is known from outside.
#[derive(Default)]
struct Seen {
    view: Option<View>,
    /// Renewals, to tell one from the next.
    beats: u64,
    /// Of this life: its first beat has 0.
    serial: u64,
    /// When the store was known to have it.
    told: BootTime,
    /// The lease, as the holder has it.
    record: Option<Record>,
    /// The last thing that went wrong.
    trouble: Option<String>,
    ended: bool,
}

#[derive(Default)]
struct Shared {
    seen: Mutex<Seen>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See the module. Dropping it ends the sign of life: machines that refer to it may be taken a term
/// later.
pub(super) struct Tenure {
    shared: Arc<Shared>,
    inputs: Sender<Input>,
    thread: Option<JoinHandle<()>>,
    store: Arc<dyn LeaseStore>,
    here: HostName,
    pace: Pace,
}

impl Drop for Tenure {
    fn drop(&mut self) {
        let _ = self.inputs.send(Input::End);
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            // A panic of the thread has been reported by then.
            let _ = thread.join();
        }
    }
}

impl Tenure {
    /// Begins to show a sign of life.
    ///
    /// # Errors
    /// If this host gives no threads.
    pub(super) fn begin(
        store: Arc<dyn LeaseStore>,
        name: BeatName,
        here: HostName,
        pace: Pace,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let (inputs, receiver) = mpsc::channel();
        let calls = callers(&store, &inputs)?;
        let work = Work {
            shared: Arc::clone(&shared),
            calls,
            here: here.clone(),
            times: pace.times(),
            holder: None,
            number: 0,
        };
        let thread = std::thread::Builder::new()
            .name("tenure".into())
            .spawn(move || work.run(name, &receiver))?;
        Ok(Self { shared, inputs, thread: Some(thread), store, here, pace })
    }

    /// T, and how often this life is renewed.
    pub(super) const fn pace(&self) -> Pace {
        self.pace
    }

    /// Until when this life holds, and how often it was renewed.
    pub(super) fn view(&self) -> (Option<View>, u64) {
        let seen = self.shared.lock();
        (seen.view.clone(), seen.beats)
    }

    /// The newest renewal that the store has.
    pub(super) fn sign(&self) -> Option<LifeSign> {
        let seen = self.shared.lock();
        let view = seen.view.as_ref()?;
        Some(LifeSign {
            life: view.of.incarnation,
            serial: seen.serial,
            of: Some(view.of.name.to_string()),
            age_us: BootClock.now().since(seen.told).as_micros() as u64,
            every_us: self.pace.renewal.as_micros() as u64,
        })
    }

    /// Waits for a life that holds.
    pub(super) fn wait_alive(&self, limit: Duration) -> Result<View, String> {
        let alive = |seen: &Seen| {
            let quarter = self.pace.term / 4;
            seen.view.clone().filter(|view| view.until.since(BootClock.now()) > quarter)
        };
        self.wait(limit, alive).map_err(|trouble| {
            format!("the lease store does not take this host's sign of life: {trouble}")
        })
    }

    /// Holds the machine whose lease is this; `deeds` are done from now on.
    pub(super) fn hold(&self, record: Record, deeds: Box<dyn Deeds>) {
        self.shared.lock().record = Some(record.clone());
        let _ = self.inputs.send(Input::Hold(record, deeds));
    }

    /// Holds a machine that arrives, under `life`, before it runs: this is the lease that is handed over.
    /// When it returns, the guard knows the end of its time.
    ///
    /// # Errors
    /// If that life has ended.
    pub(super) fn arrive(
        &self,
        handed: Record,
        life: BeatRef,
        deeds: Box<dyn Deeds>,
    ) -> Result<(), String> {
        let (done, told) = mpsc::channel();
        let _ = self.inputs.send(Input::Arrive(handed, life, deeds, done));
        match told.recv_timeout(ANSWER_LIMIT) {
            Ok(true) => Ok(()),
            _ => {
                Err("this host's sign of life is not renewed: the lease store does not answer"
                    .into())
            }
        }
    }

    /// A move begins: nothing is written to the lease but by it. Or it has ended, with the machine here.
    ///
    /// # Errors
    /// If a write of ours to the lease is not answered within `limit`.
    pub(super) fn moving(&self, moving: bool, limit: Duration) -> Result<(), String> {
        let deadline = Instant::now() + limit;
        loop {
            let (done, told) = mpsc::channel();
            let _ = self.inputs.send(Input::Moving(moving, done));
            if let Ok(true) = told.recv_timeout(ANSWER_LIMIT) {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(format!("its lease is being written, for more than {limit:?}"));
            }
            std::thread::park_timeout(Duration::from_millis(5));
        }
    }

    /// The lease, which a move has written, is this one.
    pub(super) fn holds(&self, record: &Record) {
        self.shared.lock().record = Some(record.clone());
        let _ = self.inputs.send(Input::Holding(HolderEvent::Holds(record.clone())));
    }

    /// Has the lease name this life, or none; waits until it does.
    pub(super) fn protect(&self, on: bool, limit: Duration) -> Result<Record, String> {
        let _ = self.inputs.send(Input::Holding(HolderEvent::Protect(on)));
        let bound = |seen: &Seen| {
            let life = seen.view.as_ref().map(|view| &view.of);
            let is_so = |record: &&Record| match &record.beat {
                Some(beat) => on && Some(beat) == life,
                None => !on,
            };
            seen.record.as_ref().filter(is_so).cloned()
        };
        self.wait(limit, bound).map_err(|trouble| {
            format!("the lease store does not take the machine's lease: {trouble}")
        })
    }

    /// The machine is not here any more.
    pub(super) fn let_go(&self) {
        let _ = self.inputs.send(Input::LetGo);
    }

    /// Ends this life at once and says so in the store: nobody need wait for the end of the term. What
    /// it held must have ended.
    pub(super) fn resign(mut self) {
        let _ = self.inputs.send(Input::End);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let own = self.shared.lock().view.take();
        let Some(own) = own else { return };
        let fenced = self.store.read_beat(&own.of.name).and_then(|found| {
            let Some(beat) = found.filter(|beat| beat.of == own.of && beat.fenced_by.is_none())
            else {
                return Ok(());
            };
            let Ok(nonce) = Nonce::random() else { return Ok(()) };
            let over = beat.fenced(self.here.clone(), nonce);
            self.store.compare_and_set_beat(&own.of.name, Some(&beat), &over).map(drop)
        });
        if let Err(error) = fenced {
            tracing::warn!(%error, "a stand-in has to wait for the end of the term");
        }
    }

    fn wait<T>(&self, limit: Duration, found: impl Fn(&Seen) -> Option<T>) -> Result<T, String> {
        let deadline = Instant::now() + limit;
        let mut seen = self.shared.lock();
        loop {
            if let Some(found) = found(&seen) {
                return Ok(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || seen.ended {
                let silent = || format!("no answer within {limit:?}");
                return Err(seen.trouble.clone().unwrap_or_else(silent));
            }
            let waited = self.shared.changed.wait_timeout(seen, left);
            seen = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Who asks the store.
struct Callers {
    pulse: Sender<Call>,
    holder: Sender<(u64, Call)>,
}

/// A thread for each kind of question: one that hangs does not keep the other from being asked.
fn callers(store: &Arc<dyn LeaseStore>, inputs: &Sender<Input>) -> std::io::Result<Callers> {
    let (pulse, asked) = mpsc::channel::<Call>();
    let (answers, other) = (inputs.clone(), Arc::clone(store));
    std::thread::Builder::new().name("tenure-beat".into()).spawn(move || {
        for call in asked {
            let answer = call.perform(&*other);
            if answers.send(Input::Pulse(call.operation, answer)).is_err() {
                return;
            }
        }
    })?;
    let (holder, asked) = mpsc::channel::<(u64, Call)>();
    let (answers, store) = (inputs.clone(), Arc::clone(store));
    std::thread::Builder::new().name("tenure-lease".into()).spawn(move || {
        for (number, call) in asked {
            let answer = call.perform(&*store);
            if answers.send(Input::Holder(number, call.operation, answer)).is_err() {
                return;
            }
        }
    })?;
    Ok(Callers { pulse, holder })
}

struct Work {
    shared: Arc<Shared>,
    calls: Callers,
    here: HostName,
    times: Times,
    holder: Option<(Holder, Box<dyn Deeds>)>,
    /// Of the holder: answers to an earlier one's questions are nobody's.
    number: u64,
}

impl Work {
    fn run(mut self, name: BeatName, inputs: &Receiver<Input>) {
        let parts = PulseParts { name, times: self.times.clone(), nonces: super::nonces() };
        let (mut pulse, first) = Pulse::start(BootClock.now(), parts);
        self.beat(first);
        loop {
            let now = BootClock.now();
            let held = self.holder.as_ref().and_then(|(holder, _)| holder.wake_at());
            let wake = [pulse.wake_at(), held].into_iter().flatten().min();
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
                Some(Input::Hold(record, deeds)) => self.hold(now, record, None, deeds, &pulse),
                Some(Input::Arrive(record, life, deeds, done)) => {
                    self.hold(now, record, Some(life), deeds, &pulse);
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
                    let actions = pulse.on(now, PulseEvent::Answer { operation, answer });
                    self.beat(actions);
                }
                Some(Input::Holder(number, operation, answer)) if number == self.number => {
                    self.feed(now, HolderEvent::Answer { operation, answer });
                }
                Some(Input::Holder(..)) | None => {}
            }
            // Whatever came: what is due is done.
            let now = BootClock.now();
            if pulse.wake_at().is_some_and(|at| now >= at) {
                let actions = pulse.on(now, PulseEvent::Tick);
                self.beat(actions);
            }
            let due = self.holder.as_ref().and_then(|(holder, _)| holder.wake_at());
            if due.is_some_and(|at| now >= at) {
                self.feed(now, HolderEvent::Tick);
            }
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
                    {
                        let mut seen = self.shared.lock();
                        let life = |view: &Option<View>| view.as_ref().map(|view| view.of.clone());
                        let same = life(&seen.view) == life(&view);
                        seen.serial = if same { seen.serial + 1 } else { 0 };
                        seen.view.clone_from(&view);
                        seen.told = BootClock.now();
                        seen.beats += 1;
                        seen.trouble = None;
                    }
                    self.shared.changed.notify_all();
                    self.feed(BootClock.now(), HolderEvent::View(view));
                }
            }
        }
    }

    fn report(&self, text: String) {
        tracing::warn!("{text}");
        self.shared.lock().trouble = Some(text);
    }

    fn hold(
        &mut self,
        now: BootTime,
        record: Record,
        arriving: Option<BeatRef>,
        deeds: Box<dyn Deeds>,
        pulse: &Pulse,
    ) {
        let parts = HolderParts {
            record,
            here: self.here.clone(),
            view: pulse.view().cloned(),
            times: self.times.clone(),
            nonces: super::nonces(),
        };
        self.number += 1;
        let (holder, first) = match arriving {
            Some(life) => Holder::arriving(now, parts, Some(life)),
            None => Holder::new(now, parts),
        };
        self.holder = Some((holder, deeds));
        self.act(first);
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
                    self.shared.changed.notify_all();
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
