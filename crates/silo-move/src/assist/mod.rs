//! Blocks from elsewhere: an object store, other peers, a local copy. Asked for by hash while the
//! source sends the rest, so that the destination is whole sooner and the source may go sooner.
//!
//! The destination calls [`Assist::want`] for a block that the source named by hash only, and
//! [`Assist::urge`] when somebody waits for it; the answer comes to the callback that it gave at
//! the start. What must hold: an answer counts only if its BLAKE3 is the one that the source named
//! for the block; a wrong, missing, failed or slow answer goes on with the next place, and with the
//! source when there is none left; demanded blocks go first at every place; a place that stalls
//! holds nobody but its own threads; whoever loses is told to stop, and counted.

mod by_hash;
#[cfg(test)]
mod tests;

pub use by_hash::{ByHash, HashIndex, Lookup, PeerFetch, serve_fetch};

use crate::codec::Naming;
use silo_block::{block::BlockIndex, device::DeviceName, session::messages::BlockHash};
use std::{
    collections::{HashMap, VecDeque},
    io,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{Builder, JoinHandle},
    time::{Duration, Instant},
};

/// A block to fetch.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Wanted {
    /// Of which device.
    pub device: DeviceName,
    /// Which.
    pub block: BlockIndex,
    /// Where that is in the device, in bytes.
    pub offset: u64,
    /// BLAKE3 of its content, as the source names it.
    pub hash: BlockHash,
    /// Its length in bytes.
    pub length: usize,
}

/// Why a place gave nothing.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// It does not have it.
    #[error("it is not there")]
    Missing,
    /// Somebody else was faster.
    #[error("it was cancelled")]
    Cancelled,
    /// It could not be read.
    #[error("it could not be read: {0}")]
    Failed(#[from] io::Error),
}

/// Says that an answer is not needed any more. Cheap to clone.
#[derive(Clone, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Whether to stop.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    fn set(&self) {
        self.0.store(true, Ordering::Release);
    }
}

/// A place that may have blocks.
pub trait Fetch: Send + Sync {
    /// For messages and counts.
    fn name(&self) -> &str;

    /// Gets the content of a block into `buf`, whose length is [`Wanted::length`]. Called from
    /// several threads; should look at `cancel` and keep to a deadline of its own. The caller
    /// checks the hash.
    ///
    /// # Errors
    /// If it is not there or cannot be read.
    fn fetch(&self, wanted: &Wanted, buf: &mut [u8], cancel: &Cancel) -> Result<(), FetchError>;
}

/// How the answers were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Taken: right, and first.
    pub fetched: u64,
    /// Bytes of these.
    pub bytes: u64,
    /// Of another content than named.
    pub wrong: u64,
    /// Not there.
    pub missing: u64,
    /// Could not be read.
    pub failed: u64,
    /// So slow that the next place was asked too.
    pub hedged: u64,
    /// Not needed any more: another place or the source was faster.
    pub cancelled: u64,
    /// Of no place: the source has to send them.
    pub given_up: u64,
}

/// What became of a wanted block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer<'a> {
    /// Its content, checked.
    Content(&'a [u8]),
    /// No place had it.
    Nowhere,
}

/// How to ask.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// Threads for each place: how many blocks it is asked for at once.
    pub threads: usize,
    /// After so long the next place is asked too.
    pub hedge: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Self { threads: 8, hedge: Duration::from_millis(250) }
    }
}

/// A block in a device, by the device's number in the session.
pub type Key = (u16, BlockIndex);

type Done = dyn Fn(Key, &Wanted, Answer<'_>) + Send + Sync;

struct Request {
    wanted: Wanted,
    urgent: bool,
    cancel: Cancel,
    /// Places that have been asked or are in line to be.
    asked: usize,
    /// Of these, how many have not answered.
    open: usize,
    /// When the next place is asked although this one has not answered; set when one begins.
    hedge_at: Option<Instant>,
}

#[derive(Default)]
struct Queue {
    urgent: VecDeque<Key>,
    others: VecDeque<Key>,
}

#[derive(Default)]
struct State {
    requests: HashMap<Key, Request>,
    queues: Vec<Queue>,
    counts: Counts,
    /// Of these, what each place did.
    by_place: Vec<Counts>,
    stop: bool,
}

struct Shared {
    places: Vec<Arc<dyn Fetch>>,
    policy: Policy,
    naming: Naming,
    state: Mutex<State>,
    work: Condvar,
    hedge: Condvar,
    done: Box<Done>,
}

/// See the module. Threads end when it is dropped.
pub struct Assist {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Assist {
    /// Asks `places` in their order. `done` is called once for each wanted block that is not
    /// dropped, on a thread of a place.
    ///
    /// # Errors
    /// If threads cannot be had.
    pub fn new(
        places: Vec<Arc<dyn Fetch>>,
        policy: Policy,
        naming: Naming,
        done: impl Fn(Key, &Wanted, Answer<'_>) + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let queues = places.iter().map(|_| Queue::default()).collect();
        let by_place = vec![Counts::default(); places.len()];
        let shared = Arc::new(Shared {
            places,
            policy,
            naming,
            state: Mutex::new(State { queues, by_place, ..State::default() }),
            work: Condvar::new(),
            hedge: Condvar::new(),
            done: Box::new(done),
        });
        let mut assist = Self { shared, threads: Vec::new() };
        for place in 0..assist.shared.places.len() {
            for _ in 0..policy.threads.max(1) {
                let shared = assist.shared.clone();
                let thread = Builder::new().name("silo-fetch".to_owned());
                assist.threads.push(thread.spawn(move || shared.serve(place))?);
            }
        }
        let shared = assist.shared.clone();
        let thread = Builder::new().name("silo-hedge".to_owned());
        assist.threads.push(thread.spawn(move || shared.watch())?);
        Ok(assist)
    }

    /// Whether there is any place to ask.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.shared.places.is_empty()
    }

    /// Asks for a block. One that is wanted already under another hash is asked for anew.
    pub fn want(&self, key: Key, wanted: Wanted, urgent: bool) {
        let mut state = self.shared.lock();
        if let Some(old) = state.requests.get_mut(&key) {
            if old.wanted == wanted {
                drop(state);
                if urgent {
                    self.urge(key);
                }
                return;
            }
            old.cancel.set();
            state.counts.cancelled += 1;
        }
        let request = Request {
            wanted,
            urgent,
            cancel: Cancel::default(),
            asked: 0,
            open: 0,
            hedge_at: None,
        };
        state.requests.insert(key, request);
        self.shared.next_place(state, key);
    }

    /// Somebody waits for this block: it goes first. False if it is not wanted here.
    pub fn urge(&self, key: Key) -> bool {
        let mut state = self.shared.lock();
        let Some(request) = state.requests.get_mut(&key) else { return false };
        if !std::mem::replace(&mut request.urgent, true) {
            // Where it is in line twice, the second turn finds it asked for already.
            let asked = request.asked;
            for queue in &mut state.queues[..asked] {
                if let Some(at) = queue.others.iter().position(|other| *other == key) {
                    queue.others.remove(at);
                    queue.urgent.push_back(key);
                }
            }
        }
        true
    }

    /// The block has come from elsewhere: losers are told. False if it was not wanted here.
    pub fn arrived(&self, key: Key) -> bool {
        let mut state = self.shared.lock();
        let Some(request) = state.requests.remove(&key) else { return false };
        request.cancel.set();
        state.counts.cancelled += 1;
        true
    }

    /// Blocks that are wanted and have no answer.
    #[must_use]
    pub fn open(&self) -> usize {
        self.shared.lock().requests.len()
    }

    /// How the answers were so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.shared.lock().counts
    }

    /// The same, of each place: what it gave, and what it did not.
    #[must_use]
    pub fn by_place(&self) -> Vec<(String, Counts)> {
        let names = self.shared.places.iter().map(|place| place.name().to_owned());
        names.zip(self.shared.lock().by_place.iter().copied()).collect()
    }
}

impl Drop for Assist {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.stop = true;
        state.requests.values().for_each(|request| request.cancel.set());
        drop(state);
        self.shared.work.notify_all();
        self.shared.hedge.notify_all();
        let me = std::thread::current().id();
        for thread in self.threads.drain(..).filter(|thread| thread.thread().id() != me) {
            // What a place panicked with was printed by the thread.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a request in line at the next place; without one, and nothing open, it is given up.
    fn next_place(&self, mut state: MutexGuard<'_, State>, key: Key) {
        let Some(request) = state.requests.get_mut(&key) else { return };
        let place = request.asked;
        if place < self.places.len() {
            request.asked += 1;
            request.open += 1;
            request.hedge_at = None;
            let urgent = request.urgent;
            let queue = &mut state.queues[place];
            if urgent {
                queue.urgent.push_back(key);
            } else {
                queue.others.push_back(key);
            }
            drop(state);
            self.work.notify_all();
            return;
        }
        request.hedge_at = None;
        if request.open > 0 {
            return;
        }
        let Some(request) = state.requests.remove(&key) else { return };
        state.counts.given_up += 1;
        drop(state);
        (self.done)(key, &request.wanted, Answer::Nowhere);
    }

    /// A thread of one place.
    fn serve(&self, place: usize) {
        let mut buffer = Vec::new();
        loop {
            let Some((key, wanted, cancel)) = self.next_job(place) else { return };
            buffer.clear();
            buffer.resize(wanted.length, 0);
            let result = self.places[place].fetch(&wanted, &mut buffer, &cancel);
            let right = result.is_ok() && self.naming.name(&buffer) == wanted.hash;
            let mut state = self.lock();
            if cancel.is_set() {
                continue;
            }
            let State { counts, by_place, .. } = &mut *state;
            for counts in [counts, &mut by_place[place]] {
                match &result {
                    Ok(()) if right => {
                        counts.fetched += 1;
                        counts.bytes += wanted.length as u64;
                    }
                    Ok(()) => counts.wrong += 1,
                    Err(FetchError::Missing) => counts.missing += 1,
                    Err(FetchError::Cancelled | FetchError::Failed(_)) => counts.failed += 1,
                }
            }
            if right {
                state.requests.remove(&key);
                cancel.set();
                drop(state);
                (self.done)(key, &wanted, Answer::Content(&buffer));
                continue;
            }
            let name = self.places[place].name();
            let why = result.err().map_or_else(|| "wrong content".to_owned(), |e| e.to_string());
            tracing::debug!(place = name, device = %wanted.device, block = %wanted.block, why, "no answer");
            if let Some(request) = state.requests.get_mut(&key) {
                request.open -= 1;
            }
            self.next_place(state, key);
        }
    }

    /// Waits for work; none when it is time to end.
    fn next_job(&self, place: usize) -> Option<(Key, Wanted, Cancel)> {
        let mut state = self.lock();
        loop {
            if state.stop {
                return None;
            }
            let queue = &mut state.queues[place];
            if let Some(key) = queue.urgent.pop_front().or_else(|| queue.others.pop_front()) {
                let Some(request) = state.requests.get_mut(&key) else { continue };
                let hedge = Instant::now() + self.policy.hedge;
                request.hedge_at = (request.asked < self.places.len()).then_some(hedge);
                let job = (key, request.wanted.clone(), request.cancel.clone());
                self.hedge.notify_one();
                return Some(job);
            }
            state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Asks the next place for what takes too long.
    fn watch(&self) {
        let mut state = self.lock();
        while !state.stop {
            let now = Instant::now();
            let due = |request: &Request| request.hedge_at.filter(|at| *at <= now).is_some();
            let late: Vec<Key> =
                state.requests.iter().filter(|(_, r)| due(r)).map(|(key, _)| *key).collect();
            for key in late {
                state.counts.hedged += 1;
                self.next_place(state, key);
                state = self.lock();
            }
            let next = state.requests.values().filter_map(|request| request.hedge_at).min();
            let wait = next.map_or(Duration::from_secs(60), |at| {
                at.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))
            });
            state = self.hedge.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
