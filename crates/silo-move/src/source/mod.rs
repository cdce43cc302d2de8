//! The end that gives devices away: drives [`silo_block::session::source`] over real connections.
//!
//! ```text
//!  driver thread ─ poll / perform ─┬─ control connection
//!    ▲    ▲                        ├─ work queue ─► senders: read, encode, send (one a connection)
//!    │    └ reader of control      └─ chores thread: close rounds, pause writers, ask the lease
//!    └ dialer: opens links, again after a cut
//! ```
//!
//! What must hold: the machine is touched under its lock only, and nothing waits under that lock;
//! control messages are written by the driver's thread alone, in the order in which the machine
//! gave them; a thread of a link ends with the link; the host is asked on the chores thread, so
//! that a slow host does not make this end look dead.

mod chores;
mod dialer;
mod promise;
mod send;

pub use promise::Stored;

use crate::{
    bounded::{self, Disks},
    clock::Clock,
    codec::{Method, Naming, Tally, Versions},
    lane::{Lanes, LastWords, Track, lock},
    ledger::{DeviceNote, Ledger, Note, Standing},
    peer::{Dial, Throttle},
    report::{End, MoveError, Phase, Progress, Rate, SourceReport, Timings},
    volume::Volume,
    wire,
};
use silo_block::{
    block::{BlockIndex, BlockRange, BlockSet},
    order::Class,
    rounds::Epoch,
    session::{
        LinkId,
        messages::{BlockHash, DeviceIndex, Reason, SessionId, ToDestination},
        source::{Action, Config, Counters, Event, Phase as Step, Source},
    },
};
use std::{
    io,
    sync::{Arc, Condvar, Mutex, PoisonError, mpsc},
    thread::{Builder, JoinHandle},
    time::{Duration, Instant},
};

/// Actions that are done in one go, before the machine is asked again.
const BATCH: usize = 128;

/// What the source asks of whoever uses the devices. Called on a thread of its own, one call at a
/// time; each may take as long as the patience of the session.
pub trait SourceHost: Send + Sync {
    /// A round is about to be closed: mapped memory is scanned and marked now.
    ///
    /// # Errors
    /// A sentence for people; ends the move.
    fn before_round(&self) -> Result<(), String> {
        Ok(())
    }

    /// Pauses whoever writes, saves what the other end needs to run, and notes durably that
    /// authority leaves by `attempt` of `session`: from the return of this call not even a restart
    /// lets anybody run here before [`SourceHost::resume`]. Writes and flushes through the volumes
    /// themselves are paused by the caller afterwards.
    ///
    /// # Errors
    /// A sentence for people; the move fails and writers go on.
    fn quiesce(&self, session: SessionId, attempt: u32) -> Result<Handover, String>;

    /// The move failed and the devices are this side's (no other session has taken them away
    /// meanwhile): notes so durably, and lets writers go on.
    fn resume(&self);

    /// The destination runs. From here on nobody writes here.
    fn handed_over(&self) {}

    /// The token is out and nobody answers. True if there is proof (the lease) that the destination
    /// does not own the devices and never will by this attempt.
    fn reclaimed(&self) -> bool {
        false
    }

    /// Something of the layer above came from the destination.
    fn custom(&self, kind: u32, payload: &[u8]) {
        let _ = (kind, payload);
    }

    /// Something takes longer than it should; nothing is given up.
    fn overdue(&self, what: &str) {
        let _ = what;
    }
}

/// What goes with authority.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Handover {
    /// What the layer above needs to run.
    pub state: Vec<u8>,
    /// Flushes that did not end and are to be done again at the destination, by device, by the
    /// numbers that the front end gave them. Empty for none at all.
    pub flushes: Vec<Vec<u64>>,
}

/// Hashes that somebody advertised for blocks (an image that others have, a store): a block whose
/// content still has its hash travels as the hash only. Called for each block that is sent.
pub trait Advertised: Send + Sync {
    /// The hash of this block, if one is advertised.
    fn hash(&self, device: usize, block: BlockIndex) -> Option<BlockHash>;
}

/// How a source behaves.
#[derive(Clone)]
pub struct Options {
    /// Of the session.
    pub session: Config,
    /// Number of the try, as the lease has it.
    pub attempt: u32,
    /// Memory for last versions of blocks, in bytes, for all devices together.
    pub versions: u64,
    /// One compression for all blocks; chosen by measurement if none.
    pub method: Option<Method>,
    /// How advertised hashes are made.
    pub naming: Naming,
    /// Blocks that may travel as hashes.
    pub advertised: Option<Arc<dyn Advertised>>,
    /// A store that the destination reads too: what it has is promised, and sent last.
    pub stored: Option<Arc<dyn Stored>>,
    /// Where what must survive this process is noted; nothing survives without. A volume that
    /// still arrives has the note of that session: this one needs another. After a restart the
    /// devices are this host's only if no note says that they leave.
    pub ledger: Option<Arc<dyn Ledger>>,
    /// How long a device may take for a flush, and the ledger for a note: after that a handover is
    /// given up, and the devices are used on here.
    pub disk_limit: Duration,
}

impl Default for Options {
    fn default() -> Self {
        let session = Config { window: 32 << 20, ..Config::default() };
        Self {
            session,
            attempt: 1,
            versions: 64 << 20,
            method: None,
            naming: Naming::Plain,
            advertised: None,
            stored: None,
            ledger: None,
            disk_limit: bounded::LIMIT,
        }
    }
}

struct Shared {
    machine: Mutex<Source>,
    changed: Condvar,
    clock: Clock,
    volumes: Vec<Arc<Volume>>,
    disks: Disks,
    versions: Vec<Versions>,
    /// Blocks that came to nothing as a reference: they are sent as they are.
    refused: Vec<Mutex<BlockSet>>,
    options: Options,
    dial: Dial,
    host: Arc<dyn SourceHost>,
    throttle: Throttle,
    session: SessionId,
    /// Links are numbered from here: no number twice in a session, restarts or not.
    first_link: u64,
    lanes: Lanes,
    paths: Mutex<Tally>,
    rate: Mutex<Rate>,
}

/// A move under way, at its source.
pub struct Outbound {
    shared: Arc<Shared>,
    driver: Option<JoinHandle<Result<SourceReport, MoveError>>>,
}

/// Draws the name of a new session.
///
/// # Errors
/// If the system has no randomness.
pub fn new_session() -> io::Result<SessionId> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(SessionId(bytes))
}

/// Milliseconds.
fn since_1970() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |since| since.as_millis() as u64)
}

impl Outbound {
    /// Starts to move `volumes`, all or none of them, to the peer.
    ///
    /// # Errors
    /// If there is no randomness or no thread, a volume is not this side's or about to leave, or
    /// the note cannot be made or is another session's.
    pub fn start(
        volumes: Vec<Arc<Volume>>,
        dial: Dial,
        host: Arc<dyn SourceHost>,
        options: Options,
    ) -> io::Result<Self> {
        Self::begin(new_session()?, volumes, dial, host, options, false)
    }

    /// Goes on with a move whose token may be out, after a restart that found the note
    /// [`Standing::Leaving`]: the volumes are [`Volume::leaving`]. Serves the destination if that
    /// runs; if it never got the token, the devices are this host's again, and
    /// [`SourceHost::resume`] says so.
    ///
    /// # Errors
    /// If there is no thread.
    pub fn restored(
        session: SessionId,
        volumes: Vec<Arc<Volume>>,
        dial: Dial,
        host: Arc<dyn SourceHost>,
        options: Options,
    ) -> io::Result<Self> {
        Self::begin(session, volumes, dial, host, options, true)
    }

    fn begin(
        session: SessionId,
        volumes: Vec<Arc<Volume>>,
        dial: Dial,
        host: Arc<dyn SourceHost>,
        options: Options,
        restored: bool,
    ) -> io::Result<Self> {
        let began = Instant::now();
        let devices =
            volumes.iter().map(|volume| volume.as_source(restored)).collect::<io::Result<_>>()?;
        let make = if restored { Source::restored } else { Source::new };
        let machine = make(options.session, session, options.attempt, devices, Duration::ZERO);
        let size: u64 = volumes.iter().map(|volume| volume.geometry().bytes()).sum();
        let share = |volume: &Arc<Volume>| {
            let bytes = u128::from(volume.geometry().bytes());
            (u128::from(options.versions) * bytes / u128::from(size.max(1))) as u64
        };
        let versions =
            |volume: &Arc<Volume>| Versions::new(share(volume), volume.geometry().block() as usize);
        let shared = Arc::new(Shared {
            machine: Mutex::new(machine),
            changed: Condvar::new(),
            clock: Clock::new(session, began, Phase::Connecting),
            versions: volumes.iter().map(versions).collect(),
            refused: volumes
                .iter()
                .map(|volume| Mutex::new(BlockSet::new(volume.geometry().blocks())))
                .collect(),
            disks: Disks::of(&volumes, options.disk_limit),
            volumes,
            throttle: Throttle::new(dial.limits().bandwidth),
            options,
            dial,
            host,
            session,
            first_link: if restored { since_1970() } else { 0 },
            lanes: Lanes::new(session, LastWords::Dropped),
            paths: Mutex::default(),
            rate: Mutex::default(),
        });
        if !restored {
            shared.check_ledger()?;
            // What was shared from here on is known after a crash.
            shared.note(Standing::Here)?;
        }
        let (chores, jobs) = mpsc::channel();
        shared.spawn("silo-chores", move |shared| shared.do_chores(&jobs))?;
        shared.spawn("silo-dial", Shared::keep_linked)?;
        if let Some(stored) = shared.options.stored.clone() {
            shared.spawn("silo-promise", move |shared| shared.promise(&*stored))?;
        }
        for (at, volume) in shared.volumes.iter().enumerate() {
            let weak = Arc::downgrade(&shared);
            volume.on_arrival(Box::new(move |range| {
                let Some(shared) = weak.upgrade() else { return false };
                shared.tell(Event::Arrived(DeviceIndex(at as u16), range));
                true
            }));
        }
        let for_driver = shared.clone();
        let driver = Builder::new()
            .name("silo-source".to_owned())
            .spawn(move || for_driver.drive(&chores))
            .inspect_err(|_| shared.lanes.set_over())?;
        Ok(Self { shared, driver: Some(driver) })
    }

    /// Which move this is.
    #[must_use]
    pub fn session(&self) -> SessionId {
        self.shared.session
    }

    /// Hands over at the next chance: ends a move that holds.
    pub fn switch(&self) {
        self.shared.tell(Event::Switch);
    }

    /// Stops the move, if that is still possible.
    pub fn cancel(&self, why: &str) {
        self.shared.tell(Event::Cancel(why.to_owned()));
    }

    /// Says something to the layer above at the destination; delivered once, in order.
    pub fn custom(&self, kind: u32, payload: Vec<u8>) {
        self.shared.tell(Event::Custom { kind, payload });
    }

    /// A store has these blocks, durably, with their contents as of `epoch`.
    pub fn promise(&self, device: usize, epoch: Epoch, blocks: Vec<(BlockIndex, BlockHash)>) {
        let device = DeviceIndex(device as u16);
        self.shared.tell(Event::Promised { device, epoch, blocks });
    }

    /// The recorded order of first use of a device.
    pub fn expect(&self, device: usize, order: Vec<BlockRange>) {
        self.shared.tell(Event::Expected(DeviceIndex(device as u16), order));
    }

    /// Changes the limit on bytes per second.
    pub fn set_bandwidth(&self, limit: Option<u64>) {
        self.shared.throttle.set_rate(limit);
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.shared.progress()
    }

    /// Which way blocks went so far.
    #[must_use]
    pub fn paths(&self) -> Tally {
        *lock(&self.shared.paths)
    }

    /// What was sent so far, and what was not because it came to the destination otherwise.
    #[must_use]
    pub fn counters(&self) -> Counters {
        lock(&self.shared.machine).counters()
    }

    /// How long the phases have taken so far.
    #[must_use]
    pub fn timings(&self) -> Timings {
        self.shared.clock.timings()
    }

    /// Waits for the end: everything durable at the destination, or a failure. A move ends by its
    /// own deadlines as long as the devices can still be kept; once they were given away it goes
    /// on until the destination answers.
    ///
    /// # Errors
    /// Why it failed, and who owns the devices.
    pub fn wait(mut self) -> Result<SourceReport, MoveError> {
        let driver = self.driver.take().expect("waited for once");
        driver.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Whether it is over.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.driver.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for Outbound {
    /// Cancels what can be cancelled; once the token is out the move goes on by itself.
    fn drop(&mut self) {
        if self.driver.is_some() {
            self.shared.tell(Event::Cancel("the move was dropped".to_owned()));
        }
    }
}

impl Shared {
    fn spawn(
        self: &Arc<Self>,
        name: &str,
        run: impl FnOnce(&Arc<Self>) + Send + 'static,
    ) -> io::Result<()> {
        let shared = self.clone();
        Builder::new().name(name.to_owned()).spawn(move || run(&shared)).map(drop)
    }

    fn now(&self) -> Duration {
        self.clock.now()
    }

    /// Feeds the machine.
    fn tell(&self, event: Event) {
        lock(&self.machine).handle(self.now(), event);
        self.changed.notify_all();
    }

    fn drive(
        self: &Arc<Self>,
        chores: &mpsc::Sender<chores::Job>,
    ) -> Result<SourceReport, MoveError> {
        let mut actions = Vec::with_capacity(BATCH);
        let end = loop {
            let mut machine = lock(&self.machine);
            while actions.len() < BATCH {
                let Some(action) = machine.poll(self.now()) else { break };
                actions.push(action);
            }
            let step = machine.phase().clone();
            self.note_phase(&step);
            if actions.is_empty() {
                let now = self.now();
                let wake = machine.wake(now).unwrap_or(now + Duration::from_secs(1));
                let (guard, _) = self
                    .changed
                    .wait_timeout(machine, wake.saturating_sub(now))
                    .unwrap_or_else(PoisonError::into_inner);
                drop(guard);
                continue;
            }
            drop(machine);
            let mut end = None;
            for action in actions.drain(..) {
                end = self.perform(action, chores).or(end);
            }
            self.flush();
            if let Some(end) = end {
                break end;
            }
        };
        // The host is told what it must know before the caller is.
        let (done, waited) = mpsc::channel();
        let _ = chores.send(chores::Job::Stop(done));
        let _ = waited.recv();
        self.finish(end)
    }

    /// Does what the machine wants; gives the end of the move.
    fn perform(
        &self,
        action: Action,
        chores: &mpsc::Sender<chores::Job>,
    ) -> Option<Result<(), Reason>> {
        let job = match action {
            Action::Send(link, message) => {
                self.send(link, &message);
                return None;
            }
            Action::Blocks(link, header) => {
                let track = if header.class == Class::Demand { Track::Demand } else { Track::Bulk };
                self.lanes.push(link, track, header);
                return None;
            }
            Action::Hangup(link) => {
                self.hang_up(link, None);
                return None;
            }
            Action::Pull(device, range, class) => {
                self.volumes[usize::from(device.0)].pull(range, class);
                return None;
            }
            Action::Overdue(wait) => chores::Job::Overdue(wait.to_string()),
            Action::CloseRound => chores::Job::CloseRound,
            Action::Quiesce(ticket) => chores::Job::Quiesce(ticket),
            Action::Resume => chores::Job::Resume,
            Action::HandedOver => chores::Job::HandedOver,
            Action::Undecided => chores::Job::Undecided,
            Action::Custom(custom) => chores::Job::Custom(custom),
            Action::Released => {
                let _ = chores.send(chores::Job::Released);
                return Some(Ok(()));
            }
            Action::Failed(reason) => return Some(Err(reason)),
        };
        // The thread ends after this one.
        let _ = chores.send(job);
        None
    }

    fn send(&self, link: LinkId, message: &ToDestination) {
        if self.lanes.send(link, |control| wire::write_to_destination(control, message)) {
            self.tell(Event::Cut(link));
        }
    }

    /// Sends what was gathered on the control connection.
    fn flush(&self) {
        if let Some(link) = self.lanes.flush() {
            self.tell(Event::Cut(link));
        }
    }

    /// Ends a link; the dialer makes a new one.
    fn hang_up(&self, link: LinkId, trouble: Option<String>) {
        if self.lanes.hang_up(link, trouble) {
            self.tell(Event::Cut(link));
        }
    }

    fn note_phase(&self, step: &Step) {
        self.clock.enter(match step {
            Step::Filling if self.clock.phase() == Phase::Connecting => return,
            Step::Filling => Phase::Filling,
            Step::Quiescing | Step::Draining => Phase::Quiescing,
            Step::Switched => Phase::Switching,
            Step::Serving => Phase::Following,
            Step::Released => Phase::Durable,
            Step::Failed(_) => return,
        });
    }

    /// Refuses the note of a session by which the devices still come: of two sessions with one
    /// note, a restart would believe the one that spoke last.
    fn check_ledger(&self) -> io::Result<()> {
        let Some(ledger) = &self.options.ledger else { return Ok(()) };
        let arriving = |volume: &&Arc<Volume>| volume.is_arriving();
        let Some(volume) = self.volumes.iter().find(arriving) else { return Ok(()) };
        let Some(Note { standing: standing @ Standing::Owner { .. }, .. }) = ledger.load()? else {
            return Ok(());
        };
        let text = format!(
            "device \"{}\" cannot be given on with this note: it says that {standing}, which has not \
             ended; give this move a note of its own, or wait until all has come",
            volume.name()
        );
        Err(io::Error::new(io::ErrorKind::ResourceBusy, text))
    }

    /// Makes what is here durable, then notes it, if there is a ledger.
    fn note(&self, standing: Standing) -> io::Result<()> {
        let Some(ledger) = &self.options.ledger else { return Ok(()) };
        let device = |volume: &Arc<Volume>| {
            volume.with_replica(|replica| DeviceNote::of(volume.name().clone(), replica))
        };
        // First, or what came here but is not known to be durable would be noted as absent.
        self.disks
            .flush(&self.volumes, Volume::make_durable)
            .into_iter()
            .collect::<io::Result<()>>()?;
        let devices = self.volumes.iter().map(device).collect();
        self.disks.save(ledger, Note { standing, devices })
    }

    fn finish(&self, end: Result<(), Reason>) -> Result<SourceReport, MoveError> {
        self.lanes.set_over();
        self.changed.notify_all();
        self.throttle.stop();
        self.lanes.end();
        let machine = lock(&self.machine);
        let reached = self.clock.phase();
        let counters = machine.counters();
        match end {
            Ok(()) => {
                let timings = self.clock.end();
                Ok(SourceReport {
                    session: self.session,
                    peer: self.peer(),
                    size: self.volumes.iter().map(|volume| volume.geometry().bytes()).sum(),
                    timings,
                    rounds: machine.forecast(self.now()).0,
                    links: counters.links,
                    sent: counters.sent,
                    paths: *lock(&self.paths),
                    wire: self.lanes.wire.read(),
                    spared: counters.spared,
                })
            }
            Err(reason) => Err(MoveError {
                end: End::Source,
                devices: self.volumes.iter().map(|volume| volume.name().clone()).collect(),
                phase: reached,
                peer: self.peer(),
                reason: Box::new(reason),
                link: self.lanes.trouble(),
                owned: self.volumes.iter().all(|volume| volume.is_owned()),
            }),
        }
    }

    fn peer(&self) -> String {
        format!("host {}", self.dial.peer())
    }

    fn progress(&self) -> Progress {
        let (remaining, rounds) = {
            let machine = lock(&self.machine);
            (machine.remaining(), machine.forecast(self.now()).0)
        };
        let sent = lock(&self.paths).content;
        let rate = lock(&self.rate).update(self.now(), sent);
        let left = (rate > 0.0).then(|| remaining as f64 / rate);
        Progress {
            phase: self.clock.phase(),
            size: self.volumes.iter().map(|volume| volume.geometry().bytes()).sum(),
            remaining,
            rounds,
            rate,
            left: left.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()),
            wire: self.lanes.wire.read(),
        }
    }
}
