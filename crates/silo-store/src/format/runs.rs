//! Where the blocks of a device are, as runs: the part that map leaves and log entries share.
//!
//! ```text
//! count v, then for each run: gap v (blocks since the end of the last), head u8, rest
//!   head = kind | (length - 1) << 2 for lengths up to 63; 63 << 2 | kind and (length - 64) v beyond
//!   kind 0  zeros (or: no longer what the map says, but zeros)
//!   kind 1  in the pack of the last run, right after it
//!   kind 2  in the pack of the last run; slot, less the one after the last run, zigzag v
//!   kind 3  pack v (number in the table that stands before), slot v
//! ```
//! Blocks rewritten at random places and stored in order cost 2 to 3 bytes each.

use crate::wire::{Malformed, Reader, put_varint, unzigzag, zigzag};
use std::ops::Range;

/// Content of neighbouring blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// Zeros.
    Zero,
    /// Neighbouring slots of a pack; `pack` counts in the table at hand.
    At { pack: u32, slot: u32 },
}

/// Neighbouring blocks with neighbouring places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) start: u64,
    pub(crate) count: u64,
    pub(crate) content: Content,
}

impl Run {
    pub(crate) fn end(&self) -> u64 {
        self.start + self.count
    }

    /// Whether a block with `content` at `block` continues the run.
    fn continues(&self, block: u64, content: Content) -> bool {
        block == self.end()
            && match (self.content, content) {
                (Content::Zero, Content::Zero) => true,
                (Content::At { pack, slot }, Content::At { pack: p, slot: s }) => {
                    p == pack && u64::from(s) == u64::from(slot) + self.count
                }
                _ => false,
            }
    }
}

/// Collects blocks in ascending order into runs.
#[derive(Default)]
pub(crate) struct Collector {
    pub(crate) runs: Vec<Run>,
}

impl Collector {
    pub(crate) fn push(&mut self, block: u64, content: Content) {
        match self.runs.last_mut() {
            Some(run) if run.continues(block, content) => run.count += 1,
            _ => self.runs.push(Run { start: block, count: 1, content }),
        }
    }
}

/// No pack holds more blocks.
pub(crate) const MAX_SLOTS: u32 = 1 << 20;

pub(crate) fn encode(runs: &[Run], from: u64, out: &mut Vec<u8>) {
    put_varint(out, runs.len() as u64);
    let (mut at, mut next) = (from, None::<(u32, i64)>);
    for run in runs {
        debug_assert!(run.start >= at && run.count > 0);
        put_varint(out, run.start - at);
        at = run.end();
        let kind = match (run.content, next) {
            (Content::Zero, _) => 0,
            (Content::At { pack, slot }, Some((p, s))) if p == pack => {
                if i64::from(slot) == s {
                    1
                } else {
                    2
                }
            }
            _ => 3,
        };
        let short = (run.count - 1).min(63) as u8;
        out.push(kind | short << 2);
        if short == 63 {
            put_varint(out, run.count - 64);
        }
        if let Content::At { pack, slot } = run.content {
            match (kind, next) {
                (2, Some((_, expected))) => put_varint(out, zigzag(i64::from(slot) - expected)),
                (3, _) => {
                    put_varint(out, u64::from(pack));
                    put_varint(out, u64::from(slot));
                }
                _ => {}
            }
            next = Some((pack, i64::from(slot) + run.count as i64));
        }
    }
}

/// Gives each run to `each`, in ascending order, all within `blocks` and a table of `packs` packs.
pub(crate) fn decode(
    reader: &mut Reader<'_>,
    blocks: Range<u64>,
    packs: usize,
    mut each: impl FnMut(Run),
) -> Result<(), Malformed> {
    let count = reader.count(2)?;
    let (mut at, mut next) = (blocks.start, None::<(u32, i64)>);
    for _ in 0..count {
        let start = at + reader.bounded(blocks.end - at)?;
        let head = reader.u8()?;
        let mut length = u64::from(head >> 2) + 1;
        if length == 64 {
            length += reader.bounded(blocks.end - start)?;
        }
        if length > blocks.end - start {
            return Err("a run goes past the end");
        }
        let content = match head & 3 {
            0 => Content::Zero,
            kind => {
                let (pack, slot) = match (kind, next) {
                    (1, Some(last)) => last,
                    (2, Some((pack, expected))) => {
                        let by = unzigzag(reader.bounded(2 * u64::from(MAX_SLOTS))?);
                        (pack, expected + by)
                    }
                    (3, _) => {
                        let pack = reader.varint()?;
                        if pack >= packs as u64 {
                            return Err("a run is in a pack that is not listed");
                        }
                        (pack as u32, reader.bounded(u64::from(MAX_SLOTS))? as i64)
                    }
                    _ => return Err("the first run follows another"),
                };
                let end = slot + length as i64;
                if slot < 0 || end > i64::from(MAX_SLOTS) {
                    return Err("a run leaves its pack");
                }
                next = Some((pack, end));
                Content::At { pack, slot: slot as u32 }
            }
        };
        each(Run { start, count: length, content });
        at = start + length;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn content() -> impl Strategy<Value = Content> {
        prop_oneof![
            Just(Content::Zero),
            (0u32..5, 0u32..1000).prop_map(|(pack, slot)| Content::At { pack, slot }),
        ]
    }

    proptest! {
        #[test]
        fn runs_come_back(parts in proptest::collection::vec((0u64..300, 1u64..200, content()), 0..40), from in 0u64..1000) {
            let mut at = from;
            let runs: Vec<Run> = parts.into_iter().map(|(gap, count, content)| {
                let run = Run { start: at + gap, count, content };
                at = run.end();
                run
            }).collect();
            let mut bytes = Vec::new();
            encode(&runs, from, &mut bytes);
            let (mut reader, mut read) = (Reader::new(&bytes), Vec::new());
            decode(&mut reader, from..at, 5, |run| read.push(run)).unwrap();
            prop_assert!(reader.end().is_ok());
            prop_assert_eq!(&read, &runs);
            if at > from {
                let less = decode(&mut Reader::new(&bytes), from..at - 1, 5, |_| ());
                prop_assert!(runs.is_empty() || less.is_err());
            }
        }

        #[test]
        fn any_bytes_give_runs_within_the_device_or_an_error(bytes: Vec<u8>) {
            crate::format::fuzz_runs(&bytes);
        }
    }

    #[test]
    fn blocks_at_random_places_stored_in_order_cost_at_most_three_bytes_each() {
        let mut collector = Collector::default();
        (0..10_000u64).for_each(|i| {
            collector.push(
                i * 100 + i * 7 % 90,
                Content::At { pack: (i / 2000) as u32, slot: (i % 2000) as u32 },
            );
        });
        let mut bytes = Vec::new();
        encode(&collector.runs, 0, &mut bytes);
        assert!(bytes.len() <= 30_100, "{}", bytes.len());
    }
}
