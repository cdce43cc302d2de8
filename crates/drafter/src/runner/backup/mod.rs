//! Backups of this runner's machine: one generation when somebody asks, or one every so often.
//!
//! ```text
//!   command ──Backup──▶ open store ─ take the line ─ freeze (pause: milliseconds) ─ store ─ report
//!                                                        └ machine goes on
//! ```
//!
//! What must hold:
//! - Whatever becomes of the store, the machine goes on; what was not stored is stored next time.
//! - The machine's writes are watched from the first backup to its end here, so that a generation after
//!   one that this runner stored looks at what was written since, and at nothing else. The first, and
//!   one after somebody else has written the line, compares everything.
//! - A pause is a loan of the machine's body like any other: moves and stops wait for it, and while a
//!   move has the body (from its last preparations before the pause on) there is none.
//! - The history goes with a machine that moves: its destination's first generation looks at what the source
//!   had not stored, and at what was written since.
//! - A machine whose lease names another host is stopped instead of backed up.

mod handed;
mod standing;

pub(super) use handed::{hand_on, hex};
pub(super) use standing::Watched;

use super::{
    Runner, State,
    api::{BackupReport, BackupRequest, BackupState, KeepPolicy},
    hosted::Hosted,
};
use crate::{
    checkpoint::{
        capture::{DiskCopies, MachineCapture, Taken},
        fill::FirstTouches,
    },
    lease::Record,
    migrate::source::MachineError,
};
use silo::{
    mapped::staging::StagingOptions,
    memory::Memory,
    store::{
        Access, Backup, BackupOptions, Environment, Generation, Keeper, Keeping, KeyRing, Limits,
        LineName, LineWriter, Policy, Retention, Store, StoreError, StoreUrl, Stored, Which,
        WriterOptions,
        capture::{Capture, Want},
    },
};
use std::{
    sync::{
        Arc, Mutex, PoisonError, TryLockError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

/// How often a freeze is tried for one generation: one in which the guest was too fast, or somebody
/// wrote during the pause, mostly succeeds the next time.
const FREEZES: u32 = 3;
/// How long a generation that was asked of a continuous backup may take.
const GENERATION_LIMIT: Duration = Duration::from_secs(3600);
/// Shortest time between two generations of a continuous backup.
const LEAST_INTERVAL: Duration = Duration::from_millis(100);
/// How often it is looked whether the first generation is there.
const LOOK: Duration = Duration::from_millis(20);
/// Pauses after failures of a continuous backup: the first at least and at most, and all of them.
const RETRY: (Duration, Duration, Duration) =
    (Duration::from_millis(100), Duration::from_secs(1), Duration::from_secs(60));
/// Most pauses after failures for each interval: the next generation of a store that is back is not far.
const RETRY_INTERVALS: u32 = 4;
/// How often a history is tidied.
const TIDY: Duration = Duration::from_secs(60);

/// What a backup works on, for as long as the machine stays.
#[derive(Clone)]
pub(super) struct Subject {
    memory: Arc<Memory>,
    copies: DiskCopies,
}

impl Subject {
    /// Whether it is the same stay.
    pub(super) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.memory, &other.memory)
    }

    pub(super) fn of(body: &Hosted) -> Self {
        Self { memory: Arc::clone(&body.content.memory), copies: body.copies.clone() }
    }

    /// Its disks, as they can be frozen.
    pub(super) fn copies(&self) -> DiskCopies {
        self.copies.clone()
    }

    /// The machine's memory.
    pub(super) fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }
}

/// Backups of one stay of the machine.
pub(super) struct Backups {
    capture: Arc<MachineCapture>,
    /// The machine leaves or ends: what is being stored is given up.
    stop: AtomicBool,
    /// Held while a generation is asked for.
    turn: Mutex<Option<Known>>,
    continuous: Mutex<Option<Arc<Continuous>>>,
}

/// The generation since which the machine's writes are known.
#[derive(Clone, PartialEq, Eq)]
struct Known {
    target: Target,
    number: u64,
}

/// The right to back the machine up: nobody else does meanwhile.
pub(super) struct Turn<'a>(std::sync::MutexGuard<'a, Option<Known>>);

impl Turn<'_> {
    /// The next generation compares everything.
    pub(super) fn forget(&mut self) {
        *self.0 = None;
    }
}

/// A history in a store.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Target {
    store: String,
    line: LineName,
}

/// A backup that makes a generation every so often.
struct Continuous {
    target: Target,
    every: Duration,
    /// Its first generation looked at changes only.
    from_changes: bool,
    engine: Backup,
    /// Deletes what no rule keeps.
    keeper: Option<Keeper>,
}

impl KeepPolicy {
    fn keeping(self) -> Keeping {
        let retention = Retention {
            last: self.last,
            within: Duration::from_secs(self.within_s),
            hourly: self.hourly,
            daily: self.daily,
            ..Retention::default()
        };
        let grace = self.collect_after_s.map(Duration::from_secs);
        Keeping { retention, every: TIDY, grace }
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

impl Target {
    /// That of a request.
    pub(super) fn of(request: &BackupRequest) -> Result<Self, String> {
        let line = LineName::parse(&request.line).map_err(text)?;
        Ok(Self { store: request.store.clone(), line })
    }

    /// Takes the history over from whoever wrote it before.
    pub(super) fn open(
        &self,
        request: &BackupRequest,
        options: WriterOptions,
    ) -> Result<LineWriter, String> {
        let (store, keys) = self.store(request, Access::Write, Limits::default())?;
        LineWriter::open(store, &keys, &self.line, options).map_err(text)
    }

    /// The newest generation, for reading; none of a history that has none yet.
    pub(super) fn newest(
        &self,
        request: &BackupRequest,
        limits: Limits,
        cache: usize,
    ) -> Result<Option<Arc<Generation>>, String> {
        let (store, keys) = self.store(request, Access::Read, limits)?;
        match Generation::open(&store, &keys, &self.line, Which::Newest, cache) {
            Ok(generation) => Ok(Some(generation)),
            Err(StoreError::NoGeneration { .. }) => Ok(None),
            Err(error) => Err(text(error)),
        }
    }

    fn store(
        &self,
        request: &BackupRequest,
        access: Access,
        limits: Limits,
    ) -> Result<(Arc<Store>, KeyRing), String> {
        let url: StoreUrl = self.store.parse().map_err(text)?;
        let keys = KeyRing::from_text(&request.keys.0, &request.keys_from).map_err(text)?;
        let pairs = request.environment.iter();
        let environment =
            Environment::given(pairs.map(|(name, value)| (name.as_str(), value.0.as_str())));
        Ok((Store::open(&url, access, &environment, limits).map_err(text)?, keys))
    }
}

impl Runner {
    /// Stores a generation, and more of them if that is asked for.
    pub(super) fn backup(
        self: &Arc<Self>,
        request: &BackupRequest,
    ) -> Result<BackupReport, String> {
        let began = Instant::now();
        let target = Target::of(request)?;
        let every = request.every_ms.map(|ms| Duration::from_millis(ms).max(LEAST_INTERVAL));
        let backups = self.backups()?;
        let Turn(mut known) = backups.take_turn()?;
        let going_on = backups.same_continuous(&target, every, &mut known)?;
        let stored = if going_on {
            backups.one_more(&request.label)
        } else {
            let machine_runs = |error: String| format!("{error}; the machine runs on");
            let writer = target.open(request, WriterOptions::default()).map_err(machine_runs)?;
            let since = known
                .as_ref()
                .filter(|known| known.target == target && known.number == writer.newest())
                .filter(|_| !writer.needs_everything())
                .map(|known| known.number)
                .or_else(|| self.arrived_with(&backups, &writer));
            // Until a generation is stored nothing is known.
            let stored = match every {
                None => backups.once(writer, since, &request.label),
                Some(every) => backups.begin(writer, since, &target, every, request),
            };
            stored.map(|stored| (stored, since.is_some()))
        };
        let (stored, changes_only) = stored
            .map_err(|error| format!("no generation was stored: {error}; the machine runs on"))?;
        *known = Some(Known { target, number: stored.number });
        let every_ms = every.map(|every| every.as_millis() as u64);
        let mut report = BackupReport {
            machine: self.config.machine.clone(),
            store: request.store.clone(),
            line: request.line.clone(),
            changes_only,
            total_ms: ms(began.elapsed()),
            every_ms,
            ..BackupReport::default()
        };
        tell_stored(&mut report, &stored);
        tell_taken(&mut report, backups.capture.taken());
        Ok(report)
    }

    /// Stores a generation of the continuous backup whose instant is yet to come.
    pub(super) fn generation_now(self: &Arc<Self>) -> Result<(), String> {
        let stored = self.backups()?.one_more("");
        stored.map(drop).map_err(|error| format!("no further generation was stored: {error}"))
    }

    /// Ends a continuous backup.
    pub(super) fn end_backup(&self) -> Result<String, String> {
        let backups = self.lock().backups.clone();
        let none = || "the machine has no continuous backup".to_owned();
        let backups = backups.ok_or_else(none)?;
        let mut known = lock(&backups.turn);
        let Some((target, last)) = backups.end() else { return Err(none()) };
        let text = format!("the backup to {} in {} has ended", target.line, target.store);
        if let Some(number) = last {
            *known = Some(Known { target, number });
        }
        Ok(text)
    }

    /// How the continuous backup does, if there is one.
    pub(super) fn backup_state(backups: &Backups) -> Option<BackupState> {
        let continuous = backups.continuous()?;
        let status = continuous.engine.status();
        Some(BackupState {
            store: continuous.target.store.clone(),
            line: continuous.target.line.to_string(),
            every_ms: continuous.every.as_millis() as u64,
            from_changes: continuous.from_changes,
            generations: status.generations,
            newest: status.last.as_ref().map(|stored| stored.number),
            age_s: status.committed.map(|at| at.elapsed().as_secs_f64()),
            pause_ms: status.last.as_ref().map(|stored| ms(stored.held)),
            durable_ms: status.last.as_ref().map(|stored| ms(stored.took)),
            pauses_ms: (status.holds.count() > 0)
                .then(|| (ms(status.holds.quantile(0.5)), ms(status.holds.longest()))),
            pruned: continuous.keeper.as_ref().map_or(0, |keeper| keeper.kept().pruned),
            failures: status.failures,
            error: status.error,
            ended: status.ended,
        })
    }

    /// The backups of this stay; the machine is watched from the first call on.
    fn backups(self: &Arc<Self>) -> Result<Arc<Backups>, String> {
        let subject = {
            let inner = self.settled();
            if let Some(backups) = &inner.backups {
                return Ok(Arc::clone(backups));
            }
            if let Some(filling) = &inner.filling {
                filling.stop_recording();
            }
            let runs = inner.state == State::Running;
            inner.subject.clone().filter(|_| runs).ok_or_else(|| {
                format!(
                    "the machine is {} here; only one that runs can be backed up",
                    inner.state.word()
                )
            })?
        };
        let machine = Arc::new(Watched { runner: Arc::downgrade(self), for_store: true });
        let (memory, options) = (Arc::clone(&subject.memory), StagingOptions::default());
        let capture = MachineCapture::new(machine, &memory, subject.copies, options)
            .map_err(|error| format!("the machine cannot be backed up: {error}"))?;
        let backups = Arc::new(Backups {
            capture: Arc::new(capture),
            stop: AtomicBool::new(false),
            turn: Mutex::new(None),
            continuous: Mutex::new(None),
        });
        let mut inner = self.lock();
        let stays = inner.subject.as_ref().is_some_and(|now| Arc::ptr_eq(&now.memory, &memory));
        if !stays {
            return Err("the machine has just left".into());
        }
        Ok(Arc::clone(inner.backups.get_or_insert(backups)))
    }

    /// The machine leaves or has ended: whatever has to do with stores ends too, in the background,
    /// since a store may take its time.
    pub(super) fn leave_stores(&self) {
        self.leave_protection();
        let (backups, filling) = {
            let mut inner = self.lock();
            inner.subject = None;
            inner.first_touches = FirstTouches::new();
            (inner.protect_wanted, inner.unprotected, inner.taken_over) = (None, None, None);
            (inner.backups.take(), inner.filling.take())
        };
        if let Some(filling) = filling {
            filling.end();
        }
        let Some(backups) = backups else { return };
        backups.stop.store(true, Ordering::Relaxed);
        let ending = std::thread::Builder::new().name("backup-end".into()).spawn(move || {
            backups.end();
        });
        if let Err(error) = ending {
            tracing::error!(%error, "no thread to end the backup; it ends with the runner");
        }
    }

    /// If the lease names another host, the machine must not run here: stops it.
    pub(super) fn check_owner(&self) -> Result<(), MachineError> {
        // No answer says nothing.
        let Ok(Some(record)) = self.store.read(&self.name) else { return Ok(()) };
        if record.owner == self.host {
            return Ok(());
        }
        let Record { owner, epoch, .. } = &record;
        let why = format!("host \"{owner}\" owns the machine now ({epoch})");
        let mut body = self.borrow(State::Running, State::Saving)?;
        let stopped = body.vm().pause(&mut || {});
        let detail = match stopped {
            Ok(()) => format!("{why}; it was stopped here: end it with `drafter stop`"),
            Err(error) => format!("{why}, and it could not be stopped here: {error}"),
        };
        tracing::error!(machine = %self.name.as_str(), "{detail}");
        self.give_back(body, State::Paused, detail.clone());
        Err(detail.into())
    }
}

fn tell_stored(report: &mut BackupReport, stored: &Stored) {
    report.number = stored.number;
    report.blocks = stored.blocks;
    report.zeros = stored.zeros;
    report.known = stored.known;
    report.new_bytes = stored.content;
    report.stored_bytes = stored.bytes();
    report.requests = stored.requests.total();
    report.stored_ms = ms(stored.took);
}

fn tell_taken(report: &mut BackupReport, taken: Taken) {
    report.pause_ms = ms(taken.paused);
    report.pauses = taken.pauses;
    report.rounds = taken.rounds;
    report.copied_bytes = taken.copied;
    report.copied_paused_bytes = taken.copied_paused;
}

impl Backups {
    /// Whether the continuous backup is the one that is asked for. One to the same place at another
    /// interval is ended, to be begun anew.
    fn same_continuous(
        &self,
        target: &Target,
        every: Option<Duration>,
        known: &mut Option<Known>,
    ) -> Result<bool, String> {
        let Some(continuous) = self.continuous() else { return Ok(false) };
        if continuous.target != *target {
            return Err(format!(
                "the machine is backed up to {} in {} continuously; end that first (`drafter backup \
                 NAME --end`)",
                continuous.target.line, continuous.target.store
            ));
        }
        let same = every.is_none_or(|every| every == continuous.every);
        let ended = continuous.engine.status().ended;
        drop(continuous);
        if same && !ended {
            return Ok(true);
        }
        if let Some((target, Some(number))) = self.end() {
            *known = Some(Known { target, number });
        }
        Ok(false)
    }

    /// Unless somebody has it.
    pub(super) fn take_turn(&self) -> Result<Turn<'_>, String> {
        match self.turn.try_lock() {
            Ok(known) => Ok(Turn(known)),
            Err(TryLockError::Poisoned(poisoned)) => Ok(Turn(poisoned.into_inner())),
            Err(TryLockError::WouldBlock) => {
                Err("a backup of the machine is under way; ask again when it is done".into())
            }
        }
    }

    fn continuous(&self) -> Option<Arc<Continuous>> {
        lock(&self.continuous).clone()
    }

    /// Ends the continuous backup: what it stored to, and the last generation that it stored.
    fn end(&self) -> Option<(Target, Option<u64>)> {
        let continuous = lock(&self.continuous).take()?;
        let target = continuous.target.clone();
        let status = match Arc::try_unwrap(continuous) {
            Ok(alone) => alone.engine.stop(),
            // Whoever else looks at it ends it by letting go of it.
            Err(shared) => shared.engine.status(),
        };
        Some((target, status.last.map(|stored| stored.number)))
    }

    /// A generation of the continuous backup, now.
    fn one_more(&self, label: &str) -> Result<(Stored, bool), String> {
        let continuous = self.continuous().ok_or("it has just ended")?;
        let stored = continuous.engine.now(label, GENERATION_LIMIT).map_err(text)?;
        Ok((stored, true))
    }

    /// One generation.
    fn once(
        &self,
        mut writer: LineWriter,
        since: Option<u64>,
        label: &str,
    ) -> Result<Stored, String> {
        let everything = since.is_none();
        let want = if everything { Want::Everything } else { Want::Changed };
        let infos = self.capture.devices();
        let mut tries = 1;
        let frozen = loop {
            match self.capture.freeze(want) {
                Ok(frozen) => break frozen,
                Err(error) if tries == FREEZES || self.stop.load(Ordering::Relaxed) => {
                    return Err(text(error));
                }
                Err(error) => tracing::info!(%error, "the machine is frozen once more"),
            }
            tries += 1;
        };
        match writer.store(&infos, frozen.as_ref(), everything, label, &self.stop) {
            Ok(stored) => {
                frozen.release();
                Ok(stored)
            }
            Err(error) => {
                frozen.put_back();
                Err(text(error))
            }
        }
    }

    /// Begins a continuous backup, and waits for its first generation.
    fn begin(
        &self,
        writer: LineWriter,
        since: Option<u64>,
        target: &Target,
        every: Duration,
        request: &BackupRequest,
    ) -> Result<Stored, String> {
        let policy = Policy {
            max_age: every,
            min_interval: every,
            // A guest always writes: one interval after the beginning of a round the next is due.
            min_changed: 1,
            period: (every / 4).clamp(Duration::from_millis(20), Duration::from_secs(1)),
            retry: (every / 2).clamp(RETRY.0, RETRY.1),
            retry_most: (every * RETRY_INTERVALS).min(RETRY.2),
            ..Policy::default()
        };
        let options = BackupOptions { policy, tracked_since: since };
        let capture: Arc<dyn Capture> = self.capture.clone();
        let store = Arc::clone(writer.store_of());
        let keeper =
            request.keep.map(|keep| Keeper::start(store, target.line.clone(), keep.keeping()));
        let keeper = keeper.transpose().map_err(text)?;
        let engine = Backup::start(writer, capture, options).map_err(text)?;
        let continuous = Arc::new(Continuous {
            target: target.clone(),
            every,
            from_changes: since.is_some(),
            engine,
            keeper,
        });
        *lock(&self.continuous) = Some(Arc::clone(&continuous));
        if since.is_some() {
            return continuous.engine.now(&request.label, GENERATION_LIMIT).map_err(text);
        }
        // It begins by itself with what the store lacks.
        let deadline = Instant::now() + GENERATION_LIMIT;
        loop {
            let status = continuous.engine.status();
            if let Some(stored) = status.last {
                return Ok(stored);
            }
            if let Some(error) = status.error {
                return Err(format!(
                    "{error}; it is tried again until `drafter backup NAME --end`"
                ));
            }
            if self.stop.load(Ordering::Relaxed) || Instant::now() > deadline {
                return Err(text(StoreError::Stopped));
            }
            std::thread::park_timeout(LOOK);
        }
    }
}
