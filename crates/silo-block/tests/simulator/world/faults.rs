//! Moves that begin, hosts that die and come back.

use super::{Broken, Checked, Ev, Move, World};
use crate::host::{Disk, name};
use silo_block::{
    block::BlockSet,
    model::Replica,
    rounds::Epoch,
    session::{
        Finish, Patience, Policy,
        destination::{self, Destination, DestinationDevice, MemoryHashes},
        messages::SessionId,
        source::{self, Source},
    },
};
use std::time::Duration;

const fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

impl World {
    fn patience(&self) -> Patience {
        Patience { silence: ms(60), answer: ms(600) }
    }

    fn source_config(&self) -> source::Config {
        source::Config {
            window: self.window,
            demand_window: 1024,
            patience: self.patience(),
            policy: Policy {
                blackout: ms(8),
                switch_cost: ms(1),
                max_rounds: 6,
                pause: ms(1),
                finish: if self.whole { Finish::Whole } else { Finish::Hybrid },
                ..Policy::default()
            },
            half_life: ms(20),
        }
    }

    fn destination_config(&self) -> destination::Config {
        destination::Config {
            patience: self.patience(),
            early_release: self.early_release,
            fetch_window: 2048,
            prefetch: if self.seed.is_multiple_of(2) { 8 } else { 0 },
        }
    }

    /// Begins a move to another host, if the owner is free to; the last one when faults are over.
    pub(super) fn begin_move(&mut self) -> Checked {
        let calm = self.now >= self.troubled_until;
        self.soon(9_000, Ev::Move);
        let Some(from) = self.guest.host.filter(|host| self.hosts[*host].up) else {
            return Ok(());
        };
        if self.hosts[from].source.is_some() || self.guest.paused || self.last_move {
            return Ok(());
        }
        if calm && self.moves.iter().any(|of| !of.over) {
            return Ok(());
        }
        let to = (from + 1 + self.random.below(2) as usize) % 3;
        let busy = |host: &crate::host::Host| {
            !host.up
                || host.source.is_some()
                || host.destination.is_some()
                || host.disk.handed.is_some()
        };
        if busy(&self.hosts[to]) {
            return Ok(());
        }
        let Some(_) = self.closed(from) else { return Ok(()) };
        self.last_move = calm;
        let (session, now) = (self.session(), self.time());
        let open = |device| self.hosts[from].replica(device).rounds().clock();
        let shared: Vec<Epoch> = self.hosts[from].devices().map(open).collect();
        self.hosts[from].persist();
        self.hosts[from].disk.shared = Some(shared);
        let config = self.source_config();
        let devices = self.hosts[from].source_devices();
        self.hosts[from].source = Some(Source::new(config, session, 1, devices, now));
        self.outcome.moves += 1;
        self.outcome.chained += u64::from(!self.hosts[from].all_here());
        let old = self.hosts[to].replicas.iter().any(|r| !r.history().terms().is_empty());
        self.outcome.back += u64::from(old);
        self.hosts[to].disk.received = Some((session, None));
        self.receive(to, session);
        self.moves.push(Move { session, from, to, link: None, over: false });
        let of = self.moves.len() - 1;
        self.soon(2_000, Ev::Connect(of));
        Ok(())
    }

    /// Closes the rounds of a device group, so that what is shared from now on is newer.
    fn closed(&mut self, host: usize) -> Option<()> {
        let devices: Vec<_> = self.hosts[host].devices().collect();
        devices.into_iter().try_for_each(|device| {
            self.hosts[host].replica(device).rounds().advance(Duration::ZERO).ok().map(|_| ())
        })
    }

    fn receive(&mut self, host: usize, session: SessionId) {
        let (config, now) = (self.destination_config(), self.time());
        let devices = self.hosts[host].take_destination();
        let hashes = Box::new(MemoryHashes::default());
        let destination = Destination::new(config, session, devices, hashes, now);
        self.hosts[host].destination = Some(destination);
    }

    pub(super) fn disturb(&mut self) {
        if self.now >= self.troubled_until {
            return;
        }
        self.soon(12_000, Ev::Disturb);
        // Most crashes hit hosts that take part in something.
        let host = self.random.below(3) as usize;
        if self.random.chance(55) {
            self.soon(1_000, Ev::Crash(host));
            // A power cut takes more than one.
            if self.random.chance(30) {
                self.soon(1_000, Ev::Crash((host + 1) % 3));
            }
        }
    }

    pub(super) fn crash(&mut self, host: usize) {
        if !self.hosts[host].up {
            return;
        }
        self.outcome.crashes += 1;
        let out = self.hosts[host].disk.handed.is_some() && self.hosts[host].source.is_some();
        self.outcome.crashes_out += u64::from(out);
        let filling = self.hosts[host].destination.as_ref().is_some_and(|destination| {
            *destination.phase() == destination::Phase::Running && destination.missing() > 0
        });
        self.outcome.crashes_filling += u64::from(filling);
        self.count(host);
        let source = self.hosts[host].source.as_ref().map(Source::session);
        let ours = self.moves.iter().filter(|of| of.from == host || of.to == host);
        let links: Vec<_> = ours.filter_map(|of| of.link).collect();
        links.into_iter().for_each(|link| self.cut(link));
        if self.guest.host == Some(host) {
            self.outcome.crashes_guest += 1;
            self.guest.die();
            self.guest.paused = false;
        }
        self.hosts[host].crash(&mut self.random);
        let handed = self.hosts[host].disk.handed.as_ref().map(|(session, _)| *session);
        if let Some(session) = source.filter(|session| handed != Some(*session)) {
            // Authority had not left: the move is over, and the owner is here when it is back.
            self.outcome.failures += 1;
            self.end_session(session, false);
        }
        self.soon(15_000, Ev::Restart(host));
    }

    pub(super) fn restart(&mut self, host: usize) -> Checked {
        if self.hosts[host].up {
            return Ok(());
        }
        self.hosts[host].read_records();
        let Disk { owner, handed, received, shared, promised, .. } = self.hosts[host].disk.clone();
        let now = self.time();
        if owner {
            let term = self.session();
            let mut intent = self.hosts[host].disk.intent.clone();
            if self.hosts[host].journal {
                // The records and the content are of the same moment.
                intent.iter_mut().for_each(|set| *set = BlockSet::new(set.device_blocks()));
            }
            let told = self.broken != Broken::RestartsAreNotTold;
            for (at, replica) in self.hosts[host].replicas.iter_mut().enumerate() {
                let shared = shared.as_ref().filter(|_| told).map(|shared| shared[at]);
                replica.restarted(term, shared, &intent[at]);
            }
            self.hosts[host].devices().for_each(|device| self.hosts[host].note(device));
        }
        if let Some((_, epochs)) = &handed {
            for (replica, last) in self.hosts[host].replicas.iter_mut().zip(epochs) {
                replica.give_away(*last);
            }
        }
        if let Some((session, attempt)) = received {
            let current = self.moves.iter().any(|of| of.session == session && !of.over);
            let full = self.hosts[host].replicas.iter().all(|r| r.absent().is_empty());
            match attempt {
                None if current => self.receive(host, session),
                None => self.hosts[host].disk.received = None,
                Some(attempt) if current || !full => {
                    let replicas = std::mem::take(&mut self.hosts[host].replicas);
                    let device = |(at, replica): (usize, Replica)| DestinationDevice {
                        name: name(at),
                        base: None,
                        replica,
                    };
                    let devices = replicas.into_iter().enumerate().map(device).collect();
                    let (config, hashes) =
                        (self.destination_config(), Box::new(MemoryHashes::default()));
                    let mut destination =
                        Destination::restored(config, session, devices, hashes, attempt, now);
                    for (device, blocks) in &promised {
                        destination.remember(*device, blocks);
                        for (block, hash) in blocks {
                            self.promises.insert((host, device.0, block.0), *hash);
                        }
                    }
                    self.hosts[host].destination = Some(destination);
                }
                Some(_) => {}
            }
        }
        if let Some((session, _)) = handed {
            let config = self.source_config();
            let devices = self.hosts[host].source_devices();
            self.hosts[host].source = Some(Source::restored(config, session, 1, devices, now));
        }
        if owner {
            self.boot_guest(host)?;
        }
        self.pump(host)
    }
}
