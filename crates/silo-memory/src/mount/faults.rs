//! The fault thread of one mapping: takes page faults, serves what needs no waiting and asks for the
//! rest. It never waits for anything but the next fault; of the backend it takes only what
//! `try_read_at` gives at once.

use super::{
    queue::Class,
    shared::{Phase, Shared},
    view::View,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use silo_block::block::{BLOCK_SIZE, BlockIndex, BlockRange};
use std::{
    io,
    os::fd::AsFd,
    sync::{
        Arc, LazyLock,
        mpsc::{Receiver, SyncSender, TryRecvError},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// How long to look for the next fault before sleeping: walkers fault again at once, and waking a
/// sleeping thread costs more than serving the fault.
const SPIN: Duration = Duration::from_micros(20);
/// The same after a mount has opened, once: who opens one reads of it at once, and would wait for
/// two sleeping processors instead of one.
const FIRST_SPIN: Duration = Duration::from_micros(200);
/// With one processor, looking only keeps the one from its work who could fault. Asked once: the
/// answer takes as long as a mount does to open.
static SEVERAL: LazyLock<bool> =
    LazyLock::new(|| std::thread::available_parallelism().is_ok_and(|number| number.get() > 1));
/// How often waits are looked at for having become too long.
const TICK: Duration = Duration::from_millis(50);

/// A thread that will serve the faults of a mapping that is still being made. A thread takes as long
/// to start as a mount does to open, so it starts first; dropped, it ends.
pub(super) struct Prepared {
    thread: JoinHandle<()>,
    work: SyncSender<(Arc<Shared>, Arc<View>)>,
}

/// Starts a fault thread.
pub(super) fn prepare() -> io::Result<Prepared> {
    let (work, receiver) = std::sync::mpsc::sync_channel(1);
    let thread = std::thread::Builder::new().name("mount-faults".into()).spawn(move || {
        if let Some((shared, view)) = first_work(&receiver) {
            Server { shared, view, page: [0; BLOCK_SIZE] }.run();
        }
    })?;
    Ok(Prepared { thread, work })
}

fn first_work(work: &Receiver<(Arc<Shared>, Arc<View>)>) -> Option<(Arc<Shared>, Arc<View>)> {
    let began = Instant::now();
    while *SEVERAL && began.elapsed() < FIRST_SPIN {
        match work.try_recv() {
            Ok(found) => return Some(found),
            Err(TryRecvError::Disconnected) => return None,
            Err(TryRecvError::Empty) => std::hint::spin_loop(),
        }
    }
    work.recv().ok()
}

impl Prepared {
    /// The mapping that it serves, until [`View::stop`].
    pub(super) fn begin(self, shared: &Arc<Shared>, view: &Arc<View>) -> JoinHandle<()> {
        // There is room for one, and the thread takes it; if it panicked, joining says so.
        let _ = self.work.send((Arc::clone(shared), Arc::clone(view)));
        self.thread
    }
}

struct Server {
    shared: Arc<Shared>,
    view: Arc<View>,
    page: [u8; BLOCK_SIZE],
}

impl Server {
    fn run(mut self) {
        let mut addresses = Vec::with_capacity(64);
        let mut looked = Instant::now();
        let mut spin = if *SEVERAL { FIRST_SPIN } else { SPIN };
        loop {
            match self.next_faults(&mut addresses, std::mem::replace(&mut spin, SPIN)) {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    let mount = &self.shared.options.name;
                    tracing::error!(%mount, %error, "page faults cannot be served any more");
                    self.shared.lock().stats.error(format!("taking page faults: {error}"));
                    return;
                }
            }
            for address in addresses.drain(..) {
                if let Err(error) = self.serve(self.view.block_at(address)) {
                    let text = format!("serving a fault at {address:#x}: {error}");
                    tracing::error!(mount = %self.shared.options.name, "{text}");
                    self.shared.lock().stats.error(text);
                }
            }
            if looked.elapsed() >= TICK {
                looked = Instant::now();
                self.end_long_waits(looked);
            }
        }
    }

    /// Faults, or none after a while; false when the thread shall end.
    fn next_faults(&self, addresses: &mut Vec<u64>, spin: Duration) -> io::Result<bool> {
        let began = Instant::now();
        loop {
            self.view.userfault().faults(addresses)?;
            if !addresses.is_empty() {
                return Ok(true);
            }
            if began.elapsed() >= spin {
                break;
            }
            std::hint::spin_loop();
        }
        let mut fds = [
            PollFd::new(self.view.userfault().as_fd(), PollFlags::POLLIN),
            PollFd::new(self.view.stop.as_fd(), PollFlags::POLLIN),
        ];
        let tick = PollTimeout::try_from(TICK).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, tick) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready = |at: usize| fds[at].revents().unwrap_or(PollFlags::empty());
        let gone = PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL;
        if !ready(1).is_empty() || ready(0).intersects(gone) {
            return Ok(false);
        }
        self.view.userfault().faults(addresses)?;
        Ok(true)
    }

    fn serve(&mut self, block: u64) -> io::Result<()> {
        let range = BlockRange::new(block, 1);
        let mut state = self.shared.lock();
        state.stats.faults += 1;
        // Past the end there is only the rest of the last page of an empty device.
        if block >= state.table.blocks() || state.table.is_here(range) {
            state.stats.present += 1;
            self.shared.touched_by_walker(&mut state, range);
            self.shared.stir(&mut state);
            drop(state);
            return self.view.expose(range);
        }
        if state.phase != Phase::Open {
            drop(state);
            return self.view.poison(range);
        }
        let now = Instant::now();
        state.table.wait(BlockIndex(block), now);
        let unasked = state.table.idle().contains(BlockIndex(block));
        let length = self.shared.bytes_of(range);
        if unasked && !self.shared.backend.may_wait(range.start.offset(), length as u64) {
            state.table.want(range);
            self.shared.touched_by_walker(&mut state, range);
            drop(state);
            self.serve_at_once(range, length)?;
            state = self.shared.lock();
        } else {
            self.shared.demand(&mut state, range);
            self.shared.touched_by_walker(&mut state, range);
        }
        self.shared.stir(&mut state);
        Ok(())
    }

    /// The backend can answer without waiting: does so here, and saves a change of threads.
    fn serve_at_once(&mut self, range: BlockRange, length: usize) -> io::Result<()> {
        self.page[length..].fill(0);
        let read = self.shared.backend.try_read_at(range.start.offset(), &mut self.page[..length]);
        // It would wait after all, or failed: a fetching thread has the time for either.
        let read = read.unwrap_or(false);
        if read {
            self.shared.land(range, &self.page, Class::Demand, false)?;
        }
        let mut state = self.shared.lock();
        if read {
            state.stats.demands += 1;
        } else {
            state.table.give_up(range);
            self.shared.demand(&mut state, range);
        }
        Ok(())
    }

    /// The backend owes an answer for longer than anybody shall wait.
    fn end_long_waits(&self, now: Instant) {
        let Some(limit) = now.checked_sub(self.shared.options.deadline) else { return };
        let mut state = self.shared.lock();
        if !state.table.is_waited_for() {
            return;
        }
        let mut blocks = Vec::new();
        for range in state.table.overdue(limit) {
            blocks.extend(state.table.fail(range));
        }
        if let Some(first) = blocks.first() {
            let waited = self.shared.options.deadline.as_secs_f64();
            let text =
                format!("{} blocks from {first} did not come in {waited:.1} s", blocks.len());
            tracing::error!(mount = %self.shared.options.name, "{text}");
            state.stats.error(text);
        }
        drop(state);
        self.shared.poison(&blocks);
        self.shared.news.notify_all();
    }
}
