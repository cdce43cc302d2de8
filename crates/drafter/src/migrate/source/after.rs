//! The end of a move, from the token on: a [`Keeper`] sees it through, here is what comes of it. And
//! the same for a runner that finds its machine in that state.

use super::{
    History, MachineError, MoveError, Moved, Outage, Session,
    flight::{Flight, ms},
    give_back,
    handover::Ready,
    keeper::{End, Keeper, Parts},
    line::{Line, Place},
    pages::PageServer,
    send::Pacer,
    take_if_tracked, tell_holding,
};
use crate::{
    lease::{LeaseStore, Record},
    migrate::{
        link,
        messages::{Confirmation, TokenMeta},
        planner::Reason,
        protocol::Frame,
        switchover::{FlipEpoch, Holding, SourceAuthority, SourceState},
        timings::MoveReport,
    },
    runner::api::{Phase, Progress},
};
use silo::{block::BlockSet, device::Device};
use std::{
    sync::{Arc, atomic::AtomicBool},
    time::{Duration, Instant},
};

/// How long it may take to say what the machine's last generation was, when all is at the destination; after
/// that it compares all of the machine with its history.
const HISTORY_LIMIT: Duration = Duration::from_secs(2);

/// How long a FLUSH that was answered early may take to become durable.
const FLUSH_LIMIT: Duration = Duration::from_secs(60);

impl Session<'_> {
    /// Sends the token and serves until the move is over. Also returns what this host holds then.
    pub(super) fn after_token(mut self, ready: Ready) -> (Result<Moved, MoveError>, Holding) {
        let Ready { mut flight, token, reason, precopied, paused_at_ns } = ready;
        let send = Instant::now();
        let state_bytes = flight.state_bytes;
        let meta = serde_json::to_vec(&TokenMeta::of(&token, state_bytes)).unwrap_or_default();
        let state = std::mem::take(&mut flight.state);
        let sent = self.main.write(&Frame::Token { meta, state }).and_then(|()| self.main.flush());
        flight.parts.send_ms += ms(send.elapsed());
        let handed = Instant::now();
        let pages =
            Arc::new(PageServer::new(self.devices.clone(), std::mem::take(&mut flight.missing)));
        let place = self.place();
        // A token that could not be sent counts as sent: it may have arrived.
        let fault = self.fault.take().filter(|_| sent.is_ok());
        let (round, plan) = (self.planner.rounds().len() as u32, self.plan);
        let Self { around, devices, main, control, arrivals, taken, pacer, verdict, .. } = self;
        let line = match fault {
            Some(fault) => Some(Line::open(main, control, arrivals, fault, &pages, &place)),
            None => {
                control.shutdown();
                None
            }
        };
        let super::Surroundings {
            machine,
            mut authority,
            store,
            cancel,
            progress,
            outage,
            holding,
            history,
            ..
        } = around;
        let tell = |left_bytes, sent_bytes| {
            let phase = Phase::PostCopy;
            progress(Progress { job: plan.job, phase, round, sent_bytes, left_bytes });
        };
        let mut flush = || machine.wait_flushed(FLUSH_LIMIT);
        let mut keeper = Keeper::new(Parts {
            place,
            authority: &mut authority,
            store,
            devices: devices.clone(),
            pages: Arc::clone(&pages),
            pacer,
            flush: token.flush_owed.then_some(&mut flush),
            cancel,
            progress: &tell,
            outage,
            history,
            line,
            no_line: sent.err().map_or_else(String::new, |error| error.to_string()),
        });
        let end = keeper.run();
        if let End::Released = &end {
            keeper.tell_history(HISTORY_LIMIT);
        }
        let left = keeper.remaining();
        let Keeper { confirmation, durable, why, sent, .. } = keeper;
        // Whoever releases this host has the machine, also if its confirmation never came.
        let confirmation = confirmation.or_else(|| {
            let epoch = durable.as_ref()?.epoch;
            Some((Instant::now(), Confirmation { epoch, ..Confirmation::default() }))
        });
        progress(Progress {
            job: plan.job,
            phase: Phase::Ended,
            round,
            sent_bytes: sent,
            left_bytes: 0,
        });
        let moved = match end {
            End::Released => confirmation
                .map(|(at, confirmation)| {
                    let mut taken = taken;
                    let late_writes = count_late_writes(plan, &devices, &mut taken);
                    let summary = Summary {
                        plan,
                        verdict: &verdict,
                        mode: self.planner_mode,
                        rounds: self.planner.rounds().to_vec(),
                        round_trip: self.round_trip,
                        started: self.started,
                        prepared: self.prepared,
                        session: self.session,
                        known_bytes: self.known_bytes,
                        sent: sent + pages.fault_bytes(),
                        durable: durable.as_ref(),
                        late_writes,
                    };
                    let report = summary.report(
                        &flight,
                        at,
                        &confirmation,
                        reason,
                        precopied,
                        paused_at_ns,
                        state_bytes,
                        handed,
                    );
                    Moved::Released(Box::new(report))
                })
                .ok_or_else(|| MoveError::HandedOver {
                    epoch: durable.as_ref().map_or(0, |durable| durable.epoch),
                    reason: "it released this host without having confirmed".into(),
                    left: 0,
                }),
            End::GoOn { epoch, flip } => {
                give_back(&devices, &taken);
                tell_holding(&holding, &authority);
                Err(match machine.go_on(epoch.0, flip.0) {
                    Ok(()) => MoveError::Aborted { phase: "switchover", reason: why },
                    Err(cause) => MoveError::Stuck { reason: why, cause: cause.to_string() },
                })
            }
            End::StayPaused(reason) => {
                give_back(&devices, &taken);
                Err(MoveError::Undecided { reason })
            }
            End::GivenUp => {
                let epoch = epoch_of(&authority);
                Err(MoveError::HandedOver { epoch, reason: why, left })
            }
            End::TakenOver(record) => Err(taken_over(&plan.request.host, &record)),
        };
        (moved, authority.holding())
    }

    fn place(&self) -> Place {
        let request = &self.plan.request;
        Place {
            machine: request.shape.name.clone(),
            host: request.host.clone(),
            attempt: request.attempt,
            session: self.session,
            to: self.plan.to,
            peer: self.plan.peer.clone(),
            security: self.plan.security.clone(),
            round_trip: self.round_trip,
            resumes: self.verdict.resumes,
        }
    }
}

fn epoch_of(authority: &SourceAuthority) -> u64 {
    match authority.state() {
        SourceState::ServingPages(epoch) => epoch.0,
        _ => 0,
    }
}

/// Nothing may write to a paused machine: the last scan was the last word. Looked at when all
/// else is done, because looking costs time in proportion to the memory, and a processor that
/// a destination on the same computer needs for its first instructions.
fn count_late_writes(
    plan: &super::Plan,
    devices: &[Arc<dyn Device>],
    taken: &mut [BlockSet],
) -> u64 {
    let mut late = 0;
    for at in 0..devices.len() {
        match take_if_tracked(plan, devices, taken, at) {
            Ok(set) => late += set.len(),
            Err(error) => tracing::debug!(%error, "no last look at the tracking"),
        }
    }
    if late > 0 {
        tracing::error!(late, "blocks were written after the pause: please report this");
    }
    late
}

/// A machine that a runner finds paused by a move of the runner before it.
pub struct Recovered<'a> {
    /// The move.
    pub place: Place,
    /// Who may run it, as found.
    pub authority: SourceAuthority,
    /// Where that is recorded.
    pub store: Arc<dyn LeaseStore>,
    /// Its frozen content.
    pub devices: Vec<Arc<dyn Device>>,
    /// Makes durable what the disks hold.
    pub flush: &'a mut dyn FnMut() -> Result<(), MachineError>,
    /// Set by a person who gives the destination up.
    pub cancel: Arc<AtomicBool>,
    /// As [`super::Surroundings::outage`].
    pub outage: &'a dyn Fn(Option<Outage>),
    /// As [`super::Surroundings::history`].
    pub history: Option<&'a History<'a>>,
}

/// What became of it.
#[derive(Debug)]
pub enum Kept {
    /// Everything is durable at the destination.
    Released {
        /// The destination's epoch.
        epoch: u64,
    },
    /// The machine goes on here, under these.
    GoOn {
        /// What this host holds.
        holding: Holding,
        /// For the network.
        flip: FlipEpoch,
    },
    /// It stays paused, with what a person should know.
    Paused(MoveError),
}

/// Serves a machine's frozen content until somebody owns all of it, or it may go on here.
pub fn keep(found: Recovered<'_>) -> Kept {
    let Recovered { place, mut authority, store, devices, flush, cancel, outage, history } = found;
    let none = devices.iter().map(|device| BlockSet::new(device.blocks())).collect();
    let mut keeper = Keeper::new(Parts {
        place,
        authority: &mut authority,
        store,
        pages: Arc::new(PageServer::new(devices.clone(), none)),
        devices,
        pacer: Pacer::new(None),
        flush: Some(flush),
        cancel,
        progress: &|_, _| {},
        outage,
        history,
        line: None,
        no_line: "the runner has just come back".into(),
    });
    let end = keeper.run();
    let left = keeper.remaining();
    let Keeper { durable, why, .. } = keeper;
    match end {
        End::Released => Kept::Released { epoch: durable.map_or(0, |durable| durable.epoch) },
        End::GoOn { flip, .. } => Kept::GoOn { holding: authority.holding(), flip },
        End::StayPaused(reason) => Kept::Paused(MoveError::Undecided { reason }),
        End::GivenUp => {
            let epoch = epoch_of(&authority);
            Kept::Paused(MoveError::HandedOver { epoch, reason: why, left })
        }
        // As if it had been released by the destination.
        End::TakenOver(record) => {
            tracing::warn!("{}", taken_over("this host", &record));
            Kept::Released { epoch: record.epoch.0 }
        }
    }
}

fn taken_over(here: &str, record: &Record) -> MoveError {
    MoveError::TakenOver {
        here: here.to_owned(),
        owner: record.owner.to_string(),
        epoch: record.epoch.0,
    }
}

/// What a report is made of, besides the switchover.
struct Summary<'a> {
    plan: &'a super::Plan,
    verdict: &'a super::Verdict,
    mode: crate::migrate::messages::Mode,
    rounds: Vec<crate::migrate::planner::Round>,
    round_trip: Duration,
    started: Instant,
    prepared: Duration,
    session: crate::migrate::protocol::SessionId,
    known_bytes: u64,
    sent: u64,
    durable: Option<&'a crate::migrate::messages::DurableReport>,
    late_writes: u64,
}

impl Summary<'_> {
    #[expect(clippy::too_many_arguments, reason = "the pieces of one record")]
    fn report(
        self,
        flight: &Flight,
        confirmed_at: Instant,
        confirmation: &Confirmation,
        reason: Reason,
        precopied: Duration,
        paused_at_ns: u64,
        state_bytes: u64,
        handed: Instant,
    ) -> MoveReport {
        let request = &self.plan.request;
        let same_clock = !request.boot_id.is_empty()
            && request.boot_id == self.verdict.boot_id
            && confirmation.running_at_ns > 0;
        let blackout_ms = if same_clock {
            confirmation.running_at_ns.saturating_sub(paused_at_ns) as f64 / 1e6
        } else {
            // One way there and one way back surround what the destination did meanwhile.
            let total = ms(confirmed_at.duration_since(flight.paused_at));
            let later =
                confirmation.released_us.saturating_sub(confirmation.running_us) as f64 / 1e3;
            total - later - ms(self.round_trip) / 2.0
        };
        let mut parts = flight.parts;
        let us = |to: u64, from: u64| to.saturating_sub(from) as f64 / 1e3;
        parts.arm_ms = us(confirmation.armed_us, 0);
        parts.load_ms = us(confirmation.loaded_us, confirmation.armed_us);
        parts.run_ms = us(confirmation.running_us, confirmation.loaded_us);
        MoveReport {
            machine: request.shape.name.clone(),
            from: request.host.clone(),
            to: self.verdict.host.clone(),
            mode: self.mode,
            returned: self.verdict.holds_stay,
            reason,
            rounds: self.rounds,
            known_bytes: self.known_bytes,
            bytes_sent: self.sent,
            memory_bytes: request.shape.memory_bytes,
            dirty_bytes: flight.dirty_bytes,
            flight_bytes: flight.flight_bytes,
            state_bytes,
            round_trip_ms: ms(self.round_trip),
            total_ms: ms(self.started.elapsed()),
            prepare_ms: ms(self.prepared),
            precopy_ms: ms(precopied),
            blackout_ms,
            blackout_exact: same_clock,
            blackout: parts,
            confirmed_ms: ms(confirmed_at.duration_since(flight.paused_at)),
            postcopy_ms: ms(handed.elapsed()),
            paused_at_ns,
            faults: self.durable.map(|d| d.faults).unwrap_or_default(),
            late_writes: self.late_writes,
            early_faults: confirmation.early_faults,
            epoch: confirmation.epoch,
            session: link::session_hex(self.session),
        }
    }
}
