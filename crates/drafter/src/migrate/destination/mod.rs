//! The destination of a move: from the verdict to the moment when every block is durable here.
//!
//! Threads: the caller's reads the main connection, puts blocks in place, and loads and runs the
//! machine when the token comes; one reads the fault connection and fills; two more belong to the
//! [`desk`], where the authority is.

mod apply;
mod desk;
mod door;
mod faults;
mod helper;
mod line;
mod machine;

pub use apply::ApplyError;
pub use door::Door;
pub(crate) use door::turn_away;
pub use faults::Demands;
pub use machine::{DestinationMachine, Freezer};

use super::{
    link::{Channel, Incoming, Outgoing},
    messages::{ResumeAnswer, Standing, TokenMeta},
    names::Comparison,
    protocol::{DeviceNumber, Frame, WireError},
    switchover::{
        DestinationAuthority, DestinationEvent, DestinationParts, DestinationState, Holding,
    },
};
use crate::{
    driver::Urgent,
    lease::{LeaseStore, Record},
};
use apply::Applier;
use desk::Desk;
use door::Visitor;
use identity::Control;
use silo::{block::BlockSet, device::Device};
use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// A source that says nothing for so long is gone (it sends blocks or at least is connected; TCP
/// keeps a dead host's connection open for much longer).
const SILENCE_LIMIT: Duration = Duration::from_secs(60);
/// Largest device state accepted, bytes.
const STATE_LIMIT: usize = 64 << 20;
/// How long the lease store may take before an arrived machine's session ends undecided.
const DECISION_LIMIT: Duration = Duration::from_secs(600);
/// Time between two looks at whether the session still has something to wait for.
const LOOK: Duration = Duration::from_millis(100);

/// Takes an arrived machine over from its session.
pub type OnOwner<M> = Box<dyn FnOnce(Box<M>, Holding) + Send>;

/// Notes that a machine lacks nothing any more.
pub type OnComplete = Box<dyn FnOnce() + Send>;

/// Holds the machine to this host's term, under the lease that is handed over; an error refuses it.
pub type OnToken = Box<dyn FnOnce(&Record) -> Result<(), String> + Send>;

/// Gets what the source told of the machine's history; `None` if it did not say.
pub type OnHistory = Box<dyn FnOnce(Option<HistoryTold>) + Send>;

/// Which generation of a machine its source stored last.
pub struct HistoryTold {
    /// JSON of [`BackupMark`](super::messages::BackupMark).
    pub mark: Vec<u8>,
    /// In which blocks of each device of the group the machine differed from it when it left.
    pub changed: Vec<BlockSet>,
    /// What the guest waits for.
    pub demands: Arc<Demands>,
}

/// An arrival, ready for the source's blocks.
pub struct Arrival<M> {
    /// The main connection, after the verdict was sent.
    pub main: Channel,
    /// The fault connection.
    pub fault: Channel,
    /// The machine, built.
    pub machine: Box<M>,
    /// Where the source comes in again if a connection breaks.
    pub door: Arc<Door>,
    /// Who it is, for the authority.
    pub parts: DestinationParts,
    /// Where the lease is.
    pub store: Arc<dyn LeaseStore>,
    /// Told what the authority reports, for people.
    pub on_report: Box<dyn Fn(&str) + Send + Sync>,
    /// Called with the token, before the machine runs.
    pub on_token: OnToken,
    /// Called as soon as the source has told, which may be before all blocks are here; else when the session
    /// ends, however.
    pub on_history: OnHistory,
    /// Gets the machine when this host owns it and its frames may leave, which may be long before
    /// all blocks are here.
    pub on_owner: OnOwner<M>,
    /// Called when everything is durable here, before the source is told.
    pub on_complete: OnComplete,
}

/// How an arrival ended.
pub struct Ended<M> {
    /// The machine, unless `on_owner` has got it.
    pub machine: Option<Box<M>>,
    /// What became of it.
    pub fate: Fate,
}

/// See [`Ended`].
#[derive(Debug)]
pub enum Fate {
    /// It runs here and needs its source no more.
    Settled(Holding),
    /// It runs here, but blocks are missing and the source is gone.
    Incomplete {
        /// What this host holds.
        holding: Holding,
        /// Blocks that are not here.
        missing: u64,
        /// What happened.
        reason: String,
    },
    /// It never ran here and never will by this attempt: drop it.
    Discard {
        /// What happened.
        reason: String,
        /// Whether blocks have been stored, so that an earlier stay is spoilt.
        touched: bool,
    },
    /// The lease store does not say who owns it: frozen, to be kept.
    Undecided {
        /// What happened.
        reason: String,
    },
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn monotonic_ns() -> u64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .map_or(0, |t| Duration::from(t).as_nanos() as u64)
}

/// Takes a machine in.
pub fn run<M: DestinationMachine + 'static>(arrival: Arrival<M>) -> Ended<M> {
    let Arrival {
        main,
        fault,
        machine,
        door,
        parts,
        store,
        on_report,
        on_token,
        on_history,
        on_owner,
        on_complete,
    } = arrival;
    let devices = machine.devices();
    let (control, fault_control) = (main.control.clone(), fault.control.clone());
    let outgoing = Arc::new(Mutex::new(main.outgoing));
    let authority = DestinationAuthority::new(parts);
    let last_report = Arc::new(Mutex::new(String::new()));
    let kept = Arc::clone(&last_report);
    let report = Box::new(move |line: &str| {
        lock(&kept).clear();
        lock(&kept).push_str(line);
        on_report(line);
    });
    let opened = Desk::open(authority, Arc::clone(&outgoing), machine, store, report);
    let desk = match opened {
        Ok(desk) => desk,
        Err(error) => {
            let reason = error.to_string();
            door.end(&ResumeAnswer::of(Standing::Refused, &reason));
            return Ended { machine: None, fate: Fate::Discard { reason, touched: false } };
        }
    };
    let demands = Demands::new(&devices, Some(fault.outgoing));
    door.opened(&[control.clone(), fault_control]);
    let mut session = Session {
        desk: Arc::clone(&desk),
        applier: Applier::new(devices),
        comparison: None,
        changed: Vec::new(),
        main: outgoing,
        control,
        filler: faults::fill(fault.incoming, &demands, &door),
        demands,
        door,
        touched: false,
        on_token: Some(on_token),
        on_history: Some(on_history),
        on_owner: Some(on_owner),
        on_complete: Some(on_complete),
    };
    session.control.set_read_timeout(Some(SILENCE_LIMIT));
    session.desk.event(DestinationEvent::Prepared);
    let (fate, incoming) = session.run(Some(main.incoming), &last_report);
    session.close(&fate, incoming);
    let machine = desk.machine().take();
    Ended { machine, fate }
}

/// A machine whose runner died while blocks were missing: this one goes on, once the source connects.
pub struct Continuation {
    /// The group, armed with what is missing.
    pub devices: Vec<Arc<dyn Device>>,
    /// Asks for blocks; the devices were armed with its [`Demands::of`].
    pub demands: Arc<Demands>,
    /// Where the source comes in.
    pub door: Arc<Door>,
    /// What this host holds.
    pub holding: Holding,
    /// Who it is, for the authority.
    pub parts: DestinationParts,
    /// Where the lease is.
    pub store: Arc<dyn LeaseStore>,
    /// Stops the machine.
    pub freezer: Arc<dyn Freezer>,
    /// Tells the memory faults.
    pub faults: Box<dyn Fn() -> silo::memory::FaultSummary + Send + Sync>,
    /// As [`Arrival::on_history`].
    pub on_history: OnHistory,
    /// What the guest has sent and sends may leave, if it may not already.
    pub on_release: Box<dyn Fn() + Send + Sync>,
    /// As [`Arrival::on_complete`].
    pub on_complete: OnComplete,
}

/// Brings the rest of a machine that was taken over; returns when all is here, or nobody waits for it
/// any more.
pub fn go_on<M: DestinationMachine + 'static>(from: Continuation) -> Fate {
    let Continuation {
        devices,
        demands,
        door,
        holding,
        parts,
        store,
        freezer,
        faults,
        on_history,
        on_release,
        on_complete,
    } = from;
    let authority = DestinationAuthority::owner(parts, holding.record);
    door.lost("the runner has just come back");
    // Until the source is back there is no connection to write to.
    let Some(Visitor { main, fault }) = first_visitor(&door) else {
        return Fate::Discard { reason: "the machine has ended".into(), touched: true };
    };
    let outgoing = Arc::new(Mutex::new(main.outgoing));
    let opened = Desk::<M>::over(
        authority,
        Arc::clone(&outgoing),
        None,
        freezer,
        faults,
        store,
        Box::new(|_| {}),
        on_release,
    );
    let desk = match opened {
        Ok(desk) => desk,
        Err(error) => return Fate::Undecided { reason: error.to_string() },
    };
    let mut session = Session {
        desk: Arc::clone(&desk),
        applier: Applier::armed(devices),
        comparison: None,
        changed: Vec::new(),
        main: outgoing,
        control: main.control.clone(),
        filler: None,
        demands,
        door,
        touched: true,
        on_token: None,
        on_history: Some(on_history),
        on_owner: None,
        on_complete: Some(on_complete),
    };
    let incoming = session.greet(main.incoming, main.control, fault).ok();
    let (fate, incoming) = session.run(incoming, &Mutex::default());
    session.close(&fate, incoming);
    fate
}

fn first_visitor(door: &Door) -> Option<Visitor> {
    loop {
        match door.wait(LOOK) {
            None if door.is_closed() => return None,
            None => {}
            visitor => return visitor,
        }
    }
}

struct Session<M> {
    desk: Arc<Desk<M>>,
    applier: Applier,
    /// Names are coming.
    comparison: Option<Comparison>,
    /// What the machine's history lacks is being told.
    changed: Vec<BlockSet>,
    main: Arc<Mutex<Outgoing>>,
    control: Control,
    demands: Arc<Demands>,
    filler: Option<JoinHandle<()>>,
    door: Arc<Door>,
    touched: bool,
    on_token: Option<OnToken>,
    on_history: Option<OnHistory>,
    on_owner: Option<OnOwner<M>>,
    on_complete: Option<OnComplete>,
}

impl<M: DestinationMachine + 'static> Session<M> {
    /// Reads what comes, over one connection after another, until the session is over.
    fn run(
        &mut self,
        mut incoming: Option<Incoming>,
        last_report: &Mutex<String>,
    ) -> (Fate, Option<Incoming>) {
        loop {
            let reason = match &mut incoming {
                None => "the source has not connected yet".to_owned(),
                Some(incoming) => match self.listen(incoming) {
                    Ok(()) => break,
                    Err(reason) => reason,
                },
            };
            match self.interrupted(&reason) {
                Some(next) => incoming = Some(next),
                None => return (self.end(reason, last_report), None),
            }
        }
        (self.end(String::new(), last_report), incoming)
    }

    /// Takes frames until everything is here, or the connection is of no use any more.
    fn listen(&mut self, incoming: &mut Incoming) -> Result<(), String> {
        loop {
            match incoming.read() {
                Ok(frame) => match self.take(frame) {
                    Ok(true) => incoming.recycle(self.applier.take_spare()),
                    Ok(false) => return Ok(()),
                    Err(reason) => return Err(reason),
                },
                Err(WireError::Io(error)) if timed_out(&error) && self.may_wait() => {}
                Err(error) => return Err(error.to_string()),
            }
        }
    }

    /// Everything is here: makes it durable, and has that written down before the source hears it.
    fn complete(&mut self) -> Result<(), ApplyError> {
        self.applier.complete()?;
        if let Some(on_complete) = self.on_complete.take() {
            on_complete();
        }
        Ok(())
    }

    /// After the token silence is normal (the source has sent all and waits for us).
    fn may_wait(&self) -> bool {
        !matches!(self.desk.state(), DestinationState::Preparing | DestinationState::Offering)
    }

    /// Takes a frame; false when the session is over and everything is here.
    fn take(&mut self, frame: Frame) -> Result<bool, String> {
        self.touched |=
            matches!(frame, Frame::Blocks { .. } | Frame::Zero { .. } | Frame::Missing { .. });
        // The lease may have been decided between two blocks, with seconds of blocks to come.
        self.tell_owner();
        let Some(frame) = self.applier.apply(frame).map_err(|e| e.to_string())? else {
            return Ok(true);
        };
        match frame {
            Frame::Names { device, start, names } => {
                if self.may_wait() {
                    return Err("it names blocks after the token".into());
                }
                let devices = self.applier.devices();
                let comparison = self.comparison.get_or_insert_with(|| Comparison::new(devices));
                comparison.take(device, start, &names)?;
            }
            Frame::RoundEnd(round) => {
                if let Some(comparison) = self.comparison.take() {
                    self.tell_lacking(comparison)?;
                }
                self.send(&Frame::RoundApplied(round));
            }
            Frame::Ping(nonce) => self.send(&Frame::Pong(nonce)),
            Frame::Token { meta, state } => self.token(&meta, &state)?,
            Frame::Expect(ms) => {
                if let Some(machine) = self.desk.machine().as_mut() {
                    machine.expect(Duration::from_millis(ms));
                }
            }
            Frame::SourceDurable { .. } => {
                self.desk.event(DestinationEvent::SourceDurable);
            }
            Frame::Changed { device, ranges } if self.may_wait() => self.lacks(device, &ranges)?,
            Frame::History(mark) if self.may_wait() => self.hears_history(Some(mark)),
            Frame::BulkEnd => return self.bulk_end(),
            Frame::Abort(reason) => {
                self.desk.event(DestinationEvent::Cancel);
                return Err(format!("the source ended the move: {reason}"));
            }
            _ => {}
        }
        self.tell_owner();
        Ok(true)
    }

    fn send(&self, frame: &Frame) {
        let mut main = lock(&self.main);
        let _ = main.write(frame).and_then(|()| main.flush());
    }

    /// All blocks were named: the source hears which are to be sent.
    fn tell_lacking(&self, comparison: Comparison) -> Result<(), String> {
        let lacking = comparison.lacking().map_err(|error| error.to_string())?;
        let mut main = lock(&self.main);
        for (at, set) in lacking.iter().enumerate() {
            main.missing(DeviceNumber(at as u8), set).map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    fn tell_owner(&mut self) {
        if self.on_owner.is_some()
            && let Some((machine, holding)) = self.desk.hand_out()
            && let Some(tell) = self.on_owner.take()
        {
            tell(machine, holding);
        }
    }

    /// The flight has landed: the one moment of the session when every microsecond counts.
    fn token(&mut self, meta: &[u8], state: &[u8]) -> Result<(), String> {
        let _urgent = Urgent::this_thread();
        self.desk.marks().token = Some(Instant::now());
        let meta = serde_json::from_slice::<TokenMeta>(meta).map_err(|e| e.to_string());
        let (token, state) = meta
            .and_then(|meta| {
                let size = usize::try_from(meta.state_bytes).unwrap_or(usize::MAX).min(STATE_LIMIT);
                let state = zstd::bulk::decompress(state, size).map_err(|e| e.to_string())?;
                Ok((meta.token()?, state))
            })
            .map_err(|e| format!("the token cannot be read: {e}"))?;
        let handed = token.handed.clone();
        if !self.desk.event(DestinationEvent::Token(token)) {
            return Ok(()); // refused; the source has been told why
        }
        let held = self.on_token.take().map_or(Ok(()), |hold| hold(&handed));
        match held.and_then(|()| self.load_and_run(&state)) {
            Ok(()) => self.desk.event(DestinationEvent::Running),
            Err(why) => self.desk.event(DestinationEvent::LoadFailed(why)),
        };
        Ok(())
    }

    fn load_and_run(&mut self, state: &[u8]) -> Result<(), String> {
        self.touched = true;
        let demands = Arc::clone(&self.demands);
        self.applier
            .arm(move |device, range| demands.ask(device, range))
            .map_err(|e| e.to_string())?;
        self.desk.marks().armed = Some(Instant::now());
        let mut place = self.desk.machine();
        let machine = place.as_mut().ok_or("the machine is not here")?;
        machine.load(state).map_err(|e| e.to_string())?;
        {
            let mut marks = self.desk.marks();
            marks.loaded = Some(Instant::now());
            let faults = machine.faults()();
            marks.early_faults = faults.demanded;
        }
        machine.run().map_err(|e| e.to_string())?;
        let mut marks = self.desk.marks();
        marks.running_at_ns = monotonic_ns();
        marks.running = Some(Instant::now());
        Ok(())
    }

    /// Every block has been sent; those demanded last may still be on the fault connection.
    fn bulk_end(&mut self) -> Result<bool, String> {
        let deadline = Instant::now() + SILENCE_LIMIT;
        while self.applier.still_missing() > 0 {
            if Instant::now() > deadline || !self.demands.is_connected() {
                return Err(format!("{} blocks never came", self.applier.still_missing()));
            }
            std::thread::park_timeout(Duration::from_millis(1));
        }
        self.complete().map_err(|e| e.to_string())?;
        self.desk.event(DestinationEvent::AllPresent);
        self.tell_owner();
        // The source closes the connection once it has the release; a lease that is not decided
        // yet keeps the session open.
        let state = self.desk.wait(Instant::now() + DECISION_LIMIT, |state| {
            !matches!(
                state,
                DestinationState::Loading
                    | DestinationState::Unconfirmed
                    | DestinationState::FrozenUnconfirmed
            )
        });
        self.tell_owner();
        Ok(!matches!(state, DestinationState::Settled(_)))
    }

    fn end(&mut self, reason: String, last_report: &Mutex<String>) -> Fate {
        self.desk.event(DestinationEvent::PeerLost);
        let undecided = |state| {
            matches!(state, DestinationState::Unconfirmed | DestinationState::FrozenUnconfirmed)
        };
        let state = self.desk.wait(Instant::now() + DECISION_LIMIT, |state| !undecided(state));
        self.tell_owner();
        let said = lock(last_report).clone();
        let reason = match (reason.is_empty(), said.is_empty()) {
            (false, _) => reason,
            (true, false) => said,
            (true, true) => "the session ended".to_owned(),
        };
        let missing = self.applier.still_missing();
        match (state, self.desk.holding()) {
            (DestinationState::Settled(_), Some(holding)) => Fate::Settled(holding),
            (DestinationState::Owner(_), Some(holding)) if missing == 0 => Fate::Settled(holding),
            (DestinationState::Owner(_), Some(holding)) => {
                Fate::Incomplete { holding, missing, reason }
            }
            (DestinationState::Unconfirmed | DestinationState::FrozenUnconfirmed, _) => {
                Fate::Undecided { reason }
            }
            _ => Fate::Discard { reason, touched: self.touched },
        }
    }
}

fn timed_out(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::TimedOut | std::io::ErrorKind::WouldBlock)
}
