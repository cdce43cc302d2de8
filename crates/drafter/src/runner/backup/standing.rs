//! The runner's machine as backups see it: something that can be paused for a moment.

use super::{Runner, State};
use crate::{
    checkpoint::{
        capture::{Machine, Paused},
        description,
    },
    driver::Urgent,
    migrate::source::MachineError,
    runner::hosted::Hosted,
};
use std::{
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

/// The runner's machine, to be paused.
pub(in crate::runner) struct Watched {
    pub(in crate::runner) runner: Weak<Runner>,
    /// The instant goes to a store, and what waits for that goes with it.
    pub(in crate::runner) for_store: bool,
}

impl Machine for Watched {
    fn ready(&self) -> Result<(), MachineError> {
        let runner = self.runner.upgrade().ok_or("its runner ends")?;
        let inner = runner.lock();
        let pausing = inner.state == State::Moving && inner.body.is_none();
        if pausing { Err("a move is about to pause it, or has".into()) } else { Ok(()) }
    }

    fn pause(&self) -> Result<Box<dyn Paused>, MachineError> {
        let runner = self.runner.upgrade().ok_or("its runner ends")?;
        let protection = runner.protection();
        match &protection {
            // Who owns the machine is its business all the time.
            Some(protection) => protection.may_pause()?,
            None => runner.check_owner()?,
        }
        let (before, detail) = {
            let inner = runner.settled();
            (inner.state, inner.detail.clone())
        };
        // A move leaves the body here until shortly before it pauses the machine.
        let before = if before == State::Moving { before } else { State::Running };
        let mut body = runner.borrow(before, State::Saving)?;
        if let Err(error) = body.before_standstill() {
            body.end_quiet();
            runner.give_back(body, before, detail);
            return Err(error);
        }
        let freezes = protection.as_ref().map_or(0, |protection| protection.freezes());
        let (urgent, since) = (Urgent::this_thread(), Instant::now());
        let stopped = body.stand_still();
        let stopped = stopped.and_then(|()| match &protection {
            Some(protection) if self.for_store && protection.commits_output() => body.seal_output(),
            _ => Ok(()),
        });
        let mut paused =
            Standing { runner, body: Some(body), before, detail, since, freezes, _urgent: urgent };
        match stopped {
            Ok(()) => Ok(Box::new(paused)),
            Err(error) => {
                paused.go_on()?;
                Err(error)
            }
        }
    }

    fn stored(&self) {
        if let Some(runner) = self.runner.upgrade() {
            runner.release_sealed();
        }
    }
}

/// The machine during a pause. Dropping it lets the machine go on.
struct Standing {
    runner: Arc<Runner>,
    body: Option<Box<Hosted>>,
    /// What it was doing, and does again.
    before: State,
    detail: String,
    since: Instant,
    /// How often the machine had been frozen before.
    freezes: u64,
    // On a busy host each step of a pause would wait for its turn.
    _urgent: Urgent,
}

impl Standing {
    /// Lets the machine go on, if it has not yet; returns how long it stood still.
    fn go_on(&mut self) -> Result<Duration, MachineError> {
        let Some(mut body) = self.body.take() else { return Ok(Duration::ZERO) };
        let mut went = body.go_further();
        if went.is_err()
            && let Some(protection) = self.runner.protection()
            && protection.thawed_since(self.freezes)
        {
            // It was frozen in the middle of this; nobody heard what was asked of it.
            went = body.go_further();
        }
        let stood = self.since.elapsed();
        match went {
            Ok(()) => {
                let detail = std::mem::take(&mut self.detail);
                self.runner.give_back(body, self.before, detail);
                Ok(stood)
            }
            Err(error) => {
                // One whose monitor has ended is found by whoever watches what runs.
                let state = match body.vm().exit() {
                    Some(_) => self.before,
                    None => State::Paused,
                };
                let detail = format!("it could not go on after a pause for a backup: {error}");
                self.runner.give_back(body, state, detail);
                Err(error)
            }
        }
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        if let Err(error) = self.go_on() {
            tracing::error!(%error, "the machine stands still after a backup");
        }
    }
}

impl Paused for Standing {
    fn describe(&mut self) -> Result<Vec<u8>, MachineError> {
        use crate::migrate::source::SourceMachine as _;
        let body = self.body.as_mut().ok_or("the machine runs")?;
        let state = body.save()?;
        let description = self.runner.describe(body)?;
        Ok(description::encode(&description, &state)?)
    }

    fn resume(mut self: Box<Self>) -> Result<Duration, MachineError> {
        self.go_on()
    }
}
