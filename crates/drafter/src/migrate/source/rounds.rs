//! Pre-copy: rounds of dirty blocks while the guest runs.

use super::{LONG_ROUND_TRIP, Session, Stop, send::send_run, take_if_tracked};
use crate::{
    migrate::{
        messages::Mode,
        planner::{Decision, Reason, Round},
        protocol::{DeviceNumber, Frame, MAX_RUN},
    },
    runner::api::Phase,
    socket::unsent,
};
use silo::block::{BlockRange, BlockSet};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// How long blocks that are still on their way to this host may take before a switchover onward.
const FILL_LIMIT: Duration = Duration::from_secs(600);
/// Time between two looks at what the guest writes during a round.
const LOOK: Duration = Duration::from_millis(200);
/// A guest that writes this share of what the line carries makes every round send much again: its
/// blocks are better sent once, after the switchover.
const OUTPACED: f64 = 0.25;
/// Looks before that is believed.
const LOOKS: u32 = 2;

/// A closing round that would take longer dirties about as much as it sends.
const CLOSING_LIMIT: Duration = Duration::from_millis(25);

impl Session<'_> {
    /// Sends rounds until the planner has enough. Returns what is left, per device, and why.
    pub(super) fn precopy(
        &mut self,
        first: Vec<BlockSet>,
    ) -> Result<(Vec<BlockSet>, Reason), Stop> {
        let mut sets = first;
        let mut decision = self.planner.first();
        loop {
            match decision {
                Decision::Switchover(reason) => {
                    if self.wait_until_filled()? {
                        return Ok((sets, reason));
                    }
                    // What arrived late is in the sets: one more round takes it along.
                }
                Decision::GiveUp(why) => return Err(Stop::Peer(why)),
                Decision::AnotherRound => {}
            }
            let (round, left, broke_off) = self.round(&sets)?;
            sets = left;
            let dirty = sets.iter().map(BlockSet::bytes).sum();
            decision = if broke_off {
                self.planner.note(round);
                Decision::Switchover(Reason::Outpaced)
            } else {
                self.planner.after_round(round, dirty)
            };
            self.progress(Phase::PreCopy, dirty);
        }
    }

    /// One round; how it went, what is left after it, and whether it was broken off.
    fn round(&mut self, sets: &[BlockSet]) -> Result<(Round, Vec<BlockSet>, bool), Stop> {
        let started = Instant::now();
        let before = self.main.sent();
        let Left { mut sets, sent: set_bytes, broke_off } = self.send_round(sets)?;
        for (at, set) in sets.iter_mut().enumerate() {
            set.union_with(&self.take_if_tracked(at)?);
        }
        let sent_bytes = self.main.sent() - before;
        Ok((Round { set_bytes, sent_bytes, duration: started.elapsed() }, sets, broke_off))
    }

    /// What can be done right before the pause, so that it need not be done after it. If little is
    /// left (what the guest wrote while hooks, disk syncs and the lease took their time) one more
    /// short round sends it. If much is left, the destination is told what is stale, and drops
    /// it now. Returns what is left, and of that what the destination has been told.
    pub(super) fn close(
        &mut self,
        left: Vec<BlockSet>,
    ) -> Result<(Vec<BlockSet>, Vec<BlockSet>), Stop> {
        let mut sets = left;
        for (at, set) in sets.iter_mut().enumerate() {
            set.union_with(&self.take_if_tracked(at)?);
        }
        let none: Vec<_> = sets.iter().map(|set| BlockSet::new(set.device_blocks())).collect();
        let bytes = sets.iter().map(BlockSet::bytes).sum();
        if self.planner_mode == Mode::PostCopy || self.planner.transfer(bytes) > CLOSING_LIMIT {
            if self.planner_mode == Mode::PreCopy {
                return Ok((sets, none));
            }
            for (at, set) in sets.iter().enumerate() {
                self.main.missing(DeviceNumber(at as u8), set)?;
            }
            self.end_round()?;
            return Ok((sets.clone(), sets));
        }
        let (round, left, _) = self.round(&sets)?;
        self.planner.note(round);
        Ok((left, none))
    }

    pub(super) fn take_if_tracked(&mut self, at: usize) -> Result<BlockSet, Stop> {
        Ok(take_if_tracked(self.plan, &self.devices, &mut self.taken, at)?)
    }

    /// Sends sets of blocks, and looks now and then at what the guest writes meanwhile. What it
    /// writes before its turn comes is not sent twice.
    fn send_round(&mut self, sets: &[BlockSet]) -> Result<Left, Stop> {
        let mut left: u64 = sets.iter().map(BlockSet::bytes).sum();
        let mut buffer = Vec::new();
        let mut watch = Watch::new(sets);
        let mut reported = Instant::now();
        let mut broke_off = false;
        'devices: for (at, set) in sets.iter().enumerate() {
            let device = Arc::clone(&self.devices[at]);
            // What has not arrived here cannot be sent on; it stays in the set.
            let mut absent = device.missing();
            absent.intersect_with(set);
            let mut readable = set.clone();
            readable.subtract(&absent);
            for range in readable.ranges() {
                for piece in range.chunks(MAX_RUN) {
                    if self.cancelled() {
                        return Err(Stop::Cancelled);
                    }
                    let before = self.main.sent();
                    let number = DeviceNumber(at as u8);
                    send_run(&mut self.main, number, device.as_ref(), piece, &mut buffer)?;
                    self.pacer.sent(self.main.sent() - before);
                    left -= piece.bytes();
                    watch.sent(at, piece);
                    if reported.elapsed() > Duration::from_millis(50) {
                        reported = Instant::now();
                        self.drain()?;
                        self.progress(Phase::PreCopy, left);
                    }
                    if watch.is_due() {
                        for number in 0..sets.len() {
                            watch.wrote(number, &self.take_if_tracked(number)?);
                        }
                        // Where writes cannot be tracked every move is post-copy.
                        broke_off = watch.outpaced() && self.planner_mode == Mode::Hybrid;
                        if broke_off {
                            break 'devices;
                        }
                    }
                }
            }
        }
        self.end_round()?;
        Ok(watch.left(broke_off))
    }

    /// Ends a batch of frames, and waits until it is in place (see [`Session::wait_applied`]).
    fn end_round(&mut self) -> Result<(), Stop> {
        self.batch += 1;
        self.main.write(&Frame::RoundEnd(self.batch))?;
        self.main.flush()?;
        self.wait_applied(self.batch)
    }

    /// Waits until a round is in place, or, on a long line, until it has left this host: then the
    /// flight follows right behind it.
    fn wait_applied(&mut self, round: u64) -> Result<(), Stop> {
        let deadline = Instant::now() + super::ANSWER_LIMIT.max(self.round_trip * 20);
        let long = self.round_trip > LONG_ROUND_TRIP;
        loop {
            self.drain()?;
            if self.applied >= round || (long && unsent(&self.control) == 0) {
                return Ok(());
            }
            if self.cancelled() {
                return Err(Stop::Cancelled);
            }
            if Instant::now() > deadline {
                return Err(Stop::Peer(format!("round {round} was not acknowledged in time")));
            }
            if let Ok((at, frame)) = self.arrivals.recv_timeout(Duration::from_millis(1)) {
                self.note(at, frame?)?;
            }
        }
    }

    /// True if nothing is missing here. A machine that is still being filled pre-copies what it
    /// has; before the switchover the rest must have come.
    fn wait_until_filled(&mut self) -> Result<bool, Stop> {
        let mut waited = false;
        let deadline = Instant::now() + FILL_LIMIT;
        while self.devices.iter().any(|d| d.missing_blocks() > 0) {
            waited = true;
            if self.cancelled() {
                return Err(Stop::Cancelled);
            }
            if Instant::now() > deadline {
                return Err(Stop::Peer(format!(
                    "this host has itself not received all blocks within {FILL_LIMIT:?}"
                )));
            }
            if let Ok((at, frame)) = self.arrivals.recv_timeout(Duration::from_millis(10)) {
                self.note(at, frame?)?;
            }
        }
        Ok(!waited)
    }
}

/// What a round leaves.
struct Left {
    sets: Vec<BlockSet>,
    /// Bytes of blocks that it sent.
    sent: u64,
    broke_off: bool,
}

/// Keeps what a round has still to send and what has been written behind it.
struct Watch {
    /// To be sent, or written after it was sent.
    due: Vec<BlockSet>,
    /// Everything that was seen to be written during the round.
    written: Vec<BlockSet>,
    total: u64,
    sent: u64,
    looked: Instant,
    looks: u32,
}

impl Watch {
    fn new(sets: &[BlockSet]) -> Self {
        Self {
            due: sets.to_vec(),
            written: sets.iter().map(|set| BlockSet::new(set.device_blocks())).collect(),
            total: sets.iter().map(BlockSet::bytes).sum(),
            sent: 0,
            looked: Instant::now(),
            looks: 0,
        }
    }

    fn sent(&mut self, device: usize, piece: BlockRange) {
        self.due[device].remove_range(piece);
        self.sent += piece.bytes();
    }

    fn is_due(&self) -> bool {
        self.looked.elapsed() >= LOOK
    }

    /// What the guest has written since the last look.
    fn wrote(&mut self, device: usize, blocks: &BlockSet) {
        self.due[device].union_with(blocks);
        self.written[device].union_with(blocks);
    }

    /// Ends a look. Whether the guest has been writing too fast over the whole round, of which
    /// enough is left to make a difference.
    fn outpaced(&mut self) -> bool {
        self.looks += 1;
        self.looked = Instant::now();
        let written: u64 = self.written.iter().map(BlockSet::bytes).sum();
        let fast = written as f64 > self.sent as f64 * OUTPACED;
        let early = self.sent < self.total / 4 * 3;
        fast && early && self.looks >= LOOKS
    }

    fn left(self, broke_off: bool) -> Left {
        Left { sets: self.due, sent: self.sent, broke_off }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use silo::block::BlockIndex;

    fn written(blocks: impl IntoIterator<Item = u64>) -> BlockSet {
        let mut set = BlockSet::new(1000);
        for block in blocks {
            set.insert(BlockIndex(block));
        }
        set
    }

    #[test]
    fn what_is_written_before_its_turn_is_sent_once_and_what_is_written_after_it_stays_due() {
        let mut watch = Watch::new(&[written(0..10)]);
        watch.sent(0, BlockRange::new(0, 5));
        // Behind the round, ahead of it, and outside it.
        watch.wrote(0, &written([2, 7, 500]));
        watch.sent(0, BlockRange::new(5, 5));
        let left = watch.left(false);
        assert_eq!(left.sets[0], written([2, 500]));
        assert_eq!(left.sent, 10 * 4096);
    }

    #[test]
    fn a_round_that_is_broken_off_leaves_what_it_did_not_send() {
        let mut watch = Watch::new(&[written(0..10)]);
        watch.sent(0, BlockRange::new(0, 3));
        watch.wrote(0, &written([1]));
        let left = watch.left(true);
        assert!(left.broke_off);
        assert_eq!(left.sets[0], written([1, 3, 4, 5, 6, 7, 8, 9]));
    }

    #[test]
    fn a_guest_outpaces_the_line_over_the_whole_round_and_only_while_much_of_it_is_left() {
        let looks = |looks: &[(u64, u64)]| {
            let mut watch = Watch::new(&[written(0..1000)]);
            let (mut at, mut fresh) = (0, 0);
            let mut said = Vec::new();
            for &(sent, wrote) in looks {
                watch.sent(0, BlockRange::new(at, sent));
                watch.wrote(0, &written(fresh..fresh + wrote));
                (at, fresh) = (at + sent, fresh + wrote);
                said.push(watch.outpaced());
            }
            said
        };
        assert_eq!(looks(&[(100, 50), (100, 50)]), [false, true]);
        assert_eq!(looks(&[(100, 10), (100, 10), (100, 60)]), [false, false, true]);
        assert_eq!(looks(&[(300, 10), (100, 60), (100, 40)]), [false; 3], "a burst alone is none");
        assert_eq!(looks(&[(700, 10), (100, 400)]), [false; 2], "the round is almost over");
    }

    #[test]
    fn a_guest_that_writes_the_same_blocks_again_and_again_outpaces_nothing() {
        let mut watch = Watch::new(&[written(0..1000)]);
        for look in 0..7 {
            watch.sent(0, BlockRange::new(look * 100, 100));
            watch.wrote(0, &written(0..20));
            assert!(!watch.outpaced(), "look {look}");
        }
    }
}
