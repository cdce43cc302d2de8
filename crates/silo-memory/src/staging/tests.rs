//! A process of its own writes to the memory, and is stopped for the last set.

use super::*;
use crate::{
    machine::{Mapping, Memory, Tracking},
    mount::{Mount, Options},
    sys::SharedMap,
};
use nix::{
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{ForkResult, Pid, fork},
};
use silo_block::{
    block::BlockIndex,
    device::{Device, DeviceName},
};
use std::{
    io::{Read, Write},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

/// A process that writes 1, 2, 3, … to the first word of page 0, 1, 2, … of the first `pages`, over
/// and over, without pause.
struct Writer {
    child: Pid,
    memory: Arc<Memory>,
    pages: u64,
    /// The first words of the pages during the last pause.
    paused: Mutex<Vec<u64>>,
}

impl Writer {
    fn start(blocks: u64, pages: u64) -> Self {
        let memory =
            Memory::new(DeviceName::new("memory").unwrap(), blocks * BLOCK_SIZE as u64).unwrap();
        let device = File::options().read(true).write(true).open("/dev/userfaultfd").unwrap();
        let (mut from_child, mut to_parent) = io::pipe().unwrap();
        let (mut from_parent, mut to_child) = io::pipe().unwrap();
        // SAFETY: the child only maps, makes a descriptor, uses pipes, and writes to the mapping;
        // it takes no lock and allocates nothing.
        let child = match unsafe { fork() }.unwrap() {
            ForkResult::Child => {
                let map =
                    SharedMap::new(memory.file(), blocks as usize * BLOCK_SIZE, true).unwrap();
                let userfaultfd = sys::new_userfaultfd(&device).unwrap();
                let mut told = [0; 16];
                told[..8].copy_from_slice(&(map.base().as_ptr() as u64).to_ne_bytes());
                told[8..].copy_from_slice(&(userfaultfd.as_raw_fd() as u64).to_ne_bytes());
                to_parent.write_all(&told).unwrap();
                from_parent.read_exact(&mut [0]).unwrap();
                for count in 1.. {
                    let page = (count - 1) % pages;
                    // SAFETY: inside the mapping.
                    unsafe {
                        let word = map.base().as_ptr().add(page as usize * BLOCK_SIZE);
                        word.cast::<u64>().write_volatile(count);
                    }
                }
                unreachable!("it counts until it is killed")
            }
            ForkResult::Parent { child } => child,
        };
        let mut told = [0; 16];
        from_child.read_exact(&mut told).unwrap();
        let word = |at: usize| u64::from_ne_bytes(told[at..at + 8].try_into().unwrap());
        // SAFETY: the two system calls take numbers and return new descriptors, owned from here on.
        let userfaultfd = unsafe {
            let process = libc::syscall(libc::SYS_pidfd_open, child.as_raw(), 0);
            assert!(process >= 0, "{}", io::Error::last_os_error());
            let process = OwnedFd::from_raw_fd(process as i32);
            let fd = libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), word(8) as i32, 0);
            assert!(fd >= 0, "{}", io::Error::last_os_error());
            OwnedFd::from_raw_fd(fd as i32)
        };
        let tracking = memory
            .attach(Mapping {
                userfaultfd,
                pid: child.as_raw() as u32,
                address: word(0),
                incoming: false,
                adopted: false,
                track: true,
            })
            .unwrap();
        assert_eq!(tracking, Tracking::WriteProtect, "these tests need Linux 6.7 or newer");
        to_child.write_all(&[1]).unwrap();
        Self { child, memory: Arc::new(memory), pages, paused: Mutex::default() }
    }

    /// Waits until the writer has come so far.
    fn wait_for(&self, count: u64) {
        while self.word((count - 1) % self.pages) < count {
            thread::yield_now();
        }
    }

    /// The first word of a page, from the memory itself.
    fn word(&self, page: u64) -> u64 {
        let mut block = vec![0; BLOCK_SIZE];
        self.memory.read(BlockIndex(page), &mut block).unwrap();
        u64::from_ne_bytes(block[..8].try_into().unwrap())
    }
}

impl Pauser for Writer {
    fn pause(&self) -> io::Result<()> {
        kill(self.child, Signal::SIGSTOP)?;
        match waitpid(self.child, Some(WaitPidFlag::WUNTRACED))? {
            WaitStatus::Stopped(..) => {}
            other => return Err(io::Error::other(format!("the writer is {other:?}"))),
        }
        *self.paused.lock().unwrap() = (0..self.pages).map(|page| self.word(page)).collect();
        Ok(())
    }

    fn resume(&self) -> io::Result<()> {
        Ok(kill(self.child, Signal::SIGCONT)?)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = kill(self.child, Signal::SIGKILL);
        let _ = waitpid(self.child, None);
        self.memory.detach();
    }
}

/// The first words of the pages, with a round laid over them.
fn apply(image: &mut [u64], staged: &Staged) {
    for range in staged.changed().ranges().flat_map(|range| range.chunks(1)) {
        let mut block = vec![0; BLOCK_SIZE];
        staged.read(range, &mut block).unwrap();
        if let Some(word) = image.get_mut(range.start.0 as usize) {
            *word = u64::from_ne_bytes(block[..8].try_into().unwrap());
        }
    }
}

/// The image is what the memory held in the last pause, and what the writer had written at some
/// instant: each page holds the last count before the largest one that belongs to it. The writer
/// has begun, or there is nothing to see.
fn assert_one_instant(image: &[u64], writer: &Writer) -> u64 {
    for (page, (found, held)) in image.iter().zip(&*writer.paused.lock().unwrap()).enumerate() {
        assert_eq!(found, held, "page {page} in the image and in the paused memory");
    }
    let (pages, last) = (image.len() as u64, *image.iter().max().unwrap());
    assert!(last > 0, "wait for the writer before the freeze");
    for (page, found) in image.iter().enumerate() {
        let ahead = (last - 1 + pages - page as u64) % pages;
        let expected = last.saturating_sub(ahead);
        assert_eq!(*found, expected, "page {page} when {last} was written last");
    }
    last
}

#[test]
fn a_frozen_image_is_of_one_instant_and_the_next_round_is_the_difference() {
    one_instant(StagingOptions::default());
}

#[test]
fn an_image_that_several_threads_copy_is_of_one_instant_too() {
    one_instant(StagingOptions { threads: 3, ..StagingOptions::default() });
}

fn one_instant(options: StagingOptions) {
    const PAGES: u64 = 1500;
    let writer = Writer::start(16_384, PAGES);
    writer.wait_for(2 * PAGES);
    let staging = Staging::new(Arc::clone(&writer.memory) as _, options).unwrap();
    let mut image = vec![0; PAGES as usize];
    let mut before = 0;
    for round in 0..5 {
        let (mut staged, held) = freeze(&[&staging], &writer).unwrap();
        let staged = staged.pop().unwrap();
        let changed = staged.changed().len();
        if round == 0 {
            assert_eq!(changed, 16_384, "the first round holds all");
        } else {
            assert!(changed <= PAGES, "round {round} holds {changed} blocks");
        }
        assert!(held < Duration::from_secs(20), "paused for {held:?}");
        apply(&mut image, &staged);
        let last = assert_one_instant(&image, &writer);
        assert!(last > before, "the writer goes on between rounds");
        before = last;
        staged.release();
        writer.wait_for(last + 10);
    }
}

#[test]
fn a_round_that_was_not_stored_is_listed_again_with_newer_content() {
    const PAGES: u64 = 500;
    let writer = Writer::start(4096, PAGES);
    writer.wait_for(1);
    let staging = Staging::new(Arc::clone(&writer.memory) as _, StagingOptions::default()).unwrap();
    let mut image = vec![0; PAGES as usize];
    let (staged, _) = freeze(&[&staging], &writer).unwrap();
    assert!(matches!(staging.prepare(), Err(StagingError::Frozen)));
    let first = staged[0].changed();
    drop(staged);
    assert_eq!(staging.changed().unwrap(), first, "put back");
    let (mut staged, _) = freeze(&[&staging], &writer).unwrap();
    assert_eq!(staged[0].changed(), first);
    apply(&mut image, &staged[0]);
    let last = assert_one_instant(&image, &writer);
    staged.remove(0).release();
    // A second round that is lost: its blocks come again in the third.
    writer.wait_for(last + 10);
    drop(freeze(&[&staging], &writer).unwrap());
    let (staged, _) = freeze(&[&staging], &writer).unwrap();
    apply(&mut image, &staged[0]);
    assert!(assert_one_instant(&image, &writer) > last);
}

#[test]
fn a_writer_that_outpaces_the_copying_is_a_named_error_and_loses_nothing() {
    const PAGES: u64 = 6000;
    let writer = Writer::start(8192, PAGES);
    writer.wait_for(3 * PAGES);
    let tight =
        StagingOptions { last_set: 64 << 10, enough: 4096, rounds: 2, pauses: 2, threads: 1 };
    let staging = Staging::new(Arc::clone(&writer.memory) as _, tight).unwrap();
    let error = freeze(&[&staging], &Busy(&writer)).err().expect("65536 bytes cannot be enough");
    assert!(matches!(error, StagingError::Outpaced { limit: 65_536, .. }), "{error}");
    assert!(error.to_string().contains("slow the writer down"), "{error}");
    // The writer runs, and when it stops everything is listed.
    let now = writer.memory.clone();
    writer.pause().unwrap();
    let mut staged = freeze(&[&staging], &Nobody).unwrap().0;
    assert_eq!(staged[0].changed().len(), 8192);
    let mut image = vec![0; PAGES as usize];
    apply(&mut image, &staged[0]);
    assert_one_instant(&image, &writer);
    drop(now);
    staged.remove(0).release();
    assert!(staging.changed().unwrap().is_empty(), "nobody writes");
    writer.resume().unwrap();
}

/// Stops the writer only when it has written more than a tight last set.
struct Busy<'a>(&'a Writer);

impl Pauser for Busy<'_> {
    fn pause(&self) -> io::Result<()> {
        let mut block = vec![0; BLOCK_SIZE];
        let mut now = || {
            self.0.memory.read(BlockIndex(0), &mut block).unwrap();
            u64::from_ne_bytes(block[..8].try_into().unwrap())
        };
        // Once around from page 0 is every page.
        let before = now();
        while now() < before + 1 {
            thread::yield_now();
        }
        self.0.pause()
    }

    fn resume(&self) -> io::Result<()> {
        self.0.resume()
    }
}

/// For memory that nobody writes meanwhile.
struct Nobody;

impl Pauser for Nobody {
    fn pause(&self) -> io::Result<()> {
        Ok(())
    }

    fn resume(&self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn content_that_is_elsewhere_comes_through_the_pager_before_it_is_copied() {
    struct Slow(Vec<u8>);
    impl silo_block::io::BlockDevice for Slow {
        fn size(&self) -> u64 {
            self.0.len() as u64
        }
        fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
            thread::sleep(Duration::from_millis(1));
            buf.copy_from_slice(&self.0[offset as usize..][..buf.len()]);
            Ok(())
        }
        fn write_at(&self, _: u64, _: &[u8]) -> io::Result<()> {
            Ok(())
        }
        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
        fn trim(&self, _: u64, _: u64) -> io::Result<()> {
            Ok(())
        }
        fn zero(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
            Ok(())
        }
    }
    let content: Vec<u8> = (0..3_000_100u32).map(|at| (at / 7) as u8).collect();
    let options = Options::new(DeviceName::new("slow").unwrap());
    let mount = Arc::new(Mount::direct(Arc::new(Slow(content.clone())), options).unwrap());
    let staging = Staging::new(Arc::clone(&mount) as _, StagingOptions::default()).unwrap();
    let read = |staged: &Staged| {
        let mut image = vec![0; 733 * BLOCK_SIZE];
        for range in staged.changed().ranges() {
            let at = range.start.offset() as usize;
            staged.read(range, &mut image[at..at + range.bytes() as usize]).unwrap();
        }
        image
    };
    let (mut staged, _) = freeze(&[&staging], &Nobody).unwrap();
    let image = read(&staged[0]);
    assert!(image[..content.len()] == content, "all of it came");
    assert!(image[content.len()..].iter().all(|byte| *byte == 0));
    staged.remove(0).release();
    // SAFETY: inside the mapping, and no reference to it exists.
    unsafe { mount.address().as_ptr().add(99 * BLOCK_SIZE).write_volatile(250) };
    silo_block::io::BlockDevice::write_at(&*mount, 500 * BLOCK_SIZE as u64, &[9; 10]).unwrap();
    let (staged, _) = freeze(&[&staging], &Nobody).unwrap();
    let changed: Vec<_> = staged[0].changed().ranges().map(|range| range.start.0).collect();
    assert_eq!(changed, [99, 500], "through the mapping and through the library");
    assert_eq!(read(&staged[0])[99 * BLOCK_SIZE], 250);
}

#[test]
fn a_machines_missing_memory_is_brought_by_its_pager() {
    let name = DeviceName::new("memory").unwrap();
    let memory = Arc::new(Memory::new(name, 64 * BLOCK_SIZE as u64).unwrap());
    let map = SharedMap::new(memory.file(), 64 * BLOCK_SIZE, true).unwrap();
    let device = File::options().read(true).write(true).open("/dev/userfaultfd").unwrap();
    let mapping = Mapping {
        userfaultfd: sys::new_userfaultfd(&device).unwrap(),
        pid: std::process::id(),
        address: map.base().as_ptr() as u64,
        incoming: true,
        adopted: false,
        track: true,
    };
    memory.attach(mapping).unwrap();
    let (asked, answers) = std::sync::mpsc::channel();
    let asked = Mutex::new(asked);
    let demand = move |range: BlockRange| {
        // Nobody listens any more when the last is asked for, which is to be late.
        let _ = asked.lock().unwrap().send(range);
    };
    memory.arm(&BlockSet::full(64), Box::new(demand)).unwrap();
    let filler = Arc::clone(&memory);
    let peer = thread::spawn(move || {
        let mut brought = 0;
        while brought < 3 {
            let range = answers.recv().unwrap();
            for block in range.chunks(1) {
                brought +=
                    filler.fill(block.start, &[block.start.0 as u8 + 1; BLOCK_SIZE]).unwrap();
            }
        }
    });
    let mut bytes = vec![0; 3 * BLOCK_SIZE];
    memory.read_present(BlockRange::new(10, 3), &mut bytes).unwrap();
    peer.join().unwrap();
    for (number, block) in bytes.chunks(BLOCK_SIZE).enumerate() {
        assert!(block.iter().all(|byte| *byte == number as u8 + 11));
    }
    let late = memory.bring(BlockRange::new(40, 2), Duration::from_millis(50)).unwrap_err();
    assert!(late.to_string().contains("no answer in time"), "{late}");
    memory.detach();
}
