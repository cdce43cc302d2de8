//! What a mount fetches next: demands, then what was asked for first, then read-ahead, then the rest
//! in its order. Called under the mount's lock.

use super::{table::Table, window::Window};
use silo_block::block::{BLOCK_SIZE, BlockIndex, BlockRange};
use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// Why blocks are fetched, most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Class {
    /// Somebody waits.
    Demand,
    /// Asked for before the rest.
    First,
    /// A walker will touch it.
    Ahead,
    /// All of the device.
    Bulk,
}

/// A request to the backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Job {
    pub(super) class: Class,
    pub(super) range: BlockRange,
    /// Its first block is left where touching it is seen: it begins what was fetched ahead at once.
    pub(super) marked: bool,
}

/// A range of a list, of which requests take the beginning.
struct Listed {
    range: BlockRange,
    begun: bool,
}

impl From<BlockRange> for Listed {
    fn from(range: BlockRange) -> Self {
        Self { range, begun: false }
    }
}

/// The rest, in order.
pub(super) enum Bulk {
    /// Only on demand.
    Off,
    /// From the beginning to the end, from this block on.
    InOrder(u64),
    /// Pieces of [`PIECE`] blocks in a given order, from this place in the list on.
    Listed(Vec<u32>, usize),
}

/// Unit of a given order, in blocks (1 MiB).
pub(super) const PIECE: u64 = 256;

/// After an error the background work rests for this long, doubled each time up to the second.
const REST: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

pub(super) struct Queue {
    demands: VecDeque<BlockRange>,
    first: VecDeque<Listed>,
    ahead: VecDeque<Listed>,
    bulk: Bulk,
    rest: Option<(Instant, Duration)>,
}

impl Queue {
    pub(super) fn new(bulk: Bulk) -> Self {
        let (demands, first, ahead) = (VecDeque::new(), VecDeque::new(), VecDeque::new());
        Self { demands, first, ahead, bulk, rest: None }
    }

    /// Requested blocks that somebody waits for.
    pub(super) fn demand(&mut self, range: BlockRange) {
        self.demands.extend(range.chunks(PIECE));
    }

    pub(super) fn first(&mut self, range: BlockRange) {
        self.first.push_back(range.into());
    }

    /// Read-ahead: the newest goes first, and what is too far back in the queue is dropped.
    pub(super) fn ahead(&mut self, range: BlockRange) {
        self.ahead.push_front(range.into());
        self.ahead.truncate(256);
    }

    /// Where in-order bulk work stands.
    pub(super) fn cursor(&self) -> Option<u64> {
        match self.bulk {
            Bulk::InOrder(cursor) => Some(cursor),
            Bulk::Off | Bulk::Listed(..) => None,
        }
    }

    /// Background work failed.
    pub(super) fn failed(&mut self, now: Instant) {
        let pause = self.rest.map_or(REST.0, |(_, before)| (before * 2).min(REST.1));
        self.rest = Some((now + pause, pause));
    }

    /// Background work succeeded.
    pub(super) fn succeeded(&mut self) {
        self.rest = None;
    }

    /// When background work may go on, if it rests.
    pub(super) fn rests_until(&self, now: Instant) -> Option<Instant> {
        self.rest.map(|(until, _)| until).filter(|until| *until > now)
    }

    /// Whether [`Queue::next`] may find something; sure only when it says no.
    pub(super) fn has_work(&self, table: &Table, window: &mut Window, now: Instant) -> bool {
        if !self.demands.is_empty() {
            return true;
        }
        let listed = !self.first.is_empty() || !self.ahead.is_empty();
        (listed || !matches!(self.bulk, Bulk::Off))
            && !table.idle().is_empty()
            && self.rests_until(now).is_none()
            && window.has_room()
    }

    /// The next request, taken out of the table's idle blocks and counted in the window.
    pub(super) fn next(
        &mut self,
        table: &mut Table,
        window: &mut Window,
        now: Instant,
    ) -> Option<Job> {
        if let Some(range) = self.demands.pop_front() {
            return Some(Job { class: Class::Demand, range, marked: false });
        }
        if self.rests_until(now).is_some() || table.idle().is_empty() || !window.has_room() {
            return None;
        }
        let most = window.request() / BLOCK_SIZE as u64;
        let job = |class| move |(range, marked)| Job { class, range, marked };
        let found = Self::listed(&mut self.first, table, most)
            .map(|(range, _)| job(Class::First)((range, false)))
            .or_else(|| Self::listed(&mut self.ahead, table, most).map(job(Class::Ahead)))
            .or_else(|| {
                self.next_bulk(table, most).map(|range| job(Class::Bulk)((range, false)))
            })?;
        table.want(found.range);
        window.sent(now, found.range.bytes());
        Some(found)
    }

    /// The next idle run in a list of ranges, and whether it is the first of its range.
    fn listed(list: &mut VecDeque<Listed>, table: &Table, most: u64) -> Option<(BlockRange, bool)> {
        while let Some(front) = list.front_mut() {
            let found = table.idle().ranges_in(front.range).next();
            let Some(run) = found else {
                list.pop_front();
                continue;
            };
            let taken = BlockRange::new(run.start.0, run.count.min(most));
            let rest = BlockRange::new(taken.end(), front.range.end() - taken.end());
            let begun = std::mem::replace(front, Listed { range: rest, begun: true }).begun;
            return Some((taken, !begun));
        }
        None
    }

    fn next_bulk(&mut self, table: &Table, most: u64) -> Option<BlockRange> {
        match &mut self.bulk {
            Bulk::Off => None,
            Bulk::InOrder(cursor) => {
                let idle = table.idle();
                let run = idle
                    .next_range(BlockIndex(*cursor), most)
                    // What was given up behind the cursor.
                    .or_else(|| idle.next_range(BlockIndex(0), most))?;
                // Requests end at multiples of their size, so that odd starts do not go on for ever.
                let end = run.end().min((run.start.0 / most + 1) * most);
                *cursor = end;
                Some(BlockRange::new(run.start.0, end - run.start.0))
            }
            Bulk::Listed(pieces, at) => {
                let pick = |piece: u32| {
                    let whole = BlockRange::new(u64::from(piece) * PIECE, PIECE);
                    table.idle().ranges_in(whole).next()
                };
                // Once around: what was given up is met again.
                for _ in 0..=pieces.len() {
                    let piece = *pieces.get(*at)?;
                    if let Some(run) = pick(piece) {
                        return Some(BlockRange::new(run.start.0, run.count.min(most)));
                    }
                    *at = (*at + 1) % pieces.len();
                }
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(queue: &mut Queue, table: &mut Table, limit: usize) -> Vec<(Class, u64)> {
        let mut window = Window::new(1 << 40);
        let now = Instant::now();
        std::iter::from_fn(|| queue.next(table, &mut window, now))
            .take(limit)
            .map(|job| (job.class, job.range.start.0))
            .collect()
    }

    #[test]
    fn demands_go_first_then_what_was_asked_for_then_read_ahead_then_the_rest() {
        let mut table = Table::new(1000);
        let mut queue = Queue::new(Bulk::InOrder(0));
        queue.ahead(BlockRange::new(600, 10));
        queue.first(BlockRange::new(700, 10));
        table.want(BlockRange::new(800, 1));
        queue.demand(BlockRange::new(800, 1));
        let order = all(&mut queue, &mut table, 100);
        let start =
            [(Class::Demand, 800), (Class::First, 700), (Class::Ahead, 600), (Class::Bulk, 0)];
        assert_eq!(order[..4], start);
        assert!(table.idle().is_empty(), "nothing is left out");
    }

    #[test]
    fn pieces_come_in_the_given_order_and_what_was_given_up_comes_again() {
        let mut table = Table::new(4 * PIECE);
        let mut queue = Queue::new(Bulk::Listed(vec![2, 0, 3, 1], 0));
        let firsts: Vec<u64> =
            all(&mut queue, &mut table, 1000).iter().map(|j| j.1 / PIECE).collect();
        let mut deduped = firsts.clone();
        deduped.dedup();
        assert_eq!(deduped, [2, 0, 3, 1]);
        table.give_up(BlockRange::new(0, 2 * PIECE));
        assert!(!all(&mut queue, &mut table, 1000).is_empty());
        assert!(table.idle().is_empty());
    }

    #[test]
    fn background_work_rests_after_an_error_and_demands_do_not() {
        let (mut table, mut window) = (Table::new(1000), Window::new(1 << 30));
        let mut queue = Queue::new(Bulk::InOrder(0));
        let now = Instant::now();
        queue.failed(now);
        assert_eq!(queue.next(&mut table, &mut window, now), None);
        table.want(BlockRange::new(5, 1));
        queue.demand(BlockRange::new(5, 1));
        assert!(queue.next(&mut table, &mut window, now).is_some());
        let later = now + Duration::from_secs(1);
        assert_eq!(queue.next(&mut table, &mut window, later).unwrap().class, Class::Bulk);
    }

    #[test]
    fn no_more_than_the_window_is_in_flight() {
        let (mut table, mut window) = (Table::new(1 << 20), Window::new(1 << 20));
        let mut queue = Queue::new(Bulk::InOrder(0));
        let now = Instant::now();
        let jobs = std::iter::from_fn(|| queue.next(&mut table, &mut window, now));
        let bytes: u64 = jobs.map(|job| job.range.bytes()).sum();
        assert_eq!(bytes, 1 << 20);
    }
}
