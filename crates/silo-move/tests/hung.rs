//! Disks that do not answer: a flush that hangs (at a source in the kernel: an fsync of a file on FUSE
//! whose device does not answer) holds up its own device only, for as long as it hangs, and no session
//! for ever.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use common::{Random, file::FileDevice, memory::Memory, rig::*};
use silo_block::{io::BlockDevice, session::source::Config};
use silo_expose::fuse::{FuseMount, FuseOptions};
use silo_move::{
    Volume, destination,
    ledger::{FileLedger, Ledger, Note},
    source,
};
use std::{
    io,
    path::Path,
    sync::{Arc, Condvar, Mutex},
    time::{Duration, Instant},
};

const SIZE: u64 = 4 << 20;
/// How long a disk may take here.
const LIMIT: Duration = Duration::from_secs(1);

/// A disk whose flushes hang while it is told so.
struct Hanging {
    inner: Memory,
    hangs: Mutex<bool>,
    changed: Condvar,
}

impl Hanging {
    fn new() -> Arc<Self> {
        let (hangs, changed) = (Mutex::new(false), Condvar::new());
        Arc::new(Self { inner: Memory::new(SIZE), hangs, changed })
    }

    fn hang(&self, hangs: bool) {
        *self.hangs.lock().unwrap() = hangs;
        self.changed.notify_all();
    }

    fn wait(&self) {
        let hangs = self.hangs.lock().unwrap();
        // A test that failed ends all the same: nobody can kill who waits in the kernel.
        drop(self.changed.wait_timeout_while(hangs, 2 * common::WAIT, |hangs| *hangs).unwrap());
    }
}

impl BlockDevice for Hanging {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.inner.read_at(offset, buf)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.inner.write_at(offset, data)
    }

    fn flush(&self) -> io::Result<()> {
        self.wait();
        Ok(())
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.inner.trim(offset, length)
    }

    fn zero(&self, offset: u64, length: u64, allocate: bool) -> io::Result<()> {
        self.inner.zero(offset, length, allocate)
    }
}

/// A file whose fsync hangs when its disk does.
struct Stuck {
    disk: Arc<Hanging>,
    mount: FuseMount,
    _dir: tempfile::TempDir,
}

impl Stuck {
    /// `None` where this computer has no FUSE.
    fn mount() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let disk = Hanging::new();
        match FuseMount::mount(dir.path(), "disk", disk.clone(), &FuseOptions::default()) {
            Ok(mount) => Some(Self { disk, mount, _dir: dir }),
            Err(error) => {
                eprintln!("not tried here: {error}");
                None
            }
        }
    }

    fn device(&self) -> Arc<dyn BlockDevice> {
        Arc::new(FileDevice::open(self.mount.path(), SIZE).unwrap())
    }
}

impl Drop for Stuck {
    fn drop(&mut self) {
        // A test that failed ends, too.
        self.disk.hang(false);
    }
}

fn noise(seed: u64) -> Arc<Memory> {
    let device = Arc::new(Memory::new(SIZE));
    let mut all = vec![0; SIZE as usize];
    Random(seed).fill(&mut all);
    device.write_at(0, &all).unwrap();
    device
}

fn arriving(dir: &Path) -> destination::Options {
    destination::Options {
        ledger: Some(Arc::new(FileLedger::new(dir.join("arriving")))),
        disk_limit: Some(LIMIT),
        ..quick()
    }
}

fn leaving(ledger: Arc<dyn Ledger>) -> source::Options {
    source::Options { ledger: Some(ledger), disk_limit: LIMIT, ..source_options(Config::default()) }
}

fn noted(dir: &Path, name: &str) -> Note {
    FileLedger::new(dir.join(name)).load().unwrap().unwrap()
}

/// Blocks that a note does not have, of a device of the group.
fn absent(note: &Note, device: usize) -> u64 {
    note.devices[device].record.absent.iter().map(|range| range.count).sum()
}

#[test]
fn a_device_whose_flush_hangs_holds_up_no_other_of_its_group_and_keeps_the_source_until_it_answers()
{
    let dir = tempfile::tempdir().unwrap();
    let (one, two, disk) = (noise(1), noise(2), Hanging::new());
    let file = FileDevice::open(&dir.path().join("fine"), SIZE).unwrap();
    let (fine, hung) = (empty("fine", Arc::new(file), 4096), empty("hung", disk.clone(), 4096));
    let receiver = Receiver::new(vec![fine.clone(), hung.clone()], arriving(dir.path()));
    let server = serve(&receiver);
    disk.hang(true);
    let ledger = Arc::new(FileLedger::new(dir.path().join("leaving")));
    let volumes = [owned("fine", one.clone(), 4096), owned("hung", two.clone(), 4096)];
    let outbound = start(&volumes, server.address(), &Arc::default(), leaving(ledger));
    outbound.switch();
    // It runs, with both.
    receiver.host.wait_for(|seen| matches!(seen, Seen::Run(..)));
    common::until("everything has come", || fine.absent() + hung.absent() == 0);
    fine.write_at(0, &[7; 4096]).unwrap();
    let began = Instant::now();
    fine.flush().unwrap();
    assert!(began.elapsed() < LIMIT * 8, "it waited {:?} for the other", began.elapsed());
    let error = hung.flush().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    assert!(error.to_string().contains("device \"hung\""), "{error}");
    let note = noted(dir.path(), "arriving");
    assert_eq!(absent(&note, 0), 0, "what was flushed is durable");
    assert_eq!(absent(&note, 1), SIZE / 4096, "nothing of the other is");
    let said = receiver.host.wait_for(|seen| matches!(seen, Seen::Trouble(_)));
    assert!(matches!(said, Seen::Trouble(text) if text.contains("device \"hung\"")));
    // The source has to stay, and does.
    assert!(!outbound.is_over() && !receiver.session(1).is_over());
    assert!(!receiver.host.seen().contains(&Seen::Durable));

    disk.hang(false);
    outbound.wait().unwrap();
    receiver.session(1).wait().unwrap();
    hung.flush().unwrap();
    assert_eq!(absent(&noted(dir.path(), "arriving"), 1), 0);
    same(&*two, &*hung);
    one.write_at(0, &[7; 4096]).unwrap();
    same(&*one, &*fine);
}

#[test]
fn a_handover_whose_flush_hangs_is_given_up_and_the_devices_are_used_on_at_the_source() {
    let Some(stuck) = Stuck::mount() else { return };
    let dir = tempfile::tempdir().unwrap();
    let volume = owned("hung", stuck.device(), 4096);
    let there = empty("hung", Arc::new(Memory::new(SIZE)), 4096);
    let receiver = Receiver::new(vec![there.clone()], arriving(dir.path()));
    let server = serve(&receiver);
    let ledger = Arc::new(FileLedger::new(dir.path().join("leaving")));
    let host = Arc::new(Host::default());
    let outbound =
        start(std::slice::from_ref(&volume), server.address(), &host, leaving(ledger.clone()));
    stuck.disk.hang(true);
    let began = Instant::now();
    outbound.switch();
    host.wait_for(|seen| *seen == Seen::Resume);
    assert!(began.elapsed() < LIMIT * 20, "writers stood still for {:?}", began.elapsed());
    let error = outbound.wait().unwrap_err();
    assert!(error.owned && error.to_string().contains("device \"hung\""), "{error}");
    assert!(receiver.session(1).wait().is_err() && !there.is_owned());
    stuck.disk.hang(false);
    volume.write_at(0, &[5; 4096]).unwrap();
    volume.flush().unwrap();
    // And it can leave as soon as the disk answers.
    let again = start(std::slice::from_ref(&volume), server.address(), &host, leaving(ledger));
    again.switch();
    again.wait().unwrap();
    receiver.session(2).wait().unwrap();
    let mut first = [0; 4096];
    there.read_at(0, &mut first).unwrap();
    assert_eq!(first, [5; 4096]);
}

/// A ledger on a disk that hangs.
struct HangingLedger {
    disk: Arc<Hanging>,
    inner: FileLedger,
}

impl Ledger for HangingLedger {
    fn save(&self, note: &Note) -> io::Result<()> {
        self.disk.wait();
        self.inner.save(note)
    }

    fn load(&self) -> io::Result<Option<Note>> {
        self.inner.load()
    }
}

#[test]
fn a_session_whose_note_hangs_ends_when_it_is_to_end() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Hanging::new();
    let inner = FileLedger::new(dir.path().join("note"));
    let ledger: Arc<dyn Ledger> = Arc::new(HangingLedger { disk: disk.clone(), inner });
    let options = destination::Options { ledger: Some(ledger), ..arriving(dir.path()) };
    let there: Arc<Volume> = empty("disk", Arc::new(Memory::new(SIZE)), 4096);
    let receiver = Receiver::new(vec![there.clone()], options);
    let server = serve(&receiver);
    disk.hang(true);
    let volume = owned("disk", noise(3), 4096);
    let host = Arc::new(Host::default());
    let outbound = start(
        std::slice::from_ref(&volume),
        server.address(),
        &host,
        source_options(Config::default()),
    );
    let session = receiver.session(1);
    session.cancel("enough");
    let began = Instant::now();
    let error = session.wait().unwrap_err();
    assert!(began.elapsed() < LIMIT * 20, "it took {:?}", began.elapsed());
    assert!(!error.owned, "{error}");
    outbound.wait().unwrap_err();
    assert!(volume.is_owned() && !there.is_owned());
    // What hung is done late, and harms nobody: the next session's notes come after it.
    disk.hang(false);
    let options = destination::Options {
        ledger: Some(Arc::new(FileLedger::new(dir.path().join("note")))),
        // Nothing hangs any more, and a busy computer is no hung disk.
        disk_limit: None,
        ..arriving(dir.path())
    };
    *receiver.options.lock().unwrap() = options;
    let outbound = start(
        std::slice::from_ref(&volume),
        server.address(),
        &host,
        source_options(Config::default()),
    );
    outbound.switch();
    outbound.wait().unwrap();
    receiver.session(2).wait().unwrap();
    assert_eq!(absent(&noted(dir.path(), "note"), 0), 0);
    assert!(there.is_owned());
}
