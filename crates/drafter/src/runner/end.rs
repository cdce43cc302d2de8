//! A machine's end: watched for, or asked for.

use super::{Runner, State, trouble};
use crate::driver::{Exit, qemu};
use std::{
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

/// How long a runner waits for its first machine.
struct Waiting {
    limit: Option<Duration>,
    since: Instant,
}

impl Waiting {
    fn of(limit_ms: Option<u64>) -> Self {
        Self { limit: limit_ms.map(Duration::from_millis), since: Instant::now() }
    }

    /// The limit, if it has passed. A runner that has had a machine waits for it as long as it lives.
    fn is_over(&mut self, state: State) -> Option<Duration> {
        match state {
            State::Standby => self.limit.filter(|limit| self.since.elapsed() >= *limit),
            // What arrives may come to nothing yet.
            State::Receiving => {
                self.since = Instant::now();
                None
            }
            _ => self.limit.take().and(None),
        }
    }
}

impl Runner {
    /// Waits for the machine's end, looking at its monitor now and then.
    pub(super) fn watch(self: &Arc<Self>) -> Result<(), String> {
        let mut watch = trouble::DiskWatch::default();
        let mut waiting = Waiting::of(self.config.wait_ms);
        let mut inner = self.lock();
        loop {
            if inner.state.over() {
                return match inner.state {
                    State::Failed => Err(inner.detail.clone()),
                    _ => Ok(()),
                };
            }
            let running = inner.state == State::Running;
            if let Some(limit) = waiting.is_over(inner.state) {
                inner.state = State::Stopped;
                inner.detail = format!("no machine came within {limit:?}");
                tracing::info!(machine = %self.name.as_str(), detail = inner.detail, "it has waited");
                drop(inner);
                self.record();
                inner = self.lock();
                continue;
            }
            // Whoever found that another host has the machine has ended it, and is about to say so.
            let lost = inner.protection.as_ref().is_some_and(|protection| protection.is_over());
            let exit = match &mut inner.body {
                Some(body) if running && !lost => body.vm().exit(),
                _ => None,
            };
            if let Some(exit) = exit {
                drop(inner);
                self.machine_ended(&exit);
                inner = self.lock();
                continue;
            }
            if running && self.look_at_disks(&mut inner, &mut watch) {
                let body = inner.body.take();
                drop(inner);
                self.try_again(body, &mut watch);
                inner = self.lock();
            }
            if running && inner.body.as_ref().is_some_and(|body| body.may_have_to_rejoin()) {
                let body = inner.body.take();
                drop(inner);
                self.rejoin_disks(body);
                inner = self.lock();
            }
            inner = self
                .changed
                .wait_timeout(inner, Duration::from_millis(200))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn machine_ended(&self, exit: &Exit) {
        self.protected_ended(exit);
        match exit {
            Exit::Shutdown => self.set_state(State::Stopped, "the guest shut down"),
            Exit::Reset => self.set_state(State::Stopped, "the guest rebooted or panicked"),
            Exit::Failed { detail } => {
                self.set_state(State::Failed, format!("its monitor failed: {detail}"));
            }
        }
    }

    /// SIGTERM and SIGINT stop the machine in an orderly way.
    pub(super) fn watch_signals(self: &Arc<Self>) -> Result<(), String> {
        use signal_hook::{
            consts::{SIGINT, SIGTERM},
            iterator::Signals,
        };
        let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(|e| e.to_string())?;
        let runner = Arc::clone(self);
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                for _ in signals.forever() {
                    if let Err(why) = runner.stop(Duration::from_secs(10)) {
                        tracing::warn!("not stopping: {why}");
                    }
                }
            })
            .map(drop)
            .map_err(|e| e.to_string())
    }

    /// Ends the machine: by its agent within `grace`, else at once.
    pub(super) fn stop(&self, grace: Duration) -> Result<String, String> {
        let state = self.settled().state;
        match state {
            State::Standby | State::StandIn => {
                self.set_state(State::Stopped, "nothing ran here");
                return Ok("nothing ran here".into());
            }
            State::Stopped | State::Failed => return Ok("it had ended already".into()),
            State::Running | State::Paused => {}
            other => return Err(format!("it is {} just now; cancel that first", other.word())),
        }
        if let Err(error) = self.let_go() {
            tracing::error!(
                error,
                "the lease store does not learn that the machine is stopped: a stand-in will start it"
            );
        }
        let guest = self.lock().guest.clone();
        let deadline = Instant::now() + grace;
        if state == State::Running
            && !grace.is_zero()
            && let Some(guest) = guest
        {
            match guest.shut_down(grace) {
                Ok(()) => {
                    let mut inner = self.lock();
                    while !inner.state.over() && Instant::now() < deadline {
                        let left = deadline.saturating_duration_since(Instant::now());
                        inner = self
                            .changed
                            .wait_timeout(inner, left)
                            .unwrap_or_else(PoisonError::into_inner)
                            .0;
                    }
                    if inner.state.over() {
                        return Ok("the guest shut down".into());
                    }
                }
                Err(error) => tracing::warn!(%error, "the guest could not be asked to shut down"),
            }
        }
        if state == State::Paused && self.lock().body.is_none() {
            // What a runner found, and nobody looks after any more.
            qemu::stop_without_runner(&self.dir.run()).map_err(|e| e.to_string())?;
        } else {
            self.borrow(state, State::Stopped)?.tear_down();
        }
        self.set_state(State::Stopped, "it was ended at once");
        Ok("it was ended at once".into())
    }

    pub(super) fn drop_stay(&self) -> u64 {
        let stay = self.lock().stay.take();
        stay.map_or(0, |stay| stay.bytes())
    }

    pub(super) fn clean_up(&self) {
        self.leave_stores();
        let body = self.lock().body.take();
        if let Some(mut body) = body {
            body.tear_down();
        }
        let _ = std::fs::remove_file(self.dir.socket());
        self.record();
    }
}
