//! The connections of one link while they are in use, and the runs of blocks that wait for them.
//! The same on both ends. What must hold: one link at most is in use; a call for another changes
//! nothing; each link that was in use is reported as cut once.

use crate::peer::{Hangup, Outgoing};
use silo_block::{
    block::BlockRange,
    order::Class,
    session::{
        LinkId,
        messages::{BlockHeader, DeviceIndex, SessionId},
    },
};
use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Locks; whatever a panic left behind a lock of this crate is whole (counters, queues, machines
/// that are moved from state to state by one call).
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs that wait for a connection.
#[derive(Default)]
struct Queues {
    demand: VecDeque<BlockHeader>,
    bulk: VecDeque<BlockHeader>,
    closed: bool,
}

/// Which connection takes a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Track {
    /// Somebody waits for it.
    Demand,
    /// All others.
    Bulk,
}

/// The runs to be sent over one link. Bounded by the window of the session.
#[derive(Default)]
pub(crate) struct Work {
    queues: Mutex<Queues>,
    demand: Condvar,
    bulk: Condvar,
}

impl Work {
    pub(crate) fn push(&self, track: Track, header: BlockHeader) {
        let mut queues = lock(&self.queues);
        match track {
            Track::Demand => {
                queues.demand.push_back(header);
                self.demand.notify_one();
            }
            Track::Bulk => {
                queues.bulk.push_back(header);
                self.bulk.notify_one();
            }
        }
    }

    /// Somebody waits for blocks: those that have not been sent leave the line of the others.
    pub(crate) fn urge(&self, device: DeviceIndex, range: BlockRange) {
        let mut queues = lock(&self.queues);
        let meets = |header: &BlockHeader| {
            header.device == device
                && header.range.start.0 < range.end()
                && range.start.0 < header.range.end()
        };
        let Some(at) = queues.bulk.iter().position(meets) else { return };
        let mut rest = Vec::new();
        for header in queues.bulk.split_off(at) {
            if !meets(&header) {
                rest.push(header);
                continue;
            }
            let (start, end) = (header.range.start.0, header.range.end());
            let (from, to) = (start.max(range.start.0), end.min(range.end()));
            let part = |from, to| BlockHeader { range: BlockRange::new(from, to - from), ..header };
            queues.demand.push_back(BlockHeader { class: Class::Demand, ..part(from, to) });
            rest.extend((start < from).then(|| part(start, from)));
            rest.extend((to < end).then(|| part(to, end)));
        }
        queues.bulk.extend(rest);
        self.demand.notify_all();
    }

    /// The next run; `idle` is called before waiting for one. None when the link is closed.
    pub(crate) fn pop(&self, track: Track, mut idle: impl FnMut()) -> Option<BlockHeader> {
        let mut queues = lock(&self.queues);
        let mut told = false;
        loop {
            if queues.closed {
                return None;
            }
            let (queue, condition) = match track {
                Track::Demand => (&mut queues.demand, &self.demand),
                Track::Bulk => (&mut queues.bulk, &self.bulk),
            };
            if let Some(header) = queue.pop_front() {
                return Some(header);
            }
            if !told {
                drop(queues);
                idle();
                told = true;
                queues = lock(&self.queues);
                continue;
            }
            queues = condition.wait(queues).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Nothing more is sent.
    pub(crate) fn close(&self) {
        let mut queues = lock(&self.queues);
        queues.closed = true;
        queues.demand.clear();
        queues.bulk.clear();
        self.demand.notify_all();
        self.bulk.notify_all();
    }
}

/// One link: what is said on it, what waits to be sent, and how it is ended.
pub(crate) struct Lane {
    id: LinkId,
    control: Outgoing,
    hangup: Hangup,
    work: Arc<Work>,
    /// Of `control.sent()`, what was counted already.
    counted: u64,
}

impl Lane {
    pub(crate) fn new(id: LinkId, control: Outgoing, hangup: Hangup, work: Arc<Work>) -> Self {
        Self { id, control, hangup, work, counted: 0 }
    }

    /// Says what was gathered; nothing more is said afterwards.
    fn say_goodbye(&mut self) {
        // If it does not arrive the other end finds out by itself.
        let _ = self.control.flush();
        let _ = self.control.inner().finish();
    }

    /// Ends it, now.
    fn close(&self) {
        self.hangup.hang_up();
        self.work.close();
    }

    /// Ends it as the end that is to hear the last word: nothing is said any more, and of the other
    /// end's words none is lost that is on its way.
    fn close_but_hear(&mut self) {
        self.say_goodbye();
        self.hangup.hang_up_blocks();
        self.work.close();
    }
}

/// How long an end waits for the other to have heard its last word, and to hang up: on a slow line all
/// that was sent before is heard first. Without that word the other one waits out its patience.
const GOODBYE: Duration = Duration::from_secs(10);

/// What happens to words that are on their way when a link is hung up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LastWords {
    /// At a destination: its own are said (why a source is refused should arrive), and the source's
    /// are heard, up to the end of the control connection. "Released" is said once: another
    /// connection's end, which may be noticed first, must not make it unheard.
    Kept,
    /// At a source: they are dropped, the next handshake makes up for them.
    Dropped,
}

/// The link in use, if there is one, and whether the session is over. A call that finds the link
/// cut says so: its caller tells the machine, with no lock held.
pub(crate) struct Lanes {
    session: SessionId,
    last_words: LastWords,
    lane: Mutex<Option<Lane>>,
    /// There is no link any more, or the session is over.
    gone: Condvar,
    over: AtomicBool,
    trouble: Mutex<Option<String>>,
    /// The newest link over which the other end has said something.
    heard: AtomicU64,
    pub(crate) wire: WireCount,
}

impl Lanes {
    pub(crate) fn new(session: SessionId, last_words: LastWords) -> Self {
        Self {
            session,
            last_words,
            lane: Mutex::new(None),
            gone: Condvar::new(),
            over: AtomicBool::new(false),
            trouble: Mutex::new(None),
            heard: AtomicU64::new(0),
            wire: WireCount::default(),
        }
    }

    /// Puts a link to use; an older one is given up. False if the session is over.
    pub(crate) fn put(&self, lane: Lane) -> bool {
        let hangup = lane.hangup.clone();
        if let Some(old) = lock(&self.lane).replace(lane) {
            old.close();
        }
        // Whoever ends the session looks for a link after it is over.
        let over = self.is_over();
        if over {
            hangup.hang_up();
        }
        !over
    }

    /// Whether this link is in use.
    pub(crate) fn uses(&self, link: LinkId) -> bool {
        lock(&self.lane).as_ref().is_some_and(|lane| lane.id == link)
    }

    /// Has a run sent, if the link is in use still.
    pub(crate) fn push(&self, link: LinkId, track: Track, header: BlockHeader) {
        if let Some(lane) = lock(&self.lane).as_ref().filter(|lane| lane.id == link) {
            lane.work.push(track, header);
        }
    }

    /// Gathers a message for the control connection. True if the link was cut by that.
    pub(crate) fn send(
        &self,
        link: LinkId,
        write: impl FnOnce(&mut Outgoing) -> io::Result<()>,
    ) -> bool {
        let mut lane = lock(&self.lane);
        let Some(current) = lane.as_mut().filter(|lane| lane.id == link) else { return false };
        let result = write(&mut current.control);
        drop(lane);
        result.is_err_and(|error| self.hang_up(link, Some(control_trouble(&error))))
    }

    /// Sends what was gathered on the control connection. Gives the link if it was cut by that.
    pub(crate) fn flush(&self) -> Option<LinkId> {
        let mut lane = lock(&self.lane);
        let current = lane.as_mut()?;
        let (id, result) = (current.id, current.control.flush());
        let sent = current.control.sent();
        self.wire.control_sent.fetch_add(sent - current.counted, Ordering::Relaxed);
        current.counted = sent;
        drop(lane);
        let error = result.err()?;
        self.hang_up(id, Some(control_trouble(&error))).then_some(id)
    }

    /// Ends a link; see [`LastWords`]. True if it was in use.
    pub(crate) fn hang_up(&self, link: LinkId, trouble: Option<String>) -> bool {
        let mut lane = lock(&self.lane);
        let Some(mut current) = lane.take_if(|lane| lane.id == link) else { return false };
        match self.last_words {
            LastWords::Kept => current.close_but_hear(),
            LastWords::Dropped => current.close(),
        }
        drop(lane);
        if let Some(trouble) = trouble {
            tracing::info!(session = %self.session, trouble, "a link was cut");
            self.note_trouble(trouble);
        }
        self.gone.notify_all();
        true
    }

    /// The session is over; the link stays until [`Lanes::end`].
    pub(crate) fn set_over(&self) {
        self.over.store(true, Ordering::Release);
        // Whoever has looked at it and is about to wait has this lock.
        drop(lock(&self.lane));
        self.gone.notify_all();
    }

    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// Ends the link of a session that is over: what was said last ("released", "abort") should
    /// arrive, behind whatever is on its way, and the other end has [`GOODBYE`] to hang up.
    pub(crate) fn end(&self) {
        let Some(mut lane) = lock(&self.lane).take() else { return };
        lane.say_goodbye();
        lane.work.close();
        let deadline = Instant::now() + GOODBYE;
        while !lane.hangup.is_done() && Instant::now() < deadline {
            std::thread::park_timeout(Duration::from_millis(1));
        }
        lane.close();
    }

    /// Waits until there is no link; false if the session is over.
    pub(crate) fn wait_for_none(&self) -> bool {
        let lane = lock(&self.lane);
        let linked = |lane: &mut Option<Lane>| lane.is_some() && !self.is_over();
        drop(self.gone.wait_while(lane, linked).unwrap_or_else(PoisonError::into_inner));
        !self.is_over()
    }

    /// Waits for so long, or until the session is over.
    pub(crate) fn rest(&self, pause: Duration) {
        let lane = lock(&self.lane);
        let goes_on = |_: &mut Option<Lane>| !self.is_over();
        let waited = self.gone.wait_timeout_while(lane, pause, goes_on);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// The other end has said something on this link.
    pub(crate) fn note_heard(&self, link: LinkId) {
        self.heard.fetch_max(link.0, Ordering::Relaxed);
    }

    pub(crate) fn has_heard(&self, link: LinkId) -> bool {
        self.heard.load(Ordering::Relaxed) >= link.0
    }

    pub(crate) fn note_trouble(&self, trouble: String) {
        *lock(&self.trouble) = Some(trouble);
    }

    /// The last trouble with a connection.
    pub(crate) fn trouble(&self) -> Option<String> {
        lock(&self.trouble).clone()
    }
}

fn control_trouble(error: &io::Error) -> String {
    format!("the control connection: {error}")
}

/// Bytes of frames, counted by all threads of an end.
#[derive(Default)]
pub(crate) struct WireCount {
    pub(crate) control_sent: AtomicU64,
    pub(crate) control_received: AtomicU64,
    pub(crate) data: AtomicU64,
    pub(crate) demand: AtomicU64,
}

impl WireCount {
    pub(crate) fn read(&self) -> crate::report::WireBytes {
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        crate::report::WireBytes {
            control_sent: load(&self.control_sent),
            control_received: load(&self.control_received),
            data: load(&self.data),
            demand: load(&self.demand),
        }
    }

    pub(crate) fn blocks(&self, track: Track) -> &AtomicU64 {
        match track {
            Track::Demand => &self.demand,
            Track::Bulk => &self.data,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use silo_block::rounds::Epoch;

    fn header(start: u64, count: u64, class: Class) -> BlockHeader {
        let range = BlockRange::new(start, count);
        BlockHeader { device: DeviceIndex(0), range, epoch: Epoch(1), class }
    }

    #[test]
    fn blocks_that_somebody_waits_for_leave_the_line_and_nothing_is_lost_or_doubled() {
        let work = Work::default();
        (0..4).for_each(|n| work.push(Track::Bulk, header(n * 10, 10, Class::Bulk)));
        work.urge(DeviceIndex(1), BlockRange::new(0, 40));
        work.urge(DeviceIndex(0), BlockRange::new(18, 4));
        let drain = |track| {
            let mut all = Vec::new();
            let closes = std::cell::Cell::new(false);
            while let Some(header) = work.pop(track, || closes.set(true)) {
                all.push((header.range.start.0, header.range.count));
                let queues = lock(&work.queues);
                let left =
                    if track == Track::Bulk { queues.bulk.len() } else { queues.demand.len() };
                if left == 0 {
                    break;
                }
            }
            all
        };
        assert_eq!(drain(Track::Demand), [(18, 2), (20, 2)]);
        assert_eq!(drain(Track::Bulk), [(0, 10), (10, 8), (22, 8), (30, 10)]);
    }
}
