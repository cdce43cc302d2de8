//! Protection: a machine that survives the loss of its host.
//!
//! ```text
//!   generations, one after the other ─────────────▶ store            (`backup`)
//!   "this host lives" ──▶ beat, every quarter of T ─▶ lease store     (`tenure`)
//!        ├──▶ guard: frozen when the term ends, whatever becomes of this runner   (`guard`)
//!        └──▶ over: frozen here too ─ it holds again ─▶ thawed
//!                                   └ another has the machine ─▶ ended for good
//! ```
//!
//! What must hold:
//! - From the moment that the lease names a beat, the machine runs only while that beat holds, by this
//!   host's clock. Before, nobody may take it.
//! - The lease names a beat only once there is a generation that a stand-in can run; under output commit
//!   one after whose instant nothing has left.
//! - A machine that ends because somebody wanted it to end is nobody's to take; one whose monitor broke
//!   is given up at once, so that nobody has to wait for the end of the term.
//! - Under output commit no frame leaves before the generation that it is of is durable, and none of
//!   a generation that was not stored because somebody else has the history.

use super::{
    Runner, State,
    api::{BackupReport, BackupRequest, BackupState, ProtectRequest, ProtectionState, Secret},
    config::{ProtectConfig, bills_requests},
    guard::Guard,
    protected_move::Arrived,
    protection::Protection,
    tenure::{Deeds, Known, Pace, Tenure},
};
use crate::{
    checkpoint::description::LifeSign,
    driver::{Exit, Fence},
    keeper::Place,
    lease::{BootTime, Epoch, HostName, Record},
    migrate::{
        source::MachineError,
        switchover::{FlipEpoch, Holding},
    },
};
use silo::store::KeyRing;
use std::{
    sync::{Arc, Weak},
    time::Duration,
};

/// Shortest and longest T.
const TERMS: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(3600));
/// How long the store may take at the beginning.
const BEGIN_LIMIT: Duration = Duration::from_secs(20);
/// How long the store may take to learn that the machine ended because somebody wanted it to.
const RELEASE_LIMIT: Duration = Duration::from_secs(5);
/// Pauses between attempts to begin what the configuration asks for.
const AGAIN: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// Between looks at whether all of the machine is here.
const LOOK: Duration = Duration::from_millis(20);
/// Variables with the keys, and beginnings of those with credentials, as the commands have them.
const KEYS: &str = "SILO_KEYS";
const CREDENTIALS: [&str; 3] = ["AWS_", "GOOGLE_", "AZURE_"];

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// What the term's holder does to the machine.
struct Hands {
    runner: Weak<Runner>,
    protection: Weak<Protection>,
}

impl Deeds for Hands {
    fn runs_until(&self, end: Option<BootTime>) {
        if let Some(protection) = self.protection.upgrade() {
            protection.ends_at(end);
        }
    }

    fn freeze(&self) {
        if let Some(protection) = self.protection.upgrade() {
            protection.freeze();
        }
    }

    fn thaw(&self) {
        if let Some(protection) = self.protection.upgrade() {
            protection.thaw();
        }
    }

    fn held(&self, record: &Record) {
        let Some(runner) = self.runner.upgrade() else { return };
        let reclaimed = {
            let mut inner = runner.lock();
            let Some(holding) = &mut inner.holding else { return };
            let newer = record.epoch > holding.record.epoch;
            *holding =
                Holding { record: record.clone(), flips: if newer { 0 } else { holding.flips } };
            newer
        };
        if reclaimed {
            runner.reclaim_network(record.epoch);
        }
    }

    fn discard(&self, owner: &HostName, epoch: Epoch) {
        if let (Some(runner), Some(protection)) = (self.runner.upgrade(), self.protection.upgrade())
        {
            runner.lost(&protection, owner, epoch);
        }
    }
}

impl ProtectConfig {
    /// As a request, with this host's keys and credentials.
    pub(super) fn request(&self) -> Result<ProtectRequest, String> {
        let (keys, keys_from) = match &self.keys {
            Some(path) => {
                // Refuses a file that others can read.
                KeyRing::from_file(path).map_err(text)?;
                let keys = std::fs::read_to_string(path)
                    .map_err(|e| format!("{}: {e}", path.display()))?;
                (keys, format!("key file {}", path.display()))
            }
            None => {
                let keys = std::env::var(KEYS).map_err(|_| {
                    format!("no keys: give a file, or put them into the variable {KEYS}")
                })?;
                (keys.replace(';', "\n"), format!("environment variable {KEYS}"))
            }
        };
        let ours = |name: &String| CREDENTIALS.iter().any(|begin| name.starts_with(begin));
        let variables = std::env::vars_os().filter_map(|(name, value)| {
            Some((name.into_string().ok().filter(ours)?, Secret(value.into_string().ok()?)))
        });
        Ok(ProtectRequest {
            backup: BackupRequest {
                store: self.store.clone(),
                line: self.line.clone(),
                keys: Secret(keys),
                keys_from,
                environment: variables.collect(),
                every_ms: Some(self.every_ms),
                label: String::new(),
                keep: self.keep,
            },
            term_ms: self.term_ms,
            output_commit: self.output_commit,
            host_beat: Some(self.host_beat),
        })
    }
}

impl Runner {
    /// Protection of this stay, if there is any.
    pub(super) fn protection(&self) -> Option<Arc<Protection>> {
        self.lock().protection.clone()
    }

    /// How protection does, for the status.
    pub(super) fn protection_state(&self, backup: Option<&BackupState>) -> Option<ProtectionState> {
        let (protection, taken_over, unprotected, beat) = {
            let inner = self.lock();
            let beat = inner.holding.as_ref().and_then(|holding| holding.record.beat.as_ref());
            let beat = beat.map(|life| life.name.to_string());
            (inner.protection.clone(), inner.taken_over.clone(), inner.unprotected.clone(), beat)
        };
        let state = protection.map(|protection| protection.state()).map(|mut state| {
            state.beat = beat;
            if state.word == "starting" {
                // What kept it from more, the last time that it was tried.
                state.detail = unprotected.clone().unwrap_or_default();
            }
            if backup.is_some_and(|backup| backup.ended) && state.detail.is_empty() {
                "another writer has taken its history: no generation is stored any more"
                    .clone_into(&mut state.detail);
            }
            state
        });
        match (state, taken_over) {
            (Some(state), taken_over) => Some(ProtectionState { taken_over, ..state }),
            (None, None) if unprotected.is_none() => None,
            (None, taken_over) => Some(ProtectionState {
                word: "unprotected".to_owned(),
                detail: unprotected.unwrap_or_default(),
                term_ms: 0,
                left_ms: 0,
                freezes: 0,
                output_commit: false,
                beat: None,
                guard_pid: None,
                taken_over,
            }),
        }
    }

    /// Protects the machine: it is when this returns.
    pub(super) fn protect(
        self: &Arc<Self>,
        request: &ProtectRequest,
    ) -> Result<BackupReport, String> {
        let term = Duration::from_millis(request.term_ms);
        if !(TERMS.0..=TERMS.1).contains(&term) {
            return Err(format!("a term is {:?} to {:?}, not {term:?}", TERMS.0, TERMS.1));
        }
        if request.backup.every_ms.is_none() {
            return Err("protection is a generation every so often: say how often".into());
        }
        let protection = match self.protection() {
            // Taken over: its lease names this host's beat already.
            Some(protection) if !protection.has_begun() => protection,
            Some(_) => return Err("the machine is protected already; end that first".into()),
            None => {
                let fence = self.fence()?;
                let every = request.backup.every_ms.unwrap_or(request.term_ms);
                let shared =
                    request.host_beat.unwrap_or_else(|| bills_requests(&self.config.lease));
                let pace = Pace::of(term, Duration::from_millis(every), shared);
                self.install_protection(fence, pace, request.output_commit)?
            }
        };
        let bound = self.held_record()?.beat.is_some();
        let report = self.backup(&request.backup).and_then(|report| {
            if !bound {
                if protection.wants_commit() {
                    // What was sent since the first generation is in none, and nobody holds it back:
                    // before anybody may take the machine there is one whose output waits.
                    protection.hold_output();
                    self.generation_now()?;
                }
                self.begin_term(&protection)?;
            }
            Ok(report)
        });
        match report {
            Ok(report) => {
                protection.begin();
                self.lock().protect_wanted = Some(request.clone());
                tracing::info!(machine = %self.name.as_str(), ?term, "the machine is protected");
                Ok(report)
            }
            Err(why) if bound => Err(why),
            Err(why) => {
                // Of a machine that may be bound the holder goes on; else nothing is left of it.
                if self.unbind(RELEASE_LIMIT).is_ok() {
                    self.drop_protection(&protection);
                    self.let_output_go();
                    let _ = self.end_backup();
                }
                Err(why)
            }
        }
    }

    /// What stops the machine that runs here.
    fn fence(&self) -> Result<Arc<dyn Fence>, String> {
        let mut inner = self.settled();
        let runs = inner.state == State::Running;
        let word = inner.state.word();
        let body = inner.body.as_mut().filter(|_| runs);
        body.map(|body| body.fence()).ok_or_else(|| {
            format!("the machine is {word} here; only one that runs can be protected")
        })
    }

    /// The guard of an unconfirmed machine guards its term too; else there is a new one.
    fn term_guard(&self) -> Result<Arc<Guard>, String> {
        let arriving = self.lock().guard.upgrade();
        if let Some(guard) = arriving.filter(|guard| guard.keep()) {
            return Ok(guard);
        }
        let started = Guard::start(&self.dir.run());
        started.map(Arc::new).map_err(|error| format!("no guard for the end of its lease: {error}"))
    }

    /// The guard and what goes with it, before the lease says anything.
    pub(super) fn install_protection(
        &self,
        fence: Arc<dyn Fence>,
        pace: Pace,
        commit: bool,
    ) -> Result<Arc<Protection>, String> {
        let guard = self.term_guard()?;
        let protection = Protection::new(fence, guard, pace, commit);
        let mut inner = self.lock();
        if inner.protection.is_some() || inner.state.over() {
            protection.drop_guard();
            return Err("the machine is protected already, or has just ended".into());
        }
        inner.protection = Some(Arc::clone(&protection));
        Ok(protection)
    }

    /// The one that failed to begin goes.
    fn drop_protection(&self, protection: &Arc<Protection>) {
        {
            let mut inner = self.lock();
            if inner.protection.as_ref().is_some_and(|now| Arc::ptr_eq(now, protection)) {
                inner.protection = None;
            }
        }
        protection.leave();
    }

    /// This runner's sign of life, which begins with the first who asks for it.
    pub(super) fn tenure(&self, pace: Pace) -> Result<Arc<Tenure>, String> {
        let other = {
            let mut inner = self.lock();
            match &inner.tenure {
                Some(tenure) if tenure.pace() == pace => return Ok(Arc::clone(tenure)),
                _ => inner.tenure.take(),
            }
        };
        // Nothing refers to it: the machine is not protected.
        drop(other);
        let place = Place {
            state: self.config.state.clone(),
            host: self.host.clone(),
            leases: self.config.lease.to_string_lossy().into_owned(),
            machine: self.name.clone(),
            term: pace.term,
            renewal: pace.renewal,
        };
        let begun = Tenure::begin(Arc::clone(&self.store), place, pace);
        let tenure = Arc::new(begun.map_err(|e| format!("no threads for a sign of life: {e}"))?);
        self.lock().tenure = Some(Arc::clone(&tenure));
        Ok(tenure)
    }

    /// From here on the lease has an end.
    fn begin_term(self: &Arc<Self>, protection: &Arc<Protection>) -> Result<(), String> {
        let tenure = self.tenure(protection.pace())?;
        tenure.wait_alive(BEGIN_LIMIT)?;
        // While this has the body no move begins under the lease that is replaced.
        let detail = self.lock().detail.clone();
        let body = self.borrow(State::Running, State::Saving)?;
        let bound = self.held_record().and_then(|record| {
            tenure.hold(record, Known::Surely, self.hands(protection));
            tenure.protect(true, BEGIN_LIMIT)
        });
        self.give_back(body, State::Running, detail);
        if bound.is_err() {
            // The lease may name the beat all the same: the holder keeps to it.
            tracing::warn!("whether the machine may be taken is not known; it counts as if it may");
        }
        bound.map(drop)
    }

    /// The newest sign of life that the store has of this runner.
    pub(super) fn life_sign(&self) -> Option<LifeSign> {
        let tenure = self.lock().tenure.clone();
        tenure.and_then(|tenure| tenure.sign())
    }

    fn held_record(&self) -> Result<Record, String> {
        let inner = self.lock();
        let holding = inner.holding.as_ref().ok_or("this host holds no lease of the machine")?;
        Ok(holding.record.clone())
    }

    pub(super) fn hands(self: &Arc<Self>, protection: &Arc<Protection>) -> Box<dyn Deeds> {
        Box::new(Hands { runner: Arc::downgrade(self), protection: Arc::downgrade(protection) })
    }

    /// Somebody else has the machine: it never runs here again.
    fn lost(&self, protection: &Protection, owner: &HostName, epoch: Epoch) {
        let detail = format!(
            "host \"{owner}\" owns the machine now ({epoch}): it was ended here for good, and what it did \
             since its last generation is lost"
        );
        tracing::error!(machine = %self.name.as_str(), "{detail}");
        protection.freeze();
        // First the monitor: this process ends as soon as its state says that the machine has.
        protection.end();
        self.set_state(State::Stopped, detail);
    }

    /// Ends protection of a machine that runs on: nobody may take it any more.
    pub(super) fn end_protect(&self) -> Result<String, String> {
        let protection = self.protection().ok_or("the machine is not protected")?;
        if self.settled().state != State::Running {
            return Err(
                "the machine does not run here, or moves; try again when that is over".into()
            );
        }
        // First the lease; until it says so, the machine may be taken.
        self.unbind(BEGIN_LIMIT)?;
        self.drop_protection(&protection);
        self.let_output_go();
        let backup = self.end_backup();
        Ok(match backup {
            Ok(backup) => format!("the machine is protected no more; {backup}"),
            Err(_) => "the machine is protected no more".to_owned(),
        })
    }

    /// Has the lease name no beat: nobody may take the machine.
    fn unbind(&self, limit: Duration) -> Result<(), String> {
        let tenure = self.lock().tenure.clone();
        let Some(tenure) = tenure else { return Ok(()) };
        tenure.protect(false, limit)?;
        tenure.let_go();
        Ok(())
    }

    /// The machine ends because somebody wants it to: nobody is to bring it back.
    ///
    /// # Errors
    /// If the lease store does not learn it.
    pub(super) fn let_go(&self) -> Result<(), String> {
        let Some(protection) = self.protection() else { return Ok(()) };
        self.unbind(RELEASE_LIMIT)?;
        self.drop_protection(&protection);
        Ok(())
    }

    /// The machine has ended by itself.
    pub(super) fn protected_ended(&self, exit: &Exit) {
        if self.protection().is_none() {
            return;
        }
        match exit {
            Exit::Shutdown | Exit::Reset => {
                if let Err(error) = self.let_go() {
                    tracing::error!(
                        error,
                        "the lease store does not learn that the machine ended: a stand-in will start it"
                    );
                }
            }
            Exit::Failed { .. } => {
                // Nobody need wait for the end of the term.
                let tenure = self.lock().tenure.take();
                if let Some(tenure) = tenure.and_then(Arc::into_inner) {
                    tenure.resign();
                }
            }
        }
        self.leave_protection();
    }

    /// The machine leaves, or has ended.
    pub(super) fn leave_protection(&self) {
        let (protection, tenure) = {
            let mut inner = self.lock();
            (inner.protection.take(), inner.tenure.clone())
        };
        if let Some(protection) = protection {
            protection.leave();
            if let Some(tenure) = tenure {
                tenure.let_go();
            }
        }
    }

    /// A generation is durable: what the guest had sent by then may leave.
    pub(super) fn release_sealed(&self) {
        let Some(protection) = self.protection() else { return };
        if !protection.commits_output() || protection.is_frozen() {
            return;
        }
        self.with_output(|body| body.vm().release_sealed().map_err(Into::into));
    }

    /// What the guest sends waits for nothing from here on: protection has ended.
    fn let_output_go(&self) {
        self.with_output(|body| body.commit_output(false));
    }

    fn with_output(
        &self,
        act: impl FnOnce(&mut super::hosted::Hosted) -> Result<(), MachineError>,
    ) {
        let mut inner = self.lock();
        // In the hands of a move that is about to pause it, or of a stop: it waits on.
        let Some(body) = &mut inner.body else { return };
        if let Err(error) = act(body) {
            tracing::warn!(%error, "what the guest sent is still held");
        }
    }

    /// The lease was got back at a new epoch: the network learns of it.
    fn reclaim_network(&self, epoch: Epoch) {
        // Also while somebody else has the body; and nobody waits for it here, because the next sign of
        // life is due.
        let net = self.lock().net.clone();
        if let Some(net) = net {
            self.path.lead_here_soon(&net, FlipEpoch::of(epoch, 0).0);
        }
    }

    /// What protection is asked for: by a command of this stay, or by the configuration.
    fn wanted(&self) -> Option<Result<ProtectRequest, String>> {
        let wanted = self.lock().protect_wanted.clone();
        let configured = || self.config.protect.as_ref().map(ProtectConfig::request);
        wanted.map(Ok).or_else(configured)
    }

    /// Protects the machine as it is asked for, on a thread of its own, once all of it is here; tries
    /// until it is, or until the machine has left.
    pub(super) fn protect_as_wanted(self: &Arc<Self>) {
        if self.wanted().is_none() {
            return;
        }
        let (runner, subject) = (Arc::clone(self), self.lock().subject.clone());
        let begun = std::thread::Builder::new().name("protect".into()).spawn(move || {
            let (mut pause, mut told) = (AGAIN.0, String::new());
            while runner.is_still(subject.as_ref()) {
                if runner.is_whole() {
                    let begun = runner.wanted().map(|request| runner.protect(&request?));
                    let Some(Err(why)) = begun else {
                        runner.lock().unprotected = None;
                        return;
                    };
                    if why != told {
                        tracing::warn!("the machine is not protected yet: {why}");
                        told.clone_from(&why);
                    }
                    runner.lock().unprotected = Some(why);
                    pause = (pause * 2).min(AGAIN.1);
                    std::thread::park_timeout(pause);
                } else {
                    std::thread::park_timeout(LOOK);
                }
            }
        });
        if let Err(error) = begun {
            tracing::error!(%error, "no thread to protect the machine");
        }
    }

    /// Whether the machine is in the same stay here.
    pub(super) fn is_still(&self, subject: Option<&super::backup::Subject>) -> bool {
        let inner = self.lock();
        let same = subject.zip(inner.subject.as_ref()).is_some_and(|(a, b)| a.is(b));
        same && !inner.state.over()
    }

    /// Whether all of it has arrived.
    fn is_whole(&self) -> bool {
        let inner = self.lock();
        // Its source has said where its history is, or will not.
        let told = !matches!(inner.arrived, Some(Arrived::Expected));
        told && inner.filling.is_none()
            && inner.devices.iter().all(|device| device.missing_blocks() == 0)
    }
}
