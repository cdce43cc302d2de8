//! Questions by UDP, one every so often, each of which must be answered with itself: nobody sends a
//! datagram again, so that what the network loses or turns around shows.

use super::timeline::Timeline;
use std::{
    io::{self, ErrorKind},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// How often a thread looks whether it is to end.
const TICK: Duration = Duration::from_millis(50);

/// What became of the questions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Answered {
    /// Questions asked.
    pub sent: u64,
    /// Of these, answered.
    pub answered: u64,
    /// Answers that a later one's answer had overtaken.
    pub reordered: u64,
    /// Answers that came again.
    pub doubled: u64,
}

#[derive(Default)]
struct Found {
    seen: Vec<bool>,
    next: u64,
    all: Answered,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    end: AtomicBool,
    sent: AtomicU64,
    found: Mutex<Found>,
}

impl Shared {
    fn found(&self) -> MutexGuard<'_, Found> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Running questions. Dropping it ends them.
pub struct Questions {
    shared: Arc<Shared>,
    timeline: Timeline,
    threads: Vec<JoinHandle<()>>,
}

impl Questions {
    /// Asks `to` every `every`, from a socket of the calling thread's network namespace.
    pub fn start(to: SocketAddr, every: Duration) -> io::Result<Self> {
        let any: IpAddr = match to {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(TICK))?;
        let shared = Arc::new(Shared::default());
        let timeline = Timeline::new(Instant::now());
        let asker = socket.try_clone()?;
        let (asking, hearing, line) = (shared.clone(), shared.clone(), timeline.clone());
        let builder = |name: &str| std::thread::Builder::new().name(name.into());
        let ask = builder("ask").spawn(move || ask(&asker, every, &asking))?;
        let mut this = Self { shared, timeline, threads: vec![ask] };
        this.threads.push(builder("hear").spawn(move || hear(&socket, &hearing, &line))?);
        Ok(this)
    }

    /// The record of silences.
    #[must_use]
    pub fn timeline(&self) -> Timeline {
        self.timeline.clone()
    }

    /// Answers so far.
    #[must_use]
    pub fn answered(&self) -> u64 {
        self.shared.found().all.answered
    }

    /// Waits until `more` further answers came; false if that took longer than `limit`.
    #[must_use]
    pub fn wait_for(&self, more: u64, limit: Duration) -> bool {
        let goal = self.answered() + more;
        wait(limit, || self.answered() >= goal)
    }

    /// Asks no more, waits at most `limit` for what was asked, and says what became of it.
    #[must_use]
    pub fn finish(self, limit: Duration) -> Answered {
        self.shared.stop.store(true, Ordering::Relaxed);
        // One period, so that the last one is counted as asked.
        std::thread::sleep(TICK);
        let sent = || self.shared.sent.load(Ordering::Acquire);
        wait(limit, || self.answered() >= sent());
        self.timeline.end();
        Answered { sent: sent(), ..self.shared.found().all }
    }
}

impl Drop for Questions {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.end.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn wait(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    while !done() {
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}

fn ask(socket: &UdpSocket, every: Duration, shared: &Shared) {
    let mut next = Instant::now();
    while !shared.stop.load(Ordering::Relaxed) {
        let number = shared.sent.load(Ordering::Relaxed);
        // Refused: the guest's server is not up. It counts as asked, and is not answered.
        let _ = socket.send(&number.to_be_bytes());
        shared.sent.store(number + 1, Ordering::Release);
        next += every;
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
}

fn hear(socket: &UdpSocket, shared: &Shared, timeline: &Timeline) {
    let mut buffer = [0; 64];
    while !shared.end.load(Ordering::Relaxed) {
        let size = match socket.recv(&mut buffer) {
            Ok(size) => size,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                continue;
            }
            // A question that was refused.
            Err(_) => continue,
        };
        let Some(number) = buffer[..size].first_chunk().map(|n| u64::from_be_bytes(*n)) else {
            continue;
        };
        if number < shared.sent.load(Ordering::Acquire) + 1 {
            timeline.answered(Instant::now());
            shared.found().note(number);
        }
    }
}

impl Found {
    fn note(&mut self, number: u64) {
        let Ok(at) = usize::try_from(number) else { return };
        if self.seen.len() <= at {
            self.seen.resize(at + 1, false);
        }
        if std::mem::replace(&mut self.seen[at], true) {
            self.all.doubled += 1;
            return;
        }
        self.all.answered += 1;
        self.all.reordered += u64::from(number < self.next);
        self.next = self.next.max(number + 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_doubled_and_overtaken_answers_are_told_apart() {
        let mut found = Found::default();
        for number in [0, 1, 3, 2, 2, 5] {
            found.note(number);
        }
        let expected = Answered { sent: 0, answered: 5, reordered: 1, doubled: 1 };
        assert_eq!(found.all, expected);
    }

    #[test]
    fn questions_are_answered_by_whoever_sends_them_back_and_a_lost_one_shows() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        server.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let to = server.local_addr().unwrap();
        let serve = std::thread::spawn(move || {
            let mut buffer = [0; 64];
            for n in 0..50 {
                let (size, from) = server.recv_from(&mut buffer).unwrap();
                // The tenth is lost.
                if n != 9 {
                    server.send_to(&buffer[..size], from).unwrap();
                }
            }
        });
        let questions = Questions::start(to, Duration::from_millis(1)).unwrap();
        serve.join().unwrap();
        assert!(wait(Duration::from_secs(60), || questions.answered() >= 49));
        let all = questions.finish(Duration::ZERO);
        assert_eq!((all.answered, all.reordered, all.doubled), (49, 0, 0));
        assert!(all.sent >= 50, "{all:?}");
    }
}
