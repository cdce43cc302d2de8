//! A disk that moves: copy-on-write over a read-only base, tracked, and served while blocks are
//! still on their way.
//!
//! Who calls it: the block server ([`nbd`](crate::nbd)) for the guest's reads and writes, the
//! migration engine through [`Device`](crate::device::Device), and the runner for everything that
//! concerns the disk as a whole (open, freeze, flush policy, identity).
//!
//! # Files
//!
//! A disk is a folder, open in one process at a time:
//!
//! | file | what |
//! |---|---|
//! | `data` | the overlay's content, sparse, as long as the disk |
//! | `journal` | which block is where as of the last flush; survives a crash of the host |
//! | `runtime` | which block is where right now; survives the death of this process |
//! | `identity.json` | machine, epoch, hash of the base; silo keeps it, the runner writes it |
//! | `lock` | held while the disk is open |
//! | `below`, `below.json` | of a copy of a machine: a layer between base and overlay ([`Layer`]) |
//!
//! # What holds
//!
//! - A write that was answered survives `kill -9` of this process; one that was flushed survives a
//!   crash of the host (`I6`). After a crash a block holds what it held at the last flush, or
//!   something that was written to it since.
//! - A block changes its state only after the content that the new state promises is in place; so
//!   a crash between any two steps shows the old content or the new one.
//! - A block that is missing is never read from the base or from what an older visit left. What
//!   the guest writes here wins over what arrives later (`I3`).
//! - A disk that is being received, or lacks blocks, says so when it is opened again
//!   ([`DiskError::Incomplete`]), after a crash of the host too.
//! - A frozen disk takes no write from its guest.
//!
//! # Life of a disk at a destination
//!
//! ```text
//!  create ──► Whole ──reset/store──► Receiving ──arm──► Armed ──complete──► Whole
//!             guest may write        guest may read      guest runs,          as if it had
//!                                    (no promise what)   missing blocks wait  always been here
//! ```
//!
//! [`reset`](crate::device::Device::reset) is called when a move begins, not at its end: it makes
//! durable that the disk is being received, so that `arm`, inside the blackout, syncs nothing.
//! Before `arm` the guest's writes are refused, and reads return whatever is there: QEMU reads the
//! first sector as soon as it connects.

mod arrivals;
mod below;
mod error;
mod guest;
mod identity;
mod inspect;
mod moving;
mod store;
mod sync;

#[cfg(test)]
mod tests;

pub use crate::map::{BlockState, BootId, DiskStatus};
pub use below::Layer;
pub use error::DiskError;
pub use identity::Identity;
pub use inspect::{Inspection, inspect};
pub use sync::FlushPolicy;

use crate::{
    device::{Device as _, DeviceName},
    hash::RootHash,
    locks::RangeLocks,
    map::AtomicBits,
};
use arrivals::Arrivals;
use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};
use store::Store;
use sync::Flusher;

/// The most blocks that a disk may have: 1 TiB. The maps in memory cost a byte per block.
pub const MAX_BLOCKS: u64 = crate::map::MAX_BLOCKS;

/// What a disk needs to know besides its files.
#[derive(Clone, Debug)]
pub struct DiskOptions {
    /// The device's name inside its group.
    pub name: DeviceName,
    /// How long a read waits for a block that has not arrived before it fails.
    pub arrival_limit: Duration,
    /// How long a flush waits for its sync before it fails.
    pub flush_limit: Duration,
    /// Open a disk that is incomplete, to go on receiving it or to look into it.
    pub accept_incomplete: bool,
    /// The hash that the base must have: compared with the disk's [`Identity`] when it has one,
    /// not computed.
    pub base_hash: Option<RootHash>,
    /// This boot of this host; `None`: ask the kernel.
    pub boot: Option<BootId>,
}

impl DiskOptions {
    /// The usual: a day for a block to arrive, an hour for a sync, whole disks only.
    #[must_use]
    pub fn new(name: DeviceName) -> Self {
        Self {
            name,
            arrival_limit: Duration::from_secs(24 * 3600),
            flush_limit: Duration::from_secs(3600),
            accept_incomplete: false,
            base_hash: None,
            boot: None,
        }
    }
}

/// An open disk. See the [module](self) for what holds.
///
/// Dropping it closes its files without a sync, as the death of the process would.
pub struct Disk {
    name: DeviceName,
    // Before the store, whose files its thread syncs.
    flusher: Flusher,
    store: Arc<Store>,
    locks: RangeLocks,
    arrivals: Arrivals,
    /// Blocks that the guest changed since the mover last asked.
    dirty: AtomicBits,
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Disk({} in {})", self.name, self.store.dir().display())
    }
}

impl Disk {
    /// Makes a disk in the folder `dir`: over `base`, or all zeros without one. `bytes` is its
    /// size, rounded up to whole blocks; 0 takes that of the base.
    ///
    /// # Errors
    /// If there is a disk already, the size is impossible, or a file cannot be written.
    pub fn create(
        dir: &Path,
        base: Option<&Path>,
        bytes: u64,
        options: &DiskOptions,
    ) -> Result<Self, DiskError> {
        let store = Store::create(dir, base, bytes, options)?;
        Self::start(store, false, options)
    }

    /// Opens a disk, with the base it was created over.
    ///
    /// # Errors
    /// If another process has it open, its files are damaged, the base is another one, or it is
    /// incomplete and the options do not accept that.
    pub fn open(dir: &Path, base: Option<&Path>, options: &DiskOptions) -> Result<Self, DiskError> {
        let (store, frozen) = Store::open(dir, base, options)?;
        let identity = identity::read(dir)?;
        let known = identity.and_then(|identity| identity.base);
        if let (Some(created), Some(given)) = (known, options.base_hash)
            && created != given
        {
            return Err(DiskError::WrongBase {
                path: dir.to_owned(),
                base: base.map_or_else(|| PathBuf::from("no base"), Path::to_owned),
                created: format!("one with hash {created}"),
                given: format!("one with hash {given}"),
            });
        }
        let disk = Self::start(store, frozen, options)?;
        if !options.accept_incomplete && !disk.is_complete() {
            let state = match disk.status() {
                DiskStatus::Armed => format!("{} blocks never arrived", disk.missing_blocks()),
                _ => "a transfer to this host did not end".to_owned(),
            };
            return Err(DiskError::Incomplete { path: dir.to_owned(), state });
        }
        Ok(disk)
    }

    fn start(store: Store, frozen: bool, options: &DiskOptions) -> Result<Self, DiskError> {
        let store = Arc::new(store);
        let blocks = store.blocks();
        let flusher = Flusher::new(store.clone(), options.flush_limit)
            .map_err(DiskError::io("start a thread for", store.dir()))?;
        Ok(Self {
            name: options.name.clone(),
            flusher,
            store,
            locks: RangeLocks::new(frozen),
            arrivals: Arrivals::new(blocks, options.arrival_limit),
            dirty: AtomicBits::new(blocks),
        })
    }

    /// The folder it lies in.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.store.dir()
    }

    /// Size in bytes, whole blocks.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.store.bytes()
    }

    /// How far it is from being usable on its own.
    #[must_use]
    pub fn status(&self) -> DiskStatus {
        self.store.status()
    }

    /// Whether everything is here, and known to be.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.status() == DiskStatus::Whole
    }

    /// Bytes that the overlay takes on this host.
    ///
    /// # Errors
    /// If the file system does not say.
    pub fn allocated_bytes(&self) -> Result<u64, DiskError> {
        self.store.allocated_bytes()
    }

    /// Whose disk this is; `None` if nobody has said so yet.
    ///
    /// # Errors
    /// If the file is damaged or of another version.
    pub fn identity(&self) -> Result<Option<Identity>, DiskError> {
        identity::read(self.store.dir())
    }

    /// Writes whose disk this is, as a whole or not at all; durable on return.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn set_identity(&self, identity: &Identity) -> Result<(), DiskError> {
        identity::write(self.store.dir(), identity)
    }

    // ---- flushes

    /// Makes everything durable that was written before the call, whatever the policy. While the
    /// guest runs it makes the flush of the switchover small.
    ///
    /// # Errors
    /// If the file system fails; see [`DiskError::SyncLost`].
    pub fn sync(&self) -> Result<(), DiskError> {
        self.flusher.sync()
    }

    /// As the guest asks for it: by the policy.
    ///
    /// # Errors
    /// As [`Disk::sync`].
    pub fn flush(&self) -> Result<(), DiskError> {
        self.flusher.flush()
    }

    /// Sets when the guest's flushes are answered; forgets an earlier [`Disk::answer_now`].
    pub fn set_flush_policy(&self, policy: FlushPolicy) {
        self.flusher.set_policy(policy);
    }

    /// Under [`FlushPolicy::Switchover`]: answers flushes before they are durable, those that wait
    /// and those that come. Only while the guest's processors stand still.
    pub fn answer_now(&self) {
        self.flusher.answer_now();
    }

    /// Waits until everything is durable that a flush was answered for.
    ///
    /// # Errors
    /// If a sync fails or `deadline` passes.
    pub fn wait_durable(&self, deadline: Instant) -> Result<(), DiskError> {
        self.flusher.wait_durable(deadline)
    }

    // ---- authority

    /// Refuses the guest's writes from now on, and waits for those that are under way: when this
    /// returns, the content stays as it is. Survives the death of this process, not a crash of the
    /// host (then the guest is gone too, and the lease decides).
    ///
    /// # Errors
    /// If a write does not end within `limit`, or the freeze cannot be noted. The disk is frozen
    /// all the same, except for the write under way.
    pub fn freeze(&self, limit: Duration) -> Result<(), DiskError> {
        self.locks.freeze(limit)?;
        self.store.set_frozen(true)
    }

    /// Takes the guest's writes again: the move was called off.
    ///
    /// # Errors
    /// If the thaw cannot be noted; then the disk stays frozen.
    pub fn thaw(&self) -> Result<(), DiskError> {
        self.store.set_frozen(false)?;
        self.locks.thaw();
        Ok(())
    }

    /// Whether the guest's writes are refused.
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        self.locks.is_frozen()
    }

    /// Ends every wait for a missing block with an error: the server or the move ends.
    pub fn interrupt(&self) {
        self.arrivals.interrupt();
    }
}
