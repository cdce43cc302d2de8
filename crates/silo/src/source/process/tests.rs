//! A real process: this test binary again, with a memory that it changes when it is told.

use super::*;
use crate::{block::BlockRange, source::MemoryDevice};
use std::{
    env,
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::Duration,
};

const FLAG: &str = "SILO_TEST_PROCESS_MEMORY";
const PAGES: usize = 64;
const LIMIT: Duration = Duration::from_secs(20);

/// Not a test of its own: the child. Each line on its input is a page to write, or `run` to count
/// in page 0 until it is killed.
#[test]
fn child_of_the_process_tests() {
    if env::var_os(FLAG).is_none() {
        return;
    }
    let memory = MemoryDevice::new("silo test memory", (PAGES * 4096) as u64).unwrap();
    // Mapped by the device for its writes.
    for page in 0..PAGES {
        memory.write_at((page * 4096) as u64, &[page as u8 + 1; 4096]).unwrap();
    }
    println!("\nready");
    for line in io::stdin().lines() {
        let line = line.unwrap();
        if line == "run" {
            println!("\ndone");
            for count in 0u64.. {
                memory.write_at(0, &count.to_le_bytes()).unwrap();
            }
        }
        let page: u64 = line.parse().unwrap();
        memory.write_at(page * 4096 + 7, &[0xAB]).unwrap();
        println!("\ndone");
    }
}

struct Process {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Process {
    fn start() -> Self {
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["source::process::tests::child_of_the_process_tests", "--exact", "--nocapture"])
            .env(FLAG, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut process = Self { child, input, output };
        process.until("ready");
        process
    }

    fn until(&mut self, word: &str) {
        let mut line = String::new();
        while line.trim() != word {
            line.clear();
            assert!(self.output.read_line(&mut line).unwrap() > 0, "the child ended");
        }
    }

    fn tell(&mut self, line: &str) {
        writeln!(self.input, "{line}").unwrap();
        self.until("done");
    }

    fn open(&self, mode: ProcessMode) -> ProcessDevice {
        let choice = MapChoice::File("silo test memory".to_owned());
        ProcessDevice::open(self.child.id() as i32, &choice, mode).unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn the_memory_of_a_process_is_read_and_written_and_its_end_is_an_error() {
    let mut process = Process::start();
    let device = process.open(ProcessMode::ReadWrite);
    assert_eq!(device.size(), (PAGES * 4096) as u64);
    let mut all = vec![0; PAGES * 4096];
    device.read_at(0, &mut all).unwrap();
    for (index, page) in all.chunks(4096).enumerate() {
        assert!(page.iter().all(|byte| *byte == index as u8 + 1));
    }
    process.tell("3");
    let mut byte = [0];
    device.read_at(3 * 4096 + 7, &mut byte).unwrap();
    assert_eq!(byte, [0xAB]);
    // What is written from outside is what the process has.
    device.write_at(5 * 4096 - 2, &[9; 4]).unwrap();
    let second = process.open(ProcessMode::ReadOnly);
    let mut four = [0; 4];
    second.read_at(5 * 4096 - 2, &mut four).unwrap();
    assert_eq!(four, [9; 4]);
    assert_eq!(second.write_at(0, &[1]).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    device.zero(5 * 4096 - 2, 4, false).unwrap();
    second.read_at(5 * 4096 - 2, &mut four).unwrap();
    assert_eq!(four, [0; 4]);
    process.child.kill().unwrap();
    process.child.wait().unwrap();
    assert!(device.read_at(0, &mut byte).is_err());
    let error = ProcessDevice::open(
        std::process::id() as i32,
        &MapChoice::File("no such mapping".into()),
        ProcessMode::ReadOnly,
    );
    assert!(matches!(error, Err(SourceError::Process { .. })));
}

#[test]
fn rounds_find_exactly_the_pages_that_changed() {
    let mut process = Process::start();
    let device = process.open(ProcessMode::ReadOnly);
    let mut scan = ProcessScan::new(&device).unwrap();
    assert_eq!(scan.round(&device).unwrap().len(), PAGES as u64);
    assert!(scan.round(&device).unwrap().is_empty());
    for page in ["5", "6", "60"] {
        process.tell(page);
    }
    let changed = scan.round(&device).unwrap();
    let found: Vec<_> = changed.ranges().collect();
    assert_eq!(found, [BlockRange::new(5, 2), BlockRange::new(60, 1)]);
}

#[test]
fn a_stopped_process_stands_still_and_goes_on_afterwards() {
    let mut process = Process::start();
    process.tell("run");
    let device = process.open(ProcessMode::ReadOnly);
    let count = || {
        let mut bytes = [0; 8];
        device.read_at(0, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    };
    let moves_on = |from: u64| {
        let until = std::time::Instant::now() + LIMIT;
        while count() == from {
            assert!(std::time::Instant::now() < until, "it does not run");
        }
    };
    for _ in 0..3 {
        moves_on(count());
        let stopped = device.stop(LIMIT).unwrap();
        let before = count();
        // Long enough for it to count on, if it could.
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(count(), before);
        // Stopped twice, it goes on when the first one lets it.
        drop(device.stop(LIMIT).unwrap());
        assert_eq!(count(), before);
        drop(stopped);
        moves_on(before);
    }
}
