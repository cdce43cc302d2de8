//! Suspend to a store: the machine becomes a generation, and ends here.
//!
//! ```text
//!   runs      open the history ─ read and store all that there is
//!   paused    the driver's state ─ what was written meanwhile ─ commit ──▶ ended here, nothing is left
//!                                                                 │
//!                                              failed ──▶ goes on │ not sure: takes its lease anew, goes on
//! ```
//!
//! What must hold (I1): the generation says under which record of the lease the machine stood still, and
//! whoever resumes it needs that very record. So it may run on here
//! - if the store was never asked to commit, or
//! - after this host has replaced that record by a compare-and-set. Of this one and a resumer's, one wins.
//!
//! A runner that dies in the middle leaves a monitor that runs, or stands still: the next runner takes the
//! lease before it lets it go on, by the same rule.

use super::{
    Runner, State,
    api::{BackupRequest, SuspendReport},
    backup::Target,
    hosted::Hosted,
    saved::fresh,
    take_over,
};
use crate::{
    checkpoint::{
        MEMORY, description,
        fill::FirstTouches,
        moment::{Form, Moment, Sleeper},
    },
    driver::Urgent,
    lease::{Epoch, HostName, Outcome},
    migrate::{
        source::{MachineError, SourceMachine as _},
        switchover::{FlipEpoch, Holding},
    },
};
use silo::{
    block::{BlockRange, BlockSet},
    device::Device,
    order::touch::Manifest,
    store::{PackOptions, StoreError, WriterOptions, capture::Frozen},
};
use std::{
    fs,
    sync::{Arc, atomic::AtomicBool},
    time::{Duration, Instant},
};

/// How long the rest of a machine that came lazily is waited for.
const FILL_LIMIT: Duration = Duration::from_secs(60);
/// How long the command waits for a lease store; the machine waits on.
const LEASE_LIMIT: Duration = Duration::from_secs(10);
/// Pause before a lease store that did not answer is asked again.
const LEASE_AGAIN: Duration = Duration::from_millis(200);
/// How hard zstd tries: the machine stands still for a part of it.
const LEVEL: i32 = -1;
/// Most threads that compress.
const SEALERS: usize = 4;
/// Most pages that are stored together because they will be touched first, and brought before all others.
const MOST_EARLY: u64 = 6144;

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// The machine during its last pause here.
struct Standing {
    body: Box<Hosted>,
    detail: String,
    since: Instant,
    // What is left to do is done first.
    _urgent: Urgent,
}

/// What became of a record that a generation names.
enum Retaken {
    /// It is replaced: nobody resumes that generation any more.
    Ours(Epoch),
    /// Somebody has resumed it.
    Gone(HostName, Epoch),
}

impl Runner {
    /// Stores the machine and ends it here.
    pub(super) fn suspend_to_store(
        self: &Arc<Self>,
        request: &BackupRequest,
    ) -> Result<SuspendReport, String> {
        let began = Instant::now();
        if self.protection().is_some() {
            return Err(
                "the machine is protected; end that first (`drafter protect NAME --end`)".into()
            );
        }
        self.await_whole()?;
        self.check_owner().map_err(text)?;
        let backups = self.lock().backups.clone();
        if backups.is_some()
            && let Ok(ended) = self.end_backup()
        {
            tracing::info!("{ended}: the machine is suspended");
        }
        // No other backup begins or goes on meanwhile.
        let mut turn = backups.as_ref().map(|backups| backups.take_turn()).transpose()?;
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let packs =
            PackOptions { sealers: threads.min(SEALERS), level: LEVEL, ..PackOptions::default() };
        let options = WriterOptions { packs, ..WriterOptions::default() };
        let runs_on = |error: String| format!("{error}; the machine runs on");
        let mut writer =
            Target::of(request).and_then(|to| to.open(request, options)).map_err(runs_on)?;
        let (subject, disks) = {
            let inner = self.lock();
            let subject = inner.subject.clone().ok_or("the machine has just left")?;
            (subject, inner.devices.iter().skip(1).cloned().collect())
        };
        let form = Form::of(&writer.device_names());
        let sleeper = Sleeper::new(subject.memory(), disks, subject.copies(), form);
        let infos = sleeper.devices().map_err(text)?;
        let early = self.touched_first(subject.memory().blocks());
        let first = sleeper.first(early).map_err(|error| runs_on(text(error)))?;
        let stop = AtomicBool::new(false);
        let mut standing = None;
        let mut failed = None;
        let label = if request.label.is_empty() { "suspended" } else { &request.label };
        let stored = writer.store_with_rest(
            &infos,
            &first,
            true,
            &mut || match self.stand_still(&mut standing, &sleeper, &first) {
                Ok(rest) => Ok(Box::new(rest) as Box<dyn Frozen>),
                Err(why) => {
                    failed = Some(why.to_string());
                    Err(StoreError::Stopped)
                }
            },
            label,
            &stop,
        );
        let why = match stored {
            Ok(stored) => {
                let mut report = SuspendReport {
                    machine: self.config.machine.clone(),
                    store: request.store.clone(),
                    line: request.line.clone(),
                    total_ms: ms(began.elapsed()),
                    ..SuspendReport::default()
                };
                report.tell(&stored);
                if let Some(standing) = standing {
                    report.paused_ms = ms(standing.since.elapsed());
                    self.leave_for_good(standing, &report);
                }
                return Ok(report);
            }
            Err(error) => failed.unwrap_or_else(|| text(error)),
        };
        let Some(standing) = standing else { return Err(runs_on(why)) };
        // What a backup knows of its writes is no longer so.
        if let Some(turn) = &mut turn {
            turn.forget();
        }
        Err(self.stay_after_all(standing, &why, writer.may_have_committed()))
    }

    /// The blocks of memory that its last start from a store touched first.
    pub(super) fn touched_first(&self, blocks: u64) -> Vec<BlockRange> {
        let inner = self.lock();
        let known = inner.first_touches.get(MEMORY).filter(|known| known.blocks == blocks);
        known.map_or_else(Vec::new, |known| beginning(&known.order))
    }

    /// Waits until all of the machine is here.
    fn await_whole(&self) -> Result<(), String> {
        let deadline = Instant::now() + FILL_LIMIT;
        loop {
            let left: u64 = {
                let inner = self.settled();
                if inner.state != State::Running {
                    return Err(format!(
                        "the machine is {} here; only one that runs can be suspended",
                        inner.state.word()
                    ));
                }
                inner.devices.iter().map(|device| device.missing_blocks()).sum()
            };
            if left == 0 {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(format!("{left} blocks have not arrived here yet; try again later"));
            }
            std::thread::park_timeout(Duration::from_millis(20));
        }
    }

    /// The last pause here: gives what was written since `first`. Once the machine may stand still it is
    /// in `standing`.
    fn stand_still(
        self: &Arc<Self>,
        standing: &mut Option<Standing>,
        sleeper: &Sleeper,
        first: &Moment,
    ) -> Result<Moment, MachineError> {
        let detail = self.lock().detail.clone();
        let body = self.borrow(State::Running, State::Saving)?;
        take_over::note_suspending(&self.dir, true);
        let (since, urgent) = (Instant::now(), Urgent::this_thread());
        let standing = standing.insert(Standing { body, detail, since, _urgent: urgent });
        let body = &mut standing.body;
        body.call_before_suspend()?;
        body.before_standstill()?;
        standing.since = Instant::now();
        body.stand_still()?;
        let state = body.save()?;
        let mut description = self.describe(body)?;
        description.suspended = true;
        description.overlays = sleeper.overlays()?;
        if description.first_touch.is_empty() {
            let blocks = body.content.memory.blocks();
            description.set_first_touches(&guessed(&sleeper.written()?, blocks));
        }
        sleeper.rest(first, description::encode(&description, &state)?)
    }

    /// The generation is durable: nothing of the machine stays here.
    fn leave_for_good(&self, mut standing: Standing, report: &SuspendReport) {
        standing.body.tear_down();
        drop(standing);
        take_over::forget(&self.dir);
        self.leave_stores();
        if let Err(error) = fs::remove_dir_all(self.dir.disks()) {
            tracing::warn!(%error, "this host keeps disks of a machine that is in the store");
        }
        // Whoever resumes it has its address.
        self.lock().net = None;
        let SuspendReport { number, line, store, .. } = report;
        self.set_state(
            State::Stopped,
            format!("suspended as generation {number} of {line} in {store}"),
        );
    }

    /// It was not stored, or that is not known: it goes on here, if it may. Says what became of it.
    fn stay_after_all(self: &Arc<Self>, standing: Standing, why: &str, unsure: bool) -> String {
        take_over::note_suspending(&self.dir, false);
        let Standing { body, detail, .. } = standing;
        if !unsure {
            return self.go_on_here(body, detail, why);
        }
        match self.retake(LEASE_LIMIT) {
            Ok(retaken) => self.after_retaking(body, detail, why, &retaken),
            Err(error) => {
                let waits = format!(
                    "{why}; it is not known whether the generation was stored, and the lease store does \
                     not say who may run the machine ({error}): it stands still here, and goes on when \
                     that store answers"
                );
                self.give_back(body, State::Paused, waits.clone());
                let (runner, why) = (Arc::clone(self), why.to_owned());
                let asking = std::thread::Builder::new().name("retake".into());
                let asking = asking.spawn(move || runner.retake_patiently(&detail, &why));
                if let Err(error) = asking {
                    tracing::error!(%error, "no thread to ask; stop it and resume it, or recover it");
                }
                waits
            }
        }
    }

    fn retake_patiently(self: &Arc<Self>, detail: &str, why: &str) {
        loop {
            match self.retake(LEASE_LIMIT) {
                Err(error) if self.lock().state == State::Paused => {
                    tracing::warn!(error, "the machine stands still until the lease store answers");
                }
                Err(_) => return,
                Ok(retaken) => {
                    // Somebody has ended it meanwhile, or has it.
                    let Ok(body) = self.borrow(State::Paused, State::Saving) else { return };
                    let became = self.after_retaking(body, detail.to_owned(), why, &retaken);
                    tracing::warn!("{became}");
                    return;
                }
            }
        }
    }

    fn after_retaking(
        &self,
        mut body: Box<Hosted>,
        detail: String,
        why: &str,
        retaken: &Retaken,
    ) -> String {
        match retaken {
            Retaken::Ours(epoch) => {
                let flip = FlipEpoch::of(*epoch, 0).0;
                body.lead_here(flip);
                self.go_on_here(body, detail, why)
            }
            Retaken::Gone(owner, epoch) => {
                body.tear_down();
                take_over::forget(&self.dir);
                self.leave_stores();
                self.lock().net = None;
                let gone = format!(
                    "{why}; but the generation was stored, and host \"{owner}\" has resumed it ({epoch})"
                );
                self.set_state(State::Stopped, gone.clone());
                gone
            }
        }
    }

    fn go_on_here(&self, mut body: Box<Hosted>, detail: String, why: &str) -> String {
        match body.go_further() {
            Ok(()) => {
                self.give_back(body, State::Running, detail);
                format!("{why}; the machine runs on")
            }
            Err(cause) => {
                let detail = format!("{why}; it could not go on: {cause}");
                self.give_back(body, State::Paused, detail.clone());
                detail
            }
        }
    }

    /// Replaces the lease's record, at the next epoch, so that no generation that names it can be
    /// resumed.
    fn retake(&self, limit: Duration) -> Result<Retaken, String> {
        let deadline = Instant::now() + limit;
        let ours = self.lock().holding.as_ref().map(|holding| holding.record.clone());
        let ours = ours.ok_or("this host holds no lease of the machine")?;
        let (attempt, nonce) = fresh()?;
        loop {
            let tried = self.store.read(&self.name).and_then(|found| {
                if let Some(found) = &found
                    && found.owner != self.host
                {
                    return Ok(Some(Retaken::Gone(found.owner.clone(), found.epoch)));
                }
                let before = found.as_ref().filter(|found| found.epoch >= ours.epoch);
                if before.is_some_and(|before| before.nonce == nonce) {
                    // Written by a try whose answer was lost.
                    let epoch = before.map_or(ours.epoch, |before| before.epoch);
                    self.lock().holding = before.cloned().map(Holding::new);
                    return Ok(Some(Retaken::Ours(epoch)));
                }
                let new = before.unwrap_or(&ours).taken(self.host.clone(), attempt, nonce);
                let won = self.store.compare_and_set(&self.name, found.as_ref(), &new)?;
                Ok((won == Outcome::Won).then(|| {
                    let epoch = new.epoch;
                    self.lock().holding = Some(Holding::new(new));
                    Retaken::Ours(epoch)
                }))
            });
            let trouble = match tried {
                Ok(Some(retaken)) => return Ok(retaken),
                Ok(None) => "its record changes all the time".to_owned(),
                Err(error) => error.to_string(),
            };
            if Instant::now() > deadline {
                return Err(trouble);
            }
            std::thread::park_timeout(LEASE_AGAIN);
        }
    }
}

/// What was written last is what will be touched first, as far as anybody knows.
fn guessed(written: &BlockSet, blocks: u64) -> FirstTouches {
    let written: Vec<_> = written.ranges().collect();
    let order = beginning(&written);
    if order.is_empty() {
        return FirstTouches::new();
    }
    FirstTouches::from([(MEMORY.to_owned(), Manifest { blocks, order })])
}

/// As much of an order as is brought before a machine runs.
pub(super) fn beginning(order: &[BlockRange]) -> Vec<BlockRange> {
    let (mut first, mut left) = (Vec::new(), MOST_EARLY);
    for range in order {
        if left == 0 {
            break;
        }
        let count = range.count.min(left);
        first.push(BlockRange::new(range.start.0, count));
        left -= count;
    }
    first
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_beginning_of_an_order_is_bounded_and_nothing_is_guessed_of_nothing() {
        let range = |start, count| BlockRange::new(start, count);
        let order = [range(9, MOST_EARLY - 1), range(0, 5), range(7, 1)];
        assert_eq!(beginning(&order), [range(9, MOST_EARLY - 1), range(0, 1)]);
        assert_eq!(beginning(&order[1..]), order[1..]);
        let mut written = BlockSet::new(10);
        assert!(guessed(&written, 10).is_empty());
        written.insert_range(range(3, 2));
        assert_eq!(guessed(&written, 10)[MEMORY].order, [range(3, 2)]);
    }
}
