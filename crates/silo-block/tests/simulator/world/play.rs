//! What devices, stores and the guest do.

use super::{Broken, Checked, Ev, World};
use crate::guest::{Kind, Op, Writing};
use silo_block::{
    block::{BlockIndex, BlockRange},
    rounds::{Epoch, RoundError},
    session::{
        destination::{self, Access, WaiterId},
        messages::{BlockHash, DeviceIndex},
        source,
    },
};
use std::time::Duration;

const HALF: u64 = 256;

impl World {
    pub(super) fn stored(&mut self, host: usize, slot: u64) -> Checked {
        let now = self.time();
        let Some(storing) = self.hosts[host].storing.remove(&slot) else { return Ok(()) };
        storing.put(&mut self.hosts[host], 1);
        if let Some(destination) = &mut self.hosts[host].destination {
            destination.handle(now, destination::Event::Stored { slot, result: Ok(()) });
        }
        self.pump(host)
    }

    pub(super) fn fetched(
        &mut self,
        host: usize,
        ticket: u64,
        device: DeviceIndex,
        range: BlockRange,
    ) -> Checked {
        let now = self.time();
        let troubled = self.now < self.troubled_until;
        let fails = troubled && self.random.chance(10);
        let (mut content, mut hashes) = (Vec::new(), Vec::new());
        for block in range.start.0..range.end() {
            let promised = self.promises.get(&(host, device.0, block)).copied();
            let known = self.store.get(&(device.0, block)).cloned().unwrap_or_default();
            let right = known.iter().find(|c| Some(hash_of(device, block, **c)) == promised);
            let mut found = right.copied().unwrap_or([7, 7]);
            if troubled && self.random.chance(15) {
                // Another version, or other bytes.
                let any = self.random.below(known.len() as u64 + 1) as usize;
                found = known.get(any).copied().unwrap_or([found[1] ^ 1, found[0]]);
            }
            content.push(found);
            hashes.push(Some(match (self.broken, promised) {
                (Broken::HashesAreNotChecked, Some(promised)) => promised,
                _ => hash_of(device, block, found),
            }));
        }
        self.slots += 1;
        let slot = self.slots;
        let event = if fails {
            destination::Event::FetchFailed(ticket)
        } else {
            self.hosts[host].slots.insert(slot, (device, range, content));
            destination::Event::Fetched { ticket, hashes, slot }
        };
        if let Some(destination) = &mut self.hosts[host].destination {
            destination.handle(now, event);
        }
        self.pump(host)
    }

    /// All rounds of a host, if no write stands in the way.
    fn close_rounds(&mut self, host: usize) -> Option<Vec<Epoch>> {
        let devices: Vec<DeviceIndex> = self.hosts[host].devices().collect();
        // One barrier for the group: nobody writes while the rounds are closed.
        if self.guest.host == Some(host) && self.guest.half_done() > 0 {
            let rounds = self.hosts[host].replica(devices[0]).rounds();
            match rounds.advance(Duration::ZERO) {
                Ok(_) | Err(RoundError::StillWriting { .. }) => {}
                Err(RoundError::UsedUp) => unreachable!("few rounds"),
            }
            if self.random.chance(70) {
                return None;
            }
        }
        devices
            .into_iter()
            .map(|device| self.hosts[host].replica(device).rounds().advance(Duration::ZERO).ok())
            .collect()
    }

    pub(super) fn close_round(&mut self, host: usize) -> Checked {
        if !self.hosts[host].closing {
            return Ok(());
        }
        let (now, life) = (self.time(), self.hosts[host].life);
        let Some(epochs) = self.close_rounds(host) else {
            self.soon(50, Ev::CloseRound(host, life));
            return Ok(());
        };
        self.hosts[host].closing = false;
        if let Some(source) = &mut self.hosts[host].source {
            source.handle(now, source::Event::RoundClosed(epochs));
        }
        self.pump(host)
    }

    /// The guest is told to pause; when its writes have ended, authority can leave.
    pub(super) fn pause(&mut self, host: usize, ticket: u32) -> Checked {
        if self.hosts[host].pausing != Some(ticket) {
            return Ok(());
        }
        let (now, life) = (self.time(), self.hosts[host].life);
        let broken = self.broken == Broken::PauseDoesNotPause;
        let waits = self.guest.half_done() > 0 && !broken;
        let Some(epochs) = (!waits).then(|| self.close_rounds(host)).flatten() else {
            self.soon(50, Ev::Pause(host, life, ticket));
            return Ok(());
        };
        self.hosts[host].pausing = None;
        let mut flushes: Vec<Vec<u64>> = epochs.iter().map(|_| Vec::new()).collect();
        self.hosts[host].persist();
        for op in self.guest.flushes() {
            let device = self.guest.ops[&op].device;
            if self.random.chance(50) {
                self.acknowledge(op);
            } else {
                flushes[device.0 as usize].push(op);
            }
        }
        let Some(source) = &mut self.hosts[host].source else { return Ok(()) };
        let handed = Some((source.session(), epochs.clone()));
        source.handle(now, source::Event::Quiesced { ticket, epochs, flushes, state: vec![1] });
        if self.broken != Broken::HandOverIsNotNoted {
            self.hosts[host].disk.handed = handed;
            self.hosts[host].disk.owner = false;
        }
        if broken {
            self.guest.paused = false;
            self.soon(10, Ev::Guest(self.guest.life));
        }
        self.pump(host)
    }

    /// A backup under way: copies blocks beside the writer and promises them.
    pub(super) fn backup(&mut self) {
        self.soon(6_000, Ev::Backup);
        let Some(host) = self.guest.host.filter(|host| self.hosts[*host].up) else { return };
        if !self.with_store || self.hosts[host].source.is_none() {
            return;
        }
        let life = self.hosts[host].life;
        for device in self.hosts[host].devices().collect::<Vec<_>>() {
            let Ok(epoch) = self.hosts[host].replica(device).rounds().advance(Duration::ZERO)
            else {
                continue;
            };
            let mut blocks = Vec::new();
            for block in 0..self.sizes[device.0 as usize] {
                let here = self.hosts[host].replica(device).is_here(BlockRange::new(block, 1));
                if here && self.random.chance(60) {
                    let content = self.hosts[host].content[device.0 as usize][block as usize];
                    self.store.entry((device.0, block)).or_default().push(content);
                    blocks.push((BlockIndex(block), hash_of(device, block, content)));
                }
            }
            self.soon(4_000, Ev::Promised(host, life, device, epoch, blocks));
        }
    }

    // ---- the guest

    pub(super) fn guest_step(&mut self) -> Checked {
        let life = self.guest.life;
        if self.guest.host.is_none() || self.guest.paused {
            return Ok(());
        }
        let busy = if self.now < self.troubled_until { 250 } else { 2_000 };
        self.soon(busy, Ev::Guest(life));
        if self.guest.ops.len() > 12 {
            return Ok(());
        }
        let device = self.random.below(self.sizes.len() as u64);
        let blocks = self.sizes[device as usize];
        let device = DeviceIndex(device as u16);
        let first = self.random.below(blocks);
        let count = 1 + self.random.below(blocks - first).min(self.random.below(4));
        let kind = match self.random.below(100) {
            0..45 => Kind::Read(BlockRange::new(first, count)),
            45..70 => Kind::Write { first: first * 2, count: count * 2, state: Writing::Waits },
            70..95 => {
                let (start, end) = (first * 2 + self.random.below(2), (first + count) * 2);
                let count = (end - start).saturating_sub(self.random.below(2)).max(1);
                Kind::Write { first: start, count, state: Writing::Waits }
            }
            _ if self.random.chance(self.flushes) => {
                Kind::Flush(self.guest.reference.flush_begins())
            }
            _ => Kind::Read(BlockRange::new(0, blocks)),
        };
        let op = self.guest.begin(device, kind);
        self.attempt(op)
    }

    /// Begins an operation, or tries it again.
    pub(super) fn attempt(&mut self, op: u64) -> Checked {
        let Some(host) = self.guest.host else { return Ok(()) };
        let (now, life) = (self.time(), self.guest.life);
        let Some(Op { device, kind }) = self.guest.ops.get(&op) else { return Ok(()) };
        let (device, waiter) = (*device, WaiterId(op));
        match kind {
            Kind::Read(range) => {
                let range = *range;
                let access = match &mut self.hosts[host].destination {
                    Some(destination) => destination.read(now, device, range, waiter),
                    None => Access::Go(range),
                };
                match access {
                    Access::Go(_) => {
                        self.guest.ops.remove(&op);
                        self.check(host, device, range)?;
                    }
                    Access::Wait => self.outcome.waits += 1,
                    Access::Refused(_) => drop(self.guest.ops.remove(&op)),
                }
            }
            Kind::Write { first, count, state: Writing::Waits } => {
                let (first, count) = (*first, *count);
                let (offset, length) = (first * HALF, count * HALF);
                let lax = self.broken == Broken::PartialWritesDoNotWait && count % 2 == 1;
                let access = match &mut self.hosts[host].destination {
                    Some(destination) if !lax => {
                        destination.write(now, device, offset, length, waiter)
                    }
                    _ => Access::Go(BlockRange::new(0, 0)),
                };
                match access {
                    Access::Go(claim) => self.begin_write(host, op, first, count, claim),
                    Access::Wait => self.outcome.waits += 1,
                    Access::Refused(_) => drop(self.guest.ops.remove(&op)),
                }
            }
            Kind::Flush(_) => self.soon(1_500, Ev::FlushDone(host, op, life)),
            Kind::Write { state: Writing::Half { .. }, .. } => {}
        }
        self.pump(host)
    }

    fn begin_write(&mut self, host: usize, op: u64, first: u64, count: u64, claim: BlockRange) {
        let life = self.guest.life;
        let device = self.guest.ops[&op].device;
        let replica = self.hosts[host].replica(device);
        let touched = replica.geometry().touched(first * HALF, count * HALF);
        let tracked = if self.broken == Broken::WritesAreNotTracked {
            BlockRange::new(touched.start.0, 0)
        } else {
            touched
        };
        let guard = replica.rounds().write_owned(tracked);
        if self.broken != Broken::WritesAreNotIntended {
            self.hosts[host].disk.intent[device.0 as usize].insert_range(touched);
        }
        let values: Vec<u64> = (0..count).map(|_| self.guest.reference.number()).collect();
        self.put(host, device, first, &values[..count as usize / 2]);
        let state = Writing::Half { guard, claim, values };
        let kind = Kind::Write { first, count, state };
        self.guest.ops.insert(op, Op { device, kind });
        self.outcome.writes += 1;
        self.soon(300, Ev::Finish(op, life));
    }

    fn put(&mut self, host: usize, device: DeviceIndex, first: u64, values: &[u64]) {
        let base = self.half(device, 0);
        for (half, value) in (first..).zip(values) {
            let block = &mut self.hosts[host].content[device.0 as usize][half as usize / 2];
            block[half as usize % 2] = *value;
            self.guest.reference.wrote(base + half as usize, *value);
        }
    }

    pub(super) fn finish_write(&mut self, op: u64) -> Checked {
        let Some(host) = self.guest.host else { return Ok(()) };
        let half = |op: &Op| matches!(op.kind, Kind::Write { state: Writing::Half { .. }, .. });
        if !self.guest.ops.get(&op).is_some_and(half) {
            return Ok(());
        }
        let Some(Op { device, kind }) = self.guest.ops.remove(&op) else { return Ok(()) };
        let Kind::Write { first, count, state: Writing::Half { guard, claim, values } } = kind
        else {
            return Ok(());
        };
        let done = count as usize / 2;
        self.put(host, device, first + done as u64, &values[done..]);
        self.guest.reference.ended(&values);
        let now = self.time();
        if let Some(destination) = &mut self.hosts[host].destination {
            destination.wrote(now, device, claim, true);
        }
        drop(guard);
        self.pump(host)
    }

    pub(super) fn flush_done(&mut self, host: usize, op: u64) -> Checked {
        if self.guest.host != Some(host) || self.guest.paused || !self.guest.ops.contains_key(&op) {
            return Ok(());
        }
        if self.broken != Broken::FlushIsNotDurable {
            self.hosts[host].persist();
        }
        self.acknowledge(op);
        Ok(())
    }

    fn acknowledge(&mut self, op: u64) {
        if let Some(Op { kind: Kind::Flush(covered), .. }) = self.guest.ops.remove(&op) {
            self.guest.reference.flushed(&covered);
            self.outcome.flushes += 1;
        }
    }

    /// The guest goes on, on this host: what it was doing it does again.
    pub(super) fn resume_guest(&mut self, host: usize) -> Checked {
        (self.guest.host, self.guest.paused) = (Some(host), false);
        let ops: Vec<u64> = self.guest.ops.keys().copied().collect();
        for op in ops {
            self.attempt(op)?;
        }
        self.soon(50, Ev::Guest(self.guest.life));
        Ok(())
    }

    /// The guest starts anew, from what is on this host.
    pub(super) fn boot_guest(&mut self, host: usize) -> Checked {
        if let Some(other) = self.guest.host {
            return Err(format!("two owners: {host} and {other}"));
        }
        self.guest.life += 1;
        self.resume_guest(host)
    }
}

pub(super) fn hash_of(device: DeviceIndex, block: u64, content: [u64; 2]) -> BlockHash {
    let mut hash = [0; 32];
    hash[..8].copy_from_slice(&content[0].to_le_bytes());
    hash[8..16].copy_from_slice(&content[1].to_le_bytes());
    hash[16..24].copy_from_slice(&block.to_le_bytes());
    hash[24..26].copy_from_slice(&device.0.to_le_bytes());
    BlockHash(hash)
}
