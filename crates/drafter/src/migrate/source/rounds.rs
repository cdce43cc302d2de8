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
use silo::block::BlockSet;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// How long blocks that are still on their way to this host may take before a switchover onward.
const FILL_LIMIT: Duration = Duration::from_secs(600);
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
            let set_bytes = sets.iter().map(BlockSet::bytes).sum();
            let started = Instant::now();
            let before = self.main.sent();
            let number = self.planner.rounds().len() as u64 + 1;
            let unread = self.send_round(&sets, number)?;
            sets = unread;
            for (at, set) in sets.iter_mut().enumerate() {
                set.union_with(&self.take_if_tracked(at)?);
            }
            let round = Round {
                set_bytes,
                sent_bytes: self.main.sent() - before,
                duration: started.elapsed(),
            };
            let dirty = sets.iter().map(BlockSet::bytes).sum();
            decision = self.planner.after_round(round, dirty);
            self.progress(Phase::PreCopy, dirty);
        }
    }

    /// One more round right before the pause, if it is a short one: what the guest wrote while the
    /// switchover was being prepared (hooks, disk syncs, the lease) need not travel in the flight.
    /// Returns what is left.
    pub(super) fn closing_round(&mut self, left: Vec<BlockSet>) -> Result<Vec<BlockSet>, Stop> {
        if self.planner_mode == Mode::PostCopy {
            return Ok(left);
        }
        let mut sets = left;
        for (at, set) in sets.iter_mut().enumerate() {
            set.union_with(&self.take_if_tracked(at)?);
        }
        let set_bytes = sets.iter().map(BlockSet::bytes).sum();
        if self.planner.transfer(set_bytes) > CLOSING_LIMIT {
            return Ok(sets);
        }
        let started = Instant::now();
        let before = self.main.sent();
        let number = self.planner.rounds().len() as u64 + 1;
        let unread = self.send_round(&sets, number)?;
        self.planner.note(Round {
            set_bytes,
            sent_bytes: self.main.sent() - before,
            duration: started.elapsed(),
        });
        Ok(unread)
    }

    pub(super) fn take_if_tracked(&mut self, at: usize) -> Result<BlockSet, Stop> {
        Ok(take_if_tracked(self.plan, &self.devices, &mut self.taken, at)?)
    }

    /// One round; gives back the blocks that could not be read because they are still missing here.
    fn send_round(&mut self, sets: &[BlockSet], number: u64) -> Result<Vec<BlockSet>, Stop> {
        let total: u64 = sets.iter().map(BlockSet::bytes).sum();
        let mut left = total;
        let mut buffer = Vec::new();
        let mut unread = Vec::with_capacity(sets.len());
        let mut reported = Instant::now();
        for (at, set) in sets.iter().enumerate() {
            let device = Arc::clone(&self.devices[at]);
            let mut absent = device.missing();
            absent.intersect_with(set);
            let mut readable = set.clone();
            readable.subtract(&absent);
            unread.push(absent);
            for range in readable.ranges() {
                for piece in range.chunks(MAX_RUN) {
                    if self.cancelled() {
                        return Err(Stop::Cancelled);
                    }
                    let before = self.main.sent();
                    let number = DeviceNumber(at as u8);
                    send_run(&mut self.main, number, device.as_ref(), piece, &mut buffer)?;
                    let sent = self.main.sent() - before;
                    self.pacer.sent(sent);
                    left -= piece.bytes();
                    if reported.elapsed() > Duration::from_millis(50) {
                        reported = Instant::now();
                        self.drain()?;
                        self.progress(Phase::PreCopy, left);
                    }
                }
            }
        }
        self.main.write(&Frame::RoundEnd(number))?;
        self.main.flush()?;
        self.wait_applied(number)?;
        Ok(unread)
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
