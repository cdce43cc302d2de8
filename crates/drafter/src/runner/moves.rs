//! Jobs: moves of this runner's machine to another host.

use super::{
    Runner, State, Stay,
    api::{MigrateRequest, Phase, Progress},
    hosted::{self, Hosted},
};
use crate::{
    lease::AttemptId,
    migrate::{
        messages::{PrepareRequest, StayId},
        source::{self, Moved, Plan, Surroundings},
        switchover::{SourceAuthority, SourceParts, Terms},
    },
};
use identity::HostName;
use silo::memory::Tracking;
use std::{
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
    fn new(number: u64) -> Self {
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

    fn finish(&self, result: Result<serde_json::Value, String>) {
        *self.result.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        self.changed.notify_all();
    }
}

impl Runner {
    /// Starts a move; returns its job's number.
    pub(super) fn migrate(self: &Arc<Self>, request: MigrateRequest) -> Result<u64, String> {
        let peer = HostName::new(&request.peer).map_err(|e| e.to_string())?;
        if self.config.listen.is_none() {
            // Without certificates loaded there is nothing to prove ourselves with.
            self.config.security.load(&self.host).map_err(|e| e.to_string())?;
        }
        let body = self.borrow(State::Running, State::Moving)?;
        let job = {
            let mut inner = self.lock();
            let number = inner.jobs.keys().next_back().map_or(1, |last| last + 1);
            let job = Arc::new(Job::new(number));
            inner.jobs.insert(number, Arc::clone(&job));
            // Results of old jobs are in `moves`.
            while inner.jobs.len() > 64 {
                inner.jobs.pop_first();
            }
            job
        };
        let number = job.number;
        let runner = Arc::clone(self);
        let spawned = std::thread::Builder::new().name(format!("move-{number}")).spawn(move || {
            let result = runner.run_move(&request, &peer, &job, body);
            job.finish(result);
        });
        match spawned {
            Ok(_) => Ok(number),
            Err(error) => Err(format!("no thread for the move: {error}")),
        }
    }

    fn run_move(
        self: &Arc<Self>,
        request: &MigrateRequest,
        peer: &HostName,
        job: &Job,
        mut body: Box<Hosted>,
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
        let around = Surroundings {
            machine: &mut *body,
            authority,
            store: Arc::clone(&self.store),
            cancel: Arc::clone(&job.cancel),
            progress: &progress,
            holding: Arc::clone(&holding),
        };
        let moved = source::run(&plan, around);
        if let Some(holding) = holding.lock().unwrap_or_else(PoisonError::into_inner).take() {
            self.lock().holding = Some(holding);
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
            Err(error) => {
                let text = error.to_string();
                let (state, detail) = match &error {
                    error if error.still_here() => (State::Running, String::new()),
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
        let (holding, since) = {
            let inner = self.lock();
            (inner.holding.clone(), inner.since.clone())
        };
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
            machine: serde_json::Value::Null,
        };
        let authority = SourceAuthority::new(SourceParts {
            holding,
            to: peer.clone(),
            attempt,
            terms: Terms::default(),
            nonces: super::nonces(),
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
            can_track: body.tracking == Tracking::WriteProtect,
        };
        Ok((plan, authority))
    }

    /// The machine has left: keeps its content as a stay, within the limit.
    fn retire(&self, mut body: Box<Hosted>, id: StayId, detail: &str) {
        super::take_over::forget(&self.dir);
        self.leave_stores();
        body.leave();
        let keep = body.content.memory.resident_bytes() <= self.config.keep_stay_bytes
            && self.config.listen.is_some();
        {
            let mut inner = self.lock();
            inner.guest = None;
            inner.monitor_pid = None;
            inner.devices.clear();
            inner.holding = None;
            inner.since = None;
            inner.stay = keep.then(|| Stay {
                id,
                content: body.content.clone(),
                package: body.package.id().to_string(),
            });
        }
        drop(body);
        let state = if self.config.listen.is_some() { State::Standby } else { State::Stopped };
        self.set_state(state, detail);
    }
}
