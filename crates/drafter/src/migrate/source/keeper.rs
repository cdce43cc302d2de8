//! The source after the token: its machine stands still, its content is frozen and served, for as long
//! as the destination may need it and however often the connection breaks.
//!
//! ```text
//!   Serving ──connection lost, or silent──▶ Dialing ──Resumed, lists──▶ Serving
//!      │                                       │
//!      └── durable, refused, taken back ───────┴── the same, by answer or by the lease
//! ```
//!
//! Every event is also the authority's, which alone decides whether the machine may run here again.
//! There is no deadline while the destination may lack a block: a person ends it (a cancel during an
//! outage), or the machine's monitor does.
//!
//! Called by a move after its token, and by a runner that finds its machine in this state.

use super::{
    History, MachineError, Told,
    line::{Dialed, Line, Place, Reopened, dial},
    pages::PageServer,
    send::{Pacer, send_run},
};
use crate::{
    lease::{
        AttemptId, BootClock, BootTime, Clock, Epoch, LeaseStore, MachineName, OfferSerial, Record,
    },
    migrate::{
        link,
        messages::{Confirmation, DurableReport, ResumeAnswer, Standing},
        protocol::{DeviceNumber, Frame},
        switchover::{
            FlipEpoch, LeaseAnswer, Offer, SourceAction, SourceAuthority, SourceEvent, SourceState,
        },
    },
};
use silo::{block::BlockSet, device::Device};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

/// How long a destination that cannot be connected to again may take to make everything durable once
/// it has all blocks.
const DURABLE_LIMIT: Duration = Duration::from_secs(120);
/// Pause between two tries to connect again.
const REDIAL: Duration = Duration::from_millis(100);
/// The same, of a destination that answers and knows nothing of the move.
const REDIAL_UNKNOWN: Duration = Duration::from_millis(500);
/// Time between two looks at what else may have happened.
const LOOK: Duration = Duration::from_millis(20);
/// Time between two words about how far it is.
const TELL: Duration = Duration::from_millis(50);

/// A destination that is not reached while it may need blocks.
#[derive(Clone, Debug)]
pub struct Outage {
    /// The destination.
    pub peer: String,
    /// Since when.
    pub since: Instant,
    /// Why, as of the last try.
    pub reason: String,
    /// Blocks that have not been sent.
    pub left: u64,
}

/// How it ended.
#[derive(Debug)]
pub(super) enum End {
    /// Everything is durable at the destination.
    Released,
    /// The machine goes on here.
    GoOn { epoch: Epoch, flip: FlipEpoch },
    /// Nobody may run it here.
    StayPaused(String),
    /// The destination owns it and is not served any more.
    GivenUp,
    /// The destination is lost: another host has taken the machine from it.
    TakenOver(Record),
}

/// What it is made of.
pub(super) struct Parts<'a> {
    pub(super) place: Place,
    pub(super) authority: &'a mut SourceAuthority,
    pub(super) store: Arc<dyn LeaseStore>,
    pub(super) devices: Vec<Arc<dyn Device>>,
    pub(super) pages: Arc<PageServer>,
    pub(super) pacer: Pacer,
    /// Makes durable what flushes were answered for, if any were.
    pub(super) flush: Option<&'a mut dyn FnMut() -> Result<(), MachineError>>,
    pub(super) cancel: Arc<AtomicBool>,
    /// Told how many bytes are left, and how many were sent.
    pub(super) progress: &'a dyn Fn(u64, u64),
    pub(super) outage: &'a dyn Fn(Option<Outage>),
    /// What the machine's history lacks of it.
    pub(super) history: Option<&'a History<'a>>,
    pub(super) line: Option<Line>,
    /// Why there is no line.
    pub(super) no_line: String,
}

/// See the module.
pub(super) struct Keeper<'a> {
    parts: Parts<'a>,
    life: u64,
    serial: u32,
    dialing: Option<mpsc::Receiver<Result<Dialed, String>>>,
    dial_at: Instant,
    lost: Option<Outage>,
    told_lost: bool,
    cursor: (usize, u64),
    buffer: Vec<u8>,
    bulk_ended: bool,
    flush_told: bool,
    told: Instant,
    end: Option<End>,
    /// What the destination confirmed, and when.
    pub(super) confirmation: Option<(Instant, Confirmation)>,
    /// What it released.
    pub(super) durable: Option<DurableReport>,
    /// Why it refused, or what was said last.
    pub(super) why: String,
    /// Bytes on main connections.
    pub(super) sent: u64,
    /// When everything was sent, where that is waited for.
    all_sent: Option<Instant>,
    history: Asked,
}

/// What the destination is told of the machine's history: with a store that has it, it can do without this
/// host but for what the history lacks.
enum Asked {
    /// The destination may give the machine back yet, or there is none.
    Nobody,
    Wait(mpsc::Receiver<Option<Told>>),
    /// And whether it has heard it on this line.
    Known(Told, bool),
}

fn now() -> BootTime {
    BootClock.now()
}

impl<'a> Keeper<'a> {
    pub(super) fn new(parts: Parts<'a>) -> Self {
        Self {
            // Only two runners of one move must differ.
            life: getrandom::u64().unwrap_or_else(|_| u64::from(std::process::id())),
            serial: 0,
            dialing: None,
            dial_at: Instant::now(),
            lost: None,
            told_lost: false,
            cursor: (0, 0),
            buffer: Vec::new(),
            bulk_ended: false,
            flush_told: false,
            told: Instant::now(),
            end: None,
            confirmation: None,
            durable: None,
            why: String::new(),
            sent: parts.line.as_ref().map_or(0, |line| line.main.sent()),
            all_sent: None,
            history: Asked::Nobody,
            parts,
        }
    }

    /// Serves until it has ended.
    pub(super) fn run(&mut self) -> End {
        if self.parts.line.is_none() {
            let why = std::mem::take(&mut self.parts.no_line);
            self.lost(why);
        }
        loop {
            self.step(SourceEvent::Tick);
            if let Some(end) = self.end.take() {
                (self.parts.outage)(None);
                return end;
            }
            if self.parts.line.is_some() {
                self.serve();
            } else {
                self.redial();
            }
            self.tell();
        }
    }

    /// The destination, which owns the machine, hears what the history lacks of it as soon as that is known,
    /// and gets that first; it is waited for as long as `limit`.
    pub(super) fn tell_history(&mut self, limit: Duration) {
        if let (Asked::Nobody, Some(ask)) = (&self.history, self.parts.history) {
            let Some(asked) = ask() else { return };
            self.history = Asked::Wait(asked);
        }
        if let Asked::Wait(asked) = &self.history {
            match asked.recv_timeout(limit) {
                Ok(Some(told)) => {
                    self.parts.pages.first(told.1.clone());
                    self.history = Asked::Known(told, false);
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Ok(None) | Err(mpsc::RecvTimeoutError::Disconnected) => {
                    self.history = Asked::Nobody;
                    self.parts.history = None;
                }
            }
        }
        let Some(line) = &mut self.parts.line else { return };
        let Asked::Known((mark, changed), heard @ false) = &mut self.history else { return };
        *heard = true;
        let told = changed
            .iter()
            .enumerate()
            .try_for_each(|(at, set)| line.main.changed(DeviceNumber(at as u8), set))
            .and_then(|()| line.main.write(&Frame::History(mark.clone())))
            .and_then(|()| line.main.flush());
        // A line that is broken shows where blocks are sent.
        if let Err(error) = told {
            tracing::info!(%error, "the destination does not hear of the machine's history");
        }
    }

    /// Blocks that have not been sent.
    pub(super) fn remaining(&self) -> u64 {
        self.parts.pages.remaining()
    }

    fn state(&self) -> SourceState {
        self.parts.authority.state()
    }

    fn tell(&mut self) {
        if self.told.elapsed() > TELL {
            self.told = Instant::now();
            (self.parts.progress)(self.remaining() * 4096, self.sent);
        }
    }

    fn until_wake(&self) -> Duration {
        self.parts.authority.wake_at().map_or(Duration::from_secs(1), |at| at.since(now()))
    }

    // ---- authority

    /// Feeds an event and everything that follows from it at once.
    fn step(&mut self, event: SourceEvent) {
        let actions = self.parts.authority.on(now(), event);
        self.act(actions);
    }

    fn act(&mut self, actions: Vec<SourceAction>) {
        for action in actions {
            match action {
                SourceAction::Lease(call) => {
                    let machine = &call.new.machine;
                    let answer =
                        self.parts.store.compare_and_set(machine, Some(&call.expected), &call.new);
                    let answer = LeaseAnswer::from(answer);
                    let event = SourceEvent::LeaseAnswer { operation: call.operation, answer };
                    self.step(event);
                }
                SourceAction::ResumeHere { epoch, flip } => {
                    self.end = Some(End::GoOn { epoch, flip });
                }
                SourceAction::Release => self.end = Some(End::Released),
                SourceAction::StayPaused { why } => self.end = Some(End::StayPaused(why)),
                SourceAction::SendCancel { .. } => {
                    if let Some(line) = &mut self.parts.line {
                        let _ = line.main.write(&Frame::Abort("the source gave up".into()));
                        let _ = line.main.flush();
                    }
                }
                SourceAction::Report(line) => {
                    tracing::info!("{line}");
                    if self.why.is_empty() || self.lost.is_none() {
                        self.why = line;
                    }
                }
                // Done before the token.
                SourceAction::PauseMachine { .. }
                | SourceAction::SendToken(_)
                | SourceAction::ServePages => {}
            }
        }
    }

    // ---- a line

    fn serve(&mut self) {
        if !self.flush_told {
            self.tell_durable();
        }
        self.arrived();
        if self.end.is_some() {
            return;
        }
        if matches!(self.state(), SourceState::ServingPages(_)) {
            self.tell_history(Duration::ZERO);
        }
        let Some(line) = &mut self.parts.line else { return };
        if self.bulk_ended {
            let wait = self.until_wake().min(LOOK);
            let Some(line) = &self.parts.line else { return };
            match line.arrivals.recv_timeout(wait) {
                Ok((at, frame)) => self.take(at, frame),
                Err(mpsc::RecvTimeoutError::Timeout) => self.lose_patience(),
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    self.lost("the connection closed".into());
                }
            }
            return;
        }
        let before = line.main.sent();
        let sent = match self.parts.pages.next(&mut self.cursor) {
            Some((number, range)) => {
                let device = Arc::clone(&self.parts.devices[usize::from(number.0)]);
                send_run(&mut line.main, number, device.as_ref(), range, &mut self.buffer)
                    .map_err(|e| e.to_string())
            }
            None => {
                self.bulk_ended = true;
                self.all_sent = Some(Instant::now());
                let ended = line.main.write(&Frame::BulkEnd).and_then(|()| line.main.flush());
                ended.map_err(|e| e.to_string())
            }
        };
        let bytes = line.main.sent() - before;
        self.sent += bytes;
        match sent {
            Ok(()) => self.parts.pacer.sent(bytes),
            Err(why) => self.lost(why),
        }
    }

    /// The flushes that were answered early are durable now: the destination may let frames go.
    fn tell_durable(&mut self) {
        self.flush_told = true;
        let Some(flush) = &mut self.parts.flush else { return };
        match flush() {
            Ok(()) => {
                let frame = Frame::SourceDurable { attempt: self.parts.place.attempt };
                let Some(line) = &mut self.parts.line else { return };
                if let Err(error) = line.main.write(&frame).and_then(|()| line.main.flush()) {
                    self.lost(error.to_string());
                }
            }
            // The destination keeps frames held until it has everything itself.
            Err(error) => tracing::error!(%error, "a flush that was answered early failed"),
        }
    }

    /// A destination that cannot be connected to again must become durable in time.
    fn lose_patience(&mut self) {
        let late = self.all_sent.is_some_and(|at| at.elapsed() > DURABLE_LIMIT);
        if !self.parts.place.resumes && late && matches!(self.state(), SourceState::ServingPages(_))
        {
            self.lost(format!(
                "the destination did not say within {DURABLE_LIMIT:?} that everything is durable there"
            ));
        }
    }

    /// Takes what has arrived, without waiting.
    fn arrived(&mut self) {
        while let Some(line) = &self.parts.line {
            match line.arrivals.try_recv() {
                Ok((at, frame)) => self.take(at, frame),
                Err(mpsc::TryRecvError::Empty) => return,
                Err(mpsc::TryRecvError::Disconnected) => {
                    return self.lost("the connection closed".into());
                }
            }
        }
    }

    fn take(&mut self, at: Instant, frame: Result<Frame, crate::migrate::protocol::WireError>) {
        let frame = match frame {
            Ok(frame) => frame,
            Err(error) => return self.lost(error.to_string()),
        };
        match frame {
            Frame::Confirmed(json) => match serde_json::from_slice(&json) {
                Ok(confirmation) => self.confirmed(at, confirmation),
                Err(error) => tracing::warn!(%error, "a confirmation that cannot be read"),
            },
            Frame::Durable(json) => match serde_json::from_slice(&json) {
                Ok(report) => self.released(report),
                Err(error) => tracing::warn!(%error, "a release that cannot be read"),
            },
            Frame::Refused { attempt, reason } => self.refused(attempt, reason),
            Frame::Offer { attempt, serial, good_for_ms } => {
                let offer = Offer {
                    attempt: AttemptId(attempt),
                    serial: OfferSerial(serial),
                    good_for: Duration::from_millis(u64::from(good_for_ms)),
                };
                let received = now() - at.elapsed();
                let actions = self.parts.authority.on(received, SourceEvent::Offer(offer));
                self.act(actions);
            }
            _ => {}
        }
    }

    fn confirmed(&mut self, at: Instant, confirmation: Confirmation) {
        let epoch = Epoch(confirmation.epoch);
        self.confirmation.get_or_insert((at, confirmation));
        self.step(SourceEvent::Confirmed { epoch });
    }

    fn released(&mut self, report: DurableReport) {
        let epoch = Epoch(report.epoch);
        self.durable = Some(report);
        self.step(SourceEvent::Durable { epoch });
    }

    fn refused(&mut self, attempt: u64, why: String) {
        self.why = format!("the destination refused the token: {why}");
        self.step(SourceEvent::Refused { attempt: AttemptId(attempt), why });
    }

    // ---- no line

    fn lost(&mut self, why: String) {
        let silent = self.parts.line.take().is_some_and(|line| line.was_silent());
        let reason = if silent { "it does not answer".to_owned() } else { why };
        if self.lost.is_none() {
            // What was asked before speaks of another time.
            self.parts.cancel.store(false, Ordering::Relaxed);
            tracing::warn!(reason, "the connection to the destination is lost");
        }
        self.why.clone_from(&reason);
        let since = self.lost.as_ref().map_or_else(Instant::now, |outage| outage.since);
        self.outage(since, reason);
        self.dial_at = Instant::now();
        if !self.told_lost {
            self.told_lost = true;
            self.step(SourceEvent::PeerLost);
        }
    }

    fn outage(&mut self, since: Instant, reason: String) {
        let peer = self.parts.place.peer.as_str().to_owned();
        let outage = Outage { peer, since, reason, left: self.remaining() };
        self.lost = Some(outage.clone());
        (self.parts.outage)(Some(outage));
    }

    fn redial(&mut self) {
        let owned = matches!(self.state(), SourceState::ServingPages(_));
        if owned && !self.parts.place.resumes {
            self.end = Some(End::GivenUp);
            return;
        }
        if self.parts.cancel.swap(false, Ordering::Relaxed) {
            if owned {
                self.end = Some(End::GivenUp);
                return;
            }
            self.step(SourceEvent::Cancel);
        }
        let wait = self.until_wake().min(LOOK);
        let Some(told) = &self.dialing else {
            if self.parts.place.resumes && Instant::now() >= self.dial_at {
                self.serial += 1;
                let Parts { place, devices, .. } = &self.parts;
                self.dialing = Some(dial(place, devices, self.life, self.serial));
            } else {
                std::thread::park_timeout(wait);
            }
            return;
        };
        let result = match told.recv_timeout(wait) {
            Ok(result) => result,
            Err(mpsc::RecvTimeoutError::Timeout) => return,
            Err(mpsc::RecvTimeoutError::Disconnected) => Err("no thread to connect again".into()),
        };
        self.dialing = None;
        self.dial_at = Instant::now() + REDIAL;
        match result {
            Ok(Dialed::Open(line)) => self.back(*line),
            Ok(Dialed::Over(answer)) => self.answered(answer),
            Err(reason) => {
                let since = self.lost.as_ref().map_or_else(Instant::now, |outage| outage.since);
                self.outage(since, reason);
                self.look_at_lease();
            }
        }
    }

    /// A destination that is not reached may have been lost with the machine, which another host has then
    /// taken, or had all of it and has passed it on. Either way nothing here is needed any more.
    fn look_at_lease(&mut self) {
        let SourceState::ServingPages(owned) = self.state() else { return };
        let Parts { place, store, .. } = &self.parts;
        let Ok(name) = MachineName::new(&place.machine) else { return };
        if let Ok(Some(record)) = store.read(&name)
            && record.epoch > owned
            && record.owner != place.peer
        {
            self.end = Some(End::TakenOver(record));
        }
    }

    fn back(&mut self, Reopened { main, fault, missing }: Reopened) {
        let Parts { place, pages, .. } = &self.parts;
        let arrivals = match link::pump(main.incoming, "source-main") {
            Ok(arrivals) => arrivals,
            Err(error) => return self.lost(error.to_string()),
        };
        let blocks: u64 = missing.iter().map(BlockSet::len).sum();
        let outage = self.lost.take().map(|outage| outage.since.elapsed());
        tracing::info!(blocks, ?outage, "the destination is reached again");
        pages.reset(missing);
        self.parts.line =
            Some(Line::open(main.outgoing, main.control, arrivals, fault, pages, place));
        (self.bulk_ended, self.flush_told) = (false, false);
        (self.cursor, self.all_sent) = ((0, 0), None);
        if let Asked::Known((_, changed), heard) = &mut self.history {
            *heard = false;
            self.parts.pages.first(changed.clone());
        }
        (self.parts.outage)(None);
    }

    fn answered(&mut self, answer: ResumeAnswer) {
        if let Some(confirmation) = answer.confirmation {
            self.confirmed(Instant::now(), confirmation);
        }
        match (answer.standing, answer.durable) {
            (Standing::Durable, Some(report)) => self.released(report),
            (Standing::Refused, _) => self.refused(self.parts.place.attempt, answer.reason),
            _ => {
                self.dial_at = Instant::now() + REDIAL_UNKNOWN;
                self.look_at_lease();
                let reason =
                    format!("it answers, but does not take the move up: {}", answer.reason);
                let since = self.lost.as_ref().map_or_else(Instant::now, |outage| outage.since);
                self.outage(since, reason);
            }
        }
    }
}
