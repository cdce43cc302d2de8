//! A machine that is this process: a thread writes one number to memory and to the disk at once, and
//! its "state" is that number. What a round holds of the three must be equal.

use super::*;
use silo::{
    block::BlockIndex,
    device::DeviceName,
    memory::{Mapping, Tracking, sys},
    source::MemoryDevice,
};
use std::{
    fs::File,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
};

const BLOCKS: u64 = 2048;

/// The machine: what it writes to, and what may go wrong with it.
struct Fake {
    /// The number that was written last; held while it is written, and by a pause.
    gate: Mutex<u64>,
    paused: AtomicBool,
    map: sys::SharedMap,
    /// Somebody writes to memory during a pause.
    late: AtomicBool,
    refuses_pause: AtomicBool,
    resumed: AtomicU64,
    state_bytes: AtomicU64,
}

impl Fake {
    fn store(&self, block: u64, value: u64) {
        assert!(block < BLOCKS);
        let at = block as usize * BLOCK_SIZE;
        // SAFETY: inside the mapping and aligned; whoever looks at it meanwhile reads the file.
        let word = unsafe { AtomicU64::from_ptr(self.map.base().as_ptr().add(at).cast()) };
        word.store(value, Ordering::SeqCst);
    }

    fn work(&self, disk: &dyn BlockDevice) {
        let mut number = lock(&self.gate);
        if self.paused.load(Ordering::SeqCst) {
            drop(number);
            thread::yield_now();
            return;
        }
        *number += 1;
        self.store(0, *number);
        self.store(*number % BLOCKS, *number);
        disk.write_at(0, &number.to_le_bytes()).unwrap();
    }
}

struct Handle(Arc<Fake>);

struct Still {
    fake: Arc<Fake>,
    since: std::time::Instant,
}

impl Machine for Handle {
    fn pause(&self) -> Result<Box<dyn Paused>, MachineError> {
        if self.0.refuses_pause.load(Ordering::SeqCst) {
            return Err("it does not stop".into());
        }
        let _number = lock(&self.0.gate);
        self.0.paused.store(true, Ordering::SeqCst);
        Ok(Box::new(Still { fake: Arc::clone(&self.0), since: std::time::Instant::now() }))
    }
}

impl Drop for Still {
    fn drop(&mut self) {
        self.fake.resumed.fetch_add(1, Ordering::SeqCst);
        self.fake.paused.store(false, Ordering::SeqCst);
    }
}

impl Paused for Still {
    fn describe(&mut self) -> Result<Vec<u8>, MachineError> {
        let number = *lock(&self.fake.gate);
        if self.fake.late.load(Ordering::SeqCst) {
            self.fake.store(BLOCKS - 1, number);
        }
        let mut content = vec![1; self.fake.state_bytes.load(Ordering::SeqCst) as usize];
        content[..8].copy_from_slice(&number.to_le_bytes());
        Ok(content)
    }

    fn resume(self: Box<Self>) -> Result<Duration, MachineError> {
        Ok(self.since.elapsed())
    }
}

struct Rig {
    fake: Arc<Fake>,
    memory: Arc<Memory>,
    capture: MachineCapture,
    served: CopyBeforeWrite,
    _scratch: tempfile::TempDir,
}

impl Rig {
    fn new() -> Self {
        let name = DeviceName::new("memory").unwrap();
        let memory = Arc::new(Memory::new(name, BLOCKS * BLOCK_SIZE as u64).unwrap());
        let map = sys::SharedMap::new(memory.file(), BLOCKS as usize * BLOCK_SIZE, true).unwrap();
        let device = File::options().read(true).write(true).open("/dev/userfaultfd").unwrap();
        let mapping = Mapping {
            userfaultfd: sys::new_userfaultfd(&device).unwrap(),
            pid: std::process::id(),
            address: map.base().as_ptr() as u64,
            incoming: false,
            adopted: false,
            track: true,
        };
        assert_eq!(memory.attach(mapping).unwrap(), Tracking::WriteProtect, "Linux 6.7 or newer");
        let fake = Arc::new(Fake {
            gate: Mutex::new(0),
            paused: AtomicBool::new(false),
            map,
            late: AtomicBool::new(false),
            refuses_pause: AtomicBool::new(false),
            resumed: AtomicU64::new(0),
            state_bytes: AtomicU64::new(4096 * 3),
        });
        let disk: Arc<dyn BlockDevice> = Arc::new(MemoryDevice::new("root", 1 << 20).unwrap());
        let scratch = tempfile::tempdir().unwrap();
        let copies = DiskCopies::new(vec![("root".into(), disk)], scratch.path()).unwrap();
        let served = copies.served(0);
        let machine = Arc::new(Handle(Arc::clone(&fake)));
        let options = StagingOptions::default();
        let capture = MachineCapture::new(machine, &memory, copies, options).unwrap();
        Self { fake, memory, capture, served, _scratch: scratch }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.memory.detach();
    }
}

/// The first number of a device in a round; `before` if the round does not list it.
fn number(frozen: &dyn Frozen, device: usize, before: u64) -> u64 {
    let mut block = vec![0; BLOCK_SIZE];
    if !frozen.changed(device).contains(BlockIndex(0)) {
        return before;
    }
    frozen.read(device, BlockRange::new(0, 1), &mut block).unwrap();
    u64::from_le_bytes(block[..8].try_into().unwrap())
}

#[test]
fn memory_state_and_disk_of_a_round_are_of_one_instant_while_the_machine_works() {
    let rig = Rig::new();
    let stop = AtomicBool::new(false);
    let names: Vec<_> = rig.capture.devices().into_iter().map(|info| info.name).collect();
    assert_eq!(names, ["memory", "machine", "disk-root"]);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                rig.fake.work(&rig.served);
            }
        });
        let (mut stored, mut last) = ([0; 3], 0);
        for round in 0..30 {
            while *lock(&rig.fake.gate) <= last {
                thread::yield_now();
            }
            let frozen = rig.capture.freeze(Want::Changed).unwrap();
            assert!(matches!(rig.capture.freeze(Want::Changed), Err(CaptureError::Frozen)));
            let now = [0, 1, 2].map(|at| number(&*frozen, at, stored[at]));
            assert!(now[0] == now[1] && now[1] == now[2], "round {round}: {now:?}");
            assert!(now[0] > last, "round {round} has nothing new");
            last = now[0];
            if round % 3 == 1 {
                frozen.put_back();
            } else {
                stored = now;
                frozen.release();
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    let taken = rig.capture.taken();
    assert!(taken.paused > Duration::ZERO && taken.rounds >= 2, "{taken:?}");
    assert!(rig.capture.holds().count() >= 30);
}

#[test]
fn a_round_in_whose_pause_somebody_wrote_is_given_up_and_the_machine_goes_on() {
    let rig = Rig::new();
    rig.fake.work(&rig.served);
    rig.fake.late.store(true, Ordering::SeqCst);
    let refused = rig.capture.freeze(Want::Changed).map(drop).unwrap_err();
    let refused = format!("{refused}: {:?}", std::error::Error::source(&refused));
    assert!(refused.contains("while the machine stood still"), "{refused}");
    assert!(!rig.fake.paused.load(Ordering::SeqCst));
    assert_eq!(rig.fake.resumed.load(Ordering::SeqCst), 1);
    rig.fake.late.store(false, Ordering::SeqCst);
    let frozen = rig.capture.freeze(Want::Changed).unwrap();
    assert!(frozen.changed(0).len() == BLOCKS, "nothing has been stored yet");
    frozen.release();
    rig.fake.work(&rig.served);
    let frozen = rig.capture.freeze(Want::Changed).unwrap();
    assert!(frozen.changed(0).len() <= 2 && frozen.changed(2).len() == 1);
    frozen.release();
}

#[test]
fn a_machine_that_does_not_stop_is_not_backed_up_and_loses_nothing() {
    let rig = Rig::new();
    rig.fake.work(&rig.served);
    rig.fake.refuses_pause.store(true, Ordering::SeqCst);
    assert!(rig.capture.freeze(Want::Changed).is_err());
    rig.fake.refuses_pause.store(false, Ordering::SeqCst);
    let frozen = rig.capture.freeze(Want::Changed).unwrap();
    assert_eq!([0, 1, 2].map(|at| number(&*frozen, at, 0)), [1; 3]);
}

#[test]
fn a_shorter_state_leaves_nothing_of_a_longer_one() {
    let rig = Rig::new();
    let list = |bytes: u64, release: bool| {
        rig.fake.state_bytes.store(bytes, Ordering::SeqCst);
        let frozen = rig.capture.freeze(Want::Changed).unwrap();
        let listed = frozen.changed(1).len();
        let mut last = vec![7; BLOCK_SIZE];
        frozen.read(1, BlockRange::new(listed - 1, 1), &mut last).unwrap();
        if release {
            frozen.release();
        }
        (listed, last[BLOCK_SIZE - 1])
    };
    assert_eq!(list(4096 * 5, true), (DEVICE_BYTES / 4096, 0), "nothing is known of the store");
    assert_eq!(list(4096 * 5, true), (5, 1));
    assert_eq!(list(4096 * 2, false), (5, 0), "zeros where the longer one was");
    assert_eq!(list(4096 * 2, true), (5, 0), "which were not stored the last time");
    assert_eq!(list(4096 * 9, true), (9, 1));
}

#[test]
fn a_destination_that_is_told_what_its_source_had_not_stored_looks_at_that_and_at_what_was_written_since()
 {
    // The source: a generation, then writes that no generation has.
    let source = Rig::new();
    assert!(source.capture.changed().is_err(), "nothing is stored yet");
    for _ in 0..5 {
        source.fake.work(&source.served);
    }
    source.capture.freeze(Want::Changed).unwrap().release();
    for _ in 0..3 {
        source.fake.work(&source.served);
    }
    // A round that was not stored counts as never taken.
    source.capture.freeze(Want::Changed).unwrap().put_back();
    let changed = source.capture.changed().unwrap();
    // Block 0, and those of 6 to 8; of the disk its first.
    assert_eq!((changed[0].len(), changed[1].len()), (4, 1));

    // The destination: it has written before anybody watched for a backup.
    let destination = Rig::new();
    silo::device::Device::start_tracking(&*destination.memory).unwrap();
    destination.fake.store(100, 1);
    destination.served.write_at(5 * BLOCK_SIZE as u64, &[1; 8]).unwrap();
    // Whoever looked before has been told of it; it is known all the same.
    destination.capture.freeze(Want::Changed).unwrap().put_back();
    let wrong = [BlockSet::new(BLOCKS), BlockSet::new(3)];
    assert!(destination.capture.know(&wrong).is_err());
    destination.capture.know(&changed).unwrap();
    destination.fake.store(200, 1);
    let frozen = destination.capture.freeze(Want::Changed).unwrap();
    let listed = frozen.changed(0);
    let expected = [0, 6, 7, 8, 100, 200];
    assert_eq!(listed.len(), expected.len() as u64);
    assert!(expected.iter().all(|block| listed.contains(BlockIndex(*block))));
    // Of the disk the round that was put back listed everything, and that stays; it is compared.
    assert_eq!(frozen.changed(2).len(), frozen.changed(2).device_blocks());
    frozen.release();
    // From there on as always.
    destination.fake.store(300, 1);
    let frozen = destination.capture.freeze(Want::Changed).unwrap();
    assert_eq!((frozen.changed(0).len(), frozen.changed(2).len()), (1, 0));
    // Whoever is told while a round is under way is told no.
    assert!(destination.capture.know(&changed).is_err());
}
