//! A device is one register a block to all who use it while it moves, whichever end they use: a read
//! gives the newest write that ended before it began, or one that was under way beside it; and what
//! one reader has seen, no later reader sees undone.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use common::{MIB, Random, memory::Memory, rig::*, tap::Tap, until};
use silo_block::{
    io::BlockDevice,
    session::{Finish, Policy, source::Config},
};
use silo_move::{Volume, destination};
use std::{
    io::ErrorKind,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

const BLOCK: u64 = 4096;
/// Enough of them that many are still coming when the destination runs.
const BLOCKS: u64 = 16 * MIB / BLOCK;
/// Those that are used: neighbours share nothing, and a number lies across a sector's border.
const STEP: u64 = 16;
const WRITERS: u64 = 3;
const READERS: u64 = 3;

/// What is known of a block: one writer at a time, numbers that rise.
#[derive(Default)]
struct Register {
    /// The newest write that has begun, and that has ended.
    begun: AtomicU64,
    ended: AtomicU64,
    /// The newest that somebody has read.
    seen: AtomicU64,
}

struct World {
    registers: Vec<Register>,
    ends: [Arc<Volume>; 2],
    stop: AtomicBool,
    /// Reads and writes, by end.
    done: [AtomicU64; 2],
}

impl World {
    /// Does it at the end that has the device; none if that changes hands just now.
    fn at<T>(&self, work: impl Fn(&Volume) -> std::io::Result<T>) -> Option<T> {
        let at = usize::from(self.ends[1].is_owned());
        match work(&self.ends[at]) {
            Ok(result) => {
                self.done[at].fetch_add(1, Ordering::Relaxed);
                Some(result)
            }
            Err(error) if error.kind() == ErrorKind::NotConnected => {
                thread::yield_now();
                None
            }
            Err(error) => panic!("end {at}: {error}"),
        }
    }

    fn place(register: u64) -> u64 {
        register * STEP * BLOCK + 510
    }

    fn write(&self, writer: u64) {
        let mut random = Random(writer);
        let count = self.registers.len() as u64;
        while !self.stop.load(Ordering::Relaxed) {
            // Each has registers of its own.
            let number = random.below(count / WRITERS) * WRITERS + writer;
            let register = &self.registers[number as usize];
            let value = register.begun.fetch_add(1, Ordering::SeqCst) + 1;
            let bytes = value.to_le_bytes();
            // One that failed was not done, and is done again, at whatever end has the device then.
            while self.at(|volume| volume.write_at(Self::place(number), &bytes)).is_none() {}
            register.ended.store(value, Ordering::SeqCst);
        }
    }

    fn read(&self, reader: u64) {
        let mut random = Random(100 + reader);
        let count = self.registers.len() as u64 / WRITERS * WRITERS;
        while !self.stop.load(Ordering::Relaxed) {
            let number = random.below(count);
            let register = &self.registers[number as usize];
            let ended = register.ended.load(Ordering::SeqCst);
            let least = register.seen.load(Ordering::SeqCst).max(ended);
            let mut bytes = [0; 8];
            let read = self.at(|volume| {
                let mut own = [0; 8];
                volume.read_at(Self::place(number), &mut own).map(|()| own)
            });
            let Some(read) = read else { continue };
            bytes.copy_from_slice(&read);
            let value = u64::from_le_bytes(bytes);
            let most = register.begun.load(Ordering::SeqCst);
            assert!((least..=most).contains(&value), "{number}: {value} of {least} to {most}");
            register.seen.fetch_max(value, Ordering::SeqCst);
        }
    }
}

#[test]
fn check_32_a_device_is_linearizable_under_load_while_it_moves() {
    for (seed, finish) in [(1, Finish::Hybrid), (2, Finish::Whole), (3, Finish::Hybrid)] {
        let size = BLOCKS * BLOCK;
        let device = Arc::new(Memory::new(size));
        let mut content = vec![0; size as usize];
        Random(seed).fill(&mut content);
        let registers = BLOCKS / STEP;
        for register in 0..registers {
            content[World::place(register) as usize..][..8].fill(0);
        }
        device.write_at(0, &content).unwrap();
        let target = Arc::new(Memory::new(size));
        let there = empty("memory", target.clone(), BLOCK as u32);
        let receiver = Receiver::new(vec![there.clone()], destination::Options::default());
        let server = serve(&receiver);
        let tap = Tap::new(Some(server.address()));
        // Slow enough that the destination is used while most of it still comes.
        tap.jitter(Duration::from_millis(3));
        let volume = owned("memory", device, BLOCK as u32);
        let world = World {
            registers: (0..registers).map(|_| Register::default()).collect(),
            ends: [volume.clone(), there.clone()],
            stop: AtomicBool::new(false),
            done: Default::default(),
        };
        thread::scope(|scope| {
            let world = &world;
            let all: Vec<_> = (0..WRITERS)
                .map(|writer| scope.spawn(move || world.write(writer)))
                .chain((0..READERS).map(|reader| scope.spawn(move || world.read(reader))))
                .collect();
            let failed = || all.iter().any(thread::ScopedJoinHandle::is_finished);
            until("use of the source", || world.done[0].load(Ordering::Relaxed) > 500 || failed());
            let policy = Policy { finish, max_rounds: 4, ..Policy::default() };
            let options = source_options(Config { policy, ..Config::default() });
            let outbound = start(&[volume], tap.address, &Arc::default(), options);
            outbound.wait().unwrap();
            receiver.session(1).wait().unwrap();
            let before = world.done[1].load(Ordering::Relaxed);
            until("use of the destination", || {
                world.done[1].load(Ordering::Relaxed) > before + 500 || failed()
            });
            world.stop.store(true, Ordering::Relaxed);
            // A thread that saw what may not be ends the test here.
        });
        // Nothing but the registers has changed, and those hold what was written last.
        for (number, register) in world.registers.iter().enumerate() {
            let at = World::place(number as u64) as usize;
            content[at..at + 8]
                .copy_from_slice(&register.ended.load(Ordering::SeqCst).to_le_bytes());
        }
        assert!(bytes(&*target) == content, "the devices differ");
    }
}
