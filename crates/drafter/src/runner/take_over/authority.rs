//! With what right a runner goes on with a machine that it has found.
//!
//! What must hold: nothing that a guard froze is thawed before the lease is this host's; the guard that an
//! earlier runner left ends only then, or with the monitor.

use super::{MoveNote, Noted, handed_by, owned_by, text};
use crate::{
    driver::qemu,
    lease::{AttemptId, Nonce, Outcome, Record, StoreError},
    migrate::switchover::Holding,
    runner::{Runner, State, guard::Left},
};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// How long the lease store may be silent before the runner gives up, to be started again.
const STORE_LIMIT: Duration = Duration::from_secs(600);
/// Pauses before it is asked again.
const ASK_STORE_AGAIN: (Duration, Duration) =
    (Duration::from_millis(10), Duration::from_millis(200));

/// With what right a machine that was found goes on.
pub(super) struct Right {
    /// Its lease.
    pub(super) lease: Option<Record>,
    /// What this host holds, if that is settled already: not of one that may have left.
    pub(super) holding: Option<Holding>,
}

impl Runner {
    /// Settles whether the machine may go on here, as far as the lease and the guard tell; if it may,
    /// nothing holds it still any more. `None`: it was ended here.
    pub(super) fn find_right(self: &Arc<Self>, noted: &Noted) -> Result<Option<Right>, String> {
        let mut lease = self.ask_store("reading its lease", || self.store.read(&self.name))?;
        let left = Left::find(&self.dir.run());
        if let Some(by) = noted.arriving.as_ref().or(noted.settled.as_ref())
            && let Some(handed) = &lease
            && handed_by(Some(handed), &self.host, by.attempt)
        {
            lease = self.go_on_asking(by, handed, left.as_ref())?;
            if lease.is_none() {
                self.drop_arrival(by)?;
                return Ok(None);
            }
        }
        if let Some(by) = &noted.arriving
            && !owned_by(lease.as_ref(), &self.host, by.attempt)
        {
            self.drop_arrival(by)?;
            return Ok(None);
        }
        let Some(record) = &lease else { return Ok(Some(Right { lease, holding: None })) };
        let ours = record.owner == self.host;
        // All of it had come, and its source has it again: it never was this host's.
        if let (Some(by), None, false) = (&noted.settled, &noted.leaving, ours)
            && record.owner.as_str() == by.peer
        {
            self.drop_arrival(by)?;
            return Ok(None);
        }
        // A move's destination that has it needs what is here; a stand-in does not.
        let left_by_move = noted.leaving.as_ref().is_some_and(|by| by.attempt == record.attempt.0);
        let bound = record.beat.is_some() || left.as_ref().is_some_and(Left::is_bound);
        if !ours && !left_by_move && bound {
            self.end_lost(record)?;
            return Ok(None);
        }
        if !ours || record.handing_to.is_some() {
            return Ok(Some(Right { lease, holding: None }));
        }
        if record.beat.is_some() {
            let regained = self.regain(record)?;
            return Ok(regained.map(|holding| Right { lease, holding: Some(holding) }));
        }
        // One that lacks blocks is known by its record: its source asks for that attempt.
        let holding = match &noted.arriving {
            Some(_) => Holding::new(record.clone()),
            None => self.acquire()?,
        };
        if let Some(left) = left {
            left.end().map_err(text)?;
        }
        if let Some(fence) = self.driver.fence(&self.dir.run()).map_err(text)? {
            fence.thaw().map_err(text)?;
        }
        Ok(Some(Right { lease, holding: Some(holding) }))
    }

    /// The lease is being handed to this host by the move by which the machine came. If the last runner
    /// had begun to take it, this attempt was never refused, and a write of its may still be on its way:
    /// it is taken. Else nobody has, and the source may run the machine. The record of this host, if it
    /// is the owner now.
    fn go_on_asking(
        &self,
        by: &MoveNote,
        handed: &Record,
        left: Option<&Left>,
    ) -> Result<Option<Record>, String> {
        let lives = qemu::monitor_without_runner(&self.dir.run()).is_some();
        if !lives || !left.is_some_and(Left::has_asked) {
            return Ok(None);
        }
        let nonce = Nonce::random().map_err(text)?;
        let new = handed.taken(self.host.clone(), AttemptId(by.attempt), nonce);
        let write = || self.store.compare_and_set(&self.name, Some(handed), &new);
        match self.ask_store("taking its lease", write)? {
            Outcome::Won => Ok(Some(new)),
            // By the last runner, or by a try whose answer got lost.
            Outcome::Lost(found) if owned_by(found.as_ref(), &self.host, by.attempt) => Ok(found),
            Outcome::Lost(_) => Ok(None),
        }
    }

    /// Asks the store until it answers.
    fn ask_store<T>(
        &self,
        what: &str,
        ask: impl Fn() -> Result<T, StoreError>,
    ) -> Result<T, String> {
        let deadline = Instant::now() + STORE_LIMIT;
        let mut pause = ASK_STORE_AGAIN.0;
        let mut told = false;
        loop {
            let error = match ask() {
                Ok(answer) => return Ok(answer),
                Err(error) if Instant::now() > deadline => return Err(text(error)),
                Err(error) => error,
            };
            if !std::mem::replace(&mut told, true) {
                tracing::warn!(%error, "{what}: the lease store is asked again until it answers");
                self.set_state(State::Booting, format!("{what}: {error}"));
            }
            std::thread::park_timeout(pause);
            pause = (pause * 2).min(ASK_STORE_AGAIN.1);
        }
    }

    /// Another host has taken the machine, whose time here is over: it never runs here again.
    fn end_lost(&self, lease: &Record) -> Result<(), String> {
        qemu::stop_without_runner(&self.dir.run()).map_err(text)?;
        super::forget(&self.dir);
        let detail = format!(
            "host \"{}\" owns the machine now ({}): it was ended here for good, and what it did since its \
             last generation is lost",
            lease.owner, lease.epoch
        );
        tracing::error!(machine = %self.name.as_str(), "{detail}");
        let waits = self.config.listen.is_some();
        self.set_state(if waits { State::Standby } else { State::Stopped }, detail);
        Ok(())
    }
}
