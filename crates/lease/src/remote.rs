//! Stores that are elsewhere, as plain threads use them: blocking calls with a deadline.
//!
//! A call is tried again until it is answered, refused, or its time is over, each try with more
//! patience than the one before, so that a line that leads nowhere costs a second and not the whole
//! time. Trying a swap again is safe: what it writes is written by nobody else (a nonce is in it), so
//! a cell that holds it after a try without an answer was swapped by that try.
//!
//! What must hold: a call returns within [`Remote`]'s limit and [`GRACE`]; a try that was given up
//! leaves no connection behind that another one would use.

use super::{Cells, Key, StoreError, Swap};
use std::{
    future::Future,
    sync::{
        Arc,
        mpsc::{RecvTimeoutError, sync_channel},
    },
    time::{Duration, Instant},
};
use tokio::runtime::Runtime;

/// The patience of the first try; it doubles. Less than half of a term of three seconds.
const FIRST_TRY: Duration = Duration::from_secs(1);

/// Between two tries; it doubles, up to the longest.
const PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// Beyond the limit, for threads that get no processor.
const GRACE: Duration = Duration::from_secs(1);

/// Why a try came to nothing.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The store refuses, and will again until somebody changes something.
    Refused(String),
    /// No answer, or one that says nothing: it may be another one in a moment.
    Silent {
        /// For people.
        detail: String,
        /// How long to wait at least, if the store says so.
        after: Option<Duration>,
    },
    /// What is stored was written by nobody who knows how.
    Damaged(String),
}

impl Failure {
    pub(crate) fn silent(detail: impl Into<String>) -> Self {
        Self::Silent { detail: detail.into(), after: None }
    }
}

/// One try of each call. A future that is dropped has been given up.
pub(crate) trait Backend: Send + Sync + 'static {
    fn get(&self, key: &Key) -> impl Future<Output = Result<Option<Vec<u8>>, Failure>> + Send;

    fn swap(
        &self,
        key: &Key,
        expected: Option<&[u8]>,
        new: &[u8],
    ) -> impl Future<Output = Result<Swap, Failure>> + Send;

    fn place(&self, key: &Key) -> String;
}

/// A backend with a deadline and a thread of its own.
pub(crate) struct Remote<B> {
    backend: Arc<B>,
    limit: Duration,
    runtime: Option<Runtime>,
}

impl<B> Drop for Remote<B> {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Tries until there is an answer, a refusal, or no time left. `attempt` learns whether a try before
/// it got no answer.
async fn tried<T, F: Future<Output = Result<T, Failure>> + Send>(
    limit: Duration,
    mut attempt: impl FnMut(bool) -> F + Send,
) -> Result<T, Failure> {
    let begun = Instant::now();
    let (mut patience, mut pause, mut tries) = (FIRST_TRY, PAUSE, 0_u32);
    loop {
        let left = limit.saturating_sub(begun.elapsed());
        let given = patience.min(left);
        tries += 1;
        let (detail, after) = match tokio::time::timeout(given, attempt(tries > 1)).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(Failure::Silent { detail, after })) => (detail, after.unwrap_or(pause)),
            Ok(Err(final_one)) => return Err(final_one),
            Err(_) => (format!("no answer within {given:.1?}"), pause),
        };
        let wait = after.max(pause);
        if begun.elapsed() + wait >= limit {
            let spent = begun.elapsed();
            return Err(Failure::silent(format!("{detail} (tried {tries} times in {spent:.1?})")));
        }
        tokio::time::sleep(wait).await;
        patience = (patience * 2).min(limit);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

impl<B: Backend> Remote<B> {
    /// A call waits at most `limit` for the store.
    pub(crate) fn new(backend: B, limit: Duration) -> Result<Self, String> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("lease-store")
            .enable_all()
            .build()
            .map_err(|e| format!("start a thread: {e}"))?;
        Ok(Self { backend: Arc::new(backend), limit, runtime: Some(runtime) })
    }

    /// On the runtime's thread, so that it does not matter what thread waits.
    fn wait<T: Send + 'static>(
        &self,
        key: &Key,
        what: &str,
        work: impl Future<Output = Result<T, Failure>> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (sender, answer) = sync_channel(1);
        if let Some(runtime) = &self.runtime {
            runtime.spawn(async move {
                // Nobody waits any more if this fails.
                let _ = sender.send(work.await);
            });
        }
        let of = key.clone();
        let operation = format!("{what} {}", self.place(key));
        match answer.recv_timeout(self.limit + GRACE) {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(Failure::Silent { detail, .. })) => {
                Err(StoreError::Unavailable { of, operation, detail })
            }
            Ok(Err(Failure::Refused(detail))) => Err(StoreError::Refused { of, operation, detail }),
            Ok(Err(Failure::Damaged(detail))) => {
                Err(StoreError::Corrupt { of, place: self.place(key), detail })
            }
            Err(RecvTimeoutError::Timeout) => {
                let detail = format!("no answer within {:.1?}", self.limit + GRACE);
                Err(StoreError::Unavailable { of, operation, detail })
            }
            Err(RecvTimeoutError::Disconnected) => {
                let detail = "its thread ended".to_owned();
                Err(StoreError::Unavailable { of, operation, detail })
            }
        }
    }
}

impl<B: Backend> Cells for Remote<B> {
    fn get(&self, key: &Key) -> Result<Option<Vec<u8>>, StoreError> {
        let (backend, limit, of) = (Arc::clone(&self.backend), self.limit, key.clone());
        self.wait(key, "read", async move {
            tried(limit, |_| {
                let (backend, of) = (Arc::clone(&backend), of.clone());
                async move { backend.get(&of).await }
            })
            .await
        })
    }

    fn swap(&self, key: &Key, expected: Option<&[u8]>, new: &[u8]) -> Result<Swap, StoreError> {
        let (backend, limit, of) = (Arc::clone(&self.backend), self.limit, key.clone());
        let expected: Option<Arc<[u8]>> = expected.map(Arc::from);
        let new: Arc<[u8]> = Arc::from(new);
        self.wait(key, "write", async move {
            tried(limit, |again| {
                let (backend, of) = (Arc::clone(&backend), of.clone());
                let (expected, new) = (expected.clone(), Arc::clone(&new));
                async move {
                    let swapped = backend.swap(&of, expected.as_deref(), &new).await?;
                    Ok(match swapped {
                        Swap::Found(Some(found)) if again && *found == *new => Swap::Done,
                        other => other,
                    })
                }
            })
            .await
        })
    }

    fn place(&self, key: &Key) -> String {
        self.backend.place(key)
    }
}

/// An error with its causes, each once.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let said = cause.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MachineName;
    use std::sync::Mutex;

    /// What each try shall do, one after the other.
    enum Script {
        Hang,
        Silent,
        Refuse,
        /// It is swapped, and the answer is lost.
        SwapUnheard,
        Answer,
    }

    struct Scripted {
        content: Mutex<Option<Vec<u8>>>,
        script: Mutex<Vec<Script>>,
    }

    impl Scripted {
        fn swap_now(&self, expected: Option<&[u8]>, new: &[u8]) -> Swap {
            let mut content = self.content.lock().unwrap();
            if content.as_deref() != expected {
                return Swap::Found(content.clone());
            }
            *content = Some(new.to_vec());
            Swap::Done
        }
    }

    impl Backend for Scripted {
        async fn get(&self, _: &Key) -> Result<Option<Vec<u8>>, Failure> {
            Ok(self.content.lock().unwrap().clone())
        }

        async fn swap(
            &self,
            _: &Key,
            expected: Option<&[u8]>,
            new: &[u8],
        ) -> Result<Swap, Failure> {
            let next = self.script.lock().unwrap().pop();
            match next {
                Some(Script::Hang) => std::future::pending().await,
                Some(Script::Silent) => Err(Failure::silent("busy")),
                Some(Script::Refuse) => Err(Failure::Refused("no right".into())),
                Some(Script::SwapUnheard) => {
                    self.swap_now(expected, new);
                    Err(Failure::silent("cut"))
                }
                Some(Script::Answer) | None => Ok(self.swap_now(expected, new)),
            }
        }

        fn place(&self, key: &Key) -> String {
            key.path()
        }
    }

    fn remote(limit: Duration, mut script: Vec<Script>) -> Remote<Scripted> {
        script.reverse();
        let content = Mutex::new(Some(b"old".to_vec()));
        Remote::new(Scripted { content, script: Mutex::new(script) }, limit).unwrap()
    }

    fn key() -> Key {
        Key::Lease(MachineName::new("redis-1").unwrap())
    }

    const LONG: Duration = Duration::from_secs(30);

    #[test]
    fn a_swap_whose_answer_was_lost_is_known_to_be_done_when_it_is_tried_again() {
        let store = remote(LONG, vec![Script::Silent, Script::SwapUnheard, Script::Answer]);
        assert_eq!(store.swap(&key(), Some(b"old"), b"new").unwrap(), Swap::Done);
        // Asked again by a caller who has not heard: the store says what it holds.
        let again = store.swap(&key(), Some(b"old"), b"new").unwrap();
        assert_eq!(again, Swap::Found(Some(b"new".to_vec())));
    }

    #[test]
    fn another_content_is_never_taken_for_ones_own() {
        let store = remote(LONG, vec![Script::Silent, Script::Answer]);
        let found = store.swap(&key(), Some(b"older"), b"new").unwrap();
        assert_eq!(found, Swap::Found(Some(b"old".to_vec())));
    }

    #[test]
    fn a_refusal_is_not_tried_again() {
        let store = remote(LONG, vec![Script::Refuse, Script::Answer]);
        let e = store.swap(&key(), Some(b"old"), b"new").unwrap_err();
        assert!(matches!(e, StoreError::Refused { .. }), "{e}");
        assert_eq!(store.get(&key()).unwrap(), Some(b"old".to_vec()));
    }

    #[test]
    fn a_try_that_hangs_leaves_time_for_the_next() {
        let store = remote(LONG, vec![Script::Hang, Script::Answer]);
        assert_eq!(store.swap(&key(), Some(b"old"), b"new").unwrap(), Swap::Done);
    }

    #[test]
    fn silence_ends_at_the_limit_and_says_how_often_it_was_tried() {
        let limit = Duration::from_millis(300);
        let store = remote(limit, (0..100).map(|_| Script::Silent).collect());
        let begun = Instant::now();
        let e = store.swap(&key(), Some(b"old"), b"new").unwrap_err();
        assert!(matches!(e, StoreError::Unavailable { .. }), "{e}");
        assert!(e.to_string().contains("busy (tried"), "{e}");
        assert!(begun.elapsed() < limit + GRACE + Duration::from_secs(10));
        let store = remote(limit, vec![Script::Hang]);
        let e = store.swap(&key(), Some(b"old"), b"new").unwrap_err().to_string();
        assert!(e.contains("no answer within"), "{e}");
    }
}
