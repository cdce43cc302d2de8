//! Protection of a machine that moves: there is no moment of a move at which nobody could bring it back.
//!
//! ```text
//!   source        generations go on ──────────┤ pause │ the last one's history is handed on ──▶
//!   its lease     bound to the source's beat ─┼───────┼─▶ bound to the destination's, at the next epoch
//!   destination   its own beat ───────────────┼───────┤ held to its term from the first instruction
//!                 what it sends waits ────────┼───────┼──── … all blocks are here ─ generation ─▶ goes
//! ```
//!
//! What must hold:
//! - Before the token the source's copy stops at the end of the source's term, after it the destination's at
//!   the end of its own; each has its guard, which knows that end before the copy may run until then.
//! - From the pause until all blocks are at the destination no generation is made. Who takes the machine
//!   over in between takes the last of the source's, and says how much is lost by that.
//! - Under output commit nothing leaves the destination before a generation that it made. What waited at the
//!   source when it paused never leaves: the guest's TCP sends it again, of other frames the answer is lost.
//! - A destination whose source is gone with blocks that it lacks gives the machine up, to its last generation.
//! - A machine that comes back to its source runs there only when the source's lease holds.

use super::{
    Runner, State, backup, config::ProtectConfig, hosted::Hosted, protection::Protection,
    tenure::Tenure,
};
use crate::{
    lease::{Beat, BeatName, BeatRef, HostName, LeaseStore, Record},
    migrate::{
        messages::{BackupMark, PrepareRequest, Protected},
        protocol::DeviceNumber,
        source::{MachineError, SourceMachine, Told},
        switchover::{FlipEpoch, Holding},
    },
    tenure::{Times, View},
};
use conduit::HostEndpoint;
use silo::{
    block::{BlockRange, BlockSet},
    device::Device,
};
use std::{
    sync::{Arc, Mutex, PoisonError, mpsc},
    time::{Duration, Instant},
};

/// How long a write to the lease that is under way may take before a move is refused.
const SETTLE_LIMIT: Duration = Duration::from_secs(5);
/// How long the store may take for this host's first sign of life before a protected machine is refused.
const ALIVE_LIMIT: Duration = Duration::from_secs(10);

/// Between looks at the sign of life of a source whose blocks are missing.
const SOURCE_LOOK: Duration = Duration::from_millis(100);

/// What a destination has ready for a protected machine.
pub(super) struct Arriving {
    tenure: Arc<Tenure>,
    protection: Arc<Protection>,
    /// Under which it will run.
    pub(super) life: BeatRef,
    /// What tells that its source is gone.
    signs: Mutex<SourceSigns>,
}

/// Signs of life of a source whose blocks are missing.
#[derive(Clone)]
struct SourceSigns {
    /// The beat that the lease referred to when it was handed over.
    beat: BeatName,
    /// Its runner's own, which the keeper of a host's beat ends when that runner is gone.
    own: BeatName,
    /// As that was before; an error if the store did not say, and then it tells nothing.
    own_before: Result<Option<Beat>, ()>,
}

impl SourceSigns {
    fn of(runner: &Runner, from: &HostName) -> Self {
        let own = BeatName::of_runner(from.clone(), runner.name.clone());
        let own_before = runner.store.read_beat(&own).map_err(drop);
        Self { beat: own.clone(), own, own_before }
    }

    /// The newest sign. Of a runner that its host has given up that is its end.
    fn read(&self, store: &dyn LeaseStore) -> Option<Beat> {
        if self.beat != self.own
            && let Ok(before) = &self.own_before
        {
            let own = store.read_beat(&self.own).ok().flatten();
            let ended = own.filter(|beat| beat.fenced_by.is_some());
            if ended.is_some() && ended != *before {
                return ended;
            }
        }
        store.read_beat(&self.beat).ok().flatten()
    }
}

impl Arriving {
    /// The token is here: the machine is held to this host's term before it runs.
    pub(super) fn hold(&self, runner: &Arc<Runner>, handed: &Record) -> Result<(), String> {
        let deeds = runner.hands(&self.protection);
        if let Some(life) = &handed.beat {
            let mut signs = self.signs.lock().unwrap_or_else(PoisonError::into_inner);
            signs.beat.clone_from(&life.name);
        }
        self.tenure.arrive(handed.clone(), self.life.clone(), deeds)
    }

    /// Looks after it, as long as it lacks blocks of its source.
    pub(super) fn watch_source(&self, runner: &Arc<Runner>) {
        let signs = self.signs.lock().unwrap_or_else(PoisonError::into_inner).clone();
        runner.watch_source(signs);
    }

    /// It is this host's.
    pub(super) fn own(&self, record: &Record) {
        self.tenure.holds(record);
        if let Err(why) = self.tenure.moving(false, SETTLE_LIMIT) {
            // It cannot be: nothing is written while a move is on.
            tracing::error!(why, "the lease of what has arrived is not kept");
        }
    }
}

/// What is known of the history of a machine that came here, from its source or from a store.
pub(super) enum Arrived {
    /// Its source has not said yet.
    Expected,
    /// What the source stored last, and in which blocks, of each device of the group, the machine has
    /// differed from it when it left.
    Known(BackupMark, Vec<BlockSet>),
    /// It began as this generation, in all of its blocks.
    Began(BackupMark),
}

// ---- the source

impl Runner {
    /// A move begins. Nothing is written to the lease but by it from here on.
    pub(super) fn before_move(&self, dry_run: bool) -> Result<(), String> {
        // The next look for what was written begins anew.
        self.lock().arrived = None;
        let Some(protection) = self.protection().filter(|_| !dry_run) else { return Ok(()) };
        if !protection.has_time() {
            return Err(
                "it stands still, because its lease cannot be renewed; try again when it can"
                    .into(),
            );
        }
        let tenure = self.lock().tenure.clone();
        let Some(tenure) = tenure else { return Ok(()) };
        tenure
            .moving(true, SETTLE_LIMIT)
            .map_err(|error| format!("the machine is protected, and stays here: {error}"))
    }

    /// A move has ended, and the machine may be here.
    pub(super) fn after_move(self: &Arc<Self>) {
        let (protection, tenure, holding, state) = {
            let inner = self.lock();
            let (protection, tenure) = (inner.protection.clone(), inner.tenure.clone());
            (protection, tenure, inner.holding.clone(), inner.state)
        };
        if let (Some(_), Some(tenure), Some(holding)) = (&protection, tenure, holding) {
            tenure.holds(&holding.record);
            if let Err(why) = tenure.moving(false, SETTLE_LIMIT) {
                tracing::error!(why, "the lease is not kept after a move");
            }
        }
        match state {
            State::Running => self.go_on_protecting(protection.as_deref()),
            // Nothing here depends on this host's sign of life any more.
            State::Standby => {
                let tenure = self.lock().tenure.take();
                drop(tenure);
            }
            _ => {}
        }
    }

    /// Generations go on, if the move has ended them.
    fn go_on_protecting(self: &Arc<Self>, protection: Option<&Protection>) {
        let backups = self.lock().backups.clone();
        let ended = backups.is_none_or(|backups| Self::backup_state(&backups).is_none());
        match protection {
            Some(protection) if ended && protection.has_begun() => {
                protection.begin_again();
                self.protect_as_wanted();
            }
            None => self.protect_as_wanted(),
            Some(_) => {}
        }
    }

    /// What a destination is told before it builds anything.
    pub(super) fn told_of_protection(&self) -> Option<Protected> {
        let protection = self.protection()?;
        let output_commit = protection.wants_commit();
        Some(Protected { output_commit })
    }

    /// Until when this host's life holds.
    pub(super) fn term_view(&self) -> Option<View> {
        let tenure = self.lock().tenure.clone();
        tenure.and_then(|tenure| tenure.view().0)
    }

    /// Whether it stands still for want of a lease.
    pub(super) fn is_frozen(&self) -> bool {
        self.protection().is_some_and(|protection| protection.is_frozen())
    }

    /// The destination owns the machine: ends its generations here, and says which was the last and
    /// what has changed since. `None` if that is not known.
    fn hand_on_history(&self) -> Option<Told> {
        let backups = self.lock().backups.clone()?;
        let (mark, changed) = backup::hand_on(&backups)?;
        let mark = BackupMark { first_touch: self.first_touch_text(), ..mark };
        Some((serde_json::to_vec(&mark).ok()?, changed))
    }

    /// As [`Runner::hand_on_history`], which a store may keep from being done.
    pub(super) fn ask_history(self: &Arc<Self>) -> Option<mpsc::Receiver<Option<Told>>> {
        self.lock().backups.as_ref()?;
        let (done, told) = mpsc::channel();
        let runner = Arc::clone(self);
        let asked = std::thread::Builder::new().name("history".into()).spawn(move || {
            let _ = done.send(runner.hand_on_history());
        });
        asked.ok()?;
        Some(told)
    }

    /// The machine comes back to this host: waits until it may run here, and says under which epoch.
    fn right_to_go_on(&self, holding: &Holding) -> Result<Holding, String> {
        let (protection, tenure) = {
            let mut inner = self.lock();
            inner.holding = Some(holding.clone());
            (inner.protection.clone(), inner.tenure.clone())
        };
        let (Some(protection), Some(tenure)) = (protection, tenure) else {
            return Ok(holding.clone());
        };
        tenure.holds(&holding.record);
        tenure.moving(false, SETTLE_LIMIT)?;
        protection.wait_for_time(|| self.lock().state.over())?;
        Ok(self.lock().holding.clone().unwrap_or_else(|| holding.clone()))
    }
}

/// A machine that leaves. While its guest runs its body stays in the runner's hands, so that generations
/// go on; the move has it from the last preparations before the pause.
pub(super) struct Leaving {
    runner: Arc<Runner>,
    devices: Vec<Arc<dyn Device>>,
    body: Option<Box<Hosted>>,
    /// What the move holds when the machine comes back.
    holding: Arc<Mutex<Option<Holding>>>,
}

impl Leaving {
    pub(super) fn new(
        runner: &Arc<Runner>,
        body: Box<Hosted>,
        holding: &Arc<Mutex<Option<Holding>>>,
    ) -> Self {
        let devices = body.content.devices();
        runner.lock().body = Some(body);
        Self { runner: Arc::clone(runner), devices, body: None, holding: Arc::clone(holding) }
    }

    /// The body, wherever it is; nobody else has it any more.
    pub(super) fn into_body(mut self) -> Result<Box<Hosted>, String> {
        match self.body.take() {
            Some(body) => Ok(body),
            None => self.runner.borrow(State::Moving, State::Moving),
        }
    }

    fn machine(&mut self) -> Result<&mut Hosted, MachineError> {
        if self.body.is_none() {
            self.body = Some(self.runner.borrow(State::Moving, State::Moving)?);
        }
        self.body.as_deref_mut().ok_or_else(|| "its body is elsewhere".into())
    }
}

impl SourceMachine for Leaving {
    fn devices(&self) -> Vec<Arc<dyn Device>> {
        self.devices.clone()
    }

    fn state_blocks(&mut self) -> Result<Vec<(DeviceNumber, BlockRange)>, MachineError> {
        self.machine()?.state_blocks()
    }

    fn before_pause(&mut self) -> Result<(), MachineError> {
        self.machine()?.before_pause()
    }

    fn pause(&mut self, to: Option<&HostEndpoint>, flip: u64) -> Result<(), MachineError> {
        self.machine()?.pause(to, flip)
    }

    fn save(&mut self) -> Result<Vec<u8>, MachineError> {
        self.machine()?.save()
    }

    fn flush_pending(&self) -> bool {
        // Before the body is taken nothing is asked of it.
        self.body.as_ref().is_some_and(|body| body.flush_pending())
    }

    fn wait_flushed(&mut self, limit: Duration) -> Result<(), MachineError> {
        self.machine()?.wait_flushed(limit)
    }

    fn go_on(&mut self, epoch: u64, flip: u64) -> Result<(), MachineError> {
        let holding = self.holding.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut under = (epoch, flip);
        if let Some(holding) = holding {
            let now = self.runner.right_to_go_on(&holding)?;
            if now.record.epoch > holding.record.epoch {
                // Got back in a new life meanwhile.
                under = (now.record.epoch.0, FlipEpoch::of(now.record.epoch, 0).0);
            }
        }
        self.machine()?.go_on(under.0, under.1)
    }
}

// ---- the destination

impl Runner {
    /// Whether a machine that is protected would be here.
    pub(super) fn objects_to_protected(&self, request: &PrepareRequest) -> Option<String> {
        let asked = request.protected.as_ref()?;
        let host = &self.config.host;
        let end = "or end its protection where it runs (`drafter protect NAME --end`)";
        match &self.config.protect {
            None => Some(format!(
                "the machine survives the loss of its host, and would not on host \"{host}\": start this \
                 runner with --protect, {end}"
            )),
            Some(config) if asked.output_commit && !config.output_commit => Some(format!(
                "what the machine sends waits for its generation, and would not on host \"{host}\": start \
                 this runner with --output-commit, {end}"
            )),
            Some(_) => None,
        }
    }

    /// Makes ready what holds a protected machine to its term here; its monitor waits, empty.
    pub(super) fn expect_protected(
        &self,
        request: &PrepareRequest,
        body: &mut Hosted,
    ) -> Result<Option<Arriving>, String> {
        let config: &ProtectConfig = match (&request.protected, &self.config.protect) {
            (Some(_), Some(config)) => config,
            _ => return Ok(None),
        };
        let from = HostName::new(&request.host).map_err(|error| error.to_string())?;
        let tenure = self.tenure(config.pace())?;
        let life = tenure.wait_alive(ALIVE_LIMIT)?.of;
        let protection =
            self.install_protection(body.fence(), config.pace(), config.output_commit)?;
        if config.output_commit {
            protection.hold_output();
            if let Err(error) = body.commit_output(true) {
                self.leave_protection();
                return Err(error.to_string());
            }
        }
        let signs = Mutex::new(SourceSigns::of(self, &from));
        Ok(Some(Arriving { tenure, protection, life, signs }))
    }

    /// Looks after a machine that lacks blocks of its source: when that has shown no sign of life for as
    /// long as a lease holds, no block has come, and the store has none either, they are gone with it. Then the machine is given up
    /// here, so that a stand-in may go on with its last generation at once.
    fn watch_source(self: &Arc<Self>, signs: SourceSigns) {
        let (runner, subject) = (Arc::clone(self), self.lock().subject.clone());
        let watch = std::thread::Builder::new().name("source-watch".into()).spawn(move || {
            let mut seen: Option<(Beat, u64, Instant)> = None;
            while runner.is_still(subject.as_ref()) {
                let missing = runner.missing_blocks();
                if missing == 0 {
                    return;
                }
                let fallback = runner.lock().fallback.clone();
                let brings = fallback.is_some_and(|fallback| fallback.works());
                match (signs.read(&*runner.store), &seen) {
                    _ if brings => seen = None,
                    (Some(beat), Some((last, left, since)))
                        if beat == *last && missing == *left =>
                    {
                        if since.elapsed() > Times::default().patience(beat.term) {
                            return runner.give_up_incomplete(&signs.beat, missing);
                        }
                    }
                    (Some(beat), _) => seen = Some((beat, missing, Instant::now())),
                    // A store that is silent says nothing of the source.
                    _ => seen = None,
                }
                std::thread::park_timeout(SOURCE_LOOK);
            }
        });
        if let Err(error) = watch {
            tracing::error!(%error, "no thread to watch the source");
        }
    }

    fn missing_blocks(&self) -> u64 {
        self.lock().devices.iter().map(|device| device.missing_blocks()).sum()
    }

    fn give_up_incomplete(&self, source: &BeatName, missing: u64) {
        let Some(protection) = self.protection() else { return };
        let detail = format!(
            "its source ({source}) is gone with {missing} blocks that had not come: it was ended here, and a \
             stand-in goes on with its last generation"
        );
        tracing::error!(machine = %self.name.as_str(), "{detail}");
        protection.freeze();
        // Whoever watches what runs does not end this process before the store has been told.
        let body = self.borrow(State::Running, State::Paused);
        protection.end();
        let tenure = self.lock().tenure.take();
        if let Some(tenure) = tenure.and_then(Arc::into_inner) {
            tenure.resign();
        }
        if let Ok(mut body) = body {
            body.tear_down();
        }
        self.set_state(State::Stopped, detail);
    }
}
