//! Drives this runner's sign of life, or hears how its host's is, and, while the machine is protected, the rules of its term
//! (`crate::tenure`).
//!
//! One thread feeds the state machines and does what they say at once; another asks the store, so that
//! nothing waits for it. What must hold: freezing waits for nothing but the kernel, and the guard
//! (`guard`) knows the end of the machine's time before the machine may run until then.

use crate::{
    checkpoint::description::LifeSign,
    keeper::{Client, Place, Said},
    lease::{
        BeatName, BeatRef, BootClock, BootTime, Clock as _, Epoch, HostName, LeaseStore,
        MachineName, Nonce, Record, StoreError,
    },
    tenure::{
        Answer, Call, HolderEvent, OperationId, Pulse, PulseParts, Surrender, SurrenderAction,
        SurrenderEvent, SurrenderParts, Times, View, random_nonces,
    },
};
use std::{
    collections::VecDeque,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        mpsc::{self, Sender},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

mod work;

use work::{Source, Work};

/// Longest time without a look.
const LOOK: Duration = Duration::from_secs(1);
/// A sign of life is written no more often than this, unless T is short.
const LEAST_RENEWAL: Duration = Duration::from_millis(200);
/// How long the thread of the state machines may take for an answer; it waits for nothing but the kernel.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// How long the store may take to learn that nobody looks after a machine any more.
const RESIGN_LIMIT: Duration = Duration::from_secs(5);

/// How long a lease holds, and how often the sign of life behind it is renewed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pace {
    /// T.
    pub(super) term: Duration,
    /// Between two renewals.
    pub(super) renewal: Duration,
    /// The host's one sign of life keeps it, not one of this runner's own.
    pub(super) shared: bool,
}

impl Pace {
    /// For a machine with a generation this often: a stand-in knows when its owner ended, and so how much
    /// is lost, no better than from one sign of life to the next.
    pub(super) fn of(term: Duration, every: Duration, shared: bool) -> Self {
        Self { term, renewal: (every / 4).max(LEAST_RENEWAL).min(term / 4), shared }
    }

    /// The times that go with it.
    pub(super) fn times(self) -> Times {
        Times::of(self.term, self.renewal)
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

/// Whether the lease is known to be as it is said to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Known {
    /// Nobody can have given it up.
    Surely,
    /// It was read once: it is got back before the machine runs.
    Perhaps,
}

enum Input {
    Pulse(OperationId, Answer),
    Keeper(Said),
    Holder(u64, OperationId, Answer),
    Hold(Record, Known, Box<dyn Deeds>),
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
    /// How often it is renewed.
    renewal: Duration,
    /// The lease, as the holder has it.
    record: Option<Record>,
    /// The last thing that went wrong.
    trouble: Option<String>,
    /// What the keeper said went wrong, the last time.
    said: Option<String>,
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
    machine: MachineName,
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
    /// Begins to show a sign of life: its own, or with the host's keeper.
    ///
    /// # Errors
    /// If this host gives no threads.
    pub(super) fn begin(
        store: Arc<dyn LeaseStore>,
        place: Place,
        pace: Pace,
    ) -> std::io::Result<Self> {
        let (machine, here) = (place.machine.clone(), place.host.clone());
        let shared = Arc::new(Shared::default());
        shared.lock().renewal = pace.renewal;
        let (inputs, receiver) = mpsc::channel();
        let calls = callers(&store, &inputs)?;
        let (source, first) = if pace.shared {
            let said = inputs.clone();
            let client = Client::begin(place, move |words| said.send(Input::Keeper(words)).is_ok());
            (Source::Kept { client: client?, given_up: None }, Vec::new())
        } else {
            let name = BeatName::of_runner(here.clone(), machine.clone());
            let parts = PulseParts { name, times: pace.times(), nonces: random_nonces() };
            let (pulse, first) = Pulse::start(BootClock.now(), parts);
            (Source::Own(Box::new(pulse)), first)
        };
        let work = Work {
            shared: Arc::clone(&shared),
            calls,
            here: here.clone(),
            times: pace.times(),
            source,
            view: None,
            holder: None,
            number: 0,
        };
        let thread = std::thread::Builder::new()
            .name("tenure".into())
            .spawn(move || work.run(first, &receiver))?;
        Ok(Self { shared, inputs, thread: Some(thread), store, machine, here, pace })
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
            every_us: seen.renewal.as_micros() as u64,
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
    pub(super) fn hold(&self, record: Record, known: Known, deeds: Box<dyn Deeds>) {
        self.shared.lock().record = Some(record.clone());
        let _ = self.inputs.send(Input::Hold(record, known, deeds));
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

    /// Says in the store at once that nobody looks after what it held, which must have ended: nobody need
    /// wait for the end of the term.
    pub(super) fn resign(mut self) {
        let _ = self.inputs.send(Input::End);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let done = if self.pace.shared { self.give_up() } else { self.end_life() };
        if let Err(error) = done {
            tracing::warn!(%error, "a stand-in has to wait for the end of the term");
        }
    }

    /// Ends a life of its own.
    fn end_life(&self) -> Result<(), String> {
        let own = self.shared.lock().view.take();
        let Some(own) = own else { return Ok(()) };
        let text = |error: StoreError| error.to_string();
        let found = self.store.read_beat(&own.of.name).map_err(text)?;
        let Some(beat) = found.filter(|beat| beat.of == own.of && beat.fenced_by.is_none()) else {
            return Ok(());
        };
        let nonce = Nonce::random().map_err(|error| error.to_string())?;
        let over = beat.fenced(self.here.clone(), nonce);
        self.store.compare_and_set_beat(&own.of.name, Some(&beat), &over).map(drop).map_err(text)
    }

    /// The host's life goes on: the machine's lease is given up.
    fn give_up(&self) -> Result<(), String> {
        // As the holder knew it last: what is not bound nobody can take.
        if self.shared.lock().record.as_ref().is_none_or(|record| record.beat.is_none()) {
            return Ok(());
        }
        let mut surrender = Surrender::new(SurrenderParts {
            machine: self.machine.clone(),
            here: self.here.clone(),
            not_before: BootClock.now(),
            times: self.pace.times(),
            nonces: random_nonces(),
        });
        let deadline = Instant::now() + RESIGN_LIMIT;
        let mut actions = VecDeque::from(surrender.on(BootClock.now(), SurrenderEvent::Tick));
        loop {
            match actions.pop_front() {
                Some(SurrenderAction::Store(Call { operation, content })) => {
                    let answer = Call { operation, content }.perform(&*self.store);
                    let event = SurrenderEvent::Answer { operation, answer };
                    actions.extend(surrender.on(BootClock.now(), event));
                }
                Some(SurrenderAction::Done(what)) => {
                    tracing::info!(machine = %self.machine, "{what}");
                    return Ok(());
                }
                Some(SurrenderAction::Report(text)) => tracing::warn!("{text}"),
                Some(SurrenderAction::GivingUp(_)) => {}
                None if Instant::now() > deadline => {
                    return Err("the lease store does not learn it in time".to_owned());
                }
                None => {
                    let now = BootClock.now();
                    let rest = surrender.wake_at().map_or(LOOK, |at| at.since(now));
                    std::thread::park_timeout(rest.min(LOOK));
                    actions.extend(surrender.on(BootClock.now(), SurrenderEvent::Tick));
                }
            }
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
