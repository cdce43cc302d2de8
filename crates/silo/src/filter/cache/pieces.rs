//! The pieces of one region: what was written to it and is not behind yet.

use bytes::Bytes;
use std::collections::BTreeMap;

/// What holding a piece costs besides its bytes.
const OVERHEAD: u64 = 96;

/// What a piece says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// These bytes.
    Data(Bytes),
    /// So many zeros.
    Zero { length: u32, allocate: bool },
}

/// Some neighbouring sectors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) content: Content,
    /// Number of its write; later ones are higher.
    pub(super) version: u64,
    /// Memory that its bytes keep, which is more than they are if others were cut off.
    held: u32,
}

impl Piece {
    fn new(content: Content, version: u64) -> Self {
        let held = match &content {
            Content::Data(bytes) => bytes.len() as u32,
            Content::Zero { .. } => 0,
        };
        Self { content, version, held }
    }

    /// In bytes.
    pub(super) fn length(&self) -> u32 {
        match &self.content {
            Content::Data(bytes) => bytes.len() as u32,
            Content::Zero { length, .. } => *length,
        }
    }

    fn cost(&self) -> u64 {
        u64::from(self.held) + OVERHEAD
    }

    /// A part of it. What keeps much more memory than it has is copied.
    fn part(&self, from: u32, to: u32) -> Self {
        match &self.content {
            Content::Zero { allocate, .. } => {
                let content = Content::Zero { length: to - from, allocate: *allocate };
                Self { content, version: self.version, held: 0 }
            }
            Content::Data(bytes) => {
                let part = bytes.slice(from as usize..to as usize);
                if (to - from) < self.held / 2 {
                    return Self::new(Content::Data(Bytes::copy_from_slice(&part)), self.version);
                }
                Self { content: Content::Data(part), version: self.version, held: self.held }
            }
        }
    }
}

/// Pieces by their offset in the region; they do not overlap.
#[derive(Debug, Default)]
pub(super) struct Pieces {
    pieces: BTreeMap<u32, Piece>,
    cost: u64,
}

impl Pieces {
    pub(super) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Memory that they take.
    pub(super) fn cost(&self) -> u64 {
        self.cost
    }

    /// Those that overlap a range.
    pub(super) fn overlapping(&self, start: u32, end: u32) -> impl Iterator<Item = (u32, &Piece)> {
        let before = self.pieces.range(..=start).next_back().map(|(at, _)| *at);
        self.pieces
            .range(before.unwrap_or(start)..end)
            .map(|(at, piece)| (*at, piece))
            .filter(move |(at, piece)| at + piece.length() > start)
    }

    /// Everything, in order.
    pub(super) fn all(&self) -> Vec<(u32, Piece)> {
        self.pieces.iter().map(|(at, piece)| (*at, piece.clone())).collect()
    }

    /// Puts a piece over what is there.
    pub(super) fn put(&mut self, start: u32, content: Content, version: u64) {
        let piece = Piece::new(content, version);
        let end = start + piece.length();
        let covered: Vec<u32> = self.overlapping(start, end).map(|(at, _)| at).collect();
        for at in covered {
            let old = self.remove(at);
            let old_end = at + old.length();
            if at < start {
                self.insert(at, old.part(0, start - at));
            }
            if old_end > end {
                self.insert(end, old.part(end - at, old_end - at));
            }
        }
        self.insert(start, piece);
    }

    /// Drops what was written before the write number `version` or by it.
    pub(super) fn drop_until(&mut self, version: u64) {
        let done: Vec<u32> = self
            .pieces
            .iter()
            .filter(|(_, piece)| piece.version <= version)
            .map(|(at, _)| *at)
            .collect();
        for at in done {
            self.remove(at);
        }
    }

    fn insert(&mut self, at: u32, piece: Piece) {
        self.cost += piece.cost();
        self.pieces.insert(at, piece);
    }

    fn remove(&mut self, at: u32) -> Piece {
        let piece = self.pieces.remove(&at).expect("the caller found it there");
        self.cost -= piece.cost();
        piece
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pieces_hold_what_was_put_last_and_cost_what_they_hold(
            ops in proptest::collection::vec((0u32..1000, 1u32..300, any::<u8>(), any::<bool>()), 1..40),
            gone in 0u64..40,
        ) {
            let mut pieces = Pieces::default();
            let mut model: Vec<Option<(u8, u64)>> = vec![None; 1400];
            for (version, (start, length, byte, zero)) in (1u64..).zip(&ops) {
                let (start, length) = (*start, *length);
                let content = match zero {
                    true => Content::Zero { length, allocate: false },
                    false => Content::Data(Bytes::from(vec![*byte; length as usize])),
                };
                pieces.put(start, content, version);
                let value = if *zero { 0 } else { *byte };
                model[start as usize..(start + length) as usize].fill(Some((value, version)));
            }
            pieces.drop_until(gone);
            for slot in &mut model {
                *slot = slot.filter(|(_, version)| *version > gone);
            }
            let mut found = vec![None; 1400];
            let mut cost = 0;
            for (at, piece) in pieces.all() {
                cost += piece.cost();
                for index in 0..piece.length() {
                    let value = match &piece.content {
                        Content::Data(bytes) => bytes[index as usize],
                        Content::Zero { .. } => 0,
                    };
                    let slot = &mut found[(at + index) as usize];
                    prop_assert!(slot.is_none(), "pieces overlap");
                    *slot = Some((value, piece.version));
                }
                prop_assert!(piece.held <= 2 * piece.length() + 1);
            }
            prop_assert_eq!(&found, &model);
            prop_assert_eq!(cost, pieces.cost());
            prop_assert_eq!(pieces.is_empty(), model.iter().all(Option::is_none));
        }
    }
}
