//! What was written since the last flush, so that it can be written again to a server that has
//! lost it: one that was killed, or whose host lost power.
//!
//! The content is kept as runs that do not overlap, the newest bytes of each place; so writing them
//! again in any order gives what was there. (Of two writes to one place that were under way at the
//! same time either may win, here as on any disk.) A bound in bytes holds; beyond it nothing is
//! kept, and if the server is lost then, the next flush fails and says so.

use std::{collections::BTreeMap, sync::Arc};

/// What it costs to keep a run, besides its bytes.
const RUN_COST: u64 = 64;

/// What a place was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// A part of what was written.
    Data(Arc<[u8]>, usize, usize),
    /// Zeros; with `true` such that keep their place.
    Zeros(u64, bool),
}

impl Content {
    pub(super) fn data(bytes: &[u8]) -> Self {
        Self::Data(bytes.into(), 0, bytes.len())
    }

    pub(super) const fn length(&self) -> u64 {
        match self {
            Self::Data(_, start, end) => (*end - *start) as u64,
            Self::Zeros(length, _) => *length,
        }
    }

    /// The bytes of `Data`.
    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Self::Data(bytes, start, end) => &bytes[*start..*end],
            Self::Zeros(..) => &[],
        }
    }

    fn part(&self, from: u64, to: u64) -> Self {
        match self {
            Self::Data(bytes, start, _) => {
                let (from, to) = (start + from as usize, start + to as usize);
                // A small rest must not hold on to much: at most twice the bound is in memory.
                if (to - from) * 2 < bytes.len() {
                    return Self::data(&bytes[from..to]);
                }
                Self::Data(bytes.clone(), from, to)
            }
            Self::Zeros(_, allocate) => Self::Zeros(to - from, *allocate),
        }
    }

    /// What keeping it costs; a run costs something even where it is zeros.
    fn cost(&self) -> u64 {
        RUN_COST + self.bytes().len() as u64
    }
}

/// Runs that do not overlap.
#[derive(Debug, Default)]
struct Runs {
    by_offset: BTreeMap<u64, Content>,
    cost: u64,
}

impl Runs {
    fn insert(&mut self, offset: u64, content: Content) {
        if content.length() > 0 {
            self.cost += content.cost();
            self.by_offset.insert(offset, content);
        }
    }

    fn remove(&mut self, offset: u64) -> Option<Content> {
        let content = self.by_offset.remove(&offset)?;
        self.cost -= content.cost();
        Some(content)
    }

    /// Newer content takes the place of what it overlaps.
    fn put(&mut self, offset: u64, content: Content) {
        let end = offset + content.length();
        // The last run that begins before may reach into it; all that begin inside do.
        let before = self.by_offset.range(..offset).next_back().map(|(start, _)| *start);
        let inside = self.by_offset.range(offset..end).map(|(start, _)| *start);
        let touched: Vec<u64> = before.into_iter().chain(inside).collect();
        for start in touched {
            let Some(old) = self.remove(start) else { continue };
            let old_end = start + old.length();
            if start < offset {
                self.insert(start, old.part(0, old_end.min(offset) - start));
            }
            if old_end > end {
                self.insert(end, old.part(end.max(start) - start, old_end - start));
            }
        }
        self.insert(offset, content);
    }
}

/// Whether all of what was written since the last flush is here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Extent {
    All,
    /// There was more than the bound.
    NotAll,
}

/// A flush interval's writes.
#[derive(Debug)]
struct Interval {
    runs: Runs,
    extent: Extent,
}

impl Interval {
    fn new() -> Self {
        Self { runs: Runs::default(), extent: Extent::All }
    }

    fn overflow(&mut self) {
        *self = Self { runs: Runs::default(), extent: Extent::NotAll };
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Kept {
    /// Which connection to the server has all that is kept.
    pub(super) session: u64,
    limit: u64,
    /// Since the last flush began.
    newer: Interval,
    /// What the flush under way is to make durable.
    older: Interval,
    /// Writes are lost, and nobody was told.
    lost: bool,
}

impl Kept {
    /// Keeps at most `limit` bytes.
    pub(super) fn new(limit: u64) -> Self {
        Self { session: 0, limit, newer: Interval::new(), older: Interval::new(), lost: false }
    }

    /// Something was written, says the server of `session`. `content` is only asked for if there is
    /// room for it. False if that server is lost, and the write must be done again.
    pub(super) fn put(
        &mut self,
        session: u64,
        offset: u64,
        bytes: u64,
        content: impl FnOnce() -> Content,
    ) -> bool {
        if session != self.session {
            // Where nothing is kept nothing is done twice either: it counts as lost.
            self.lost |= self.limit == 0;
            return self.limit == 0;
        }
        if self.newer.extent == Extent::NotAll {
            return true;
        }
        // It may cut another run in two.
        let more = bytes + 2 * RUN_COST;
        if self.newer.runs.cost + self.older.runs.cost + more > self.limit {
            self.newer.overflow();
        } else {
            self.newer.runs.put(offset, content());
        }
        true
    }

    /// A flush begins: it covers everything so far. Only one flush is under way at a time.
    pub(super) fn begin_flush(&mut self) {
        let newer = std::mem::replace(&mut self.newer, Interval::new());
        if newer.extent == Extent::NotAll {
            return self.older.overflow();
        }
        if self.older.extent == Extent::All {
            for (offset, content) in newer.runs.by_offset {
                self.older.runs.put(offset, content);
            }
        }
    }

    /// The flush is done. False if it came too late for writes that are lost, which is told once.
    pub(super) fn end_flush(&mut self) -> bool {
        self.older = Interval::new();
        !std::mem::take(&mut self.lost)
    }

    /// The server's memory is gone: what has to be written again, in this order, before anything
    /// else. What is not here any more is lost.
    pub(super) fn after_loss(&mut self, session: u64) -> Vec<(u64, Content)> {
        self.session = session;
        let mut again = Runs::default();
        for interval in [&mut self.older, &mut self.newer] {
            if interval.extent == Extent::NotAll {
                self.lost = true;
                *interval = Interval::new();
            }
            for (offset, content) in &interval.runs.by_offset {
                again.put(*offset, content.clone());
            }
        }
        again.by_offset.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn apply(image: &mut [u8], offset: u64, content: &Content) {
        let at = offset as usize;
        let target = &mut image[at..at + content.length() as usize];
        match content {
            Content::Data(..) => target.copy_from_slice(content.bytes()),
            Content::Zeros(..) => target.fill(0),
        }
    }

    proptest! {
        #[test]
        fn writing_again_what_is_kept_gives_what_was_there(
            steps in proptest::collection::vec((0u64..200, 1u64..80, 1u8..255, 0u8..8), 0..60),
        ) {
            // `live` has every write; `durable` those before the last flush that was answered.
            let mut kept = Kept::new(1 << 20);
            let (mut live, mut durable) = (vec![0; 300], vec![0; 300]);
            for (offset, length, byte, kind) in steps {
                let content = match kind {
                    0 => { kept.begin_flush(); continue }
                    1 => {
                        kept.begin_flush();
                        prop_assert!(kept.end_flush());
                        durable.clone_from(&live);
                        continue;
                    }
                    2 => Content::Zeros(length, false),
                    _ => Content::data(&vec![byte; length as usize]),
                };
                apply(&mut live, offset, &content);
                kept.put(0, offset, length, || content);
            }
            for (offset, content) in kept.after_loss(1) {
                apply(&mut durable, offset, &content);
            }
            prop_assert_eq!(live, durable);
        }
    }

    #[test]
    fn beyond_the_bound_a_loss_is_told_by_the_next_flush_once() {
        let mut kept = Kept::new(1000);
        kept.put(0, 0, 600, || Content::data(&[1; 600]));
        kept.put(0, 0, 600, || panic!("there is no room for it"));
        kept.begin_flush();
        assert!(kept.end_flush(), "nothing was lost");
        kept.put(0, 0, 2000, || panic!("there is no room for it"));
        assert!(kept.after_loss(1).is_empty());
        kept.put(1, 0, 10, || Content::data(&[2; 10]));
        assert!(!kept.put(0, 0, 10, || panic!("that server is lost")));
        assert_eq!(kept.after_loss(2).len(), 1);
        kept.begin_flush();
        assert!(!kept.end_flush());
        kept.begin_flush();
        assert!(kept.end_flush());
    }

    #[test]
    fn what_is_kept_costs_no_more_than_the_bound() {
        let mut kept = Kept::new(100_000);
        for at in 0..10_000 {
            kept.put(0, at * 10, 1, || Content::data(&[1]));
            assert!(kept.newer.runs.cost <= 100_000);
        }
        assert_eq!(kept.newer.extent, Extent::NotAll);
    }
}
