//! `oracle run`: the memory thread, the file thread, and the socket.

use crate::{
    args::Args,
    control::{self, Command},
    file::Blocks,
    memory::Memory,
    pace::Pacer,
    page::PAGE,
    report::Report,
    sys,
};
use std::{
    io,
    path::PathBuf,
    process::ExitCode,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel},
    },
    time::{Duration, Instant},
};

const PAGES_PER_MIB: usize = (1 << 20) / PAGE;

/// Time between two looks of the memory thread at what is due.
const SLICE: Duration = Duration::from_millis(2);

/// Time between two rounds of the file thread.
const FILE_SLICE: Duration = Duration::from_millis(50);

/// Blocks that each round of the file thread checks in turn.
const FILE_CHECKS: usize = 16;

/// How long a complete pass may take, memory or file.
const VERIFY_LIMIT: Duration = Duration::from_secs(300);

/// What threads and socket share.
struct Shared {
    report: Mutex<Report>,
    paused: AtomicBool,
    started: Instant,
}

impl Shared {
    fn report(&self) -> MutexGuard<'_, Report> {
        // Counters are whole between statements, whoever panicked.
        self.report.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Asks a thread for a complete pass; it answers when that is done.
type Verify = Sender<Result<(), String>>;

pub(crate) fn run(mut args: Args) -> Result<ExitCode, String> {
    let memory_mib: usize = args.or("memory-mib", 0)?;
    let hot_mib: usize = args.or("hot-mib", memory_mib)?;
    let rate: u64 = args.or("rate-mb-s", 0)?;
    let check_rate: u64 = args.or("check-mb-s", 32)?;
    let path: Option<PathBuf> = args.optional("file")?;
    let file_mib: usize = args.or("file-mib", 4)?;
    let file_writes: u64 = args.or("file-writes-s", 80)?;
    let socket: PathBuf = args.or("socket", control::RUN_SOCKET.into())?;
    let background = args.flag("background");
    args.end()?;
    if memory_mib == 0 && path.is_none() {
        return Err("nothing to do: give --memory-mib or --file".to_owned());
    }
    if background {
        return control::run_in_background(&socket);
    }
    let number = run_number();
    let mut memory = Memory::new(memory_mib * PAGES_PER_MIB, hot_mib * PAGES_PER_MIB, number);
    let locked = memory.lock().is_ok();
    let shared = Arc::new(Shared {
        report: Mutex::new(Report { pages: memory.len() as u64, locked, ..Report::default() }),
        paused: AtomicBool::new(false),
        started: Instant::now(),
    });
    let mut verifiers = Vec::new();
    if let Some(path) = path {
        let blocks = Blocks::create(&path, (file_mib * PAGES_PER_MIB).max(1), number)
            .map_err(|error| format!("{}: {error}", path.display()))?;
        let (ask, asked) = channel();
        let shared = Arc::clone(&shared);
        spawn("file", move || watch_file(blocks, file_writes, &asked, &shared))?;
        verifiers.push(ask);
    }
    let (ask, asked) = channel();
    verifiers.push(ask);
    let for_socket = Arc::clone(&shared);
    control::serve(&socket, move |command| answer(command, &for_socket, &verifiers))?;
    let pages_a_second = |mb: u64| mb.saturating_mul(1_000_000) / PAGE as u64;
    watch_memory(&mut memory, pages_a_second(rate), pages_a_second(check_rate), &asked, &shared);
    Ok(ExitCode::SUCCESS)
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), String> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(work)
        .map(drop)
        .map_err(|error| format!("no thread for the {name}: {error}"))
}

/// A number that no other run has, also not in a fork of this machine before it.
fn run_number() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(std::process::id())
}

/// Answers the socket.
fn answer(command: Command, shared: &Shared, verifiers: &[Sender<Verify>]) -> serde_json::Value {
    let problem = match command {
        Command::Status => None,
        Command::PauseWrites => {
            shared.paused.store(true, Ordering::SeqCst);
            None
        }
        Command::ResumeWrites => {
            shared.paused.store(false, Ordering::SeqCst);
            None
        }
        Command::Verify => verify(verifiers).err(),
        Command::Stop => std::process::exit(0),
    };
    let mut report = shared.report().clone();
    report.paused = shared.paused.load(Ordering::SeqCst);
    report.running_ms = shared.started.elapsed().as_millis() as u64;
    let wrong = report.mismatches + report.file_mismatches + report.file_errors > 0;
    let mut json = serde_json::to_value(&report).unwrap_or_default();
    json["verified"] = (matches!(command, Command::Verify) && problem.is_none()).into();
    json["ok"] = (!wrong && problem.is_none()).into();
    if let Some(problem) = problem {
        json["problem"] = problem.into();
    }
    json
}

fn verify(verifiers: &[Sender<Verify>]) -> Result<(), String> {
    let gone = |_| "a thread of the oracle has ended".to_owned();
    let mut answers = Vec::new();
    for verifier in verifiers {
        let (done, answer) = channel();
        verifier.send(done).map_err(|_| gone(()))?;
        answers.push(answer);
    }
    for answer in answers {
        answer
            .recv_timeout(VERIFY_LIMIT)
            .map_err(|error| format!("no complete pass within {VERIFY_LIMIT:?}: {error}"))??;
    }
    Ok(())
}

/// Notes the longest time between two signs of life of a thread.
struct Beat {
    last: Instant,
    longest: Duration,
}

impl Beat {
    fn new() -> Self {
        Self { last: Instant::now(), longest: Duration::ZERO }
    }

    /// Alive; the thread had `planned` to be silent that long.
    fn beat(&mut self, planned: Duration) {
        let now = Instant::now();
        let silent = now.saturating_duration_since(self.last).saturating_sub(planned);
        self.longest = self.longest.max(silent);
        self.last = now;
    }
}

/// Pages between two signs of life.
const BATCH: u64 = 16;

/// The memory thread; ends with the process.
fn watch_memory(
    memory: &mut Memory,
    writes: u64,
    checks: u64,
    asked: &Receiver<Verify>,
    shared: &Shared,
) {
    let now = Instant::now();
    let (mut write_pace, mut check_pace) = (Pacer::new(writes, now), Pacer::new(checks, now));
    let mut dirtied = 0;
    let mut beat = Beat::new();
    loop {
        match asked.try_recv() {
            Ok(done) => {
                let (mut findings, mut left) = (Vec::new(), memory.len() as u64);
                while left > 0 {
                    let count = left.min(BATCH);
                    findings.extend(memory.check(count).0);
                    left -= count;
                    beat.beat(Duration::ZERO);
                }
                let mut report = shared.report();
                report.add_pages(memory.len() as u64, &findings);
                report.passes += 1;
                drop(report);
                // Who asked may have gone.
                let _ = done.send(Ok(()));
            }
            Err(TryRecvError::Empty) => {}
            Err(TryRecvError::Disconnected) => return,
        }
        let now = Instant::now();
        let mut to_write = write_pace.due(now);
        if shared.paused.load(Ordering::SeqCst) {
            to_write = 0;
        }
        while to_write > 0 {
            let count = to_write.min(BATCH);
            dirtied += memory.dirty(count);
            to_write -= count;
            beat.beat(Duration::ZERO);
        }
        let to_check = if memory.len() == 0 { 0 } else { check_pace.due(now) };
        let (mut findings, mut passes, mut left) = (Vec::new(), 0, to_check);
        while left > 0 {
            let count = left.min(BATCH);
            let (found, ends) = memory.check(count);
            findings.extend(found);
            passes += ends;
            left -= count;
            beat.beat(Duration::ZERO);
        }
        let mut report = shared.report();
        report.add_pages(to_check, &findings);
        report.passes += passes;
        report.dirtied_mb = dirtied / 1_000_000;
        report.longest_stall_us = beat.longest.as_micros() as u64;
        drop(report);
        beat.beat(Duration::ZERO);
        std::thread::sleep(SLICE);
        beat.beat(SLICE);
    }
}

/// The file thread; ends with the process.
fn watch_file(mut blocks: Blocks, writes: u64, asked: &Receiver<Verify>, shared: &Shared) {
    // The file is there to be checked, not to compete with whom the guest serves.
    if let Err(error) = sys::yield_to_others() {
        eprintln!("oracle: the file thread keeps its priority: {error}");
    }
    let mut pace = Pacer::new(writes, Instant::now());
    loop {
        match asked.recv_timeout(FILE_SLICE) {
            Ok(done) => {
                let result = blocks.check_all();
                count_blocks(shared, blocks.len() as u64, &result);
                let _ = done.send(result.map(drop).map_err(|error| format!("file: {error}")));
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        let now = Instant::now();
        if shared.paused.load(Ordering::SeqCst) {
            pace.due(now);
        } else {
            let due = pace.due(now);
            let result = blocks.rewrite(due);
            count_blocks(shared, due, &result);
            if result.is_ok() {
                shared.report().file_writes += due;
            }
        }
        let result = blocks.check(FILE_CHECKS);
        count_blocks(shared, FILE_CHECKS as u64, &result);
    }
}

fn count_blocks(shared: &Shared, checked: u64, result: &io::Result<Vec<crate::report::Finding>>) {
    let mut report = shared.report();
    match result {
        Ok(findings) => report.add_blocks(checked, findings),
        Err(error) => report.add_file_error(error),
    }
}
