//! Jobs: moves of this runner's machine to another host.

use super::{
    Runner, State,
    api::{MigrateRequest, Phase, Progress},
    hosted::{self, Hosted},
    protected_move::Leaving,
    take_over::{self, MoveNote},
};
use crate::{
    lease::AttemptId,
    migrate::{
        link::session_hex,
        messages::{Mode, PrepareRequest, StayId},
        planner,
        reception::{self, Ask},
        source::{self, MoveError, Moved, Outage, Plan, ProtectedSource, Surroundings},
        switchover::{Holding, SourceAuthority, SourceParts, Terms},
        timings::MoveReport,
    },
    tenure::random_nonces,
};
use identity::HostName;
use silo::memory::Tracking;
use std::{
    net::SocketAddr,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

/// A move that runs or ran.
pub(super) struct Job {
    pub(super) number: u64,
    cancel: Arc<AtomicBool>,
    progress: Mutex<Progress>,
    result: Mutex<Option<Result<serde_json::Value, String>>>,
    changed: Condvar,
}

impl Job {
    pub(super) fn new(number: u64) -> Self {
        let progress =
            Progress { job: number, phase: Phase::Prepare, round: 0, sent_bytes: 0, left_bytes: 0 };
        Self {
            number,
            cancel: Arc::new(AtomicBool::new(false)),
            progress: Mutex::new(progress),
            result: Mutex::new(None),
            changed: Condvar::new(),
        }
    }

    pub(super) fn progress(&self) -> Progress {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What a cancel sets.
    pub(super) fn cancel_flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.cancel)
    }

    pub(super) fn cancel(&self) {
        self.cancel.store(true, Ordering::Relaxed);
    }

    /// The result, once there is one; waits at most `limit`.
    pub(super) fn wait(&self, limit: Duration) -> Option<Result<serde_json::Value, String>> {
        let result = self.result.lock().unwrap_or_else(PoisonError::into_inner);
        let (result, _) = self
            .changed
            .wait_timeout_while(result, limit, |result| result.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        result.clone()
    }

    pub(super) fn finish(&self, result: Result<serde_json::Value, String>) {
        *self.result.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        self.changed.notify_all();
    }
}

impl Runner {
    /// Asks another host for a runner that takes this machine; where that listens.
    pub(super) fn ask_host(&self, to: SocketAddr, peer: &str) -> Result<SocketAddr, String> {
        let peer = HostName::new(peer).map_err(|e| e.to_string())?;
        let security = self.config.security.load(&self.host).map_err(|e| e.to_string())?;
        let asked = Ask { host: self.config.host.clone(), machine: self.config.machine.clone() };
        reception::ask(to, &peer, &security, &asked)
    }

    /// Starts a move; returns its job's number.
    pub(super) fn migrate(self: &Arc<Self>, request: MigrateRequest) -> Result<u64, String> {
        let peer = HostName::new(&request.peer).map_err(|e| e.to_string())?;
        if self.config.listen.is_none() {
            // Without certificates loaded there is nothing to prove ourselves with.
            self.config.security.load(&self.host).map_err(|e| e.to_string())?;
        }
        self.before_move(request.dry_run)?;
        let body = self.borrow(State::Running, State::Moving).inspect_err(|_| self.after_move())?;
        let job = self.new_job();
        let number = job.number;
        let runner = Arc::clone(self);
        let spawned = std::thread::Builder::new().name(format!("move-{number}")).spawn(move || {
            let result = runner.run_move(&request, &peer, &job, body);
            runner.after_move();
            job.finish(result);
        });
        match spawned {
            Ok(_) => Ok(number),
            Err(error) => {
                self.after_move();
                Err(format!("no thread for the move: {error}"))
            }
        }
    }

    /// A job with the next number.
    pub(super) fn new_job(&self) -> Arc<Job> {
        let mut inner = self.lock();
        let number = inner.jobs.keys().next_back().map_or(1, |last| last + 1);
        let job = Arc::new(Job::new(number));
        inner.jobs.insert(number, Arc::clone(&job));
        // Results of old jobs are in `moves`.
        while inner.jobs.len() > 64 {
            inner.jobs.pop_first();
        }
        job
    }

    /// A destination that may need blocks is not reached, or is again.
    pub(super) fn note_outage(&self, outage: Option<Outage>) {
        self.lock().outage = outage;
    }

    fn run_move(
        self: &Arc<Self>,
        request: &MigrateRequest,
        peer: &HostName,
        job: &Job,
        body: Box<Hosted>,
    ) -> Result<serde_json::Value, String> {
        let prepared = self.plan(request, peer.clone(), job, &body);
        let (plan, authority) = match prepared {
            Ok(prepared) => prepared,
            Err(why) => {
                self.give_back(body, State::Running, "");
                return Err(why);
            }
        };
        let holding = Arc::new(Mutex::new(None));
        let progress = |progress: Progress| {
            *job.progress.lock().unwrap_or_else(PoisonError::into_inner) = progress;
            job.changed.notify_all();
        };
        let mut leaving = Leaving::new(self, body, &holding);
        let asked = ProtectedSource { view: &|| self.term_view(), is_frozen: &|| self.is_frozen() };
        let history = || self.ask_history();
        let around = Surroundings {
            machine: &mut leaving,
            authority,
            store: Arc::clone(&self.store),
            cancel: Arc::clone(&job.cancel),
            progress: &progress,
            outage: &|outage| self.note_outage(outage),
            leaving: &|session, hold| {
                let note = MoveNote {
                    attempt: plan.request.attempt,
                    session: session_hex(session),
                    peer: plan.peer.as_str().to_owned(),
                    to: Some(plan.to),
                    offers_hold_ms: u64::try_from(hold.as_millis()).unwrap_or(u64::MAX),
                    flips: self.lock().holding.as_ref().map_or(0, |holding| holding.flips),
                };
                take_over::note_leaving(&self.dir, Some(note));
            },
            holding: Arc::clone(&holding),
            protection: plan.request.protected.is_some().then_some(asked),
            history: Some(&history),
        };
        let moved = source::run(&plan, around);
        if let Some(holding) = holding.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let mut inner = self.lock();
            // Got back in a new life meanwhile: that is newer.
            let newer = |now: &Holding| now.record.epoch > holding.record.epoch;
            if !inner.holding.as_ref().is_some_and(newer) {
                inner.holding = Some(holding);
            }
        }
        let body = match leaving.into_body() {
            Ok(body) => body,
            // It has ended meanwhile: whoever ended it has said how.
            Err(why) => return Err(moved.err().map_or(why, |error| error.to_string())),
        };
        if self.lock().state.over() {
            // Another host has taken it from this one: it was ended for good.
            let detail = self.lock().detail.clone();
            self.lock().body = Some(body);
            return Err(detail);
        }
        let mut last = job.progress();
        last.phase = Phase::Ended;
        progress(last);
        match moved {
            Ok(Moved::DryRun { verdict, blackout, total, bytes }) => {
                self.give_back(body, State::Running, "");
                Ok(serde_json::json!({
                    "verdict": if verdict.refusals.is_empty() { "ready" } else { "refused" },
                    "host": verdict.host,
                    "holds_stay": verdict.holds_stay,
                    "predicted_blackout_ms": blackout.as_secs_f64() * 1e3,
                    "predicted_total_ms": total.as_secs_f64() * 1e3,
                    "bytes": bytes,
                }))
            }
            Ok(Moved::Released(report)) => {
                let id = StayId { epoch: report.epoch, session: report.session.clone() };
                let detail = format!("moved to {}", report.to);
                let value = serde_json::to_value(&*report).map_err(|e| e.to_string())?;
                self.lock().moves.push(*report);
                self.retire(body, id, &detail);
                Ok(value)
            }
            Err(error @ MoveError::TakenOver { .. }) => {
                let text = error.to_string();
                let id = StayId { epoch: 0, session: String::new() };
                // Older than what runs: nothing to come back to.
                self.retire(body, id, &text);
                self.drop_stay();
                Err(text)
            }
            Err(error) => {
                let cancelled = matches!(error, MoveError::Cancelled { .. });
                let text = if cancelled && !job.cancel.load(Ordering::Relaxed) {
                    "the move was given up: the machine's lease could not be renewed, so it stands still \
                     here until it can; then try again"
                        .to_owned()
                } else {
                    error.to_string()
                };
                if matches!(error, MoveError::HandedOver { .. }) {
                    // It is the destination's to be held to a term.
                    self.leave_protection();
                }
                let (state, detail) = match &error {
                    error if error.still_here() => {
                        take_over::note_leaving(&self.dir, None);
                        (State::Running, String::new())
                    }
                    _ => (State::Paused, text.clone()),
                };
                self.give_back(body, state, detail);
                Err(text)
            }
        }
    }

    fn plan(
        &self,
        request: &MigrateRequest,
        peer: HostName,
        job: &Job,
        body: &Hosted,
    ) -> Result<(Plan, SourceAuthority), String> {
        let facts = self.driver.facts().map_err(|e| e.to_string())?;
        let attempt = AttemptId::random().map_err(|e| e.to_string())?;
        let can_track = body.tracking == Tracking::WriteProtect;
        let mode = if can_track { request.mode } else { Mode::PostCopy };
        let (holding, since, last_blackout) = {
            let inner = self.lock();
            let same_mode = inner.moves.iter().filter(|m| m.mode == mode);
            let blackout = |m: &MoveReport| Duration::try_from_secs_f64(m.blackout_ms / 1e3);
            let blackouts = same_mode.filter_map(|m| blackout(m).ok());
            (inner.holding.clone(), inner.since.clone(), planner::last_blackout(blackouts))
        };
        let expected = request.budgets.expected_blackout(last_blackout);
        let holding = holding.ok_or("this host holds no lease of the machine")?;
        let prepare = PrepareRequest {
            attempt: attempt.0,
            shape: body.shape.clone(),
            package: body.package.id().to_string(),
            package_name: body.package.manifest().name.clone(),
            devices: hosted::describe(&body.content, &body.package),
            network: body.net.clone(),
            host: self.config.host.clone(),
            facts,
            boot_id: super::state::boot_id(),
            epoch: holding.record.epoch.0,
            since,
            dry_run: request.dry_run,
            resumes: true,
            expected_blackout_ms: u64::try_from(expected.as_millis()).ok(),
            protected: self.told_of_protection(),
            names: true,
            stored_as: request.stored_as.clone(),
            machine: serde_json::Value::Null,
        };
        let authority = SourceAuthority::new(SourceParts {
            holding,
            to: peer.clone(),
            attempt,
            view: self.term_view(),
            terms: Terms::default(),
            nonces: random_nonces(),
        });
        let security = self.config.security.load(&self.host).map_err(|e| e.to_string())?;
        let plan = Plan {
            job: job.number,
            to: request.to,
            peer,
            security,
            mode: request.mode,
            budgets: request.budgets,
            request: prepare,
            can_track,
            last_blackout,
        };
        Ok((plan, authority))
    }

    /// The machine has left: keeps its content as a stay, within the limit.
    fn retire(&self, mut body: Box<Hosted>, id: StayId, detail: &str) {
        take_over::forget(&self.dir);
        self.leave_stores();
        body.leave();
        {
            let mut inner = self.lock();
            inner.guest = None;
            inner.monitor_pid = None;
            inner.devices.clear();
            inner.holding = None;
            inner.since = None;
        }
        self.keep_stay(&body.content, &body.package, Some(id));
        drop(body);
        let state = if self.config.listen.is_some() { State::Standby } else { State::Stopped };
        self.set_state(state, detail);
    }
}
