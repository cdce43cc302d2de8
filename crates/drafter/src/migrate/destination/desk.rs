//! The destination's desk for authority: feeds events to the state machine and carries out its
//! actions. It is shared by the session's threads; three of them matter here:
//!
//! - the *timer* keeps [`DestinationAuthority::wake_at`], does nothing that can hang, and so
//!   freezes the machine on time whatever the others are stuck in; what freezes it if this process is
//!   dead or stopped by then is told by [`Freezer::run_until`], before the first instruction;
//! - the *clerk* talks to the lease store and tells the machine what was decided;
//! - the session's own thread loads and runs, when an event of its own says so.

use super::machine::{DestinationMachine, Freezer};
use crate::{
    lease::{BootClock, Clock, LeaseStore},
    migrate::{
        link::Outgoing,
        messages::{Confirmation, DurableReport},
        protocol::Frame,
        switchover::{
            DestinationAction, DestinationAuthority, DestinationEvent, DestinationState, Holding,
            LeaseAnswer, LeaseCall,
        },
    },
};
use silo::memory::FaultSummary;
use std::{
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// The machine behind a lock of its own: held while it loads, runs or releases output. Absent once
/// it has been handed to the runner, which happens as soon as it needs the desk no more.
pub(super) type SharedMachine<M> = Arc<Mutex<Option<Box<M>>>>;

/// Times of the switchover here, for the confirmation.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Marks {
    pub(super) token: Option<Instant>,
    pub(super) armed: Option<Instant>,
    pub(super) loaded: Option<Instant>,
    pub(super) running: Option<Instant>,
    pub(super) running_at_ns: u64,
    pub(super) early_faults: u64,
}

/// What the clerk does, in order.
enum Errand {
    Lease(Box<LeaseCall>),
    Resume { epoch: u64, flip: u64 },
    ReleaseOutput,
    Confirm { epoch: u64 },
    Durable { epoch: u64 },
}

/// See the module.
pub(super) struct Desk<M> {
    authority: Mutex<DestinationAuthority>,
    changed: Condvar,
    main: Arc<Mutex<Outgoing>>,
    machine: SharedMachine<M>,
    freezer: Arc<dyn Freezer>,
    faults: Box<dyn Fn() -> FaultSummary + Send + Sync>,
    released: AtomicBool,
    store: Arc<dyn LeaseStore>,
    errands: Mutex<Option<mpsc::Sender<Errand>>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    marks: Mutex<Marks>,
    ended: Mutex<bool>,
    on_report: Box<dyn Fn(&str) + Send + Sync>,
    on_release: Box<dyn Fn() + Send + Sync>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<M: DestinationMachine + 'static> Desk<M> {
    /// Starts the timer and the clerk; they end with [`Desk::close`].
    pub(super) fn open(
        authority: DestinationAuthority,
        main: Arc<Mutex<Outgoing>>,
        machine: Box<M>,
        store: Arc<dyn LeaseStore>,
        on_report: Box<dyn Fn(&str) + Send + Sync>,
    ) -> std::io::Result<Arc<Self>> {
        let (freezer, faults) = (machine.freezer(), machine.faults());
        let none = Box::new(|| {});
        Self::over(authority, main, Some(machine), freezer, faults, store, on_report, none)
    }

    /// As [`Desk::open`]. `on_release`: lets out what a machine sends that is not in the desk's hands.
    #[expect(clippy::too_many_arguments, reason = "the pieces of one desk")]
    pub(super) fn over(
        authority: DestinationAuthority,
        main: Arc<Mutex<Outgoing>>,
        machine: Option<Box<M>>,
        freezer: Arc<dyn Freezer>,
        faults: Box<dyn Fn() -> FaultSummary + Send + Sync>,
        store: Arc<dyn LeaseStore>,
        on_report: Box<dyn Fn(&str) + Send + Sync>,
        on_release: Box<dyn Fn() + Send + Sync>,
    ) -> std::io::Result<Arc<Self>> {
        let machine = Arc::new(Mutex::new(machine));
        let (sender, receiver) = mpsc::channel();
        let desk = Arc::new(Self {
            authority: Mutex::new(authority),
            changed: Condvar::new(),
            main,
            machine,
            freezer,
            faults,
            released: AtomicBool::new(false),
            store,
            errands: Mutex::new(Some(sender)),
            threads: Mutex::default(),
            marks: Mutex::new(Marks::default()),
            ended: Mutex::new(false),
            on_report,
            on_release,
        });
        let clerk = Arc::clone(&desk);
        let clerk = std::thread::Builder::new()
            .name("lease-clerk".into())
            .spawn(move || receiver.into_iter().for_each(|errand| clerk.run_errand(errand)))?;
        let timer = Arc::clone(&desk);
        let timer = std::thread::Builder::new()
            .name("lease-timer".into())
            .spawn(move || timer.keep_time())?;
        lock(&desk.threads).extend([clerk, timer]);
        Ok(desk)
    }

    /// Ends the threads, once they have done what they were asked. Not to be called by them.
    pub(super) fn close(&self) {
        *lock(&self.ended) = true;
        lock(&self.errands).take();
        self.changed.notify_all();
        for thread in std::mem::take(&mut *lock(&self.threads)) {
            if thread.join().is_err() {
                tracing::error!("a thread of an arrival panicked");
            }
        }
    }

    /// Where the authority is.
    pub(super) fn state(&self) -> DestinationState {
        lock(&self.authority).state()
    }

    /// The machine, to load and run it.
    pub(super) fn machine(&self) -> MutexGuard<'_, Option<Box<M>>> {
        lock(&self.machine)
    }

    /// The machine, once this host owns it and its frames may leave: the desk needs it no more.
    pub(super) fn hand_out(&self) -> Option<(Box<M>, Holding)> {
        if !self.released.load(Ordering::Acquire) {
            return None;
        }
        let holding = self.holding()?;
        Some((lock(&self.machine).take()?, holding))
    }

    /// What this host holds once it is the owner.
    pub(super) fn holding(&self) -> Option<Holding> {
        lock(&self.authority).holding()
    }

    /// Waits until `decided` holds of the state, at most until `deadline`.
    pub(super) fn wait(
        &self,
        deadline: Instant,
        decided: impl Fn(DestinationState) -> bool,
    ) -> DestinationState {
        let mut authority = lock(&self.authority);
        loop {
            let state = authority.state();
            let left = deadline.saturating_duration_since(Instant::now());
            if decided(state) || left.is_zero() {
                return state;
            }
            authority = self
                .changed
                .wait_timeout(authority, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    pub(super) fn marks(&self) -> MutexGuard<'_, Marks> {
        lock(&self.marks)
    }

    /// Feeds an event. True if the caller, who holds no lock, shall load and run the machine now.
    pub(super) fn event(&self, event: DestinationEvent) -> bool {
        let mut load = false;
        let mut authority = lock(&self.authority);
        let before = authority.state();
        let mut actions = authority.on(BootClock.now(), event);
        if actions.contains(&DestinationAction::LoadAndRun)
            && let Err(why) = self.freezer.run_until(authority.freeze_at())
        {
            actions = authority.on(BootClock.now(), DestinationEvent::LoadFailed(why));
        }
        let asks = |action: &DestinationAction| matches!(action, DestinationAction::Lease(_));
        if before == DestinationState::Loading && actions.iter().any(asks) {
            self.freezer.lease_asked();
        }
        // Before it is thawed, if it is frozen.
        if !is_owner(before)
            && is_owner(authority.state())
            && let Err(error) = self.freezer.run_until(None)
        {
            tracing::error!(error, "its guard does not learn that the machine is this host's");
        }
        // Carried out under the authority's lock, so that no two threads mix their actions; all of
        // them are quick, or left to the clerk.
        for action in actions {
            load |= self.act(action);
        }
        drop(authority);
        self.changed.notify_all();
        load
    }

    fn act(&self, action: DestinationAction) -> bool {
        match action {
            DestinationAction::SendOffer(offer) => self.send(&Frame::Offer {
                attempt: offer.attempt.0,
                serial: offer.serial.0,
                good_for_ms: u32::try_from(offer.good_for.as_millis()).unwrap_or(u32::MAX),
            }),
            DestinationAction::LoadAndRun => return true,
            DestinationAction::SendRefused { attempt, why } => {
                self.send(&Frame::Refused { attempt: attempt.0, reason: why });
            }
            DestinationAction::Lease(call) => self.errand(Errand::Lease(Box::new(call))),
            DestinationAction::Resume { epoch, flip } => {
                self.errand(Errand::Resume { epoch: epoch.0, flip: flip.0 });
            }
            DestinationAction::ReleaseOutput { .. } => self.errand(Errand::ReleaseOutput),
            DestinationAction::FreezeNow => {
                if let Err(error) = self.freezer.freeze() {
                    tracing::error!(error, "freezing the machine failed");
                }
            }
            DestinationAction::Thaw => {
                if let Err(error) = self.freezer.thaw() {
                    tracing::error!(error, "thawing the machine failed");
                }
            }
            DestinationAction::SendConfirmed { epoch } => {
                self.errand(Errand::Confirm { epoch: epoch.0 });
            }
            DestinationAction::SendDurable { epoch } => {
                self.errand(Errand::Durable { epoch: epoch.0 });
            }
            // The session ends in the state that led here, and its caller drops the machine.
            DestinationAction::Discard => {}
            DestinationAction::Report(line) => {
                tracing::info!("{line}");
                (self.on_report)(&line);
            }
        }
        false
    }

    fn errand(&self, errand: Errand) {
        if let Some(sender) = &*lock(&self.errands) {
            // It can only fail when the clerk is gone, which is after the end of the session.
            let _ = sender.send(errand);
        }
    }

    fn send(&self, frame: &Frame) {
        let mut main = lock(&self.main);
        // A connection that is gone shows at the reader, which tells the authority.
        let _ = main.write(frame).and_then(|()| main.flush());
    }

    fn run_errand(&self, errand: Errand) {
        match errand {
            Errand::Lease(call) => {
                let machine = &call.new.machine;
                let answer = self.store.compare_and_set(machine, Some(&call.expected), &call.new);
                let answer = LeaseAnswer::from(answer);
                self.event(DestinationEvent::LeaseAnswer { operation: call.operation, answer });
            }
            Errand::Resume { epoch, flip } => {
                if let Some(machine) = lock(&self.machine).as_mut() {
                    machine.own(epoch, flip);
                }
            }
            Errand::ReleaseOutput => {
                let released = match lock(&self.machine).as_mut() {
                    Some(machine) => machine.release_output(),
                    None => {
                        (self.on_release)();
                        Ok(())
                    }
                };
                if let Err(error) = released {
                    tracing::error!(error, "releasing held frames failed");
                }
                self.released.store(true, Ordering::Release);
                self.changed.notify_all();
            }
            Errand::Confirm { epoch } => {
                let confirmation = self.confirmation(epoch);
                if let Ok(json) = serde_json::to_vec(&confirmation) {
                    self.send(&Frame::Confirmed(json));
                }
            }
            Errand::Durable { epoch } => {
                if let Ok(json) = serde_json::to_vec(&self.durable(epoch)) {
                    self.send(&Frame::Durable(json));
                }
            }
        }
    }

    /// What is released.
    pub(super) fn durable(&self, epoch: u64) -> DurableReport {
        DurableReport { epoch, faults: (self.faults)() }
    }

    /// What is confirmed.
    pub(super) fn confirmation(&self, epoch: u64) -> Confirmation {
        let marks = *self.marks();
        let since_token = |at: Option<Instant>| {
            let token = marks.token?;
            Some(at?.saturating_duration_since(token).as_micros() as u64)
        };
        Confirmation {
            epoch,
            armed_us: since_token(marks.armed).unwrap_or(0),
            loaded_us: since_token(marks.loaded).unwrap_or(0),
            running_us: since_token(marks.running).unwrap_or(0),
            released_us: since_token(Some(Instant::now())).unwrap_or(0),
            running_at_ns: marks.running_at_ns,
            early_faults: marks.early_faults,
        }
    }

    fn keep_time(&self) {
        let mut authority = lock(&self.authority);
        while !*lock(&self.ended) {
            let now = BootClock.now();
            let wait = authority.wake_at().map_or(Duration::from_millis(200), |at| at.since(now));
            if wait.is_zero() {
                drop(authority);
                self.event(DestinationEvent::Tick);
                authority = lock(&self.authority);
                continue;
            }
            authority = self
                .changed
                .wait_timeout(authority, wait)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

const fn is_owner(state: DestinationState) -> bool {
    matches!(state, DestinationState::Owner(_) | DestinationState::Settled(_))
}

#[cfg(test)]
#[path = "desk_tests.rs"]
mod tests;
