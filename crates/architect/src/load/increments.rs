//! A client that increments one key, one answer after the other, and remembers when each came: what a
//! machine that lost its host remembers, and when it is there again.
//!
//! Other than [`Load`](super::Load) it gives a connection up after a moment and makes a new one: a machine
//! that goes on from an earlier instant knows connections otherwise than their clients do.

use std::{
    io::{self, BufRead, BufReader, Write},
    net::TcpStream,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// How long an answer is waited for before a new connection is made.
pub const PATIENCE: Duration = Duration::from_millis(400);

/// One answer: the number after an increment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Increment {
    /// The number.
    pub number: u64,
    /// When the answer came.
    pub at: Instant,
}

/// See the module. Dropping it ends it.
pub struct Increments {
    answers: Arc<Mutex<Vec<Increment>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

fn lock(answers: &Mutex<Vec<Increment>>) -> MutexGuard<'_, Vec<Increment>> {
    answers.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Increments until an answer does not come or makes no sense.
fn serve(stream: TcpStream, answers: &Mutex<Vec<Increment>>, stop: &AtomicBool) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    while !stop.load(Ordering::Relaxed) {
        reader.get_mut().write_all(b"INCR increments\r\n")?;
        line.clear();
        reader.read_line(&mut line)?;
        let number = line.trim_start_matches(':').trim().parse();
        let number = number.map_err(|_| io::Error::other(format!("an answer of {line:?}")))?;
        lock(answers).push(Increment { number, at: Instant::now() });
    }
    Ok(())
}

impl Increments {
    /// Begins. `connect` makes a connection to a Redis, within [`PATIENCE`] or so.
    ///
    /// # Errors
    /// If there is no thread.
    pub fn start(connect: impl Fn() -> io::Result<TcpStream> + Send + 'static) -> io::Result<Self> {
        let answers: Arc<Mutex<Vec<Increment>>> = Arc::default();
        let stop = Arc::new(AtomicBool::new(false));
        let (seen, ended) = (Arc::clone(&answers), Arc::clone(&stop));
        let thread = std::thread::Builder::new().name("increments".into()).spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                let served = connect().and_then(|stream| serve(stream, &seen, &ended));
                if let Err(error) = served {
                    tracing::debug!(%error, "a new connection is made");
                    std::thread::park_timeout(Duration::from_millis(5));
                }
            }
        })?;
        Ok(Self { answers, stop, thread: Some(thread) })
    }

    /// The last answer.
    #[must_use]
    pub fn newest(&self) -> Option<Increment> {
        lock(&self.answers).last().copied()
    }

    /// Waits for an answer that comes after `since`; the first such.
    #[must_use]
    pub fn wait_after(&self, since: Instant, limit: Duration) -> Option<Increment> {
        let deadline = Instant::now() + limit;
        loop {
            let found = lock(&self.answers).iter().find(|answer| answer.at > since).copied();
            if found.is_some() || Instant::now() > deadline {
                return found;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// By how much the machine that answered `first` is behind what it had answered before `died`: the
    /// age, at that moment, of the oldest answer that it does not remember. Earlier answers are
    /// forgotten here too.
    #[must_use]
    pub fn lost(&self, first: Increment, died: Instant) -> Duration {
        let mut answers = lock(&self.answers);
        let forgotten = answers.iter().find(|a| a.at < first.at && a.number >= first.number);
        let lost = forgotten.map_or(Duration::ZERO, |a| died.saturating_duration_since(a.at));
        answers.retain(|answer| answer.at >= first.at);
        lost
    }

    /// The longest time without an answer, between answers from `from` to `to`.
    #[must_use]
    pub fn longest_between(&self, from: Instant, to: Instant) -> Duration {
        let answers = lock(&self.answers);
        let within = answers.windows(2).filter(|pair| pair[1].at >= from && pair[0].at <= to);
        within.map(|pair| pair[1].at - pair[0].at).max().unwrap_or_default()
    }

    /// Forgets all answers so far.
    pub fn forget(&self) {
        lock(&self.answers).clear();
    }

    /// Two answers of which the later has no higher number: time has gone back between them.
    #[must_use]
    pub fn went_back(&self) -> Option<(u64, u64)> {
        let answers = lock(&self.answers);
        let pairs = answers.windows(2).map(|pair| (pair[0].number, pair[1].number));
        pairs.into_iter().find(|(before, after)| after <= before)
    }
}

impl Drop for Increments {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It looks at each answer; a panic has been reported by then.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_machine_does_not_remember_is_as_old_as_its_oldest_answer() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let answer = |number, ms| Increment { number, at: at(ms) };
        let answers = vec![answer(1, 0), answer(2, 100), answer(3, 200), answer(3, 900)];
        let increments = Increments {
            answers: Arc::new(Mutex::new(answers)),
            stop: Arc::default(),
            thread: None,
        };
        assert_eq!(increments.went_back(), Some((3, 3)));
        let first = increments.wait_after(at(300), Duration::ZERO).unwrap();
        // It had answered 3 before it died, and answers 3 anew.
        assert_eq!(increments.lost(first, at(300)), Duration::from_millis(100));
        assert_eq!(increments.went_back(), None);
        assert_eq!(increments.lost(first, at(300)), Duration::ZERO);
    }
}
