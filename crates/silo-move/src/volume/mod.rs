//! A device that can move: what front ends read and write, wherever its blocks are.
//!
//! One object for the device's whole stay on this host, whatever role it has:
//!
//! ```text
//!          Inbound takes it          Run                    Outbound: token out
//!  IDLE ────────────────► ARRIVING ─────► OPEN ── pause ─► PAUSED ─────────────► AWAY
//!    (untouched, or left)     refuses      ▲ ▲               │ resume              │ Inbound again
//!                                          │ └───────────────┘                     ▼
//!                               Volume::owned                                  ARRIVING
//! ```
//!
//! What must hold: a write is done inside the guard of its round, and only while the volume is
//! open, so that a round that was closed after [`Volume::pause`] is the last; a block that is not
//! here is read and partly written only after it has come; whole blocks may be written before, and
//! nothing that comes later goes over them.

mod access;
mod here;
mod touch;

use crate::lane::lock;
use here::Here;
use silo_block::{
    block::{BlockRange, BlockSet},
    device::DeviceName,
    geometry::Geometry,
    hash::RootHash,
    io::{Allocation, BlockDevice},
    model::{Owner, Replica},
    order::Class,
    rounds::Rounds,
    session::{
        messages::{SessionId, Term},
        source::SourceDevice,
    },
};
use std::{
    io,
    sync::{
        Arc, Condvar, Mutex, OnceLock, PoisonError, RwLock,
        atomic::{AtomicU8, Ordering},
    },
    time::{Duration, Instant},
};

/// The longest that a writer waits while a volume is paused.
const PAUSE: Duration = Duration::from_secs(120);
/// What is looked at in one go for allocated parts.
const LOOK: u64 = 1 << 30;

/// What blocks of a device that nobody has written in silo are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Zeros: a new device.
    Zeros,
    /// A base with this root, which was verified on this host.
    Base(RootHash),
    /// Anything: all that is not a hole counts as written.
    Unknown,
}

/// Whether accesses are let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Mode {
    /// Nobody owns it here.
    Idle,
    /// It is coming.
    Arriving,
    /// It is used.
    Open,
    /// It is about to leave.
    Paused,
    /// It has left.
    Away,
}

impl Mode {
    fn of(number: u8) -> Self {
        match number {
            0 => Self::Idle,
            1 => Self::Arriving,
            2 => Self::Open,
            3 => Self::Paused,
            _ => Self::Away,
        }
    }
}

/// What an access to blocks that are not here has to do.
pub(crate) enum Turn {
    /// Go on; a write says [`Hub::wrote`] with this range afterwards.
    Go(BlockRange),
    /// Fail.
    Fail(io::Error),
}

/// The session that a volume arrives by.
pub(crate) trait Hub: Send + Sync {
    /// Waits until blocks can be read.
    fn read(&self, device: u16, range: BlockRange) -> Turn;
    /// Waits until bytes can be written.
    fn write(&self, device: u16, offset: u64, length: u64) -> Turn;
    /// A write for which there was a range is over.
    fn wrote(&self, device: u16, range: BlockRange, well: bool);
    /// Somebody will need blocks.
    fn want(&self, device: u16, range: BlockRange, class: Class);
    /// Makes what is known of the volumes durable, on behalf of a flush of one.
    fn note(&self, device: u16) -> io::Result<()>;
    /// What is known of the device.
    fn with_replica(&self, device: u16, look: &mut dyn FnMut(&mut Replica));
}

/// Where what is known of the blocks is kept.
enum Knowledge {
    /// In the volume itself.
    Own(Box<Replica>),
    /// In the session by which it arrives; its number there.
    Arriving(Arc<dyn Hub>, u16),
}

/// Called with blocks that have come; false to be forgotten.
pub(crate) type OnArrival = Box<dyn Fn(BlockRange) -> bool + Send + Sync>;

/// See the module.
pub struct Volume {
    name: DeviceName,
    base: Option<RootHash>,
    geometry: Geometry,
    device: Arc<dyn BlockDevice>,
    rounds: Mutex<Arc<Rounds>>,
    here: Here,
    /// Blocks of a new device that nothing was stored in since it was made of zeros.
    blank: Option<Here>,
    mode: AtomicU8,
    /// Held for reading between a look at the mode and the guard of a round, where that matters.
    entering: RwLock<()>,
    knowledge: Mutex<Knowledge>,
    /// The session that has paused it, or has given it away.
    leaving: Mutex<Option<SessionId>>,
    /// The mode has changed.
    changed: Condvar,
    waiting: Mutex<()>,
    listeners: Mutex<Vec<OnArrival>>,
    touch: OnceLock<touch::Touch>,
}

impl std::fmt::Debug for Volume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Volume(\"{}\", {:?}, {:?})", self.name, self.geometry, self.mode())
    }
}

impl Volume {
    /// A device that is used here, in blocks of `block` bytes. `id` names this time of ownership:
    /// random, and the same for no other.
    ///
    /// # Errors
    /// If block and size do not fit, or its extents cannot be read.
    pub fn owned(
        name: DeviceName,
        device: Arc<dyn BlockDevice>,
        block: u32,
        content: Content,
        id: SessionId,
    ) -> io::Result<Self> {
        let geometry = geometry_of(&*device, block)?;
        let term = Term { id, first: silo_block::rounds::Epoch(1) };
        let replica = Replica::owned(geometry, term);
        if content == Content::Unknown {
            let mut written = BlockSet::new(geometry.blocks());
            for_each_data(&*device, |offset, length| {
                written.insert_range(geometry.touched(offset, length));
            })?;
            replica.rounds().mark(&written);
        }
        Ok(Self::with(name, device, content, replica, Mode::Open))
    }

    /// A device that nobody uses here yet: it can only arrive. What is in it must be `content`:
    /// zeros, or a verified base; of [`Content::Unknown`] nothing is trusted.
    ///
    /// # Errors
    /// If block and size do not fit.
    pub fn untouched(
        name: DeviceName,
        device: Arc<dyn BlockDevice>,
        block: u32,
        content: Content,
    ) -> io::Result<Self> {
        let geometry = geometry_of(&*device, block)?;
        Ok(Self::with(name, device, content, Replica::untouched(geometry), Mode::Idle))
    }

    /// A device as it was noted durably. One that is owned here is open, and has all its blocks;
    /// blocks that were still coming go on by a session ([`crate::destination`]).
    #[must_use]
    pub fn restored(
        name: DeviceName,
        device: Arc<dyn BlockDevice>,
        content: Content,
        replica: Replica,
    ) -> Self {
        let mode = match replica.owner() {
            Owner::Here if replica.absent().is_empty() => Mode::Open,
            Owner::Here => Mode::Arriving,
            Owner::Elsewhere => Mode::Away,
        };
        Self::with(name, device, content, replica, mode)
    }

    /// A device as it was noted when it was about to leave, or had left: nobody uses it here,
    /// unless [`crate::source::Outbound::restored`] finds that the other end has never got it.
    #[must_use]
    pub fn leaving(
        name: DeviceName,
        device: Arc<dyn BlockDevice>,
        content: Content,
        replica: Replica,
    ) -> Self {
        Self::with(name, device, content, replica, Mode::Paused)
    }

    fn with(
        name: DeviceName,
        device: Arc<dyn BlockDevice>,
        content: Content,
        replica: Replica,
        mode: Mode,
    ) -> Self {
        let geometry = replica.geometry();
        let new = mode == Mode::Idle && content == Content::Zeros;
        let base = match content {
            Content::Base(root) => Some(root),
            Content::Zeros | Content::Unknown => None,
        };
        Self {
            name,
            base,
            geometry,
            device,
            rounds: Mutex::new(replica.rounds().clone()),
            here: Here::new(geometry.blocks(), replica.absent()),
            blank: new.then(|| Here::new(geometry.blocks(), &BlockSet::new(geometry.blocks()))),
            mode: AtomicU8::new(mode as u8),
            entering: RwLock::new(()),
            knowledge: Mutex::new(Knowledge::Own(Box::new(replica))),
            leaving: Mutex::new(None),
            changed: Condvar::new(),
            waiting: Mutex::new(()),
            listeners: Mutex::default(),
            touch: OnceLock::new(),
        }
    }

    /// Its name in its group.
    #[must_use]
    pub fn name(&self) -> &DeviceName {
        &self.name
    }

    /// The root of its base, if it has one.
    #[must_use]
    pub fn base(&self) -> Option<RootHash> {
        self.base
    }

    /// Size and blocks.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Clock and epochs.
    #[must_use]
    pub fn rounds(&self) -> Arc<Rounds> {
        lock(&self.rounds).clone()
    }

    /// How many blocks are not here.
    #[must_use]
    pub fn absent(&self) -> u64 {
        self.here.absent()
    }

    /// Whether it is this host's.
    #[must_use]
    pub fn is_owned(&self) -> bool {
        matches!(self.mode(), Mode::Open | Mode::Paused)
    }

    /// Looks at what is known of its blocks.
    pub fn with_replica<R>(&self, look: impl FnOnce(&mut Replica) -> R) -> R {
        let mut look = Some(look);
        let mut result = None;
        let mut once = |replica: &mut Replica| {
            result = look.take().map(|look| look(replica));
        };
        let mut knowledge = lock(&self.knowledge);
        match &mut *knowledge {
            Knowledge::Own(replica) => once(replica),
            Knowledge::Arriving(hub, device) => {
                let (hub, device) = (hub.clone(), *device);
                drop(knowledge);
                hub.with_replica(device, &mut once);
            }
        }
        result.expect("a hub looks once at the device that it has")
    }

    /// As [`Volume::with_replica`], when no session has it.
    pub(crate) fn with_own_replica(&self, look: &mut dyn FnMut(&mut Replica)) {
        // A session gives it back right after it has ended.
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            if let Knowledge::Own(replica) = &mut *lock(&self.knowledge) {
                return look(replica);
            }
            assert!(Instant::now() < deadline, "a session that ended has not given a volume back");
            std::thread::park_timeout(Duration::from_millis(1));
        }
    }

    // ---- as a source

    /// `restored`: authority was about to leave, or had left, when this process began.
    pub(crate) fn as_source(&self, restored: bool) -> io::Result<SourceDevice> {
        match self.mode() {
            Mode::Open => {}
            Mode::Paused if restored => {}
            Mode::Paused => return Err(self.busy("is about to leave by another session")),
            Mode::Idle | Mode::Arriving | Mode::Away => {
                let text = format!("device \"{}\" is not in use on this host", self.name);
                return Err(io::Error::new(io::ErrorKind::NotConnected, text));
            }
        }
        let (name, base) = (self.name.clone(), self.base);
        Ok(self.with_replica(|replica| SourceDevice::new(name, base, replica)))
    }

    /// Makes what is here durable, and known to be so: a record made from now on has it.
    pub(crate) fn make_durable(&self) -> io::Result<()> {
        // The session knows what came while it was flushed.
        if let Some((hub, device)) = self.hub() {
            return hub.note(device);
        }
        self.with_replica(Replica::sync_begins);
        let flushed = self.device.flush();
        self.with_replica(|replica| replica.sync_ends(flushed.is_ok()));
        flushed
    }

    /// Reads what is in the device, whoever owns it; the caller knows which blocks are here.
    pub(crate) fn read_raw(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.device.read_at(offset, buf)
    }

    /// Has blocks sent here that are absent.
    pub(crate) fn pull(&self, range: BlockRange, class: Class) {
        if let Some((hub, device)) = self.hub() {
            hub.want(device, range, class);
        } else {
            // All here: nothing will come, and nothing has to.
            self.tell_arrived(range);
        }
    }

    /// Calls back for blocks that come from now on.
    pub(crate) fn on_arrival(&self, listener: OnArrival) {
        lock(&self.listeners).push(listener);
    }

    /// Lets nobody write from here on; who is inside ends in the open round. Of several sessions
    /// that would give it away only one gets so far: else two others could own it.
    pub(crate) fn pause(&self, session: SessionId) -> io::Result<()> {
        {
            let mut leaving = lock(&self.leaving);
            match self.mode() {
                Mode::Open => *leaving = Some(session),
                Mode::Paused if *leaving == Some(session) => {}
                Mode::Paused => return Err(self.busy("is about to leave by another session")),
                Mode::Idle | Mode::Arriving => return Err(self.busy("is not in use on this host")),
                Mode::Away => return Err(self.busy("was given away by another session")),
            }
            self.change(|_| Mode::Paused);
        }
        // Whoever saw it open is inside its round when this is had.
        drop(self.entering.write().unwrap_or_else(PoisonError::into_inner));
        Ok(())
    }

    /// Whether it is this host's, and this session may say so: no other is about to give it away.
    pub(crate) fn is_left_to(&self, session: SessionId) -> bool {
        let leaving = lock(&self.leaving);
        self.is_owned() && leaving.is_none_or(|by| by == session)
    }

    /// What this session has paused goes on.
    pub(crate) fn resume(&self, session: SessionId) {
        let mut leaving = lock(&self.leaving);
        if leaving.is_none_or(|by| by == session) {
            self.change(|mode| if mode == Mode::Paused { Mode::Open } else { mode });
            *leaving = None;
        }
    }

    /// The round that is closed now was the last of this host.
    pub(crate) fn give_away(&self) {
        let last = silo_block::rounds::Epoch(self.rounds().clock().0.saturating_sub(1));
        self.with_replica(|replica| replica.give_away(last));
        self.change(|_| Mode::Away);
    }

    // ---- as a destination

    /// Gives what is known of the blocks to the session by which they come.
    pub(crate) fn arrive(&self, hub: Arc<dyn Hub>, device: u16) -> io::Result<Replica> {
        if self.is_owned() {
            return Err(self.busy("is in use here"));
        }
        let replica = self.give_to(hub, device)?;
        self.change(|_| Mode::Arriving);
        Ok(replica)
    }

    /// As [`Volume::arrive`], to go on with a session whose token came before a restart: a volume
    /// that has all its blocks is open already, and stays so.
    pub(crate) fn arrive_again(&self, hub: Arc<dyn Hub>, device: u16) -> io::Result<Replica> {
        if self.mode() == Mode::Paused {
            return Err(self.busy("is about to leave"));
        }
        let replica = self.give_to(hub, device)?;
        self.change(|mode| if mode == Mode::Open { mode } else { Mode::Arriving });
        Ok(replica)
    }

    fn busy(&self, what: &str) -> io::Error {
        let text = format!("device \"{}\" {what}", self.name);
        io::Error::new(io::ErrorKind::ResourceBusy, text)
    }

    fn give_to(&self, hub: Arc<dyn Hub>, device: u16) -> io::Result<Replica> {
        let mut knowledge = lock(&self.knowledge);
        if matches!(*knowledge, Knowledge::Arriving(..)) {
            return Err(self.busy("is arriving by another session"));
        }
        let Knowledge::Own(replica) =
            std::mem::replace(&mut *knowledge, Knowledge::Arriving(hub, device))
        else {
            unreachable!("looked at above, under the same lock")
        };
        Ok(*replica)
    }

    /// The session is over: what is known is the volume's own again.
    pub(crate) fn settle(&self, replica: Replica) {
        let owned = replica.owner() == Owner::Here;
        let mut knowledge = lock(&self.knowledge);
        *knowledge = Knowledge::Own(Box::new(replica));
        drop(knowledge);
        if !owned {
            self.change(|mode| if mode == Mode::Arriving { Mode::Idle } else { mode });
        }
    }

    /// It is this host's from now on; `absent` blocks are still coming.
    pub(crate) fn open(&self, absent: &BlockSet, rounds: &Arc<Rounds>) {
        let whole = BlockRange::new(0, self.geometry.blocks());
        self.here.insert(whole);
        absent.ranges().for_each(|range| self.here.remove(range));
        *lock(&self.rounds) = rounds.clone();
        *lock(&self.leaving) = None;
        self.change(|_| Mode::Open);
    }

    /// It could not be used here after all.
    pub(crate) fn close(&self) {
        self.change(|_| Mode::Arriving);
    }

    /// Stores content that has come.
    pub(crate) fn store(&self, offset: u64, content: &[u8]) -> io::Result<()> {
        if let Some(blank) = &self.blank {
            blank.remove(self.geometry.touched(offset, content.len() as u64));
        }
        self.device.write_at(offset, content)
    }

    /// Stores zeros that have come. Where nothing was ever stored there are zeros.
    pub(crate) fn store_zeros(&self, offset: u64, length: u64) -> io::Result<()> {
        let touched = self.geometry.touched(offset, length);
        if self.blank.as_ref().is_some_and(|blank| blank.has(touched)) {
            return Ok(());
        }
        self.device.zero(offset, length, false)
    }

    /// Blocks have come. Called under the lock of the machine that says so: said later, it could be
    /// of a block that a list has made absent since, and what was there before would be read, and
    /// written to, as if it were the newest.
    pub(crate) fn arrived(&self, range: BlockRange) {
        self.here.insert(range);
    }

    /// Tells those who wait for blocks that these have come, less those that are absent again.
    pub(crate) fn tell_arrived(&self, range: BlockRange) {
        let mut listeners = lock(&self.listeners);
        if self.here.has(range) {
            listeners.retain(|listener| listener(range));
            return;
        }
        for block in range.chunks(1).filter(|block| self.here.has(*block)) {
            listeners.retain(|listener| listener(block));
        }
    }

    pub(crate) fn raw(&self) -> &dyn BlockDevice {
        &*self.device
    }

    /// Whether a session has not ended by which it comes.
    pub(crate) fn is_arriving(&self) -> bool {
        self.hub().is_some()
    }

    fn hub(&self) -> Option<(Arc<dyn Hub>, u16)> {
        match &*lock(&self.knowledge) {
            Knowledge::Own(_) => None,
            Knowledge::Arriving(hub, device) => Some((hub.clone(), *device)),
        }
    }

    fn mode(&self) -> Mode {
        Mode::of(self.mode.load(Ordering::SeqCst))
    }

    fn change(&self, to: impl Fn(Mode) -> Mode) {
        let guard = lock(&self.waiting);
        self.mode.store(to(self.mode()) as u8, Ordering::SeqCst);
        self.changed.notify_all();
        drop(guard);
    }
}

fn geometry_of(device: &dyn BlockDevice, block: u32) -> io::Result<Geometry> {
    Geometry::new(device.size(), block)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error.to_string()))
}

/// Calls `each` with the parts of a device that are not holes.
pub(crate) fn for_each_data(
    device: &dyn BlockDevice,
    mut each: impl FnMut(u64, u64),
) -> io::Result<()> {
    let (mut offset, size) = (0, device.size());
    while offset < size {
        let runs = device.extents(offset, LOOK.min(size - offset))?;
        if runs.is_empty() {
            return Err(io::Error::other("a device without extents"));
        }
        for run in runs {
            if run.allocation == Allocation::Data {
                each(offset, run.length);
            }
            offset += run.length;
        }
    }
    Ok(())
}
