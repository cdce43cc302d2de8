//! The destination of a move: from the verdict to the moment when every block is durable here.
//!
//! Threads: the caller's reads the main connection, puts blocks in place, and loads and runs the
//! machine when the token comes; one reads the fault connection and fills; two more belong to the
//! [`desk`], where the authority is.

mod apply;
mod desk;
mod helper;
mod machine;

pub use apply::ApplyError;
pub use machine::{DestinationMachine, Freezer};

use super::{
    link::{Channel, Incoming, Outgoing},
    messages::TokenMeta,
    protocol::{DeviceNumber, Frame, WireError},
    switchover::{
        DestinationAuthority, DestinationEvent, DestinationParts, DestinationState, Holding,
    },
};
use crate::{driver::Urgent, lease::LeaseStore};
use apply::Applier;
use desk::Desk;
use silo::{block::BlockRange, device::Device};
use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// A source that says nothing for so long is gone (it sends blocks or at least is connected; TCP
/// keeps a dead host's connection open for much longer).
const SILENCE_LIMIT: Duration = Duration::from_secs(60);
/// Largest device state accepted, bytes.
const STATE_LIMIT: usize = 64 << 20;
/// How long the source may take to close the connection after its release.
const GOODBYE_LIMIT: Duration = Duration::from_secs(5);
/// How long the lease store may take before an arrived machine's session ends undecided.
const DECISION_LIMIT: Duration = Duration::from_secs(600);

/// Takes an arrived machine over from its session.
pub type OnOwner<M> = Box<dyn FnOnce(Box<M>, Holding) + Send>;

/// An arrival, ready for the source's blocks.
pub struct Arrival<M> {
    /// The main connection, after the verdict was sent.
    pub main: Channel,
    /// The fault connection.
    pub fault: Channel,
    /// The machine, built.
    pub machine: Box<M>,
    /// Who it is, for the authority.
    pub parts: DestinationParts,
    /// Where the lease is.
    pub store: Arc<dyn LeaseStore>,
    /// Told what the authority reports, for people.
    pub on_report: Box<dyn Fn(&str) + Send + Sync>,
    /// Gets the machine when this host owns it and its frames may leave, which may be long before
    /// all blocks are here.
    pub on_owner: OnOwner<M>,
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
    let Arrival { main, fault, machine, parts, store, on_report, on_owner } = arrival;
    let devices = machine.devices();
    let control = main.control.clone();
    let fault_control = fault.control.clone();
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
            let fate = Fate::Discard { reason: error.to_string(), touched: false };
            return Ended { machine: None, fate };
        }
    };
    let mut session = Session {
        desk: Arc::clone(&desk),
        applier: Applier::new(devices.clone()),
        main: outgoing,
        demand: Arc::new(Mutex::new(fault.outgoing)),
        touched: false,
        on_owner: Some(on_owner),
    };
    let filler = fill_on_fault(fault.incoming, devices);
    control.set_read_timeout(Some(SILENCE_LIMIT));
    let mut incoming = main.incoming;
    let fate = session.run(&mut incoming, &last_report);
    // Everything that was to be said is said before the connection ends, and the source, which
    // waits for the last word, ends it.
    desk.close();
    session.tell_owner();
    control.set_read_timeout(Some(GOODBYE_LIMIT));
    if matches!(fate, Fate::Settled(_)) {
        while incoming.read().is_ok() {}
    }
    control.shutdown();
    fault_control.shutdown();
    if let Ok(thread) = filler {
        let _ = thread.join();
    }
    let machine = desk.machine().take();
    Ended { machine, fate }
}

/// Answers to demands come on the fault connection.
fn fill_on_fault(
    mut from: Incoming,
    devices: Vec<Arc<dyn Device>>,
) -> std::io::Result<std::thread::JoinHandle<()>> {
    std::thread::Builder::new().name("fault-fill".into()).spawn(move || {
        // The guest waits for these blocks (design, I5).
        let _urgent = Urgent::this_thread();
        let fits = |device: DeviceNumber, range: BlockRange| {
            devices.get(usize::from(device.0)).filter(|d| range.end() <= d.blocks())
        };
        while let Ok(frame) = from.read() {
            let filled = match frame {
                Frame::Blocks { device, start, data } => {
                    let count = (data.len() / silo::block::BLOCK_SIZE) as u64;
                    fits(device, BlockRange::new(start.0, count)).map(|d| d.fill(start, &data))
                }
                Frame::Zero { device, range } => fits(device, range).map(|d| d.fill_zero(range)),
                _ => continue,
            };
            match filled {
                Some(Ok(_)) => {}
                Some(Err(error)) => {
                    tracing::error!(%error, "a demanded block could not be put in place");
                }
                None => {
                    tracing::error!("the source answered a demand with blocks that do not fit");
                    return;
                }
            }
        }
    })
}

struct Session<M> {
    desk: Arc<Desk<M>>,
    applier: Applier,
    main: Arc<Mutex<Outgoing>>,
    demand: Arc<Mutex<Outgoing>>,
    touched: bool,
    on_owner: Option<OnOwner<M>>,
}

impl<M: DestinationMachine + 'static> Session<M> {
    fn run(&mut self, incoming: &mut Incoming, last_report: &Mutex<String>) -> Fate {
        self.desk.event(DestinationEvent::Prepared);
        let reason = loop {
            match incoming.read() {
                Ok(frame) => match self.take(frame) {
                    Ok(true) => incoming.recycle(self.applier.take_spare()),
                    Ok(false) => break String::new(),
                    Err(reason) => break reason,
                },
                Err(WireError::Io(error)) if timed_out(&error) && self.may_wait() => {}
                Err(error) => break error.to_string(),
            }
        };
        self.end(reason, last_report)
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
            Frame::RoundEnd(round) => self.send(&Frame::RoundApplied(round)),
            Frame::Ping(nonce) => self.send(&Frame::Pong(nonce)),
            Frame::Token { meta, state } => self.token(&meta, &state)?,
            Frame::SourceDurable { .. } => {
                self.desk.event(DestinationEvent::SourceDurable);
            }
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
        if !self.desk.event(DestinationEvent::Token(token)) {
            return Ok(()); // refused; the source has been told why
        }
        match self.load_and_run(&state) {
            Ok(()) => self.desk.event(DestinationEvent::Running),
            Err(why) => self.desk.event(DestinationEvent::LoadFailed(why)),
        };
        Ok(())
    }

    fn load_and_run(&mut self, state: &[u8]) -> Result<(), String> {
        self.touched = true;
        let demand = Arc::clone(&self.demand);
        self.applier
            .arm(move |device, range| {
                let mut to = lock(&demand);
                let asked = to.write(&Frame::Demand { device, range }).and_then(|()| to.flush());
                if let Err(error) = asked {
                    tracing::warn!(%error, block = range.start.0, "a demand could not be sent");
                }
            })
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
            if Instant::now() > deadline {
                return Err(format!("{} blocks never came", self.applier.still_missing()));
            }
            std::thread::park_timeout(Duration::from_millis(1));
        }
        self.applier.complete().map_err(|e| e.to_string())?;
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
        // What has come counts, also if the connection ended right behind it.
        if let Err(error) = self.applier.settle() {
            tracing::warn!(%error, "the last blocks could not be put in place");
        }
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
