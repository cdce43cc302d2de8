//! Before the first round: what a destination that compares has already ([`names`](crate::migrate::names)).

use super::{ANSWER_LIMIT, Session, Stop, is_tracked};
use crate::{
    migrate::{
        lists::Lists,
        names::{RUN, names_of},
        protocol::{DeviceNumber, Frame},
    },
    runner::api::Phase,
};
use silo::block::BlockSet;
use std::{
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

/// How often it is told how far this is.
const TELL: Duration = Duration::from_millis(50);

impl Session<'_> {
    /// What is to be sent of the first set. Writes are watched already.
    pub(super) fn lacking(&mut self, first: Vec<BlockSet>) -> Result<Vec<BlockSet>, Stop> {
        if !self.verdict.compares {
            return Ok(first);
        }
        let began = Instant::now();
        let (mut named, mut rest) = (first.clone(), first);
        for (at, device) in self.devices.iter().enumerate() {
            if is_tracked(self.plan, device) {
                // What has not arrived here has no name yet.
                named[at].subtract(&device.missing());
            } else {
                named[at] = BlockSet::new(device.blocks());
            }
            rest[at].subtract(&named[at]);
        }
        self.lists = Some(Lists::new(self.devices.iter().map(|device| device.blocks())));
        self.name(&named)?;
        let lists = self.answer()?;
        let mut same = 0;
        for ((rest, named), lacking) in rest.iter_mut().zip(&mut named).zip(lists.into_sets()) {
            named.subtract(&lacking);
            same += named.bytes();
            rest.union_with(&lacking);
        }
        self.known_bytes = same;
        tracing::info!(same, took = ?began.elapsed(), "the destination has compared what it has");
        Ok(rest)
    }

    fn name(&mut self, sets: &[BlockSet]) -> Result<(), Stop> {
        let mut left: u64 = sets.iter().map(BlockSet::bytes).sum();
        let (mut buffer, mut told) = (Vec::new(), Instant::now());
        for (at, set) in sets.iter().enumerate() {
            let device = Arc::clone(&self.devices[at]);
            for piece in set.ranges().flat_map(|range| range.chunks(RUN)) {
                if self.cancelled() {
                    return Err(Stop::Cancelled);
                }
                let names =
                    names_of(&*device, piece, &mut buffer).map_err(super::SendError::from)?;
                let before = self.main.sent();
                let device = DeviceNumber(at as u8);
                self.main.write(&Frame::Names { device, start: piece.start, names })?;
                self.pacer.sent(self.main.sent() - before);
                left -= piece.bytes();
                if told.elapsed() > TELL {
                    told = Instant::now();
                    self.drain()?;
                    self.progress(Phase::PreCopy, left);
                }
            }
        }
        self.batch += 1;
        self.main.write(&Frame::RoundEnd(self.batch))?;
        Ok(self.main.flush()?)
    }

    /// Waits until the destination has said what it lacks.
    fn answer(&mut self) -> Result<Lists, Stop> {
        let deadline = Instant::now() + ANSWER_LIMIT;
        while self.applied < self.batch {
            if self.cancelled() {
                return Err(Stop::Cancelled);
            }
            if Instant::now() > deadline {
                return Err(Stop::Peer("it has not said in time what it lacks".into()));
            }
            match self.arrivals.recv_timeout(Duration::from_millis(10)) {
                Ok((at, frame)) => drop(self.note(at, frame?)?),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => return Err(super::closed()),
            }
        }
        self.lists.take().ok_or_else(|| Stop::Peer("it was not asked".into()))
    }
}
