//! The source of a move: from the request to the release.
//!
//! One thread (the job's) drives everything here; a second reads the main connection into a
//! channel, a third serves faults once the token is out. Who may run the machine is never decided
//! here: every step that concerns it is an event to the authority ([`super::switchover`]) and an
//! action back.
//!
//! [`Session`] is the state that the phases share: `compare` asks what the destination has already,
//! `rounds` sends while the guest runs, `handover` pauses and hands over. After the token a
//! [`keeper::Keeper`] serves what is missing, over a [`line::Line`] and whichever follow it; `pages` is what
//! they serve from.

mod after;
mod compare;
mod error;
mod flight;
mod handover;
mod keeper;
mod line;
mod machine;
mod pages;
mod rounds;
mod send;

pub use after::{Kept, Recovered, keep};
pub use error::MoveError;
pub use keeper::Outage;
pub use line::Place;
pub use machine::{MachineError, SourceMachine};
pub use send::SendError;

use super::{
    link::{self, Arrival, Channel, Outgoing},
    lists::Lists,
    messages::{Mode, PrepareRequest, Verdict},
    planner::{Budgets, Planner},
    protocol::{Frame, SessionId},
    switchover::{Holding, SourceAuthority},
    timings::MoveReport,
};
use crate::{
    lease::LeaseStore,
    runner::api::{Phase, Progress},
    tenure::View,
};
use error::Stop;
use identity::{Control, HostName, Security};
use send::Pacer;
use silo::{block::BlockSet, device::Device};
use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

/// Round trips above this are not worth waiting for before a pause: more would be dirtied
/// meanwhile than the wait saves.
const LONG_ROUND_TRIP: Duration = Duration::from_millis(5);
/// How long the destination may take to check and build.
const PREPARE_LIMIT: Duration = Duration::from_secs(60);
/// How long an answer on a living connection may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// A move, as asked for.
pub struct Plan {
    /// The job's number, for progress.
    pub job: u64,
    /// Where the destination listens.
    pub to: SocketAddr,
    /// The name in its certificate.
    pub peer: HostName,
    /// How the connections are protected.
    pub security: Security,
    /// How to move.
    pub mode: Mode,
    /// Limits.
    pub budgets: Budgets,
    /// What the destination is told.
    pub request: PrepareRequest,
    /// Whether this host can track writes; without, every move is post-copy.
    pub can_track: bool,
    /// How long the machine stood still in its last moves.
    pub last_blackout: Option<Duration>,
}

/// What a move shares with the runner around it.
pub struct Surroundings<'a> {
    /// The machine.
    pub machine: &'a mut dyn SourceMachine,
    /// Who may run it.
    pub authority: SourceAuthority,
    /// Where that is recorded.
    pub store: Arc<dyn LeaseStore>,
    /// Set by the user's cancel.
    pub cancel: Arc<AtomicBool>,
    /// Told how far we are.
    pub progress: &'a dyn Fn(Progress),
    /// Told when the destination is not reached while it may need blocks, and when it is again.
    pub outage: &'a dyn Fn(Option<Outage>),
    /// Told, before the lease says that the machine leaves, which session it is and how long the
    /// destination's offers are good for: what a runner needs that comes after this one.
    pub leaving: &'a dyn Fn(SessionId, Duration),
    /// Gets what this host holds after the move, if the machine stayed; before it goes on here.
    pub holding: Arc<std::sync::Mutex<Option<Holding>>>,
    /// Of a protected machine.
    pub protection: Option<ProtectedSource<'a>>,
    /// Asked once, when the destination owns the machine: ends its generations here.
    pub history: Option<&'a History<'a>>,
}

/// Which generation of the machine was the last (JSON of `BackupMark`), and in which blocks of each device
/// of the group the machine differs from it.
pub type Told = (Vec<u8>, Vec<BlockSet>);

/// Begins to find that out; `None`, there or here, if it is not known.
pub type History<'a> = dyn Fn() -> Option<mpsc::Receiver<Option<Told>>> + 'a;

/// What the move of a protected machine asks its runner.
pub struct ProtectedSource<'a> {
    /// This host's life, and until when it holds.
    pub view: &'a dyn Fn() -> Option<View>,
    /// Whether the machine stands still, because that is over: a reason to give the move up.
    pub is_frozen: &'a dyn Fn() -> bool,
}

/// How a move ended well.
#[derive(Debug)]
pub enum Moved {
    /// Only checked: what would happen.
    DryRun {
        /// The destination's word.
        verdict: Verdict,
        /// Expected blackout.
        blackout: Duration,
        /// Expected total time, if the guest wrote nothing.
        total: Duration,
        /// Bytes that would be sent at least.
        bytes: u64,
    },
    /// The machine is at the destination, and nothing here is needed any more.
    Released(Box<MoveReport>),
}

/// What the phases share.
struct Session<'a> {
    plan: &'a Plan,
    around: Surroundings<'a>,
    devices: Vec<Arc<dyn Device>>,
    verdict: Verdict,
    session: SessionId,
    main: Outgoing,
    control: Control,
    arrivals: mpsc::Receiver<Arrival>,
    fault: Option<Channel>,
    planner: Planner,
    pacer: Pacer,
    round_trip: Duration,
    /// Everything that tracking reported in this session, to be given back if it fails.
    taken: Vec<BlockSet>,
    /// Batches of frames that the destination was asked to put in place.
    batch: u64,
    /// The last of them that it has in place.
    applied: u64,
    /// What it lists, once it was asked what it lacks.
    lists: Option<Lists>,
    /// Bytes of blocks that it had already.
    known_bytes: u64,
    started: Instant,
    prepared: Duration,
    /// The mode in force: post-copy where writes cannot be tracked.
    planner_mode: Mode,
    /// What the authority asked for while something else was going on.
    pending: Vec<handover::Next>,
    last_report: String,
    /// The longest that an offer of this destination was good for.
    offers_hold: Duration,
}

/// Moves a machine, or says why not.
pub fn run<'a>(plan: &'a Plan, around: Surroundings<'a>) -> Result<Moved, MoveError> {
    let started = Instant::now();
    let aborted = |phase, reason: String| MoveError::Aborted { phase, reason };
    let session = link::new_session().map_err(|e| aborted("prepare", e.to_string()))?;
    let report = |phase| {
        (around.progress)(Progress {
            job: plan.job,
            phase,
            round: 0,
            sent_bytes: 0,
            left_bytes: 0,
        });
    };
    report(Phase::Prepare);
    let (main, fault) =
        link::connect_both(plan.to, &plan.peer, &plan.security, session, link::CONNECT_LIMIT)
            .map_err(|e| aborted("connect", e))?;
    let arrivals =
        link::pump(main.incoming, "source-main").map_err(|e| aborted("connect", e.to_string()))?;
    let devices = around.machine.devices();
    let taken = devices.iter().map(|d| BlockSet::new(d.blocks())).collect();
    let mut mode = plan.mode;
    if !plan.can_track && mode != Mode::PostCopy {
        tracing::warn!(
            asked = %mode,
            "writes to memory are not tracked here (Linux 6.7 can): this move is post-copy"
        );
        mode = Mode::PostCopy;
    }
    let mut session = Session {
        devices,
        verdict: Verdict::default(),
        session,
        main: main.outgoing,
        control: main.control,
        arrivals,
        fault: Some(fault),
        planner: Planner::new(mode, plan.budgets, Duration::ZERO),
        pacer: Pacer::new(plan.budgets.bandwidth),
        round_trip: Duration::ZERO,
        taken,
        batch: 0,
        applied: 0,
        lists: None,
        known_bytes: 0,
        started,
        prepared: Duration::ZERO,
        planner_mode: mode,
        pending: Vec::new(),
        last_report: String::new(),
        offers_hold: Duration::ZERO,
        plan,
        around,
    };
    let kept = Arc::clone(&session.around.holding);
    let (moved, holding) = match session.go(mode) {
        Ok(Went::Token(ready)) => session.after_token(*ready),
        Ok(Went::Over(moved)) => (Ok(moved), session.around.authority.holding()),
        Err(error) => (Err(error), session.around.authority.holding()),
    };
    *kept.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(holding);
    moved
}

/// How far a move has come before its token.
enum Went {
    /// There was none to send.
    Over(Moved),
    /// It is ready to be sent: from here on the authority counts it as sent.
    Token(Box<handover::Ready>),
}

impl Session<'_> {
    fn go(&mut self, mode: Mode) -> Result<Went, MoveError> {
        if let Err(stop) = self.prepare(mode) {
            return Err(self.give_up("prepare", &stop));
        }
        if !self.verdict.refusals.is_empty() {
            let host = self.verdict.host.clone();
            let reasons = std::mem::take(&mut self.verdict.refusals);
            self.control.shutdown();
            return Err(MoveError::Refused { host, reasons });
        }
        let first = match self.first_set() {
            Ok(first) => first,
            Err(stop) => return Err(self.give_up("prepare", &stop)),
        };
        if self.plan.request.dry_run {
            return Ok(Went::Over(self.forecast(&first)));
        }
        let first = self.lacking(first);
        let (left, reason) = match first.and_then(|first| self.precopy(first)) {
            Ok(done) => done,
            Err(stop) => return Err(self.give_up("pre-copy", &stop)),
        };
        let ready = self.hand_over(left, reason);
        if ready.is_err() {
            self.give_back();
        }
        ready.map(|ready| Went::Token(Box::new(ready)))
    }

    /// Sends the request, waits for the verdict, measures the round trip.
    fn prepare(&mut self, mode: Mode) -> Result<(), Stop> {
        let request = serde_json::to_vec(&self.plan.request).map_err(std::io::Error::from)?;
        self.main.write(&Frame::Prepare(request))?;
        self.main.flush()?;
        let json = self.wait(PREPARE_LIMIT, "the verdict", |frame| match frame {
            Frame::Verdict(json) => Some(json),
            _ => None,
        })?;
        self.verdict = serde_json::from_slice(&json)
            .map_err(|e| Stop::Peer(format!("its verdict cannot be read: {e}")))?;
        self.prepared = self.started.elapsed();
        if !self.verdict.refusals.is_empty() {
            return Ok(());
        }
        let mut best = Duration::MAX;
        for nonce in 0..3 {
            let sent = Instant::now();
            self.main.write(&Frame::Ping(nonce))?;
            self.main.flush()?;
            self.wait(ANSWER_LIMIT, "a pong", |frame| {
                matches!(frame, Frame::Pong(n) if n == nonce).then_some(())
            })?;
            best = best.min(sent.elapsed());
            if best > LONG_ROUND_TRIP {
                break; // what a busy computer adds does not count here
            }
        }
        self.round_trip = best;
        self.planner = Planner::new(mode, self.plan.budgets, best);
        Ok(())
    }

    /// What an untouched (or returning) destination lacks, per device. Tracking is on from here.
    fn first_set(&mut self) -> Result<Vec<BlockSet>, Stop> {
        let known = self.plan.request.since.is_some();
        let mut first = Vec::with_capacity(self.devices.len());
        for at in 0..self.devices.len() {
            let device = Arc::clone(&self.devices[at]);
            first.push(with_missing(&*device, || {
                if !is_tracked(self.plan, &device) {
                    return Ok(device.allocated()?);
                }
                if known {
                    let changed = self.take(at)?;
                    return Ok(if self.verdict.holds_stay {
                        changed
                    } else {
                        device.allocated()?
                    });
                }
                device.start_tracking()?;
                Ok(device.allocated()?)
            })?);
        }
        Ok(first)
    }

    /// Dirty blocks of a device, remembered for an abort.
    fn take(&mut self, at: usize) -> Result<BlockSet, Stop> {
        Ok(take(&self.devices, &mut self.taken, at)?)
    }

    fn forecast(&mut self, first: &[BlockSet]) -> Moved {
        let bytes: u64 = first.iter().map(BlockSet::bytes).sum();
        self.give_back();
        let _ = self.main.write(&Frame::Abort("dry run".into()));
        let _ = self.main.flush();
        let rate = self.plan.budgets.bandwidth.map_or(500.0e6, |limit| limit as f64);
        Moved::DryRun {
            blackout: self.planner.predicted_blackout(self.planner.flight_bytes()),
            total: self.prepared + Duration::from_secs_f64(bytes as f64 / rate),
            bytes,
            verdict: std::mem::take(&mut self.verdict),
        }
    }

    /// Nothing that tracking reported is lost by an abort (design, I2).
    fn give_back(&mut self) {
        give_back(&self.devices, &self.taken);
    }

    /// Ends a session whose machine never paused.
    fn give_up(&mut self, phase: &'static str, stop: &Stop) -> MoveError {
        self.give_back();
        let reason = stop.to_string();
        let _ = self.main.write(&Frame::Abort(reason.clone()));
        let _ = self.main.flush();
        self.control.shutdown();
        match stop {
            Stop::Cancelled | Stop::Send(SendError::Cancelled) => MoveError::Cancelled { phase },
            _ => MoveError::Aborted { phase, reason },
        }
    }

    fn cancelled(&self) -> bool {
        let is_frozen = |protected: &ProtectedSource<'_>| (protected.is_frozen)();
        self.around.cancel.load(Ordering::Relaxed)
            || self.around.protection.as_ref().is_some_and(is_frozen)
    }

    /// What this host holds now, for whoever lets the machine go on here.
    fn tell_holding(&self) {
        tell_holding(&self.around.holding, &self.around.authority);
    }

    fn progress(&self, phase: Phase, left_bytes: u64) {
        (self.around.progress)(Progress {
            job: self.plan.job,
            phase,
            round: self.planner.rounds().len() as u32,
            sent_bytes: self.main.sent(),
            left_bytes,
        });
    }

    /// Takes a frame that any phase before the token may get.
    fn note(&mut self, at: Instant, frame: Frame) -> Result<Option<Frame>, Stop> {
        match frame {
            Frame::Offer { attempt, serial, good_for_ms } => {
                self.offer(at, attempt, serial, good_for_ms);
            }
            Frame::RoundApplied(round) => self.applied = self.applied.max(round),
            Frame::Missing { device, ranges } => {
                if let Some(lists) = &mut self.lists {
                    lists.take(device, &ranges).map_err(Stop::Peer)?;
                }
            }
            Frame::Abort(reason) => {
                return Err(Stop::Peer(format!("the destination gave up: {reason}")));
            }
            Frame::Unknown(_) => {}
            other => return Ok(Some(other)),
        }
        Ok(None)
    }

    /// Takes whatever has arrived, without waiting.
    fn drain(&mut self) -> Result<(), Stop> {
        loop {
            match self.arrivals.try_recv() {
                Ok((at, frame)) => {
                    self.note(at, frame?)?;
                }
                Err(mpsc::TryRecvError::Empty) => return Ok(()),
                Err(mpsc::TryRecvError::Disconnected) => return Err(closed()),
            }
        }
    }

    /// Waits for a frame that `pick` wants.
    fn wait<T>(
        &mut self,
        limit: Duration,
        what: &str,
        mut pick: impl FnMut(Frame) -> Option<T>,
    ) -> Result<T, Stop> {
        let deadline = Instant::now() + limit;
        loop {
            if self.cancelled() {
                return Err(Stop::Cancelled);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Stop::Peer(format!("{what} did not come within {limit:?}")));
            }
            match self.arrivals.recv_timeout(left.min(Duration::from_millis(100))) {
                Ok((at, frame)) => {
                    if let Some(other) = self.note(at, frame?)?
                        && let Some(found) = pick(other)
                    {
                        return Ok(found);
                    }
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => return Err(closed()),
            }
        }
    }
}

fn tell_holding(to: &std::sync::Mutex<Option<Holding>>, authority: &SourceAuthority) {
    let mut to = to.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    *to = Some(authority.holding());
}

/// Gives back what was taken from tracking.
fn give_back(devices: &[Arc<dyn Device>], taken: &[BlockSet]) {
    for (device, taken) in devices.iter().zip(taken) {
        device.put_back(taken);
    }
}

/// Dirty blocks of device number `at`, remembered in `taken` for an abort.
fn take(
    devices: &[Arc<dyn Device>],
    taken: &mut [BlockSet],
    at: usize,
) -> Result<BlockSet, silo::device::DeviceError> {
    let dirty = devices[at].take_dirty()?;
    taken[at].union_with(&dirty);
    Ok(dirty)
}

/// What `look` finds, and what has not arrived here: that cannot be read yet, and `look` does not see
/// it. It is asked for first: a block that arrives between the two is in both, never in neither.
fn with_missing(
    device: &dyn Device,
    look: impl FnOnce() -> Result<BlockSet, Stop>,
) -> Result<BlockSet, Stop> {
    let missing = device.missing();
    let mut found = look()?;
    found.union_with(&missing);
    Ok(found)
}

/// Whether writes to a device can be tracked on this host: to memory by the kernel, if at all.
fn is_tracked(plan: &Plan, device: &Arc<dyn Device>) -> bool {
    plan.can_track || device.name().as_str() != "memory"
}

/// As [`take`]; nothing where writes to memory cannot be tracked.
fn take_if_tracked(
    plan: &Plan,
    devices: &[Arc<dyn Device>],
    taken: &mut [BlockSet],
    at: usize,
) -> Result<BlockSet, silo::device::DeviceError> {
    if !is_tracked(plan, &devices[at]) {
        return Ok(BlockSet::new(devices[at].blocks()));
    }
    take(devices, taken, at)
}

fn closed() -> Stop {
    Stop::Peer("the connection to the destination closed".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use silo::{
        block::BlockIndex,
        device::DeviceName,
        disk::{Disk, DiskOptions},
    };

    #[test]
    fn a_block_that_arrives_while_its_device_is_looked_at_is_sent_on() {
        let folder = tempfile::tempdir().unwrap();
        let options = DiskOptions::new(DeviceName::new("disk").unwrap());
        let disk = Disk::create(folder.path(), None, 1 << 20, &options).unwrap();
        disk.begin().unwrap();
        let mut missing = BlockSet::new(disk.blocks());
        missing.insert(BlockIndex(5));
        disk.arm(&missing, Box::new(|_| {})).unwrap();
        let found = with_missing(&disk, || {
            // As memory tells it: what is there, without what is not.
            let mut seen = disk.allocated()?;
            seen.subtract(&disk.missing());
            assert!(!seen.contains(BlockIndex(5)), "nothing is proved");
            disk.fill(BlockIndex(5), &[7; 4096])?;
            assert!(disk.missing().is_empty());
            Ok(seen)
        });
        assert!(found.unwrap().contains(BlockIndex(5)));
    }
}
