//! The guard of a machine whose time may end: a process beside runner and monitor that freezes the
//! machine when its time is over, whatever has become of the runner.
//!
//! ```text
//!   runner ──"until 81.250 s"──▶ a page of memory ◀── looks ── guard ──freeze──▶ monitor
//!      └────── a line: go, ready, look now, and its end when the runner dies ──┘
//! ```
//!
//! A machine's time has two ends, either of which may be open: that of the *offer* under which it runs
//! here unconfirmed (a move's destination, `migrate::destination::desk`), and that of its lease's *term*
//! (`protection`). The runner freezes the machine itself when one of them comes; the guard is for a runner
//! that hangs, was killed, or was stopped and goes on too late. What must hold:
//! - Times are of this host's `CLOCK_BOOTTIME`, as everything about leases is.
//! - The guard needs nothing of the runner but that page, and asks the monitor for nothing.
//! - A time that is set later, once the lease is ours again, undoes a freeze that crossed it.
//! - It ends with the monitor, when it is told to, or when the runner is gone and no end is set.
//! - A runner that comes after one that died ends its guard ([`Left`]) and no other way: before the lease
//!   is its own, what the guard freezes must stand still.

use super::state::process_start;
use crate::{
    driver::{Fence, Urgent, qemu},
    lease::{BootClock, BootTime, Clock},
};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        memfd::{MFdFlags, memfd_create},
        signal::{Signal, kill},
        socket::{MsgFlags, send},
    },
    unistd::Pid,
};
use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::{fs::FileExt, net::UnixStream, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

/// Longest time between two looks at the page. An offer is never taken up that ends sooner than this
/// (`Terms::start_margin`), so its end is set without waking the guard in the middle of a blackout.
const LOOK: Duration = Duration::from_millis(200);
/// Before a page that is just being set is looked at again.
const TORN: Duration = Duration::from_micros(100);
/// How long a guard may take to begin: milliseconds, if the host is not very busy.
const BEGIN_LIMIT: Duration = Duration::from_secs(15);
/// How long the kernel may take to end one that was killed.
const END_LIMIT: Duration = Duration::from_secs(5);
/// Name of the file with the guard's process.
const FILE: &str = "guard.pid";
/// Says that there is no end of the machine's time.
const OPEN: u64 = u64::MAX;

/// What the page says, each a number and its complement.
#[derive(Clone, Copy)]
enum Slot {
    /// When the term of the lease ends.
    Term,
    /// When the offer ends under which the machine runs here unconfirmed.
    Offer,
    /// 1 once the lease of a machine that runs by an offer was asked for.
    Asked,
    /// 1 when the guard is to end.
    End,
}

const SLOTS: usize = 4;
const SLOT_BYTES: usize = 16;

/// The page, as it was at one time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Said([u64; SLOTS]);

impl Said {
    const fn slot(&self, slot: Slot) -> u64 {
        self.0[slot as usize]
    }

    /// The end that comes first.
    fn until(&self) -> u64 {
        self.slot(Slot::Term).min(self.slot(Slot::Offer))
    }

    const fn is_set(&self, slot: Slot) -> bool {
        self.slot(slot) == 1
    }
}

/// The page that runner and guard share.
struct Page(File);

impl Page {
    fn new() -> io::Result<Self> {
        let file = File::from(memfd_create("lease-until", MFdFlags::MFD_CLOEXEC)?);
        file.set_len((SLOTS * SLOT_BYTES) as u64)?;
        let page = Self(file);
        for (slot, value) in
            [(Slot::Term, OPEN), (Slot::Offer, OPEN), (Slot::Asked, 0), (Slot::End, 0)]
        {
            page.set(slot, value)?;
        }
        Ok(page)
    }

    fn set(&self, slot: Slot, value: u64) -> io::Result<()> {
        let mut bytes = [0; SLOT_BYTES];
        bytes[..8].copy_from_slice(&value.to_le_bytes());
        bytes[8..].copy_from_slice(&(!value).to_le_bytes());
        self.0.write_all_at(&bytes, (slot as usize * SLOT_BYTES) as u64)
    }

    /// What was set last; `None` if some of it is just being set.
    fn get(&self) -> io::Result<Option<Said>> {
        let mut bytes = [0; SLOTS * SLOT_BYTES];
        self.0.read_exact_at(&mut bytes, 0)?;
        let mut said = Said([0; SLOTS]);
        for (slot, value) in bytes.chunks_exact(SLOT_BYTES).zip(&mut said.0) {
            let word =
                |at: usize| slot[at..at + 8].iter().rev().fold(0, |n, b| n << 8 | u64::from(*b));
            if word(0) != !word(8) {
                return Ok(None);
            }
            *value = word(0);
        }
        Ok(Some(said))
    }
}

fn nanos(at: BootTime) -> u64 {
    // Below the word that is no time: 584 years are.
    u64::try_from(at.0.as_nanos()).unwrap_or(OPEN - 1).min(OPEN - 1)
}

/// The runner's side. Dropping it leaves the guard to what it was told last: only a runner that knows that
/// the machine may run, or runs no more, ends it.
pub(super) struct Guard {
    page: Page,
    line: UnixStream,
    pid: u32,
    ended: Arc<AtomicBool>,
    /// It guards a term, whatever becomes of offers.
    kept: AtomicBool,
    /// It was told to end.
    over: AtomicBool,
}

impl Guard {
    /// Starts a guard of the monitor in `run_dir`; it is at work when this returns.
    ///
    /// # Errors
    /// If this host gives no process, or there is no monitor.
    pub(super) fn start(run_dir: &Path) -> io::Result<Self> {
        let guard = Self::begin(run_dir)?;
        guard.watch()?;
        Ok(guard)
    }

    /// Starts the process of a guard, beside whatever starts the monitor; one that an earlier runner
    /// started ends. It guards nothing before [`Guard::watch`], and ends if this is dropped.
    ///
    /// # Errors
    /// If this host gives no process, or an earlier guard does not end.
    pub(super) fn begin(run_dir: &Path) -> io::Result<Self> {
        if let Some(left) = Left::find(run_dir) {
            left.end()?;
        }
        let page = Page::new()?;
        let (line, theirs) = UnixStream::pair()?;
        let mut command = Command::new(std::env::current_exe()?);
        command
            .args(["guard", "--run-dir"])
            .arg(run_dir)
            .stdin(Stdio::from(page.0.try_clone()?))
            .stdout(Stdio::from(OwnedFd::from(theirs)))
            // Out of reach of what ends the runner and all that it started.
            .process_group(0);
        let mut child = command.spawn()?;
        // With it our copy of its end of the line: the end that is left tells whether it lives.
        drop(command);
        let pid = child.id();
        let started = process_start(pid).unwrap_or(0);
        fs::write(run_dir.join(FILE), format!("{pid} {started}\n"))?;
        let ended = Arc::<AtomicBool>::default();
        let has_ended = Arc::clone(&ended);
        // Nobody but its parent can take its exit status.
        std::thread::Builder::new().name("guard".into()).spawn(move || {
            let _ = child.wait();
            has_ended.store(true, Ordering::Release);
        })?;
        let (kept, over) = (AtomicBool::new(false), AtomicBool::new(false));
        Ok(Self { page, line, pid, ended, kept, over })
    }

    /// The monitor is there: guards it. Returns when it is guarded.
    ///
    /// # Errors
    /// If the guard has ended, or does not answer.
    pub(super) fn watch(&self) -> io::Result<()> {
        self.line.set_read_timeout(Some(BEGIN_LIMIT))?;
        (&self.line).write_all(b"g")?;
        (&self.line).read_exact(&mut [0])
    }

    /// The guard's process.
    pub(super) const fn pid(&self) -> u32 {
        self.pid
    }

    /// The machine's term ends then, and it is frozen if nothing else is said by that time.
    pub(super) fn until(&self, at: BootTime) {
        self.tell(Slot::Term, nanos(at));
    }

    /// The machine has no term, or one that does not end.
    pub(super) fn open_end(&self) {
        self.tell(Slot::Term, OPEN);
    }

    /// The machine may run here unconfirmed until then, and is frozen if nothing else is said by that
    /// time; it ends no sooner than a look from now. `None`: it runs here in its own right.
    ///
    /// # Errors
    /// If nobody would freeze it.
    pub(super) fn offer_until(&self, end: Option<BootTime>) -> io::Result<()> {
        let Some(end) = end else {
            self.tell(Slot::Offer, OPEN);
            return Ok(());
        };
        self.page.set(Slot::Offer, nanos(end))?;
        if self.ended.load(Ordering::Acquire) {
            return Err(io::Error::other("the process that guards it has ended"));
        }
        Ok(())
    }

    /// The lease is asked for by whoever has the machine run here unconfirmed.
    pub(super) fn lease_asked(&self) {
        self.set(Slot::Asked, 1);
    }

    /// It guards the machine's term from here on, also when nothing is unconfirmed any more. False if it
    /// has ended, or was told to.
    pub(super) fn keep(&self) -> bool {
        self.kept.store(true, Ordering::SeqCst);
        !self.over.load(Ordering::SeqCst) && !self.ended.load(Ordering::SeqCst)
    }

    /// The machine runs here in its own right: the guard ends, unless somebody keeps it.
    pub(super) fn end_of_offers(&self) {
        self.over.store(true, Ordering::SeqCst);
        if self.kept.load(Ordering::SeqCst) {
            self.over.store(false, Ordering::SeqCst);
        } else {
            self.end();
        }
    }

    /// The machine is gone, or needs no guard any more. What it froze and may run by now is thawed.
    pub(super) fn end(&self) {
        self.over.store(true, Ordering::SeqCst);
        self.tell(Slot::End, 1);
    }

    fn set(&self, slot: Slot, value: u64) {
        if let Err(error) = self.page.set(slot, value) {
            // It is a page of memory that exists.
            tracing::error!(%error, "the guard of the machine was not told");
        }
    }

    fn tell(&self, slot: Slot, value: u64) {
        self.set(slot, value);
        // One that takes no word has many to read, or is gone.
        let _ = send(self.line.as_raw_fd(), b"l", MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL);
    }
}

/// A guard that an earlier runner of the same machine has left.
pub(super) struct Left {
    file: PathBuf,
    pid: u32,
    started: u64,
    said: Said,
}

impl Left {
    /// The one of the monitor in `run_dir`, if it lives.
    pub(super) fn find(run_dir: &Path) -> Option<Self> {
        let file = run_dir.join(FILE);
        let text = fs::read_to_string(&file).ok()?;
        let mut words = text.split_whitespace().map(str::parse::<u64>);
        let (pid, started) = (words.next()?.ok()?, words.next()?.ok()?);
        let pid = u32::try_from(pid).ok().filter(|pid| *pid > 1)?;
        // Its standard input is the page, which nobody sets any more.
        let page = File::open(format!("/proc/{pid}/fd/0")).map(Page);
        let said = page.and_then(|page| page.get()).ok().flatten();
        let said = said.unwrap_or(Said([OPEN, OPEN, 0, 0]));
        (process_start(pid) == Some(started)).then_some(Self { file, pid, started, said })
    }

    /// Whether the machine ran here unconfirmed and its runner had begun to ask for the lease: it is
    /// all of a machine, it was never refused, and that write may still be on its way.
    pub(super) const fn has_asked(&self) -> bool {
        self.said.is_set(Slot::Asked)
    }

    /// Whether the machine's lease had an end: another host may have taken it.
    pub(super) const fn is_bound(&self) -> bool {
        self.said.slot(Slot::Term) != OPEN
    }

    /// Ends it: when this returns, it freezes nothing any more. What it has frozen stays so.
    ///
    /// # Errors
    /// If it does not end.
    pub(super) fn end(self) -> io::Result<()> {
        let lives = || process_start(self.pid) == Some(self.started);
        let raw = i32::try_from(self.pid).map_err(io::Error::other)?;
        if lives() {
            let _ = kill(Pid::from_raw(raw), Signal::SIGKILL);
        }
        let deadline = Instant::now() + END_LIMIT;
        while lives() {
            if Instant::now() > deadline {
                let text = format!("an earlier guard (process {}) does not end", self.pid);
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            std::thread::sleep(Duration::from_micros(500));
        }
        let _ = fs::remove_file(&self.file);
        Ok(())
    }
}

/// Says in `run_dir` who guards the monitor there, as long as it does.
struct Named(PathBuf);

impl Drop for Named {
    fn drop(&mut self) {
        let own = format!("{} ", std::process::id());
        if fs::read_to_string(&self.0).is_ok_and(|text| text.starts_with(&own)) {
            let _ = fs::remove_file(&self.0);
        }
    }
}

/// The guard's process: its standard input is the page, its standard output the line. Returns when it is
/// told to end, or when nothing is left to guard.
///
/// # Errors
/// If there is no page or no monitor.
pub fn serve(run_dir: &Path) -> anyhow::Result<()> {
    use anyhow::Context as _;
    let _named = Named(run_dir.join(FILE));
    let page = Page(File::from(io::stdin().as_fd().try_clone_to_owned()?));
    let foreign = "its standard input and output are not what a runner gives to a guard";
    page.get().context(foreign)?;
    let line = UnixStream::from(io::stdout().as_fd().try_clone_to_owned()?);
    if (&line).read(&mut [0]).context(foreign)? == 0 {
        // The runner is gone, and there never was a machine.
        return Ok(());
    }
    let gone = "there is no monitor to guard";
    let fence = qemu::fence_of(run_dir)?.context(gone)?;
    let monitor = qemu::process_of(run_dir)?.context(gone)?;
    // It sleeps, and must not wait for a processor when it wakes.
    let _urgent = Urgent::this_thread();
    line.set_nonblocking(true)?;
    (&line).write_all(b"r")?;
    watch(&page, &line, monitor.as_fd(), &*fence);
    Ok(())
}

fn watch(page: &Page, line: &UnixStream, monitor: BorrowedFd<'_>, fence: &dyn Fence) {
    let mut runner_lives = true;
    let mut frozen_for = None;
    loop {
        let said = match page.get() {
            Ok(Some(said)) => said,
            Ok(None) => {
                std::thread::sleep(TORN);
                continue;
            }
            // A page of memory does not go away.
            Err(_) => return,
        };
        let (now, until) = (nanos(BootClock.now()), said.until());
        match frozen_for {
            // It may run again, and whoever said so may have thawed before we froze.
            Some(_) if now < until => {
                let _ = fence.thaw();
                frozen_for = None;
            }
            Some(old) if old == until => {}
            _ if now >= until => {
                match fence.freeze() {
                    Ok(()) => tracing::warn!("its time is over: the machine was frozen"),
                    Err(error) => {
                        tracing::error!(%error, "its time is over and the machine does not freeze");
                        let _ = fence.kill();
                    }
                }
                frozen_for = Some(until);
                // Something else may have been said meanwhile.
                continue;
            }
            _ => {}
        }
        if said.is_set(Slot::End) || (!runner_lives && until == OPEN) {
            return;
        }
        let rest = Duration::from_nanos(until.saturating_sub(now));
        let rest = if frozen_for.is_some() { LOOK } else { rest.min(LOOK) };
        // Rounded up: what is left of a millisecond would be looked at again and again.
        let rest =
            PollTimeout::try_from(rest + Duration::from_micros(999)).unwrap_or(PollTimeout::MAX);
        let mut wanted = vec![PollFd::new(monitor, PollFlags::POLLIN)];
        if runner_lives {
            wanted.push(PollFd::new(line.as_fd(), PollFlags::POLLIN));
        }
        if poll(&mut wanted, rest).is_err() {
            continue;
        }
        let any = |fd: Option<&PollFd<'_>>| fd.is_some_and(|fd| fd.any().unwrap_or(true));
        if any(wanted.first()) {
            return;
        }
        if any(wanted.get(1)) {
            runner_lives = hears(line);
        }
    }
}

/// Takes all words off the line; false if there is nobody at its other end.
fn hears(mut line: &UnixStream) -> bool {
    loop {
        match line.read(&mut [0; 64]) {
            Ok(0) => return false,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
        }
    }
}

#[cfg(test)]
#[path = "guard_tests.rs"]
mod tests;
