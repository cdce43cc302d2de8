//! The end of a move that receives devices.
//!
//! ```text
//!  RECEIVING ── lists, blocks; after a cut of any length Have says what is missing
//!     │ Token                                   │ any failure: FAILED, a token is refused
//!     ▼                                         ▼
//!  STARTING ── Run → Ran ─────────────────► (CannotRun: FAILED, Refused)
//!     ▼
//!  RUNNING (filling: reads of absent blocks wait and are demanded, by peer and store)
//!     │ all here, or early: the rest is promised by a store; MakeDurable → MadeDurable
//!     ▼
//!  DURABLE ── Released, and all here ──► COMPLETE
//! ```
//!
//! The driver feeds events and the time, does what [`Destination::poll`] says, and asks again after
//! every event and at [`Destination::wake`]. Accesses of this side go through
//! [`Destination::read`] and [`Destination::write`]. What must hold:
//! - `Run` is carried out only after it is noted durably that this side owns the devices, with
//!   terms, clocks, epochs and absent blocks; a restart makes [`Destination::restored`] from that.
//! - A block that was stored counts as here after a restart only if it was made durable; else it is
//!   absent again, and the source still has it until [`ToSource::Durable`].
//! - Store actions may be done in any order: two of them never touch the same block.

mod access;
mod fetch;
mod speak;

pub use access::{Access, WaiterId};
pub use fetch::{Hashes, MemoryHashes};

use super::{
    link::{Customs, Link, LinkId, Patience},
    messages::{
        BlockHash, BlockHeader, Custom, DeviceIndex, MAX_CUSTOM, Reason, SessionId, ToDestination,
        ToSource, Token, Wait,
    },
};
use crate::{
    block::{BlockRange, BlockSet},
    device::DeviceName,
    hash::RootHash,
    model::Replica,
    order::{Class, Prefetch},
    rounds::Epoch,
};
use access::Waiter;
use fetch::Fetching;
use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

/// How a destination behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Longest waits.
    pub patience: Patience,
    /// The source may go when what is missing is promised by a store.
    pub early_release: bool,
    /// Bytes that may be on their way from stores.
    pub fetch_window: u64,
    /// Most blocks that one fault has fetched in advance; 0 for none.
    pub prefetch: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            patience: Patience::default(),
            early_release: false,
            fetch_window: 8 << 20,
            prefetch: 256,
        }
    }
}

/// A device that can receive. No store or write of an earlier session is under way any more.
#[derive(Debug)]
pub struct DestinationDevice {
    /// Its name in the group.
    pub name: DeviceName,
    /// What its blocks at [`Epoch::BASE`] are, verified.
    pub base: Option<RootHash>,
    /// What is known of its blocks.
    pub replica: Replica,
}

/// What happens to a destination. Slots are numbers of the driver for content that it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The transport has a new link to the source; an older one is gone.
    Connected(LinkId),
    /// A link is cut.
    Cut(LinkId),
    /// A control message came.
    Received(LinkId, ToDestination),
    /// Content came: what [`BlockHeader`] says, decoded, or to be decoded when it is stored.
    Blocks(LinkId, BlockHeader, u64),
    /// The answer to [`Action::Store`].
    Stored {
        /// Whose content was stored.
        slot: u64,
        /// What went wrong, as text.
        result: Result<(), String>,
    },
    /// The answer to [`Action::Fetch`]: content of the whole range.
    Fetched {
        /// The number of the request.
        ticket: u64,
        /// The hashes of what came, a block each; computed, not copied from anywhere. None for a
        /// block that could not be had.
        hashes: Vec<Option<BlockHash>>,
        /// Where the content is.
        slot: u64,
    },
    /// A fetch failed; the peer is asked instead.
    FetchFailed(u64),
    /// A source on this host, which gives the devices on, needs blocks.
    Want(DeviceIndex, BlockRange, Class),
    /// The answer to [`Action::Run`]: it runs.
    Ran,
    /// The answer to [`Action::Run`]: it does not and will not.
    CannotRun(Reason),
    /// The answer to [`Action::MakeDurable`].
    MadeDurable,
    /// The layer above has something to say to its peer.
    Custom {
        /// What it is.
        kind: u32,
        /// At most [`MAX_CUSTOM`].
        payload: Vec<u8>,
    },
    /// The layer above has handled a custom event.
    CustomHandled(u32),
    /// Stop, if that is still possible.
    Cancel(String),
}

/// What a destination wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send on the control connection, in order.
    Send(LinkId, ToSource),
    /// Note durably what is absent of this device, and its epochs ([`Replica::record`]), before any
    /// later [`Action::Store`] touches it: what is overwritten must not be taken for the old content
    /// after a crash. Nothing to do for memory.
    Note(DeviceIndex),
    /// Store these parts of the content in a slot, and free it; then [`Event::Stored`].
    Store {
        /// The content.
        slot: u64,
        /// Of which device.
        device: DeviceIndex,
        /// The parts, in ascending order.
        parts: Vec<BlockRange>,
    },
    /// The content in this slot is not needed.
    Discard(u64),
    /// Blocks are here now.
    Here(DeviceIndex, Vec<BlockRange>),
    /// These accesses can be tried again.
    Wake(Vec<WaiterId>),
    /// These accesses fail.
    Fail(Vec<WaiterId>, Reason),
    /// Note durably that this side owns the devices ([`Replica::record`] of each, session, try),
    /// before any later [`Action::Store`], and let them be used; then [`Event::Ran`].
    Run {
        /// The try.
        attempt: u32,
        /// From the layer above at the source.
        state: Vec<u8>,
        /// Flushes to be done again, by device; they are answered when that is done.
        flushes: Vec<Vec<u64>>,
    },
    /// Get blocks from the store, as of this epoch; then [`Event::Fetched`] or
    /// [`Event::FetchFailed`]. More urgent ones may pass others under way.
    Fetch {
        /// Number of the request.
        ticket: u64,
        /// Of which device.
        device: DeviceIndex,
        /// The blocks.
        range: BlockRange,
        /// As of which round.
        epoch: Epoch,
        /// How urgent.
        class: Class,
    },
    /// What this fetch would bring is not needed any more; it need not be answered.
    CancelFetch(u64),
    /// Make everything durable; then [`Event::MadeDurable`].
    MakeDurable,
    /// Everything is here and durable, and the source may be gone.
    Complete,
    /// Something takes longer than it should; nothing is given up.
    Overdue(Wait),
    /// A block cannot be stored while this side runs: its readers get errors.
    Trouble(Reason),
    /// The move is over without success; this side never runs by it.
    Failed(Reason),
    /// Close this link; it is of no use.
    Hangup(LinkId),
    /// Something for the layer above; answer with [`Event::CustomHandled`].
    Custom(Custom),
}

/// Where a destination stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Lists and blocks come.
    Receiving,
    /// The token has come.
    Starting,
    /// It runs.
    Running,
    /// The source is not needed any more.
    Durable,
    /// All is here.
    Complete,
    /// Over.
    Failed(Reason),
}

/// What was counted, in blocks where nothing else is said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Stored, from the peer.
    pub from_peer: u64,
    /// Stored, from a store.
    pub from_store: u64,
    /// Written here before they came.
    pub written: u64,
    /// Came from the peer and were not needed.
    pub late: u64,
    /// Came from the peer and could not be taken at that moment.
    pub again: u64,
    /// Came from a store and were not needed.
    pub store_late: u64,
    /// Came from a store with wrong content.
    pub store_wrong: u64,
    /// Fetches that were cancelled because the peer was faster, or the block changed.
    pub cancelled: u64,
    /// A store had promised them, and did not give them.
    pub store_failed: u64,
    /// Demands sent.
    pub demands: u64,
    /// Prefetches sent.
    pub prefetches: u64,
    /// Lists applied.
    pub lists: u64,
}

#[derive(Debug)]
struct Incoming {
    name: DeviceName,
    base: Option<RootHash>,
    replica: Replica,
    waiters: Vec<Waiter>,
    /// What was asked for on this link.
    demanded: BlockSet,
    expected: BlockSet,
    prefetch: Prefetch,
    fetching: Fetching,
    /// What has not changed since earlier terms, until all is here.
    kept: Vec<(Epoch, Vec<BlockRange>)>,
}

/// Content that is being stored.
#[derive(Debug)]
struct Slot {
    device: DeviceIndex,
    parts: Vec<BlockRange>,
    epoch: Epoch,
    from: From,
}

#[derive(Debug)]
struct Held {
    link: LinkId,
    header: BlockHeader,
    retry: Vec<BlockRange>,
}

#[derive(Debug)]
enum From {
    /// To be confirmed on this link.
    Peer {
        link: LinkId,
        range: BlockRange,
        retry: Vec<BlockRange>,
    },
    Store,
}

/// A destination; see the module.
#[derive(Debug)]
pub struct Destination {
    config: Config,
    session: SessionId,
    devices: Vec<Incoming>,
    /// The devices are in the order of the group.
    sorted: bool,
    phase: Phase,
    attempt: Option<u32>,
    /// The driver was asked to make everything durable.
    making_durable: bool,
    /// The source may go, or has gone, because stores have what is missing.
    relies: bool,
    released: bool,
    link: Option<Link>,
    customs: Customs,
    slots: BTreeMap<u64, Slot>,
    /// Confirmations that wait: the peer would only send again what is being stored just now.
    held: Vec<Held>,
    hashes: Box<dyn Hashes>,
    tickets: u64,
    alone: Duration,
    told: Duration,
    /// Reads fail at once: there has been no link for too long.
    lost: bool,
    actions: VecDeque<Action>,
    counters: Counters,
}

impl Destination {
    /// A destination that waits for its source from `now` on.
    #[must_use]
    pub fn new(
        config: Config,
        session: SessionId,
        devices: Vec<DestinationDevice>,
        hashes: Box<dyn Hashes>,
        now: Duration,
    ) -> Self {
        let devices = devices.into_iter().map(|device| Incoming::new(device, &config)).collect();
        Self {
            config,
            session,
            devices,
            sorted: false,
            phase: Phase::Receiving,
            attempt: None,
            making_durable: false,
            relies: false,
            released: false,
            link: None,
            customs: Customs::default(),
            slots: BTreeMap::new(),
            held: Vec::new(),
            hashes,
            tickets: 0,
            alone: now,
            told: now,
            lost: false,
            actions: VecDeque::new(),
            counters: Counters::default(),
        }
    }

    /// A destination that runs already, after a restart: its devices in the order of the group, as
    /// they were noted durably, and the try whose token it has.
    #[must_use]
    pub fn restored(
        config: Config,
        session: SessionId,
        devices: Vec<DestinationDevice>,
        hashes: Box<dyn Hashes>,
        attempt: u32,
        now: Duration,
    ) -> Self {
        let mut destination = Self::new(config, session, devices, hashes, now);
        destination.sorted = true;
        destination.phase = Phase::Running;
        destination.attempt = Some(attempt);
        destination
    }

    /// Where it stands.
    #[must_use]
    pub fn phase(&self) -> &Phase {
        &self.phase
    }

    /// What was counted.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// A device, by its place in the group (before the first link: in the order given).
    #[must_use]
    pub fn replica(&self, device: DeviceIndex) -> Option<&Replica> {
        self.devices.get(device.0 as usize).map(|device| &device.replica)
    }

    /// A device, for giving it away to somebody else; see [`Replica::give_away`].
    pub fn replica_mut(&mut self, device: DeviceIndex) -> Option<&mut Replica> {
        self.devices.get_mut(device.0 as usize).map(|device| &mut device.replica)
    }

    /// The devices, when the move is over.
    #[must_use]
    pub fn into_devices(self) -> Vec<DestinationDevice> {
        let device = |incoming: Incoming| DestinationDevice {
            name: incoming.name,
            base: incoming.base,
            replica: incoming.replica,
        };
        self.devices.into_iter().map(device).collect()
    }

    /// Blocks of a device that are not here: those that a store has promised, and those that only
    /// the source has.
    #[must_use]
    pub fn lacking(&self, device: DeviceIndex) -> (Vec<BlockRange>, Vec<BlockRange>) {
        let Some(incoming) = self.devices.get(device.0 as usize) else { return Default::default() };
        let (mut promised, mut others) = (Vec::new(), Vec::new());
        for range in incoming.replica.absent().ranges() {
            let rest = incoming.fetching.unpromised(range);
            let mut at = range.start.0;
            for part in rest.iter().copied().chain([BlockRange::new(range.end(), 0)]) {
                if part.start.0 > at {
                    promised.push(BlockRange::new(at, part.start.0 - at));
                }
                at = part.end();
            }
            others.extend(rest);
        }
        (promised, others)
    }

    /// Whether the source may go, or has gone, because stores have what is missing here: every
    /// record of this side goes with [`Destination::promised`] then.
    #[must_use]
    pub fn relies_on_stores(&self) -> bool {
        self.relies
    }

    /// Bytes that are not here.
    #[must_use]
    pub fn missing(&self) -> u64 {
        let missing = |d: &Incoming| d.replica.absent().len() * d.replica.geometry().block();
        self.devices.iter().map(missing).sum()
    }

    /// Takes an event.
    pub fn handle(&mut self, now: Duration, event: Event) {
        match event {
            Event::Connected(link) => self.connected(now, link),
            Event::Cut(link) => self.cut(now, link),
            Event::Received(link, message) => self.received(now, link, message),
            Event::Blocks(link, header, slot) => self.blocks(now, link, header, slot),
            Event::Stored { slot, result } => self.stored(now, slot, result),
            Event::Fetched { ticket, hashes, slot } => self.fetched(now, ticket, &hashes, slot),
            Event::FetchFailed(ticket) => self.fetch_failed(now, ticket),
            Event::Want(device, range, class) => self.want(now, device, range, class),
            Event::Ran => self.ran(now),
            Event::CannotRun(reason) => self.cannot_run(now, reason),
            Event::MadeDurable => self.made_durable(now),
            Event::Custom { kind, payload } => self.custom(now, kind, payload),
            Event::CustomHandled(serial) => {
                self.customs.handled(serial);
                self.say(now, ToSource::CustomDone { serial });
            }
            Event::Cancel(why) => {
                if self.phase == Phase::Receiving {
                    self.fail(now, Reason::Cancelled(why));
                }
            }
        }
    }

    /// The next thing to do; `None` until the next event or [`Destination::wake`].
    pub fn poll(&mut self, now: Duration) -> Option<Action> {
        if let Some(action) = self.actions.pop_front() {
            return Some(action);
        }
        self.look_at_the_clock(now);
        self.decide(now);
        self.actions.pop_front().or_else(|| self.next_fetch(now))
    }

    /// When to call [`Destination::poll`] again if nothing happens before.
    #[must_use]
    pub fn wake(&self, now: Duration) -> Option<Duration> {
        if matches!(self.phase, Phase::Complete | Phase::Failed(_)) {
            return None;
        }
        let patience = self.config.patience;
        let mut at = self.told.max(self.alone) + patience.answer;
        if let Some(link) = &self.link {
            at = at.min(link.said + patience.silence / 3).min(link.heard + patience.silence);
        }
        for pause in self.devices.iter().filter_map(|device| device.fetching.paused(now)) {
            at = at.min(pause);
        }
        let waiters = self.devices.iter().flat_map(|device| &device.waiters);
        if let Some(since) = waiters.map(|waiter| waiter.since).min() {
            at = at.min(since + patience.answer);
        }
        Some(at.max(now + Duration::from_micros(1)))
    }

    /// The token, if it has come and was not refused.
    fn token_state(&self) -> Token {
        match (self.attempt, &self.phase) {
            (Some(attempt), Phase::Starting) => Token::Taken(attempt),
            (Some(attempt), _) if self.runs() => Token::Runs(attempt),
            _ => Token::Awaited,
        }
    }

    fn runs(&self) -> bool {
        matches!(self.phase, Phase::Running | Phase::Durable | Phase::Complete)
    }

    /// Ends a move that has not got the token: a token that comes is refused.
    fn fail(&mut self, now: Duration, reason: Reason) {
        if self.phase != Phase::Receiving {
            return;
        }
        self.say(now, ToSource::Abort(reason.clone()));
        self.end(reason);
    }

    fn end(&mut self, reason: Reason) {
        self.fail_waiters(|_, _| true, &reason);
        self.actions.push_back(Action::Failed(reason.clone()));
        self.phase = Phase::Failed(reason);
    }

    fn look_at_the_clock(&mut self, now: Duration) {
        if matches!(self.phase, Phase::Complete | Phase::Failed(_)) {
            return;
        }
        let patience = self.config.patience;
        if let Some(link) = self.link.clone() {
            if now >= link.heard + patience.silence {
                self.actions.push_back(Action::Hangup(link.id));
                self.cut(now, link.id);
            } else if now >= link.said + patience.silence / 3 {
                self.say(now, ToSource::Alive);
            }
        }
        let late = Reason::Deadline { what: Wait::Blocks, after: patience.answer };
        self.fail_waiters(|waiter, _| now >= waiter.since + patience.answer, &late);
        if now < self.told.max(self.alone) + patience.answer {
            return;
        }
        self.told = now;
        let what = match &self.link {
            None => Wait::Connection,
            Some(link) if !link.ready => Wait::Handshake,
            Some(_) => Wait::Blocks,
        };
        match self.phase {
            Phase::Receiving if what != Wait::Blocks => {
                self.fail(now, Reason::Deadline { what, after: patience.answer });
            }
            Phase::Running | Phase::Durable if self.missing() > 0 => {
                self.actions.push_back(Action::Overdue(what));
                if what != Wait::Blocks && self.phase == Phase::Running {
                    self.lost = true;
                    let reason = Reason::Deadline { what, after: patience.answer };
                    self.fail_waiters(Waiter::needs_the_peer, &reason);
                }
            }
            Phase::Starting => self.actions.push_back(Action::Overdue(Wait::Running)),
            _ => {}
        }
    }

    /// Durability, and the end.
    fn decide(&mut self, now: Duration) {
        // The source ought to hear that it may go; if it does not come back, it does not ask.
        let gone = self.link.is_none() && now >= self.alone + self.config.patience.answer;
        if self.phase == Phase::Durable
            && self.missing() == 0
            && self.slots.is_empty()
            && (self.released || gone)
        {
            self.apply_kept();
            self.phase = Phase::Complete;
            self.actions.push_back(Action::Complete);
            return;
        }
        if self.phase != Phase::Running || self.making_durable {
            return;
        }
        let early = self.config.early_release;
        let safe = |device: &Incoming| {
            let absent = device.replica.absent();
            absent.is_empty() || (early && device.fetching.covers(absent))
        };
        if self.slots.is_empty() && self.devices.iter().all(safe) {
            self.making_durable = true;
            self.apply_kept();
            self.relies |= self.devices.iter().any(|device| !device.replica.absent().is_empty());
            self.actions.push_back(Action::MakeDurable);
        }
    }

    fn made_durable(&mut self, now: Duration) {
        if self.phase == Phase::Running && self.making_durable {
            self.phase = Phase::Durable;
            self.say_durable(now);
        }
    }

    fn say_durable(&mut self, now: Duration) {
        let epochs = self.last_epochs();
        self.say(now, ToSource::Durable { epochs });
    }

    fn custom(&mut self, now: Duration, kind: u32, payload: Vec<u8>) {
        if payload.len() > MAX_CUSTOM {
            return;
        }
        match self.customs.post(kind, payload) {
            Some(custom) if self.link.as_ref().is_some_and(|link| link.ready) => {
                self.say(now, ToSource::Custom(custom));
            }
            Some(_) => {}
            None => {
                self.fail(now, Reason::Protocol("too many events wait for an answer".into()));
            }
        }
    }
}
