//! The runner: one process that owns one machine on one host.
//!
//! ```text
//!   Booting ──▶ Running ◀──────────────┐
//!                 │  ▲                 │ settled
//!     migrate job │  │ failed          │
//!                 ▼  │                 │
//!               Moving ──released──▶ Standby ──prepare──▶ Receiving
//!                                      ▲                    │ discarded
//!                                      └────────────────────┘
//!   Running ──stop, suspend, guest ends──▶ Stopped        any ──▶ Failed
//!   Running, Moving ◀──pause of a backup, milliseconds──▶ Saving
//! ```
//!
//! The machine's body ([`hosted::Hosted`]) is lent to whoever works on it (a move's job, an
//! arriving session); everything else answers from what [`Inner`] knows meanwhile.
//!
//! [`boot`] starts it from its package, [`end`] watches for its end and brings it about,
//! [`server`] answers the API, [`peer`] takes connections of other hosts, [`moves`] runs jobs,
//! [`suspend`] saves to a folder, [`sleep`] to a store, [`backup`] there while the machine runs, [`restore`]
//! brings it back from there; what they share is in [`saved`]. [`take_over`] finds a machine whose runner is
//! gone, [`disks`] serves its disks, [`trouble`] deals with disks that fail, [`load`] measures for planners.
//! [`fork`] makes an image of a machine and begins as a copy of one.
//! [`protect`] lets it survive the loss of this host, by [`tenure`] and [`guard`], also while it moves
//! ([`protected_move`]); [`stand_in`] is what brings it back elsewhere.

pub mod api;
mod backup;
mod boot;
mod bring;
pub mod config;
mod confine;
mod disks;
mod end;
mod fallback;
mod fork;
pub mod guard;
mod held;
mod hosted;
mod load;
mod moves;
mod network;
mod peer;
mod protect;
mod protected_move;
mod protection;
mod reasons;
mod restore;
mod saved;
mod server;
mod signs;
mod sleep;
mod stand_in;
pub mod state;
mod status;
mod stay;
mod suspend;
mod take_over;
mod tenure;
mod trouble;

use crate::{
    checkpoint::fill::{FirstTouches, StoreFill},
    driver::{Driver, qemu::QemuDriver},
    lease::{LeaseStore, MachineName},
    migrate::{
        destination::Door, messages::StayId, source::Outage, switchover::Holding,
        timings::MoveReport,
    },
    package::Cache,
};
use conduit::{DataPath, MachineNet};
use config::{Launch, NetworkConfig, RunnerConfig};
pub(crate) use hosted::free_memory;
use hosted::{Hosted, Site};
use identity::{HostName, Security};
use moves::Job;
use network::Network;
use silo::device::Device;
use state::{MachineDir, RunnerRecord, boot_id, process_start};
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

/// How long the edge may take to confirm a new machine.
const EDGE_LIMIT: Duration = Duration::from_secs(10);
/// How long another host may hold the lock of the lease store.
const LEASE_LOCK_LIMIT: Duration = Duration::from_secs(5);

/// How long others wait for a machine that a backup holds still.
const SAVING_LIMIT: Duration = Duration::from_secs(30);

/// How long requests in hand may take to be answered once the machine has ended.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// What a runner could not do.
#[derive(Debug, thiserror::Error)]
#[error("machine \"{machine}\": {what}")]
pub struct RunnerError {
    machine: String,
    what: String,
}

/// In which state a runner is; the words of [`Status::state`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Standby,
    /// Waits for the machine's host to fall silent.
    StandIn,
    Booting,
    Running,
    /// It stands still for a backup, and goes on at once.
    Saving,
    Moving,
    Receiving,
    Paused,
    Stopped,
    Failed,
}

impl State {
    fn word(self) -> &'static str {
        match self {
            Self::Standby => "standby",
            Self::StandIn => "stand-in",
            Self::Booting => "booting",
            Self::Running => "running",
            Self::Saving => "saving",
            Self::Moving => "moving",
            Self::Receiving => "receiving",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
        }
    }

    fn over(self) -> bool {
        matches!(self, Self::Stopped | Self::Failed)
    }
}

struct Inner {
    state: State,
    detail: String,
    /// Absent while it is lent.
    body: Option<Box<Hosted>>,
    holding: Option<Holding>,
    /// The stay since which writes are tracked.
    since: Option<StayId>,
    stay: Option<stay::Stay>,
    guest: Option<Arc<crate::guest::GuestChannel>>,
    monitor_pid: Option<u32>,
    /// The group that is here, for status.
    devices: Vec<Arc<dyn Device>>,
    jobs: BTreeMap<u64, Arc<Job>>,
    moves: Vec<MoveReport>,
    /// What a backup would work on; here while the machine is.
    subject: Option<backup::Subject>,
    backups: Option<Arc<backup::Backups>>,
    /// Where the rest of a machine is that was restored lazily, until all is here.
    filling: Option<Arc<StoreFill>>,
    /// What stands in for the source of a machine that lacks blocks.
    fallback: Option<Arc<fallback::Fallback>>,
    /// What the machine's last start from a store touched first.
    first_touches: FirstTouches,
    protection: Option<Arc<protection::Protection>>,
    /// The last protection that was asked for and began.
    protect_wanted: Option<api::ProtectRequest>,
    /// Why it is not protected although it is to be.
    unprotected: Option<String>,
    tenure: Option<Arc<tenure::Tenure>>,
    /// Of a protected machine that came by a move: where its history is.
    arrived: Option<protected_move::Arrived>,
    /// How the machine came here, if its host was lost.
    taken_over: Option<api::TakenOver>,
    launch: serde_json::Value,
    /// Where sources of machines that came here connect again.
    doors: Vec<Arc<Door>>,
    /// The destination of a move is not reached.
    outage: Option<Outage>,
    /// That of the machine which arrived last.
    guard: Weak<guard::Guard>,
    /// The machine on the network, from when it runs here until somebody else has its address.
    net: Option<MachineNet>,
}

/// See the module.
pub struct Runner {
    config: RunnerConfig,
    host: HostName,
    name: MachineName,
    security: Security,
    store: Arc<dyn LeaseStore>,
    driver: Arc<dyn Driver>,
    path: Arc<Network>,
    dir: MachineDir,
    cache: Cache,
    inner: Mutex<Inner>,
    changed: Condvar,
    /// Where it takes machines from peers, once it does.
    listens: OnceLock<SocketAddr>,
    /// Requests whose answer has not been written.
    answering: AtomicUsize,
    /// In which state the last runner left the machine, if this one comes after it.
    left_as: Option<String>,
}

/// Runs until the machine has ended or left for good.
pub fn serve(config: RunnerConfig, launch: Launch) -> Result<(), RunnerError> {
    let machine = config.machine.clone();
    let failed = |what: String| RunnerError { machine: machine.clone(), what };
    confine::confine();
    let runner = Runner::new(config, &launch).map_err(failed)?;
    let ended = runner.live(launch);
    runner.clean_up();
    ended.map_err(failed)
}

impl Runner {
    fn new(config: RunnerConfig, launch: &Launch) -> Result<Arc<Self>, String> {
        let text = |e: &dyn std::fmt::Display| e.to_string();
        let host = HostName::new(&config.host).map_err(|e| text(&e))?;
        let name = MachineName::new(&config.machine).map_err(|e| text(&e))?;
        let dir = MachineDir::create(&config.state, &config.machine)
            .map_err(|e| format!("making {}: {e}", config.state.display()))?;
        let before = dir.read_record().map_err(|e| text(&e))?;
        if let Some(record) = &before
            && record.alive()
            && record.pid != std::process::id()
        {
            return Err(format!("it has a runner on this host already (process {})", record.pid));
        }
        let security = if config.listen.is_some() {
            config.security.load(&host).map_err(|e| text(&e))?
        } else {
            Security::Plaintext
        };
        let leases = config.lease.to_str().ok_or("the lease store's address is no text")?;
        let store = lease::open(leases, LEASE_LOCK_LIMIT).map_err(|e| text(&e))?;
        let path: Arc<dyn DataPath> = match &config.network {
            NetworkConfig::None => Arc::new(conduit::NullDataPath),
            NetworkConfig::Local => Arc::new(conduit::LocalDataPath::open().map_err(|e| text(&e))?),
            NetworkConfig::Agent(socket) => {
                let path = conduit::AgentDataPath::connect(socket).map_err(|e| {
                    format!("no conduit agent answers at {}: {e}", socket.display())
                })?;
                Arc::new(path)
            }
        };
        let qemu = config.qemu();
        let state = match launch {
            Launch::Receive => State::Standby,
            Launch::StandIn => State::StandIn,
            _ => State::Booting,
        };
        let left_as = match (launch, &before) {
            (Launch::Recover, Some(before)) => {
                Some(before.left_as.clone().unwrap_or_else(|| before.state.clone()))
            }
            _ => None,
        };
        let inner = Inner {
            state,
            detail: String::new(),
            body: None,
            holding: None,
            since: None,
            stay: None,
            guest: None,
            monitor_pid: None,
            devices: Vec::new(),
            jobs: BTreeMap::new(),
            moves: Vec::new(),
            subject: None,
            backups: None,
            filling: None,
            first_touches: FirstTouches::new(),
            protection: None,
            protect_wanted: None,
            unprotected: None,
            tenure: None,
            arrived: None,
            taken_over: None,
            // As an earlier runner left it, until the machine is here.
            net: before.as_ref().and_then(|b| Some(b.network.as_ref()?.net.clone())),
            launch: match (launch, before) {
                // How the machine began stays known.
                (Launch::Recover, Some(before)) => before.launch,
                _ => serde_json::to_value(launch).unwrap_or_default(),
            },
            fallback: None,
            doors: Vec::new(),
            outage: None,
            guard: Weak::new(),
        };
        Ok(Arc::new(Self {
            host,
            name,
            security,
            store,
            driver: Arc::new(match launch {
                Launch::Forked(from) => QemuDriver::knowing(qemu, from.facts.clone()),
                _ => QemuDriver::new(qemu),
            }),
            path: Network::over(path),
            dir,
            cache: Cache::default_for_user(),
            inner: Mutex::new(inner),
            changed: Condvar::new(),
            listens: OnceLock::new(),
            answering: AtomicUsize::new(0),
            left_as,
            config,
        }))
    }

    fn live(self: &Arc<Self>, launch: Launch) -> Result<(), String> {
        self.record();
        let api = server::listen(self)?;
        if let Some(address) = self.config.listen {
            peer::listen(self, address)?;
        }
        self.watch_signals()?;
        match launch {
            Launch::Boot(boot) => self.boot(&boot)?,
            Launch::Receive => {}
            Launch::StandIn => self.stand_in()?,
            Launch::Resume(directory) => self.resume_from(&directory)?,
            Launch::Restore(from) => self.restore(&from)?,
            Launch::Forked(from) => self.begin_as_copy(&from)?,
            Launch::TakeOver(boot) => self.take_over(Some(&boot.package))?,
            Launch::Recover => self.take_over(None)?,
        }
        let ended = self.watch();
        // Whoever ended the machine hears so.
        let deadline = Instant::now() + ANSWER_LIMIT;
        while self.answering.load(Ordering::Acquire) > 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
        drop(api);
        ended
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_state(&self, state: State, detail: impl Into<String>) {
        let is_news = {
            let mut inner = self.lock();
            // The end of a pause for a generation, of which there may be one a second.
            let is_pause = matches!(state, State::Running | State::Moving);
            let is_news = !(inner.state == State::Saving && is_pause);
            inner.state = state;
            inner.detail = detail.into();
            if is_news {
                tracing::info!(machine = %self.name.as_str(), state = state.word(), detail = inner.detail);
            }
            is_news
        };
        self.changed.notify_all();
        if state.over() {
            self.path.owe_nothing();
        }
        if is_news {
            self.record();
        }
    }

    /// Writes `runner.json`; a host whose disk is full still runs its machines.
    fn record(&self) {
        let record = {
            let inner = self.lock();
            let pid = std::process::id();
            RunnerRecord {
                machine: self.config.machine.clone(),
                host: self.config.host.clone(),
                pid,
                started: process_start(pid).unwrap_or(0),
                boot_id: boot_id(),
                state: inner.state.word().to_owned(),
                detail: inner.detail.clone(),
                left_as: self.left_as.clone().filter(|_| inner.state == State::Booting),
                launch: inner.launch.clone(),
                config: Some(self.config.clone()),
                network: self
                    .config
                    .network
                    .agent()
                    .zip(inner.net.clone())
                    .map(|(agent, net)| state::OnNetwork { agent: agent.to_owned(), net }),
            }
        };
        if let Err(error) = self.dir.write_record(&record) {
            tracing::error!(%error, "writing the runner's record failed");
        }
    }

    fn site(&self) -> SitePaths {
        SitePaths { track: self.config.track, run: self.dir.run(), disks: self.dir.disks() }
    }

    /// The machine runs here now.
    fn install(self: &Arc<Self>, mut body: Box<Hosted>, holding: Holding, since: Option<StayId>) {
        body.unguard();
        if body.guest.is_none() {
            self.open_guest(&mut body);
        }
        {
            let mut inner = self.lock();
            inner.guest.clone_from(&body.guest);
            inner.monitor_pid = Some(body.monitor_pid());
            inner.devices = body.content.devices();
            inner.subject = Some(backup::Subject::of(&body));
            inner.holding = Some(holding);
            inner.since = since;
            inner.net.clone_from(&body.net);
            inner.body = Some(body);
        }
        self.set_state(State::Running, "");
        self.protect_as_wanted();
    }

    /// Everything of the machine is here: a later runner could take it over.
    fn complete(&self, noted: &take_over::Noted) {
        if let Err(error) = noted.write(&self.dir) {
            tracing::error!(%error, "a later runner could not take this machine over");
        }
    }

    /// What is known, once no backup holds the machine still (or does so for too long).
    fn settled(&self) -> MutexGuard<'_, Inner> {
        let waited = self
            .changed
            .wait_timeout_while(self.lock(), SAVING_LIMIT, |inner| inner.state == State::Saving);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Takes the body for work on it, if nobody else has it.
    fn borrow(&self, from: State, to: State) -> Result<Box<Hosted>, String> {
        let mut inner = self.settled();
        if inner.state != from {
            return Err(format!(
                "the machine is {} here, not {}{}{}",
                inner.state.word(),
                from.word(),
                if inner.detail.is_empty() { "" } else { ": " },
                inner.detail
            ));
        }
        let body = inner.body.take().ok_or("somebody is working on the machine, try again")?;
        inner.state = to;
        inner.detail.clear();
        drop(inner);
        self.changed.notify_all();
        if to != State::Saving {
            self.record();
        }
        Ok(body)
    }

    /// Opens the guest channel.
    fn open_guest(&self, body: &mut Hosted) {
        let machine = &self.config.machine;
        match crate::guest::GuestChannel::connect(&body.guest_socket(), machine) {
            Ok(channel) => body.guest = Some(Arc::new(channel)),
            Err(error) => tracing::error!(%error, "the guest channel is not there"),
        }
    }

    /// Gives it back.
    fn give_back(&self, mut body: Box<Hosted>, state: State, detail: impl Into<String>) {
        // Before a pause it falls silent for good.
        if state == State::Running && body.guest.as_ref().is_none_or(|guest| guest.is_over()) {
            body.hang_up();
            self.open_guest(&mut body);
        }
        {
            let mut inner = self.lock();
            inner.guest.clone_from(&body.guest);
            inner.body = Some(body);
        }
        self.set_state(state, detail);
    }
}

struct SitePaths {
    track: bool,
    run: PathBuf,
    disks: PathBuf,
}

impl SitePaths {
    fn site<'a>(&'a self, driver: &'a dyn Driver, path: &'a Arc<Network>) -> Site<'a> {
        Site { driver, path, run_dir: &self.run, track: self.track }
    }
}
