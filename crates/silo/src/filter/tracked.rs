//! A device whose writes are counted in rounds: what moves and backups take their dirty blocks from.

use crate::{geometry::Geometry, io::BlockDevice};
use silo_block::rounds::Rounds;
use std::{io, sync::Arc};

/// Every change of the device below is in exactly one round of its [`Rounds`].
pub struct Tracked {
    inner: Arc<dyn BlockDevice>,
    geometry: Geometry,
    rounds: Arc<Rounds>,
}

impl Tracked {
    /// Over `inner`, in blocks of `block` bytes.
    ///
    /// # Errors
    /// If the block size is not possible.
    pub fn new(
        inner: Arc<dyn BlockDevice>,
        block: u32,
    ) -> Result<Self, crate::geometry::GeometryError> {
        let geometry = Geometry::new(inner.size(), block)?;
        let rounds = Arc::new(Rounds::new(geometry.blocks()));
        Ok(Self { inner, geometry, rounds })
    }

    /// The clock and the epochs, to take rounds from.
    #[must_use]
    pub fn rounds(&self) -> &Arc<Rounds> {
        &self.rounds
    }

    /// Size, and the blocks that are counted.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }
}

impl BlockDevice for Tracked {
    forward!(inner: size read_at try_read_at may_wait flush interrupt extents prefetch zeroes_fast is_read_only);

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let _round = self.rounds.write(self.geometry.touched(offset, data.len() as u64));
        self.inner.write_at(offset, data)
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        let _round = self.rounds.write(self.geometry.touched(offset, length));
        self.inner.trim(offset, length)
    }

    fn zero(&self, offset: u64, length: u64, allocate: bool) -> io::Result<()> {
        let _round = self.rounds.write(self.geometry.touched(offset, length));
        self.inner.zero(offset, length, allocate)
    }
}
