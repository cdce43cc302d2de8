//! A queue at work: its thread takes requests from the available ring, does at once what can be
//! done without waiting, and gives the rest to the pool; whoever finishes a request hands it back.
//!
//! ```text
//! running ──pause──> paused (thread ended; requests in hand go on) ──drain──> nothing in hand
//!    │                  └──call off──> waits end; such requests are set aside ──put back──┘
//!    └──── the guest broke the rules ──> broken (nothing is taken or handed back any more)
//! ```
//!
//! Putting back: a request that was not answered may be done again from its beginning, so a ring can
//! be stopped while requests wait for room. Their heads go into the last places of the available ring
//! that were taken (whose content nobody reads any more: what is in hand has at most so many), and the
//! ring's base is said to be that much less. Whoever starts the ring next, here or on another host,
//! takes them first. The guest sees nothing of it.

use super::{
    inflight::InflightQueue,
    memory::GuestMemory,
    request::{By, Manner, Request, Status, Tried},
    ring::{self, Absent, Chain, Place, RingError, Used},
};
use crate::{polling::Polling, pool::Pool};
use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};
use silo_block::io::BlockDevice;
use std::{
    fs::File,
    hint,
    io::{self, Read, Write},
    os::fd::AsFd,
    sync::{
        Arc, Condvar, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// After so many bytes or requests the driver is told even if more can be done at once.
const TELL_BYTES: u64 = 64 << 10;
const TELL_REQUESTS: u32 = 8;

/// Requests from this length on are given to the pool while more are available: copying takes
/// longer than handing over, and several processors copy at a time.
const LONG: u64 = 256 << 10;

/// How often waits are ended while a queue is stopped without its requests.
const CALL_OFF_AGAIN: Duration = Duration::from_millis(10);

/// What the queues of all sessions share.
pub(super) struct Work {
    pub(super) device: RwLock<Arc<dyn BlockDevice>>,
    pub(super) pool: Pool,
    /// Requests that fail now are left for a successor, where there can be one.
    pub(super) stopping: AtomicBool,
    /// How often waits at the device have been ended for the sake of one queue.
    pub(super) called_off: AtomicU64,
    /// How many are at that just now.
    pub(super) calling_off: AtomicU32,
    /// Longest time to look for requests before sleeping.
    pub(super) poll: Duration,
}

impl Work {
    pub(super) fn device(&self) -> Arc<dyn BlockDevice> {
        self.device.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ends all waits at the device. Requests of queues that go on are tried again.
    fn call_off(&self) {
        self.calling_off.fetch_add(1, Ordering::SeqCst);
        self.device().interrupt();
        self.called_off.fetch_add(1, Ordering::SeqCst);
        self.calling_off.fetch_sub(1, Ordering::SeqCst);
    }

    /// Whether waits may have ended for the sake of some queue since `called_off` was `before`.
    fn called_off_since(&self, before: u64) -> bool {
        // In the opposite order to that in which they are set.
        self.calling_off.load(Ordering::SeqCst) > 0
            || self.called_off.load(Ordering::SeqCst) != before
    }
}

/// A request in the order in which requests were taken.
type Turn = (u64, u16);

/// A descriptor that the other side listens to; it may be replaced at any time.
#[derive(Default)]
pub(super) struct Doorbell(Mutex<Option<File>>);

impl Doorbell {
    pub(super) fn replace(&self, file: Option<File>) {
        if let Some(file) = &file {
            unblock(file);
        }
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = file;
    }

    pub(super) fn ring(&self) {
        let file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mut file) = file.as_ref()
            && let Err(error) = file.write_all(&1u64.to_ne_bytes())
            // It stands at its highest value: the other side has enough to wake up for.
            && error.kind() != io::ErrorKind::WouldBlock
        {
            tracing::warn!(%error, "the front end cannot be notified");
        }
    }
}

/// What we were given may be anything: no read or write of it may block us.
pub(super) fn unblock(file: &File) {
    if let Err(error) = fcntl(file, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)) {
        tracing::warn!(%error, "a descriptor of the front end cannot be made non-blocking");
    }
}

#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Running = 0,
    Paused = 1,
    Broken = 2,
    /// The session is over; what is still in hand must not touch the guest any more.
    Dead = 3,
}

/// What a queue is started with.
pub(super) struct Setup {
    pub(super) index: usize,
    pub(super) work: Arc<Work>,
    pub(super) memory: Arc<GuestMemory>,
    pub(super) place: Place,
    pub(super) inflight: Option<InflightQueue>,
    pub(super) manner: Manner,
    pub(super) kick: File,
    pub(super) call: Arc<Doorbell>,
    pub(super) err: Arc<Doorbell>,
    /// Where to go on in the available ring, where nothing was left in hand.
    pub(super) base: u16,
}

struct Shared {
    setup: Setup,
    wake: EventFd,
    state: AtomicU8,
    used: Mutex<Used>,
    in_hand: AtomicU32,
    next: AtomicU16,
    /// The queue is stopped without waiting any longer for what is in hand.
    calling_off: AtomicBool,
    /// What was in hand and is not any more, without an answer.
    aside: Mutex<Vec<Turn>>,
    draining: Mutex<bool>,
    drained: Condvar,
}

/// A running queue. Dropping it without draining leaves its requests to the pool.
pub(super) struct Queue {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Queue {
    /// # Errors
    /// If no thread or event can be made.
    pub(super) fn start(setup: Setup) -> io::Result<Self> {
        let used = setup.place.used_index();
        let left = setup.inflight.as_ref().map(|inflight| inflight.recover(used));
        let left = left.unwrap_or_default().heads;
        // What was taken is what was handed back and what is still in hand; without the latter the
        // front end knows.
        let next = if left.is_empty() { setup.base } else { used.wrapping_add(left.len() as u16) };
        if !left.is_empty() {
            tracing::info!(queue = setup.index, requests = left.len(), "a predecessor's requests");
        }
        unblock(&setup.kick);
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let name = format!("silo-vhost-q{}", setup.index);
        let shared = Arc::new(Shared {
            setup,
            wake,
            state: AtomicU8::new(State::Running as u8),
            used: Mutex::new(Used::new(used)),
            in_hand: AtomicU32::new(0),
            next: AtomicU16::new(next),
            calling_off: AtomicBool::new(false),
            aside: Mutex::default(),
            draining: Mutex::new(false),
            drained: Condvar::new(),
        });
        let runner = Runner::new(shared.clone());
        let thread = thread::Builder::new()
            .name(name)
            .stack_size(256 << 10)
            .spawn(move || runner.run(&left))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Takes no more requests once this has returned; gives where to go on.
    pub(super) fn pause(&mut self) -> u16 {
        self.shared.leave(State::Paused);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(queue = self.shared.setup.index, "the thread of a queue panicked");
        }
        self.shared.next.load(Ordering::SeqCst)
    }

    /// After [`Queue::pause`]: waits until nothing is in hand. False if the deadline came first.
    pub(super) fn drain(&self, deadline: Instant) -> bool {
        let mut draining = self.shared.lock_draining();
        *draining = true;
        while self.in_hand() > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.shared.drained.wait_timeout(draining, left);
            draining = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// As [`Queue::drain`], but ends waits once `grace` is over: what is not done by then is set
    /// aside as soon as its wait ends, and counts as no longer in hand.
    pub(super) fn drain_or_call_off(&self, grace: Duration, deadline: Instant) -> bool {
        let began = Instant::now();
        if self.drain(deadline.min(began + grace)) {
            return true;
        }
        self.shared.calling_off.store(true, Ordering::SeqCst);
        loop {
            // Again after a moment: a worker may begin to wait just after this.
            self.shared.setup.work.call_off();
            if self.drain(deadline.min(Instant::now() + CALL_OFF_AGAIN)) {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
        }
    }

    /// Once it is drained: puts what was set aside back into the available ring. Gives where to go
    /// on. A daemon that dies at any step of this leaves a record that fits the ring.
    pub(super) fn put_back(&self) -> u16 {
        let shared = &self.shared;
        let Setup { index, place, memory, inflight, .. } = &shared.setup;
        let next = shared.next.load(Ordering::SeqCst);
        let mut aside = std::mem::take(&mut *shared.lock_aside());
        if aside.is_empty() {
            return next;
        }
        aside.sort_unstable();
        let base = next.wrapping_sub(aside.len() as u16);
        for (at, &(_, head)) in (0u16..).zip(&aside) {
            place.put_head(memory, base.wrapping_add(at), head);
        }
        if let Some(inflight) = inflight {
            // The newest first: those that are still marked are always the ones before the rest.
            aside.iter().rev().for_each(|&(_, head)| inflight.put_back(head));
        }
        shared.next.store(base, Ordering::SeqCst);
        tracing::info!(queue = index, requests = aside.len(), "requests that waited are put back");
        base
    }

    /// Requests taken and not handed back.
    pub(super) fn in_hand(&self) -> u32 {
        self.shared.in_hand.load(Ordering::SeqCst)
    }

    /// What is still in hand is never handed back.
    pub(super) fn abandon(&self) {
        let used = self.shared.used.lock();
        self.shared.leave(State::Dead);
        drop(used);
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.pause();
    }
}

impl Shared {
    fn lock_draining(&self) -> std::sync::MutexGuard<'_, bool> {
        self.draining.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_aside(&self) -> std::sync::MutexGuard<'_, Vec<Turn>> {
        // Pushed to and taken as a whole.
        self.aside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is(&self, state: State) -> bool {
        self.state.load(Ordering::SeqCst) == state as u8
    }

    fn leave(&self, state: State) {
        self.state.fetch_max(state as u8, Ordering::SeqCst);
        // It fails when it was written 2^64 times.
        let _ = self.wake.write(1);
    }

    fn break_down(&self, error: RingError) {
        tracing::warn!(queue = self.setup.index, %error, "the guest broke the rules; its queue stops");
        self.leave(State::Broken);
        self.setup.err.ring();
    }

    /// Hands a request back; the driver is told later.
    fn complete(&self, head: u16, request: &Request, status: Status, written: u64) {
        // Whoever abandons waits for this lock: nothing reaches the guest after that.
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is(State::Broken) || self.is(State::Dead) {
            return;
        }
        let (place, memory) = (&self.setup.place, &self.setup.memory);
        let written = request.conclude(memory, status, written);
        used.push(place, memory, self.setup.inflight.as_ref(), head, written);
    }

    fn tell(&self) {
        let must = {
            let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
            used.must_tell(&self.setup.place)
        };
        if must {
            self.setup.call.ring();
        }
    }

    fn failed(&self, head: u16, request: &Request, error: &io::Error) {
        let left = self.setup.work.stopping.load(Ordering::SeqCst) && self.setup.inflight.is_some();
        if left {
            // It stays in the record: the next daemon runs it.
            tracing::debug!(%error, "a request is left to the next daemon");
            return;
        }
        tracing::warn!(kind = ?request.kind, bytes = request.length(), %error, "a request failed");
        let status = match error.kind() {
            io::ErrorKind::Unsupported => Status::Unsupported,
            _ => Status::Error,
        };
        self.complete(head, request, status, 0);
    }

    /// A worker's part: everything that may wait. Gives the request back if it has to be tried again.
    fn work(&self, turn: Turn, request: Option<Request>, buffer: &mut Vec<u8>) -> Option<Request> {
        if self.sets_aside(turn) {
            return None;
        }
        let head = turn.1;
        let request = match request {
            Some(request) => request,
            None => match self.await_pages(turn) {
                Ok(request) => request?,
                Err(error) => {
                    self.break_down(error);
                    return None;
                }
            },
        };
        let Setup { work, memory, manner, .. } = &self.setup;
        let before = work.called_off.load(Ordering::SeqCst);
        let device = work.device();
        match request.run(&*device, memory, manner, By::Worker, buffer) {
            Tried::Done(status, written) => self.complete(head, &request, status, written),
            Tried::Failed(_) if self.sets_aside(turn) => return None,
            // Another queue's waits were ended, and with them this one.
            Tried::Failed(_) if work.called_off_since(before) => {
                return Some(request);
            }
            Tried::Failed(error) => self.failed(head, &request, &error),
            Tried::WouldWait => self.failed(head, &request, &io::Error::other("nobody may wait")),
        }
        self.tell();
        None
    }

    /// Whether the queue is being stopped without this request, which then is set aside.
    fn sets_aside(&self, turn: Turn) -> bool {
        let aside = self.calling_off.load(Ordering::SeqCst);
        if aside {
            self.lock_aside().push(turn);
        }
        aside
    }

    /// Reads a request whose pages may be absent. `None`: it failed, and the guest knows.
    fn await_pages(&self, turn: Turn) -> Result<Option<Request>, RingError> {
        let head = turn.1;
        let (place, memory) = (&self.setup.place, &self.setup.memory);
        let mut chain = Chain::default();
        ring::walk(place, memory, head, Absent::Wait, &mut chain)?;
        let Err(error) = ring::present(memory, &chain, Absent::Wait) else {
            return Request::parse(&mut chain).map(Some);
        };
        if self.sets_aside(turn) {
            return Ok(None);
        }
        // That it failed can still be said.
        let request = Request::unread(&mut chain)?;
        memory.make_present(&[request.status()]).map_err(|_| RingError::Page)?;
        self.failed(head, &request, &error);
        self.tell();
        Ok(None)
    }
}

/// Counts a request out when it is finished, or lost by a panic.
struct InHand(Arc<Shared>);

impl Drop for InHand {
    fn drop(&mut self) {
        if self.0.in_hand.fetch_sub(1, Ordering::SeqCst) == 1 && *self.0.lock_draining() {
            self.0.drained.notify_all();
        }
    }
}

/// Has a request done by the pool, behind what that has to do already: those who wait must not keep
/// out those of a queue that is being stopped.
fn submit(in_hand: InHand, turn: Turn, request: Option<Request>) -> Result<(), RingError> {
    let shared = in_hand.0.clone();
    let job = Box::new(move |buffer: &mut Vec<u8>| {
        let Some(again) = in_hand.0.work(turn, request, buffer) else { return };
        let shared = in_hand.0.clone();
        if let Err(error) = submit(in_hand, turn, Some(again)) {
            shared.break_down(error);
        }
    });
    shared.setup.work.pool.submit(job).map_err(|error| {
        tracing::error!(%error, "no thread for a block request");
        RingError::Page
    })
}

/// The queue's thread.
struct Runner {
    shared: Arc<Shared>,
    chain: Chain,
    buffer: Vec<u8>,
    next: u16,
    /// Requests taken so far.
    taken: u64,
    /// Handed back and not told yet.
    bytes: u64,
    requests: u32,
    polling: Polling,
}

impl Runner {
    fn new(shared: Arc<Shared>) -> Self {
        let next = shared.next.load(Ordering::SeqCst);
        let (chain, buffer) = (Chain::default(), Vec::new());
        let polling = Polling::new(shared.setup.work.poll);
        Self { shared, chain, buffer, next, taken: 0, bytes: 0, requests: 0, polling }
    }

    fn run(mut self, left: &[u16]) {
        let ended = self.attend(left);
        self.shared.next.store(self.next, Ordering::SeqCst);
        if let Err(error) = ended {
            self.shared.break_down(error);
        }
    }

    fn attend(&mut self, left: &[u16]) -> Result<(), RingError> {
        for &head in left {
            self.shared.in_hand.fetch_add(1, Ordering::SeqCst);
            self.handle(head)?;
        }
        self.tell();
        let shared = self.shared.clone();
        let (place, memory) = (&shared.setup.place, &shared.setup.memory);
        place.want_kicks(memory, None);
        while shared.is(State::Running) {
            if self.pass()? || self.look() {
                continue;
            }
            place.want_kicks(memory, Some(self.next));
            if place.available_index() == self.next {
                self.sleep();
            }
            place.want_kicks(memory, None);
        }
        Ok(())
    }

    /// Takes what is available. False if there was nothing.
    fn pass(&mut self) -> Result<bool, RingError> {
        let shared = self.shared.clone();
        let (place, size) = (&shared.setup.place, shared.setup.place.size);
        let available = place.available_index();
        let count = available.wrapping_sub(self.next);
        if count > size {
            return Err(RingError::TooMany(count, size));
        }
        while self.next != available && shared.is(State::Running) {
            let head = place.head(self.next)?;
            if shared.in_hand.fetch_add(1, Ordering::SeqCst) >= u32::from(size) {
                shared.in_hand.fetch_sub(1, Ordering::SeqCst);
                return Err(RingError::TooMany(size.saturating_add(1), size));
            }
            if let Some(inflight) = &shared.setup.inflight {
                inflight.taken(head);
            }
            self.next = self.next.wrapping_add(1);
            self.handle(head)?;
        }
        self.tell();
        Ok(count > 0)
    }

    fn tell(&mut self) {
        if self.requests > 0 {
            (self.bytes, self.requests) = (0, 0);
            self.shared.tell();
        }
    }

    fn handle(&mut self, head: u16) -> Result<(), RingError> {
        let in_hand = InHand(self.shared.clone());
        self.taken += 1;
        let Setup { work, memory, manner, place, .. } = &self.shared.setup;
        if !ring::walk(place, memory, head, Absent::Tell, &mut self.chain)? {
            return self.give(head, None, in_hand);
        }
        if !matches!(ring::present(memory, &self.chain, Absent::Tell), Ok(true)) {
            return self.give(head, None, in_hand);
        }
        let request = Request::parse(&mut self.chain)?;
        if request.length() >= LONG && self.next != place.available_index() {
            return self.give(head, Some(request), in_hand);
        }
        let device = work.device();
        match request.run(&*device, memory, manner, By::Queue, &mut self.buffer) {
            Tried::WouldWait => return self.give(head, Some(request), in_hand),
            Tried::Done(status, written) => self.shared.complete(head, &request, status, written),
            Tried::Failed(error) => self.shared.failed(head, &request, &error),
        }
        self.requests += 1;
        self.bytes += request.length();
        if self.bytes >= TELL_BYTES || self.requests >= TELL_REQUESTS {
            self.tell();
        }
        Ok(())
    }

    /// Gives a request to the pool.
    fn give(
        &mut self,
        head: u16,
        request: Option<Request>,
        in_hand: InHand,
    ) -> Result<(), RingError> {
        submit(in_hand, (self.taken, head), request)
    }

    /// Looks for requests for a while. True if there is something.
    fn look(&self) -> bool {
        let Some(span) = self.polling.span() else { return false };
        let (start, place) = (Instant::now(), &self.shared.setup.place);
        while start.elapsed() < span {
            for _ in 0..16 {
                if place.available_index() != self.next || !self.shared.is(State::Running) {
                    return true;
                }
                hint::spin_loop();
            }
        }
        false
    }

    /// Sleeps until a kick or the end, and learns how long it is worth looking next time.
    fn sleep(&mut self) {
        let kick = &self.shared.setup.kick;
        let began = Instant::now();
        let mut fds = [
            PollFd::new(kick.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.shared.wake.as_fd(), PollFlags::POLLIN),
        ];
        // No deadline: waiting for requests is all this thread does, and `leave` wakes it.
        if let Err(error) = poll(&mut fds, PollTimeout::NONE)
            && error != nix::errno::Errno::EINTR
        {
            tracing::error!(%error, "a queue cannot wait for its driver");
            self.shared.leave(State::Broken);
            return;
        }
        let kicked = fds[0].revents().is_some_and(|events| !events.is_empty());
        if kicked {
            let mut count = [0; 8];
            match (&*kick).read(&mut count) {
                Ok(0) => self.shared.leave(State::Paused),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    tracing::warn!(%error, "a queue's kicks cannot be read");
                    self.shared.leave(State::Broken);
                }
            }
        }
        self.polling.slept(began.elapsed());
    }
}
