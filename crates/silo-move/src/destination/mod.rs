//! The end that receives devices: drives [`silo_block::session::destination`] over real
//! connections.
//!
//! ```text
//!  receivers (one a connection) ─ decode, offer, store ─┐
//!  readers and writers of volumes ─ wait, claim ────────┼─► the machine, under one lock
//!  fetchers (stores, peers) ────────────────────────────┘        │ everything that is said
//!                                                                ▼
//!  chores thread: run, make durable  ◄── driver thread ──► control connection
//! ```
//!
//! What must hold: the machine is touched under its lock only, and nothing waits under that lock;
//! messages leave in the order in which the machine gave them; content is stored by the thread that
//! holds it, outside of the lock; whoever waits for a block is woken by the thread that stored it.

mod access;
mod backlog;
mod chores;
mod driver;
mod farewell;
mod fetch;
mod lines;
mod receive;
mod server;

pub use server::{Accepted, Offer, Reception, Server};

use crate::{
    assist::{Assist, Counts, Fetch, Lookup, Policy},
    bounded::{self, Disks},
    clock::Clock,
    codec::Naming,
    lane::{Lanes, LastWords, lock},
    ledger::Ledger,
    peer::Link,
    report::{End, Lacking, MoveError, Phase, Progress, Rate, Timings, WireBytes},
    volume::{Hub, Volume},
    waits::{WaitSummary, Waits},
};
use access::Parker;
use backlog::Backlog;
use farewell::Outcome;
use fetch::Fetches;
use silo_block::{
    block::BlockRange,
    device::DeviceName,
    session::{
        destination::{
            Action, Config, Counters, Destination, DestinationDevice, Event, Phase as Step,
            WaiterId,
        },
        messages::{DeviceIndex, Reason, SessionId},
    },
    times::Histogram,
};
use std::{
    collections::{HashMap, VecDeque},
    io,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread::{Builder, JoinHandle},
    time::{Duration, Instant},
};

/// What the destination asks of whoever is to use the devices. Called on a thread of its own, one
/// call at a time.
pub trait DestinationHost: Send + Sync {
    /// Everything that is needed to run is here; the volumes are open and owned by this host, and
    /// it is noted durably that they are (by the ledger of the session; whoever has a lease takes
    /// it here). Blocks that are missing come when they are touched. Returns when it runs.
    ///
    /// # Errors
    /// A sentence for people: it does not run and never will by this attempt.
    fn run(&self, attempt: u32, state: Vec<u8>, flushes: Vec<Vec<u64>>) -> Result<(), String>;

    /// Everything up to the token is durable here: the source may go.
    fn durable(&self) {}

    /// Everything is here.
    fn complete(&self) {}

    /// Something of the layer above came from the source.
    fn custom(&self, kind: u32, payload: &[u8]) {
        let _ = (kind, payload);
    }

    /// A block cannot be had or stored while it is in use here: its readers get errors.
    fn trouble(&self, what: &str) {
        let _ = what;
    }

    /// Something takes longer than it should; nothing is given up.
    fn overdue(&self, what: &str) {
        let _ = what;
    }
}

/// How a destination behaves.
#[derive(Clone, Default)]
pub struct Options {
    /// Of the session.
    pub session: Config,
    /// How hashes are made that the source names blocks by.
    pub naming: Naming,
    /// Where blocks may be fetched that the source names by hash, in the order to ask.
    pub places: Vec<Arc<dyn Fetch>>,
    /// How to ask them.
    pub policy: Policy,
    /// Content of this host by hash, asked first and at once.
    pub local: Option<Arc<dyn Lookup>>,
    /// Where what must survive this process is noted; nothing survives without.
    pub ledger: Option<Arc<dyn Ledger>>,
    /// How long a device may take for a flush, and the ledger for a note, before the session goes on
    /// without; 30 s if none is given.
    pub disk_limit: Option<Duration>,
}

/// A move that went well, as the destination saw it.
#[derive(Clone, Debug)]
pub struct DestinationReport {
    /// The session.
    pub session: SessionId,
    /// The peer.
    pub peer: String,
    /// Phases: `filling` until the token came, `switch` until it ran here.
    pub timings: Timings,
    /// What was counted.
    pub counters: Counters,
    /// How stores and peers answered, all together.
    pub places: Counts,
    /// How each of them did: taken, wrong, missing, failed.
    pub by_place: Vec<(String, Counts)>,
    /// Bytes of frames.
    pub wire: WireBytes,
    /// How long accesses waited for blocks.
    pub waits: WaitSummary,
}

/// Two notes, the one under way and the next: a flush and a save each, each of which may have to wait
/// for one before it.
const NOTES: u32 = 8;

struct Core {
    /// None when the session is over and its devices have been given back.
    machine: Option<Destination>,
    /// What the driver's thread is to do, in order.
    pending: VecDeque<Action>,
    /// Notes that have to be durable before anything more is stored.
    notes: usize,
    /// Why the last note could not be made: nothing is stored before one can.
    note_failed: Option<String>,
}

pub(crate) struct Shared {
    session: SessionId,
    core: Mutex<Core>,
    changed: Condvar,
    /// A note was made.
    noted: Condvar,
    clock: Clock,
    /// In the order of the group.
    volumes: Vec<Arc<Volume>>,
    host: Arc<dyn DestinationHost>,
    options: Options,
    lanes: Lanes,
    slots: AtomicU64,
    waiters: Mutex<HashMap<WaiterId, Arc<Parker>>>,
    next_waiter: AtomicU64,
    fetches: Fetches,
    backlogs: Vec<Backlog>,
    assist: Mutex<Option<Assist>>,
    peer: Mutex<String>,
    waits: Waits,
    stored: AtomicU64,
    rate: Mutex<Rate>,
    attempt: AtomicU64,
    /// How it ended, for a source that comes back.
    outcome: Mutex<Option<Outcome>>,
    /// The driver's thread has ended.
    over: AtomicBool,
    notes: chores::Notes,
    disks: Disks,
    /// What cannot be done now is not tried again.
    ending: AtomicBool,
    /// It makes no notes any more.
    quiet: AtomicBool,
}

/// A move under way, at its destination.
pub struct Inbound {
    shared: Arc<Shared>,
    driver: Mutex<Option<JoinHandle<Result<DestinationReport, MoveError>>>>,
}

/// What a session starts from.
enum Start {
    New,
    /// It ran already before this process did, by this attempt.
    Running(u32),
}

impl Inbound {
    /// A session that receives `volumes`, which are in the order of the source's group.
    ///
    /// # Errors
    /// If a volume is in use, or there is no thread.
    pub fn new(
        session: SessionId,
        volumes: Vec<Arc<Volume>>,
        host: Arc<dyn DestinationHost>,
        options: Options,
    ) -> io::Result<Self> {
        Self::start(session, volumes, host, options, &Start::New)
    }

    /// A session whose token came before this process was started again: the volumes are as they
    /// were noted, and opened at once.
    ///
    /// # Errors
    /// If a volume is in use, or there is no thread.
    pub fn running(
        session: SessionId,
        attempt: u32,
        volumes: Vec<Arc<Volume>>,
        host: Arc<dyn DestinationHost>,
        options: Options,
    ) -> io::Result<Self> {
        Self::start(session, volumes, host, options, &Start::Running(attempt))
    }

    fn start(
        session: SessionId,
        volumes: Vec<Arc<Volume>>,
        host: Arc<dyn DestinationHost>,
        options: Options,
        start: &Start,
    ) -> io::Result<Self> {
        let phase = match start {
            Start::New => Phase::Connecting,
            Start::Running(_) => Phase::Following,
        };
        let shared = Arc::new(Shared {
            session,
            core: Mutex::new(Core {
                machine: None,
                pending: VecDeque::new(),
                notes: 0,
                note_failed: None,
            }),
            changed: Condvar::new(),
            noted: Condvar::new(),
            clock: Clock::new(session, Instant::now(), phase),
            backlogs: volumes.iter().map(|_| Backlog::default()).collect(),
            disks: Disks::of(&volumes, options.disk_limit.unwrap_or(bounded::LIMIT)),
            volumes,
            host,
            options,
            lanes: Lanes::new(session, LastWords::Kept),
            slots: AtomicU64::new(1),
            waiters: Mutex::default(),
            next_waiter: AtomicU64::new(1),
            fetches: Fetches::default(),
            assist: Mutex::new(None),
            peer: Mutex::new("a peer that has not connected".to_owned()),
            waits: Waits::default(),
            stored: AtomicU64::new(0),
            rate: Mutex::default(),
            attempt: AtomicU64::new(0),
            outcome: Mutex::default(),
            over: AtomicBool::new(false),
            notes: chores::Notes::default(),
            ending: AtomicBool::new(false),
            quiet: AtomicBool::new(false),
        });
        let mut devices = Vec::with_capacity(shared.volumes.len());
        for (at, volume) in shared.volumes.iter().enumerate() {
            let hub: Arc<dyn Hub> = shared.clone();
            let taken = match start {
                Start::New => volume.arrive(hub, at as u16),
                Start::Running(_) => volume.arrive_again(hub, at as u16),
            };
            match taken {
                Ok(replica) => devices.push(DestinationDevice {
                    name: volume.name().clone(),
                    base: volume.base(),
                    replica,
                }),
                Err(error) => {
                    give_back(&shared.volumes, devices);
                    return Err(error);
                }
            }
        }
        let hashes = Box::new(shared.fetches.hashes());
        let config = shared.options.session;
        let mut machine = match start {
            Start::New => Destination::new(config, session, devices, hashes, Duration::ZERO),
            Start::Running(attempt) => {
                for (volume, device) in shared.volumes.iter().zip(&devices) {
                    volume.open(device.replica.absent(), device.replica.rounds());
                }
                shared.attempt.store(u64::from(*attempt), Ordering::Release);
                Destination::restored(config, session, devices, hashes, *attempt, Duration::ZERO)
            }
        };
        if let Start::Running(_) = start {
            // The source may have gone because stores have the rest.
            let note = shared.options.ledger.as_ref().map(|ledger| ledger.load());
            let devices = match note.transpose() {
                Ok(note) => note.flatten().map_or_else(Vec::new, |note| note.devices),
                Err(error) => {
                    give_back(&shared.volumes, machine.into_devices());
                    return Err(error);
                }
            };
            for (at, volume) in shared.volumes.iter().enumerate() {
                let noted = devices.iter().find(|device| device.name == *volume.name());
                if let Some(noted) = noted {
                    machine.remember(DeviceIndex(at as u16), &noted.promised);
                }
            }
        }
        lock(&shared.core).machine = Some(machine);
        match shared.start_threads() {
            Ok(driver) => Ok(Self { shared, driver: Mutex::new(Some(driver)) }),
            Err(error) => {
                // Another try finds the volumes as they were.
                shared.lanes.set_over();
                let machine = lock(&shared.core).machine.take();
                give_back(
                    &shared.volumes,
                    machine.map_or_else(Vec::new, Destination::into_devices),
                );
                drop(lock(&shared.assist).take());
                Err(error)
            }
        }
    }

    /// Which move this is.
    #[must_use]
    pub fn session(&self) -> SessionId {
        self.shared.session
    }

    /// Puts a link to use; an older one is given up.
    pub fn attach(&self, link: Link) {
        self.shared.attach(link, Vec::new());
    }

    /// Says something to the layer above at the source; delivered once, in order.
    pub fn custom(&self, kind: u32, payload: Vec<u8>) {
        self.shared.tell(Event::Custom { kind, payload });
    }

    /// Stops the move, if the token has not come.
    pub fn cancel(&self, why: &str) {
        self.shared.tell(Event::Cancel(why.to_owned()));
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.shared.progress()
    }

    /// What is not here yet, by device, and where it is; only devices that lack something.
    #[must_use]
    pub fn lacking(&self) -> Vec<Lacking> {
        self.shared.lacking()
    }

    /// How long accesses have waited for blocks so far.
    #[must_use]
    pub fn waits(&self) -> WaitSummary {
        self.shared.waits.summary()
    }

    /// The same waits, each counted.
    #[must_use]
    pub fn wait_times(&self) -> Histogram {
        self.shared.waits.read()
    }

    /// How blocks came so far; nothing once it is over (see the report).
    #[must_use]
    pub fn counters(&self) -> Counters {
        let core = lock(&self.shared.core);
        core.machine.as_ref().map(Destination::counters).unwrap_or_default()
    }

    /// How long the phases have taken so far.
    #[must_use]
    pub fn timings(&self) -> Timings {
        self.shared.clock.timings()
    }

    /// Whether it is over.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.shared.over.load(Ordering::Acquire)
    }

    /// Waits for the end: everything here, or a failure. For one caller.
    ///
    /// # Errors
    /// Why it failed, and who owns the devices.
    ///
    /// # Panics
    /// If somebody waited before.
    pub fn wait(&self) -> Result<DestinationReport, MoveError> {
        let driver = lock(&self.driver).take().expect("waited for once");
        driver.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for Inbound {
    /// Cancels a session that has not got the token; one that runs goes on by itself.
    fn drop(&mut self) {
        if lock(&self.driver).is_some() {
            self.shared.tell(Event::Cancel("the session was dropped".to_owned()));
        }
    }
}

/// Says that the driver's thread has ended, also after a panic.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

fn give_back(volumes: &[Arc<Volume>], devices: Vec<DestinationDevice>) {
    for device in devices {
        let name: &DeviceName = &device.name;
        if let Some(volume) = volumes.iter().find(|volume| volume.name() == name) {
            volume.settle(device.replica);
        }
    }
}

impl Shared {
    fn start_threads(
        self: &Arc<Self>,
    ) -> io::Result<JoinHandle<Result<DestinationReport, MoveError>>> {
        self.start_assist()?;
        let (chores, jobs) = mpsc::channel();
        let for_chores = self.clone();
        Builder::new().name("silo-chores".to_owned()).spawn(move || for_chores.do_chores(&jobs))?;
        let for_driver = self.clone();
        Builder::new().name("silo-destination".to_owned()).spawn(move || {
            let _over = Over(&for_driver.over);
            for_driver.drive(&chores)
        })
    }

    fn now(&self) -> Duration {
        self.clock.now()
    }

    /// Feeds the machine; what is to be done is left to the driver.
    fn tell(&self, event: Event) {
        self.feed(event, None);
    }

    /// Feeds the machine. Does at once what concerns this host's readers; gives back what is to be
    /// done with the content in `slot`, if that is said now.
    fn feed(&self, event: Event, slot: Option<u64>) -> Option<Action> {
        self.with_machine(slot, |machine, now| machine.handle(now, event)).1
    }

    /// As [`Shared::feed`], for any call. None if the session is over.
    fn with_machine<R>(
        &self,
        slot: Option<u64>,
        call: impl FnOnce(&mut Destination, Duration) -> R,
    ) -> (Option<R>, Option<Action>) {
        let mut core = lock(&self.core);
        let noting = self.options.ledger.is_some();
        let Core { machine, pending, notes, .. } = &mut *core;
        let Some(machine) = machine else { return (None, None) };
        let now = self.now();
        let result = call(machine, now);
        let (mut own, mut local) = (None, Vec::new());
        while let Some(action) = machine.poll(now) {
            match &action {
                Action::Store { slot: of, .. } | Action::Discard(of) if Some(*of) == slot => {
                    own = Some(action);
                }
                Action::Here(device, ranges) => {
                    let volume = &self.volumes[usize::from(device.0)];
                    ranges.iter().for_each(|range| volume.arrived(*range));
                    local.push(action);
                }
                Action::Wake(_) | Action::Fail(..) => local.push(action),
                _ => {
                    let note = matches!(action, Action::Note(_) | Action::Run { .. });
                    *notes += usize::from(note && noting);
                    pending.push_back(action);
                }
            }
        }
        let more = !pending.is_empty();
        drop(core);
        if more {
            self.changed.notify_all();
        }
        for action in local {
            self.perform_local(action);
        }
        (Some(result), own)
    }

    /// Waits until everything is noted that must be before content is stored.
    fn wait_for_notes(&self) -> Result<(), String> {
        let core = lock(&self.core);
        let open = |core: &mut Core| core.notes > 0;
        let limit = self.disks.limit * NOTES;
        let waited = self.noted.wait_timeout_while(core, limit, open);
        let (core, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            return Err(format!("what is here could not be noted within {limit:?}"));
        }
        core.note_failed.clone().map_or(Ok(()), Err)
    }

    fn perform_local(&self, action: Action) {
        match action {
            Action::Here(device, ranges) => {
                let at = usize::from(device.0);
                for range in ranges {
                    self.volumes[at].tell_arrived(range);
                    self.drop_fetches(device.0, range);
                }
            }
            Action::Wake(waiters) => self.wake(&waiters, &Ok(())),
            Action::Fail(waiters, reason) => {
                let text = self.describe(&reason);
                self.wake(&waiters, &Err(text));
            }
            other => unreachable!("{other:?} is not for the thread that fed the machine"),
        }
    }

    fn error(&self, reason: Reason, phase: Phase) -> MoveError {
        MoveError {
            end: End::Destination,
            devices: self.volumes.iter().map(|volume| volume.name().clone()).collect(),
            phase,
            peer: lock(&self.peer).clone(),
            reason: Box::new(reason),
            link: self.lanes.trouble(),
            owned: self.volumes.iter().all(|volume| volume.is_owned()),
        }
    }

    fn describe(&self, reason: &Reason) -> String {
        self.error(reason.clone(), self.clock.phase()).to_string()
    }

    fn progress(&self) -> Progress {
        let remaining = {
            let core = lock(&self.core);
            core.machine.as_ref().map_or(0, Destination::missing)
        };
        let rate = lock(&self.rate).update(self.now(), self.stored.load(Ordering::Relaxed));
        let left = (rate > 0.0).then(|| remaining as f64 / rate);
        Progress {
            phase: self.clock.phase(),
            size: self.volumes.iter().map(|volume| volume.geometry().bytes()).sum(),
            remaining,
            rounds: 0,
            rate,
            left: left.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()),
            wire: self.lanes.wire.read(),
        }
    }

    fn lacking(&self) -> Vec<Lacking> {
        let core = lock(&self.core);
        let Some(machine) = &core.machine else { return Vec::new() };
        let of = |(at, volume): (usize, &Arc<Volume>)| {
            let (in_store, at_source) = machine.lacking(DeviceIndex(at as u16));
            Lacking { device: volume.name().clone(), in_store, at_source }
        };
        let some =
            |lacking: &Lacking| !(lacking.in_store.is_empty() && lacking.at_source.is_empty());
        self.volumes.iter().enumerate().map(of).filter(some).collect()
    }

    /// How it ended, once that is certain.
    fn outcome(&self) -> Option<Outcome> {
        lock(&self.outcome).clone()
    }

    /// Another session of the same source has some of these devices: this one ends if it has not
    /// got the token.
    fn make_way(&self, devices: &[silo_block::session::messages::DeviceInfo]) {
        let shares = |info: &silo_block::session::messages::DeviceInfo| {
            self.volumes.iter().any(|volume| *volume.name() == info.name)
        };
        if !devices.iter().any(shares) {
            return;
        }
        self.tell(Event::Cancel("its source began another session".to_owned()));
        let deadline = Instant::now() + Duration::from_secs(5);
        // Until it has made its last note, too: that must not come after one of the next session.
        let receiving = || {
            let core = lock(&self.core);
            let machine = core.machine.as_ref();
            machine
                .is_none_or(|machine| matches!(machine.phase(), Step::Receiving | Step::Failed(_)))
                && !self.quiet.load(Ordering::Acquire)
        };
        while receiving() && Instant::now() < deadline {
            std::thread::park_timeout(Duration::from_millis(1));
        }
    }

    fn drop_fetches(&self, device: u16, range: BlockRange) {
        if !self.fetches.is_empty() {
            self.fetches_arrived(device, range);
        }
    }

    fn device_of(&self, device: DeviceIndex) -> Option<&Arc<Volume>> {
        self.volumes.get(usize::from(device.0))
    }
}
