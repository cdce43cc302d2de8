//! Faults that a test asks of the server, and the list of requests that it saw.

use std::{
    path::PathBuf,
    sync::{Condvar, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// What a server can do wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Answers, but so much later.
    Slow(Duration),
    /// Answers with this status and does nothing.
    Status(u16),
    /// Does it, and answers with this status.
    LostAnswer(u16),
    /// Sends half of the body and closes the connection.
    Truncated,
    /// Sends the body with one bit changed, in the middle.
    WrongBytes,
    /// Sends the content of this object (a key in the bucket) instead: an old version, or another one.
    Stale(String),
    /// Does nothing and never answers.
    Hangs,
    /// Does it, and never answers.
    NoAnswer,
}

/// A request, as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// "GET", "PUT", …
    pub method: String,
    /// Path and query, not decoded.
    pub path: String,
    /// It asked for create-if-absent.
    pub creates: bool,
}

/// When a fault happens.
#[derive(Clone, Debug)]
pub struct Rule {
    /// To requests of this method.
    pub method: &'static str,
    /// With this in path and query.
    pub contains: String,
    /// After so many that fit.
    pub skip: u32,
    /// So often.
    pub times: u32,
    /// What.
    pub fault: Fault,
}

impl Rule {
    /// The next request of that kind.
    #[must_use]
    pub fn next(method: &'static str, contains: &str, fault: Fault) -> Self {
        Self { method, contains: contains.to_owned(), skip: 0, times: 1, fault }
    }

    /// All requests of that kind.
    #[must_use]
    pub fn all(method: &'static str, contains: &str, fault: Fault) -> Self {
        Self { times: u32::MAX, ..Self::next(method, contains, fault) }
    }
}

/// Rules and what was seen; shared by server and test.
#[derive(Default)]
pub struct Faults {
    rules: Mutex<Vec<Rule>>,
    seen: Mutex<Vec<Request>>,
    /// Faults that have taken their effect on the store.
    happened: Mutex<u64>,
    changed: Condvar,
}

impl Faults {
    /// Adds a rule.
    pub fn add(&self, rule: Rule) {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner).push(rule);
    }

    /// Removes all rules.
    pub fn clear(&self) {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// How many faults have happened: what one does to the store is done, and its answer is on its
    /// way or will never be.
    #[must_use]
    pub fn happened(&self) -> u64 {
        *self.happened.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until more than `before` faults have happened; false if that takes longer than `limit`.
    #[must_use]
    pub fn wait_for_more(&self, before: u64, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        let mut happened = self.happened.lock().unwrap_or_else(PoisonError::into_inner);
        while *happened <= before {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.changed.wait_timeout(happened, left);
            happened = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// A fault has done what it does to the store.
    pub(crate) fn note(&self) {
        *self.happened.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.changed.notify_all();
    }

    /// The requests since the last call.
    pub fn take_seen(&self) -> Vec<Request> {
        std::mem::take(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Notes a request; gives the fault that it meets.
    pub(crate) fn meet(&self, request: Request) -> Option<Fault> {
        let mut rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |rule: &&mut Rule| {
            rule.times > 0 && rule.method == request.method && request.path.contains(&rule.contains)
        };
        let fault = rules.iter_mut().find(fits).and_then(|rule| {
            if rule.skip > 0 {
                rule.skip -= 1;
                return None;
            }
            rule.times = rule.times.saturating_sub(u32::from(rule.times != u32::MAX));
            Some(rule.fault.clone())
        });
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).push(request);
        fault
    }
}

/// Where an object of a bucket lies in the server's folder.
pub(crate) fn file_of(root: &std::path::Path, bucket: &str, key: &str) -> PathBuf {
    root.join(bucket).join(key)
}
