//! Continuous backup: decides when a generation is due, freezes the group, stores, releases.
//!
//! One thread for each line. It ends when it is told to, or when another writer has taken the line.
//! What must hold: nothing that changed is older than the maximum age and one check period when its
//! round begins, as long as the store answers; a block that is written all the time costs one upload
//! for each minimum interval; after any failure the changes of the round are still changes.

use crate::{
    StoreError,
    capture::{Capture, Changes, Want},
    writer::{LineWriter, Stored},
};
use silo_block::times::Histogram;
use std::{
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// Shortest time between two looks.
const LEAST_REST: Duration = Duration::from_millis(1);

/// When generations are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// What changed is stored at this age at the latest.
    pub max_age: Duration,
    /// Between the beginnings of two generations, unless asked for; at most `max_age` counts.
    pub min_interval: Duration,
    /// How often it is looked whether one is due.
    pub period: Duration,
    /// A generation begins before `max_age` when so many blocks of one group have changed; 0: never.
    pub min_changed: u64,
    /// A group is `1 << group_shift` neighbouring blocks.
    pub group_shift: u32,
    /// First pause after a failure; doubles.
    pub retry: Duration,
    /// Longest pause after failures; `max_age` if that is longer.
    pub retry_most: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            max_age: Duration::from_secs(60),
            min_interval: Duration::from_secs(10),
            period: Duration::from_secs(1),
            min_changed: 0,
            group_shift: 10,
            retry: Duration::from_secs(1),
            retry_most: Duration::from_secs(60),
        }
    }
}

/// What the policy remembers. Times count from any fixed moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    /// When changes that are not stored were first seen.
    seen: Option<Duration>,
    /// When the last round began.
    began: Option<Duration>,
    failures: u32,
    /// Not before this, after a failure.
    not_before: Duration,
}

impl Policy {
    /// Whether a generation is due. Called every period with what a round would list.
    pub fn is_due(&self, pace: &mut Pace, now: Duration, changes: Changes) -> bool {
        if changes.blocks == 0 {
            pace.seen = None;
            return false;
        }
        let seen = *pace.seen.get_or_insert(now);
        if now < pace.not_before {
            return false;
        }
        if now.saturating_sub(seen) >= self.max_age {
            return true;
        }
        let interval = self.min_interval.min(self.max_age);
        let rested = pace.began.is_none_or(|began| now.saturating_sub(began) >= interval);
        rested && self.min_changed > 0 && changes.fullest >= self.min_changed
    }

    /// How long it may be until the next look: a generation that is due at its interval does not wait
    /// for the end of a period.
    #[must_use]
    pub fn rest(&self, pace: &Pace, now: Duration) -> Duration {
        let interval = self.min_interval.min(self.max_age);
        let due = match pace.began {
            Some(began) if self.min_changed > 0 => (began + interval).max(pace.not_before),
            _ => return self.period,
        };
        due.saturating_sub(now).clamp(LEAST_REST, self.period.max(LEAST_REST))
    }

    /// A round begins: what changes from here on is younger.
    pub fn begin(&self, pace: &mut Pace, now: Duration) {
        (pace.began, pace.seen) = (Some(now), None);
    }

    /// A round ended. After a failure what it held is as old as it was.
    pub fn end(&self, pace: &mut Pace, now: Duration, before: &Pace, stored: bool) {
        if stored {
            (pace.failures, pace.not_before) = (0, Duration::ZERO);
            return;
        }
        let most = self.max_age.max(self.retry_most);
        pace.not_before = now + (self.retry * (1 << pace.failures.min(16))).min(most);
        pace.failures += 1;
        pace.seen = before.seen.or(pace.seen);
    }
}

/// How a backup begins.
#[derive(Clone, Copy, Debug, Default)]
pub struct BackupOptions {
    /// When generations are made.
    pub policy: Policy,
    /// The tracker knows what changed since this generation of the line. If that is the newest, the
    /// first round lists changes only; else all blocks are compared with what is stored.
    pub tracked_since: Option<u64>,
}

/// How a backup is doing.
#[derive(Clone, Debug, Default)]
pub struct BackupStatus {
    /// Generations that were stored.
    pub generations: u64,
    /// The last of them.
    pub last: Option<Stored>,
    /// When the last one was committed.
    pub committed: Option<Instant>,
    /// What went wrong last, until something goes well again.
    pub error: Option<String>,
    /// Rounds that failed.
    pub failures: u64,
    /// Bytes that were sent to the store.
    pub bytes: u64,
    /// Blocks of all devices together.
    pub tracked: u64,
    /// What had changed and was in no generation when it was looked at last, at most a
    /// [period](Policy::period) ago or when the round under way began.
    pub changed: Changes,
    /// When the oldest of these changes was seen.
    pub oldest: Option<Instant>,
    /// A generation is frozen and being stored.
    pub storing: bool,
    /// How long writers were held.
    pub holds: Histogram,
    /// It has ended: another writer took the line, or it was told to.
    pub ended: bool,
}

#[derive(Default)]
struct State {
    status: BackupStatus,
    /// Generations asked for, with their labels.
    asked: Vec<(u64, String)>,
    next_ask: u64,
    /// Outcomes of what was asked for.
    answers: Vec<(u64, Result<Stored, Arc<StoreError>>)>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    stop: AtomicBool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running backup. Dropping it ends it, without a last generation.
pub struct Backup {
    shared: Arc<Shared>,
    capture: Arc<dyn Capture>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Backup {
    fn drop(&mut self) {
        self.end();
    }
}

impl Backup {
    /// Begins. The first round begins at once if there is anything to store.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn start(
        writer: LineWriter,
        capture: Arc<dyn Capture>,
        options: BackupOptions,
    ) -> Result<Self, StoreError> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
            stop: AtomicBool::new(false),
        });
        let compare = options.tracked_since.is_none_or(|number| number != writer.newest());
        let tracked = capture.devices().iter().map(|device| device.geometry.blocks()).sum();
        shared.lock().status.tracked = tracked;
        let runner = Runner {
            shared: shared.clone(),
            writer,
            capture: capture.clone(),
            policy: options.policy,
            compare,
            pace: Pace::default(),
            began: Instant::now(),
        };
        let thread = std::thread::Builder::new()
            .name("silo-backup".to_owned())
            .spawn(move || runner.run())
            .map_err(|source| StoreError::Local { operation: "start a thread", source })?;
        Ok(Self { shared, capture, thread: Some(thread) })
    }

    /// How it is doing.
    #[must_use]
    pub fn status(&self) -> BackupStatus {
        let mut status = self.shared.lock().status.clone();
        status.holds = self.capture.holds();
        status
    }

    /// Makes a generation now, of everything that was acknowledged to writers before the call, and
    /// waits until it is durable.
    ///
    /// # Errors
    /// What kept it from being stored; [`StoreError::Stopped`] if it takes longer than `wait`.
    pub fn now(&self, label: &str, wait: Duration) -> Result<Stored, Arc<StoreError>> {
        let until = Instant::now() + wait;
        let mut state = self.shared.lock();
        let ask = state.next_ask;
        state.next_ask += 1;
        state.asked.push((ask, label.to_owned()));
        self.shared.changed.notify_all();
        loop {
            if let Some(at) = state.answers.iter().position(|(number, _)| *number == ask) {
                return state.answers.swap_remove(at).1;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || state.status.ended {
                state.asked.retain(|(number, _)| *number != ask);
                return Err(Arc::new(StoreError::Stopped));
            }
            let waited = self.shared.changed.wait_timeout(state, left.min(Duration::from_secs(1)));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Ends it; a round under way is put back. Waits for the thread.
    pub fn stop(mut self) -> BackupStatus {
        self.end();
        self.status()
    }

    fn end(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported by then.
            let _ = thread.join();
        }
    }
}

struct Runner {
    shared: Arc<Shared>,
    writer: LineWriter,
    capture: Arc<dyn Capture>,
    policy: Policy,
    /// The next round lists all blocks.
    compare: bool,
    pace: Pace,
    began: Instant,
}

impl Runner {
    fn run(mut self) {
        let mut first = true;
        while !self.shared.stop.load(Ordering::Relaxed) {
            let changes = self.capture.changes(self.policy.group_shift);
            let asked = std::mem::take(&mut self.shared.lock().asked);
            let now = self.began.elapsed();
            let due = self.policy.is_due(&mut self.pace, now, changes);
            self.tell(changes);
            // What the store may lack altogether does not wait to be old.
            let due = due || (first && (self.compare || self.writer.needs_everything()));
            if due || !asked.is_empty() {
                first = false;
                let ended = self.round(asked);
                if ended {
                    break;
                }
            }
            let rest = self.policy.rest(&self.pace, self.began.elapsed());
            let state = self.shared.lock();
            if state.asked.is_empty() && !self.shared.stop.load(Ordering::Relaxed) {
                let waited = self.shared.changed.wait_timeout(state, rest);
                drop(waited.unwrap_or_else(PoisonError::into_inner).0);
            }
        }
        self.shared.lock().status.ended = true;
        self.shared.changed.notify_all();
    }

    /// What was seen, for whoever asks.
    fn tell(&self, changes: Changes) {
        let oldest = self.pace.seen.map(|seen| self.began + seen);
        let mut state = self.shared.lock();
        (state.status.changed, state.status.oldest) = (changes, oldest);
    }

    /// Makes a generation; true if there is no point in another.
    fn round(&mut self, asked: Vec<(u64, String)>) -> bool {
        let before = self.pace;
        self.policy.begin(&mut self.pace, self.began.elapsed());
        let label = asked.first().map_or("", |(_, label)| label);
        let result = self.store(label);
        self.policy.end(&mut self.pace, self.began.elapsed(), &before, result.is_ok());
        let fenced = matches!(result, Err(StoreError::Fenced { .. }));
        let result = result.map_err(Arc::new);
        let mut state = self.shared.lock();
        state.status.storing = false;
        match &result {
            Ok(stored) => {
                tracing::info!(
                    line = %self.writer.line(), number = stored.number, blocks = stored.blocks,
                    bytes = stored.bytes(), requests = stored.requests.total(), "generation stored"
                );
                state.status.generations += 1;
                state.status.bytes += stored.bytes();
                state.status.last = Some(stored.clone());
                state.status.committed = Some(Instant::now());
                state.status.error = None;
                (state.status.changed, state.status.oldest) = (Changes::default(), None);
            }
            Err(error) => {
                tracing::warn!(line = %self.writer.line(), %error, "generation not stored");
                state.status.failures += 1;
                state.status.error = Some(error.to_string());
            }
        }
        state.answers.extend(asked.into_iter().map(|(ask, _)| (ask, result.clone())));
        // Nobody waits for answers that are this old.
        let old = state.answers.len().saturating_sub(64);
        state.answers.drain(..old);
        drop(state);
        self.shared.changed.notify_all();
        fenced
    }

    fn store(&mut self, label: &str) -> Result<Stored, StoreError> {
        let everything = self.compare || self.writer.needs_everything();
        let want = if everything { Want::Everything } else { Want::Changed };
        let infos = self.capture.devices();
        let frozen = tracing::info_span!("freeze", line = %self.writer.line())
            .in_scope(|| self.capture.freeze(want))?;
        self.shared.lock().status.storing = true;
        match self.writer.store(&infos, frozen.as_ref(), everything, label, &self.shared.stop) {
            Ok(stored) => {
                frozen.release();
                self.compare = false;
                Ok(stored)
            }
            Err(error) => {
                frozen.put_back();
                Err(error)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn policy() -> Policy {
        Policy {
            max_age: 10 * S,
            min_interval: 4 * S,
            period: S,
            min_changed: 8,
            group_shift: 4,
            retry: S,
            retry_most: 60 * S,
        }
    }

    /// Runs the policy for `seconds`; `changes` says what was written in each. Gives the times at
    /// which rounds began.
    fn rounds(seconds: u64, changes: impl Fn(u64) -> Changes) -> Vec<u64> {
        let (policy, mut pace, mut begun) = (policy(), Pace::default(), Vec::new());
        let mut dirty = Changes::default();
        for second in 0..seconds {
            let new = changes(second);
            dirty.blocks += new.blocks;
            dirty.fullest = dirty.fullest.max(new.fullest);
            if policy.is_due(&mut pace, second as u32 * S, dirty) {
                let before = pace;
                policy.begin(&mut pace, second as u32 * S);
                policy.end(&mut pace, second as u32 * S, &before, true);
                begun.push(second);
                dirty = Changes::default();
            }
        }
        begun
    }

    #[test]
    fn a_group_that_always_changes_is_looked_at_when_its_interval_is_over_and_not_a_period_later() {
        let (policy, mut pace) = (Policy { period: 3 * S, ..policy() }, Pace::default());
        let hot = Changes { blocks: 9, fullest: 9 };
        let ms = Duration::from_millis;
        assert!(policy.is_due(&mut pace, S, hot));
        assert_eq!(policy.rest(&pace, S), 3 * S, "nothing has begun: a period");
        let before = pace;
        policy.begin(&mut pace, S);
        policy.end(&mut pace, S + ms(300), &before, true);
        assert_eq!(policy.rest(&pace, S + ms(300)), 3 * S);
        let (mut now, end) = (S + ms(3300), 5 * S);
        while !policy.is_due(&mut pace, now, hot) {
            now += policy.rest(&pace, now);
            assert!(now <= end, "{now:?}");
        }
        assert_eq!(now, end);
        // A store that fails is asked again after pauses that end.
        let mut failed = pace;
        for _ in 0..20 {
            policy.begin(&mut failed, now);
            policy.end(&mut failed, now, &pace, false);
        }
        assert!(!policy.is_due(&mut failed, now + 59 * S, hot));
        assert!(policy.is_due(&mut failed, now + 60 * S, hot));
    }

    #[test]
    fn a_single_change_is_stored_at_the_maximum_age_and_nothing_changed_stores_nothing() {
        let one =
            |second| Changes { blocks: u64::from(second == 3), fullest: u64::from(second == 3) };
        assert_eq!(rounds(100, one), [13]);
        assert!(rounds(100, |_| Changes::default()).is_empty());
    }

    #[test]
    fn check_34_many_changes_in_one_group_do_not_wait_for_the_maximum_age() {
        let burst = |second| Changes {
            blocks: 8 * u64::from(second == 5),
            fullest: 8 * u64::from(second == 5),
        };
        assert_eq!(rounds(50, burst), [5]);
    }

    #[test]
    fn check_34_a_hot_block_is_stored_once_an_interval_and_never_older_than_the_age_and_a_period() {
        let hot = |_| Changes { blocks: 1, fullest: 1 };
        let begun = rounds(200, hot);
        assert!(begun.windows(2).all(|pair| pair[1] - pair[0] == 11), "{begun:?}");
        let hot_group = |_| Changes { blocks: 9, fullest: 9 };
        let begun = rounds(200, hot_group);
        assert!(begun.windows(2).all(|pair| pair[1] - pair[0] == 4), "{begun:?}");
    }

    #[test]
    fn after_failures_the_pause_grows_and_the_age_is_not_forgotten() {
        let (policy, mut pace) = (policy(), Pace::default());
        let dirty = Changes { blocks: 1, fullest: 1 };
        assert!(!policy.is_due(&mut pace, S, dirty));
        let mut tried = Vec::new();
        for second in 2..60u32 {
            if policy.is_due(&mut pace, second * S, dirty) {
                let before = pace;
                policy.begin(&mut pace, second * S);
                policy.end(&mut pace, second * S, &before, false);
                tried.push(second);
            }
        }
        assert_eq!(tried, [11, 12, 14, 18, 26, 42]);
    }
}
