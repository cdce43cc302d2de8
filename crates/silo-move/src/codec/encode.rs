//! From content to parcel.

use super::{
    COUNT, Chooser, HASH, Method, Naming, PATTERN, SPAN, choose::entropy, kind, repeats::Repeats,
    xor,
};
use silo_block::{
    block::{BlockIndex, is_zero},
    session::messages::BlockHash,
};
use std::{io::IoSlice, ops::Range, time::Instant};
use twox_hash::XxHash3_64;

/// Fewer bytes than this are not worth compressing.
const SMALL: usize = 256;
/// Length of a sample.
const SAMPLE: usize = 4096;
/// zstd's fastest level with its full format.
const LEVEL: i32 = 1;

/// What the caller knows about blocks, asked once for each block that is not zero.
pub trait Known {
    /// The hash that was advertised for the block's present epoch: if the content has it, only
    /// the hash is sent.
    fn advertised(&self, _block: BlockIndex) -> Option<BlockHash> {
        None
    }

    /// Whether the content of `earlier`, sent before on this connection, is `content` now.
    fn is_same(&self, _earlier: BlockIndex, _content: &[u8]) -> bool {
        false
    }

    /// The last version sent, if the destination is known to have it.
    fn last_version(&self, _block: BlockIndex, _into: &mut [u8]) -> bool {
        false
    }
}

/// Nothing is known: no reference to other bytes is sent.
pub struct NothingKnown;

impl Known for NothingKnown {}

/// How many blocks went which way, and their bytes on the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Zero.
    pub zero: u64,
    /// One pattern all through.
    pub fill: u64,
    /// Same as an earlier block.
    pub same: u64,
    /// Hash only.
    pub held: u64,
    /// As they are.
    pub plain: u64,
    /// LZ4 or zstd.
    pub packed: u64,
    /// As difference.
    pub delta: u64,
    /// Length of the parcels.
    pub bytes: u64,
    /// Length of the content, in bytes of the device.
    pub content: u64,
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.zero += other.zero;
        self.fill += other.fill;
        self.same += other.same;
        self.held += other.held;
        self.plain += other.plain;
        self.packed += other.packed;
        self.delta += other.delta;
        self.bytes += other.bytes;
        self.content += other.content;
    }
}

#[derive(Clone, Debug)]
enum Part {
    /// Bytes of the run itself.
    Content(Range<usize>),
    /// Bytes made here.
    Made(Range<usize>),
}

/// An encoded run: bytes made here, and references into the run that it was made of.
pub struct Parcel<'a> {
    table: &'a [u8],
    parts: &'a [Part],
    made: &'a [u8],
    content: &'a [u8],
    /// What is in it.
    pub tally: Tally,
}

impl<'a> Parcel<'a> {
    /// Length on the wire.
    #[must_use]
    pub fn length(&self) -> usize {
        self.tally.bytes as usize
    }

    /// The bytes in order.
    pub fn slices(&self) -> impl Iterator<Item = &'a [u8]> + '_ {
        std::iter::once(self.table).chain(self.parts.iter().map(|part| match part {
            Part::Content(range) => &self.content[range.clone()],
            Part::Made(range) => &self.made[range.clone()],
        }))
    }

    /// The bytes in one piece; for tests and small parcels.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        self.slices().flatten().copied().collect()
    }

    /// As arguments of a vectored write.
    #[must_use]
    pub fn io_slices(&self) -> Vec<IoSlice<'a>> {
        self.slices().map(IoSlice::new).collect()
    }
}

/// What a block turned out to be; neighbours of one kind make a span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    Zero,
    Fill([u8; PATTERN]),
    Same,
    Held,
    Delta,
    Other,
}

/// The parcel of `blocks` blocks that are known to be zero.
#[must_use]
pub fn zeros(blocks: u32) -> [u8; COUNT + SPAN] {
    let mut parcel = [0; COUNT + SPAN];
    parcel[0] = 1;
    parcel[COUNT] = kind::ZERO;
    parcel[COUNT + 4..COUNT + 8].copy_from_slice(&blocks.to_le_bytes());
    parcel
}

/// Encodes the runs of one connection. Keeps its buffers.
pub struct Encoder {
    chooser: Chooser,
    repeats: Repeats,
    lz4: lz4_flex::block::CompressTable,
    zstd: Option<zstd::bulk::Compressor<'static>>,
    table: Vec<u8>,
    parts: Vec<Part>,
    made: Vec<u8>,
    base: Vec<u8>,
    difference: Vec<u8>,
    packed: Vec<u8>,
    tally: Tally,
    spans: u16,
    /// Forces one method, for measuring.
    forced: Option<Method>,
    naming: Naming,
}

impl Default for Encoder {
    fn default() -> Self {
        Self::new(None)
    }
}

impl Encoder {
    /// `forced`: always this method; by default it is chosen by measurement.
    #[must_use]
    pub fn new(forced: Option<Method>) -> Self {
        Self {
            chooser: Chooser::default(),
            repeats: Repeats::new(),
            lz4: lz4_flex::block::CompressTable::large(),
            zstd: None,
            table: Vec::new(),
            parts: Vec::new(),
            made: Vec::new(),
            base: Vec::new(),
            difference: Vec::new(),
            packed: Vec::new(),
            tally: Tally::default(),
            spans: 0,
            forced,
            naming: Naming::Plain,
        }
    }

    /// How advertised hashes are made.
    #[must_use]
    pub fn with_naming(mut self, naming: Naming) -> Self {
        self.naming = naming;
        self
    }

    /// Where speeds are told.
    pub fn chooser(&mut self) -> &mut Chooser {
        &mut self.chooser
    }

    /// Encodes `content`: blocks of `block` bytes of `device` from `start`, at most
    /// [`MAX_BLOCKS`](super::MAX_BLOCKS) of them, the last possibly short.
    pub fn encode<'a>(
        &'a mut self,
        device: u16,
        start: BlockIndex,
        block: usize,
        content: &'a [u8],
        known: &dyn Known,
    ) -> Parcel<'a> {
        debug_assert!(content.len().div_ceil(block) <= super::MAX_BLOCKS);
        self.table.clear();
        self.table.extend_from_slice(&[0; COUNT]);
        self.parts.clear();
        self.made.clear();
        self.difference.clear();
        (self.tally, self.spans) = (Tally::default(), 0);

        let mut at = 0;
        // A span of neighbours that were found alike: what, and from where.
        let mut open: Option<(Found, usize)> = None;
        while at < content.len() {
            let end = (at + block).min(content.len());
            let index = BlockIndex(start.0 + (at / block) as u64);
            let here = &content[at..end];
            let mut made = [0; super::SAME];
            let found = self.look(device, index, here, known, &mut made);
            let merges = matches!(&open, Some((kind, _)) if *kind == found && found != Found::Same);
            if !merges {
                if let Some((kind, from)) = open.take() {
                    self.close(kind, from..at, block, content);
                }
                open = Some((found, at));
            }
            match found {
                Found::Same => self.made.extend_from_slice(&made),
                Found::Held => self.made.extend_from_slice(&made[..HASH]),
                Found::Delta => {
                    let from = self.difference.len();
                    self.difference.extend_from_slice(&self.base[..here.len()]);
                    xor(&mut self.difference[from..], here);
                }
                Found::Zero | Found::Fill(_) | Found::Other => {}
            }
            at = end;
        }
        if let Some((kind, from)) = open {
            self.close(kind, from..content.len(), block, content);
        }
        self.table[..COUNT].copy_from_slice(&self.spans.to_le_bytes());
        self.tally.bytes += self.table.len() as u64;
        Parcel {
            table: &self.table,
            parts: &self.parts,
            made: &self.made,
            content,
            tally: self.tally,
        }
    }

    fn look(
        &mut self,
        device: u16,
        index: BlockIndex,
        content: &[u8],
        known: &dyn Known,
        made: &mut [u8; super::SAME],
    ) -> Found {
        if is_zero(content) {
            return Found::Zero;
        }
        if content.len() > PATTERN && content[PATTERN..] == content[..content.len() - PATTERN] {
            return content.first_chunk().map_or(Found::Other, |pattern| Found::Fill(*pattern));
        }
        // The reference must be smaller than what it stands for.
        if content.len() > HASH + SPAN
            && let Some(hash) = known.advertised(index)
            && self.naming.name(content) == hash
        {
            made[..HASH].copy_from_slice(&hash.0);
            return Found::Held;
        }
        self.base.resize(content.len(), 0);
        if known.last_version(index, &mut self.base[..content.len()]) {
            return Found::Delta;
        }
        if content.len() > 2 * super::SAME
            && let Some(earlier) = self.repeats.note(device, index, content)
        {
            if known.is_same(earlier, content) {
                made[..8].copy_from_slice(&earlier.0.to_le_bytes());
                made[8..].copy_from_slice(blake3::hash(content).as_bytes());
                return Found::Same;
            }
            self.repeats.replace(device, index, content);
        }
        Found::Other
    }

    fn close(&mut self, found: Found, bytes: Range<usize>, block: usize, content: &[u8]) {
        let blocks = bytes.len().div_ceil(block);
        match found {
            Found::Zero => {
                self.tally.zero += blocks as u64;
                self.span(kind::ZERO, blocks, None);
            }
            Found::Fill(pattern) => {
                self.tally.fill += blocks as u64;
                let from = self.made.len();
                self.made.extend_from_slice(&pattern);
                self.span(kind::FILL, blocks, Some(Part::Made(from..from + PATTERN)));
            }
            Found::Same => {
                self.tally.same += 1;
                let end = self.made.len();
                self.span(kind::SAME, 1, Some(Part::Made(end - super::SAME..end)));
            }
            Found::Held => {
                self.tally.held += blocks as u64;
                let end = self.made.len();
                self.span(kind::HELD, blocks, Some(Part::Made(end - blocks * HASH..end)));
            }
            Found::Delta => self.close_delta(bytes, blocks, content),
            Found::Other => self.close_other(bytes, blocks, content),
        }
    }

    fn close_other(&mut self, bytes: Range<usize>, blocks: usize, content: &[u8]) {
        let method = self.method(&content[bytes.clone()]);
        if method != Method::Plain && self.pack(method, &content[bytes.clone()]) {
            self.tally.packed += blocks as u64;
            let from = self.made.len();
            self.made.extend_from_slice(&self.packed);
            let kind = if method == Method::Lz4 { kind::LZ4 } else { kind::ZSTD };
            self.span(kind, blocks, Some(Part::Made(from..self.made.len())));
            return;
        }
        self.tally.plain += blocks as u64;
        if !self.lengthen(blocks, &bytes) {
            self.span(kind::PLAIN, blocks, Some(Part::Content(bytes)));
        }
    }

    /// Makes the last span longer, if it is plain too: neighbours that were found different (a
    /// difference that does not pack, say) would else cost a span each.
    fn lengthen(&mut self, blocks: usize, bytes: &Range<usize>) -> bool {
        let Some(Part::Content(last)) = self.parts.last_mut() else { return false };
        let at = self.table.len() - SPAN;
        if self.table[at] != kind::PLAIN || last.end != bytes.start {
            return false;
        }
        last.end = bytes.end;
        let length = last.len() as u32;
        let (_, numbers) = self.table[at..].split_at_mut(4);
        let (count, room) = numbers.split_at_mut(4);
        let before = u32::from_le_bytes([count[0], count[1], count[2], count[3]]);
        count.copy_from_slice(&(before + blocks as u32).to_le_bytes());
        room.copy_from_slice(&length.to_le_bytes());
        self.tally.bytes += bytes.len() as u64;
        true
    }

    fn close_delta(&mut self, bytes: Range<usize>, blocks: usize, content: &[u8]) {
        let difference = std::mem::take(&mut self.difference);
        // Differences are mostly zeros, which LZ4 packs as fast as memory; zstd where the line is
        // so slow that even plain content would be packed by it.
        let method = match self.forced {
            Some(Method::Zstd) => Method::Zstd,
            None if self.chooser.line() < 5e7 => Method::Zstd,
            _ => Method::Lz4,
        };
        let packs = self.pack(method, &difference);
        self.difference = difference;
        self.difference.clear();
        if !packs {
            return self.close_other(bytes, blocks, content);
        }
        self.tally.delta += blocks as u64;
        let from = self.made.len();
        self.made.extend_from_slice(&XxHash3_64::oneshot(&content[bytes]).to_le_bytes());
        self.made.extend_from_slice(&self.packed);
        let kind = if method == Method::Lz4 { kind::DELTA_LZ4 } else { kind::DELTA_ZSTD };
        self.span(kind, blocks, Some(Part::Made(from..self.made.len())));
    }

    fn span(&mut self, kind: u8, blocks: usize, part: Option<Part>) {
        let length = match &part {
            None => 0,
            Some(Part::Content(range) | Part::Made(range)) => range.len(),
        };
        self.table.extend_from_slice(&[kind, 0, 0, 0]);
        self.table.extend_from_slice(&(blocks as u32).to_le_bytes());
        self.table.extend_from_slice(&(length as u32).to_le_bytes());
        self.parts.extend(part);
        self.spans += 1;
        self.tally.bytes += length as u64;
    }

    /// Which method for these bytes.
    fn method(&mut self, content: &[u8]) -> Method {
        if content.len() < SMALL {
            return Method::Plain;
        }
        if let Some(forced) = self.forced {
            return forced;
        }
        if self.chooser.wants_sample() {
            let from = (content.len() - content.len().min(SAMPLE)) / 2;
            let sample = &content[from..from + content.len().min(SAMPLE)];
            let started = Instant::now();
            let length = self.lz4(sample);
            self.chooser.packed(Method::Lz4, sample.len(), length, started.elapsed());
            self.chooser.sampled(sample.len(), length, entropy(sample));
        }
        self.chooser.choose()
    }

    /// Compresses into `self.packed`; false if that does not pay.
    fn pack(&mut self, method: Method, content: &[u8]) -> bool {
        let started = Instant::now();
        let length = match method {
            Method::Plain => return false,
            Method::Lz4 => self.lz4(content),
            Method::Zstd => self.zstd(content),
        };
        self.packed.truncate(length);
        self.chooser.packed(method, content.len(), length, started.elapsed());
        // Its span and its check come on top, and the span of the plain blocks that may follow.
        length + 2 * SPAN + super::CHECK < content.len()
    }

    /// LZ4 into `self.packed`, whose length is not touched otherwise.
    fn lz4(&mut self, content: &[u8]) -> usize {
        let most = lz4_flex::block::get_maximum_output_size(content.len());
        if self.packed.len() < most {
            self.packed.resize(most, 0);
        }
        // The buffer is large enough, which is the only way to fail.
        lz4_flex::block::compress_into_with_table(content, &mut self.packed, &mut self.lz4)
            .unwrap_or(content.len())
    }

    fn zstd(&mut self, content: &[u8]) -> usize {
        let most = zstd::zstd_safe::compress_bound(content.len());
        if self.packed.len() < most {
            self.packed.resize(most, 0);
        }
        if self.zstd.is_none() {
            self.zstd = zstd::bulk::Compressor::new(LEVEL).ok();
        }
        let Some(zstd) = &mut self.zstd else { return content.len() };
        zstd.compress_to_buffer(content, &mut self.packed[..]).unwrap_or(content.len())
    }
}
