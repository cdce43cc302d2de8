//! The two ends of a device that moves. Memory and disks differ here and nowhere else: the engine
//! that moves blocks (drafter's `migrate`) sees only these traits.
//!
//! A device is a *source* while its guest runs here or its frozen content is served from here, and
//! a *destination* while its blocks arrive. One object implements both, because a destination
//! becomes a source when the machine moves on:
//!
//! ```text
//!  source:       start_tracking → (take_dirty → read …)* → frozen, read on demand
//!  destination:  (store …)* → arm(missing) → guest runs → (fill …)* → complete
//! ```

use crate::block::{BlockIndex, BlockRange, BlockSet};
use std::io;

/// A device's name inside its group, as in the package manifest: `memory`, `root`, `data-1`.
/// At most 64 bytes of `[a-z0-9-]`, so that it is safe in file names and in messages.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceName(String);

impl DeviceName {
    /// Checks and takes a name; `None` if it breaks the rule above.
    #[must_use]
    pub fn new(name: &str) -> Option<Self> {
        let fits = !name.is_empty() && name.len() <= 64;
        let clean = name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        (fits && clean).then(|| Self(name.to_owned()))
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for DeviceName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// What went wrong with a device, for people: names the device and the operation.
#[derive(Debug, thiserror::Error)]
#[error("device \"{device}\": {operation} failed at {at}: {source}")]
pub struct DeviceError {
    /// The device.
    pub device: DeviceName,
    /// What was attempted: "read", "fill", …
    pub operation: &'static str,
    /// The block or phase, as text.
    pub at: String,
    /// The cause.
    pub source: io::Error,
}

/// Short form for results of this module.
pub type Result<T, E = DeviceError> = std::result::Result<T, E>;

/// Called on the thread that needs a block that has not arrived. It must not block: it hands the
/// request to the connection and returns. The answer comes later by [`Device::fill`].
pub type Demand = Box<dyn Fn(BlockRange) + Send + Sync>;

/// A device that can be read, tracked and moved. All methods may be called from several threads.
pub trait Device: Send + Sync {
    /// The name inside the group.
    fn name(&self) -> &DeviceName;

    /// Size in blocks.
    fn blocks(&self) -> u64;

    // ---- source end

    /// Starts tracking (again): from the return of this call every write by the guest is seen by
    /// a later [`Device::take_dirty`]. What was tracked before is forgotten.
    fn start_tracking(&self) -> Result<()>;

    /// The blocks written since tracking started or since the last call, and tracks them anew.
    /// A block that [`Device::store`] or [`Device::fill`] wrote is not in it.
    fn take_dirty(&self) -> Result<BlockSet>;

    /// Gives blocks back, so that the next [`Device::take_dirty`] reports them again (an aborted
    /// move loses nothing).
    fn put_back(&self, blocks: &BlockSet);

    /// The blocks that may differ from what an untouched destination starts with: zeros for
    /// memory, the package's base for a disk.
    fn allocated(&self) -> Result<BlockSet>;

    /// Reads whole blocks; `buf` is a multiple of the block size. Fails on a block that has not
    /// arrived here yet; never allocates or changes anything.
    fn read(&self, start: BlockIndex, buf: &mut [u8]) -> Result<()>;

    // ---- destination end

    /// An arrival begins: what is here may be overwritten, and is whole again only after
    /// [`Device::complete`]. A disk notes that durably now, so that nothing of it has to be
    /// written during the blackout.
    fn begin(&self) -> Result<()> {
        Ok(())
    }

    /// Forgets everything, back to what an untouched destination starts with.
    fn reset(&self) -> Result<()>;

    /// Writes whole blocks before the guest runs here; overwrites.
    fn store(&self, start: BlockIndex, data: &[u8]) -> Result<()>;

    /// Makes blocks zero before the guest runs here; overwrites.
    fn store_zero(&self, range: BlockRange) -> Result<()>;

    /// These blocks will be missing when the device is armed, and nothing is stored to them before
    /// that: drops their content early, while there is time. A hint, which need not be taken.
    fn discard(&self, _range: BlockRange) -> Result<()> {
        Ok(())
    }

    /// The last call before the guest runs here: `missing` blocks are stale, their content is
    /// dropped and from now on whoever touches one waits, while `demand` is called for it. Starts
    /// tracking as by [`Device::start_tracking`]: what the guest writes from now on is dirty, what
    /// arrives is not.
    fn arm(&self, missing: &BlockSet, demand: Demand) -> Result<()>;

    /// Whole blocks that arrived after [`Device::arm`]. Only blocks still missing are taken (a
    /// late or doubled answer changes nothing). Wakes whoever waits. Returns how many were taken.
    fn fill(&self, start: BlockIndex, data: &[u8]) -> Result<u64>;

    /// As [`Device::fill`], with zeros.
    fn fill_zero(&self, range: BlockRange) -> Result<u64>;

    /// The blocks still missing.
    fn missing(&self) -> BlockSet;

    /// How many blocks are still missing; cheaper than the set.
    fn missing_blocks(&self) -> u64 {
        self.missing().len()
    }

    /// Nothing is missing any more: makes the content durable where the device is (a disk syncs)
    /// and lets accesses go without the detour over the fault service.
    fn complete(&self) -> Result<()>;
}
