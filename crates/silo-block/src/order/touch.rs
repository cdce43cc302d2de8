//! The order in which blocks were first used: recorded where a machine ran, shipped with it or kept
//! with its package, and fetched in that order where it starts next.

use crate::block::{BlockIndex, BlockRange, BlockSet};

/// Most blocks in a manifest: what a start touches, not a whole device.
pub const MAX_TOUCHES: usize = 1 << 20;
const MAGIC: [u8; 4] = *b"SLFT";
const VERSION: u8 = 1;

/// Records first uses.
#[derive(Debug)]
pub struct FirstTouch {
    seen: BlockSet,
    order: Vec<BlockRange>,
    touched: usize,
}

impl FirstTouch {
    /// For a device of `blocks` blocks.
    #[must_use]
    pub fn new(blocks: u64) -> Self {
        Self { seen: BlockSet::new(blocks), order: Vec::new(), touched: 0 }
    }

    /// Blocks were used. Only the first use of each counts, and only [`MAX_TOUCHES`] of them.
    pub fn touched(&mut self, range: BlockRange) {
        let end = range.end().min(self.seen.device_blocks());
        for block in range.start.0..end {
            if self.touched >= MAX_TOUCHES || !self.seen.insert(BlockIndex(block)) {
                continue;
            }
            self.touched += 1;
            match self.order.last_mut() {
                Some(last) if last.end() == block => last.count += 1,
                _ => self.order.push(BlockRange::new(block, 1)),
            }
        }
    }

    /// What was recorded so far.
    #[must_use]
    pub fn manifest(&self) -> Manifest {
        Manifest { blocks: self.seen.device_blocks(), order: self.order.clone() }
    }
}

/// The recorded order of one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// Size of the device, in blocks.
    pub blocks: u64,
    /// First used first; no block twice.
    pub order: Vec<BlockRange>,
}

/// Bytes that are not a manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// Something else.
    #[error("not a first-touch manifest")]
    Foreign,
    /// Another version.
    #[error("a first-touch manifest of version {0}; this release reads version {VERSION}")]
    Version(u8),
    /// Cut off, or numbers that cannot be.
    #[error("the first-touch manifest is damaged at byte {0}; record it again")]
    Damaged(usize),
}

impl Manifest {
    /// As bytes: magic, version, then varints: blocks of the device, number of runs, and for each
    /// run the distance from the end of the run before (zigzag) and its length.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(16 + self.order.len() * 3);
        out.extend_from_slice(&MAGIC);
        out.push(VERSION);
        put(&mut out, self.blocks);
        put(&mut out, self.order.len() as u64);
        let mut at = 0i64;
        for range in &self.order {
            let step = range.start.0 as i64 - at;
            put(&mut out, ((step << 1) ^ (step >> 63)) as u64);
            put(&mut out, range.count);
            at = range.end() as i64;
        }
        out
    }

    /// From bytes, which may be anything.
    ///
    /// # Errors
    /// If they are not a whole manifest of this version. Memory is bounded by the bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
        let head = bytes.get(..5).ok_or(ManifestError::Foreign)?;
        if head[..4] != MAGIC {
            return Err(ManifestError::Foreign);
        }
        if head[4] != VERSION {
            return Err(ManifestError::Version(head[4]));
        }
        let mut at = 5;
        let damaged = |at: usize| ManifestError::Damaged(at);
        let blocks = get(bytes, &mut at).ok_or(damaged(at))?;
        let runs = get(bytes, &mut at).ok_or(damaged(at))?;
        if blocks > u64::from(u32::MAX) || runs > ((bytes.len() - at) / 2) as u64 {
            return Err(damaged(at));
        }
        let (mut order, mut end, mut total) = (Vec::with_capacity(runs as usize), 0i64, 0u64);
        for _ in 0..runs {
            let start_of = at;
            let step = get(bytes, &mut at).ok_or(damaged(at))?;
            let count = get(bytes, &mut at).ok_or(damaged(at))?;
            let step = (step >> 1) as i64 ^ -((step & 1) as i64);
            let start = end.checked_add(step).filter(|start| *start >= 0);
            let start = start.ok_or(damaged(start_of))? as u64;
            let stop = start.checked_add(count).filter(|stop| count > 0 && *stop <= blocks);
            end = stop.ok_or(damaged(start_of))? as i64;
            total += count;
            if total > MAX_TOUCHES as u64 {
                return Err(damaged(start_of));
            }
            order.push(BlockRange::new(start, count));
        }
        if at == bytes.len() { Ok(Self { blocks, order }) } else { Err(damaged(at)) }
    }
}

fn put(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn get(bytes: &[u8], at: &mut usize) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let byte = *bytes.get(*at)?;
        *at += 1;
        let part = u64::from(byte & 0x7f);
        if shift == 63 && part > 1 {
            return None;
        }
        value |= part << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}
