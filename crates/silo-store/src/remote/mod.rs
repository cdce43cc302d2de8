//! A store as plain threads use it: blocking calls with deadlines, repeated where that is safe,
//! every request counted. Everything else in this crate speaks to stores through here.
//!
//! What must hold: no call waits longer than [`Limits`] allow; a request that was given up counts
//! as unknown (it may still take effect); nothing is handed on that is longer than asked for.

mod open;
mod requests;

pub(crate) use open::open;
pub use open::{Environment, StoreUrl};
pub use requests::Requests;

use crate::error::{Result, StoreError};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::{
    Error as Raw, GetOptions, GetResultPayload, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode,
    PutOptions, PutPayload, path::Path,
};
use requests::Counters;
use std::{
    future::Future,
    ops::Range,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, sync_channel},
    },
    time::{Duration, SystemTime},
};
use tokio::runtime::Runtime;

/// How long to wait for a store and how often to repeat.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// For one attempt of a request, without the time for its bytes.
    pub request: Duration,
    /// The slowest that bytes may come or go, per second: adds to the time of an attempt.
    pub slowest: u64,
    /// How often a request is tried.
    pub attempts: u32,
    /// Pause before the second attempt; doubles each time.
    pub pause: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            request: Duration::from_secs(15),
            slowest: 256 << 10,
            attempts: 5,
            pause: Duration::from_millis(100),
        }
    }
}

impl Limits {
    fn attempt(&self, bytes: u64) -> Duration {
        self.request + Duration::from_secs_f64(bytes as f64 / self.slowest.max(1) as f64)
    }
}

/// What an object in a listing takes on the way, in bytes.
const LISTED: u64 = 1 << 10;

/// Outcome of a create-if-absent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Created {
    /// The object is there, made by this call.
    New,
    /// It was there, with this content.
    Exists(Bytes),
}

/// An object in a listing.
#[derive(Clone, Debug)]
pub(crate) struct Listed {
    pub(crate) object: String,
    pub(crate) size: u64,
    /// By the store's clock; only ever compared with other times of the same store.
    pub(crate) modified: SystemTime,
}

struct Inner {
    store: Arc<dyn ObjectStore>,
    prefix: Path,
    limits: Limits,
    counters: Counters,
}

/// An opened store. Cheap to share; calls may come from any thread.
pub(crate) struct Remote {
    inner: Arc<Inner>,
    url: String,
    /// Of a local store.
    folder: Option<PathBuf>,
    runtime: Option<Runtime>,
}

impl Drop for Remote {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// A request under way.
pub(crate) struct Pending<T> {
    answer: Receiver<Result<T>>,
    operation: &'static str,
    object: String,
    limit: Duration,
}

impl<T> Pending<T> {
    /// Waits for the answer.
    pub(crate) fn wait(self) -> Result<T> {
        match self.answer.recv_timeout(self.limit) {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                Err(StoreError::Timeout {
                    operation: self.operation,
                    object: self.object,
                    limit: self.limit,
                })
            }
        }
    }
}

/// Whether repeating cannot help.
fn is_final(error: &Raw) -> bool {
    matches!(
        error,
        Raw::NotFound { .. }
            | Raw::AlreadyExists { .. }
            | Raw::Precondition { .. }
            | Raw::NotModified { .. }
            | Raw::NotSupported { .. }
            | Raw::NotImplemented { .. }
            | Raw::InvalidPath { .. }
            | Raw::PermissionDenied { .. }
            | Raw::Unauthenticated { .. }
            | Raw::UnknownConfigurationKey { .. }
    )
}

impl Inner {
    fn path(&self, object: &str) -> Path {
        object.split('/').fold(self.prefix.clone(), Path::join)
    }

    /// The object's name without the prefix.
    fn name(&self, path: &Path) -> Option<String> {
        let mut parts = path.prefix_match(&self.prefix)?;
        let first = parts.next()?.as_ref().to_owned();
        Some(parts.fold(first, |name, part| name + "/" + part.as_ref()))
    }

    /// Tries until it succeeds, cannot succeed, or was tried often enough. `bytes`: how many come or
    /// go. Where only the answer says how many, an attempt notes it there, and if the time was too
    /// short for so many, the next attempt has more.
    async fn tried<T, F: Future<Output = Result<T, Raw>>>(
        &self,
        operation: &'static str,
        object: &str,
        bytes: &AtomicU64,
        mut attempt: impl FnMut() -> F,
    ) -> Result<T, StoreError> {
        let mut pause = self.limits.pause;
        let mut tried = 0;
        loop {
            tried += 1;
            self.counters.count(operation, tried > 1);
            let limit = self.limits.attempt(bytes.load(Ordering::Relaxed));
            let failed = match tokio::time::timeout(limit, attempt()).await {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(source)) => {
                    let last = is_final(&source) || tried >= self.limits.attempts;
                    let source = Box::new(source);
                    let object = object.to_owned();
                    (last, StoreError::Request { operation, object, attempts: tried, source })
                }
                Err(_) => {
                    let object = object.to_owned();
                    (
                        tried >= self.limits.attempts,
                        StoreError::Timeout { operation, object, limit },
                    )
                }
            };
            if failed.0 {
                return Err(failed.1);
            }
            tracing::debug!(error = %failed.1, "repeating a request to the store");
            // Half of the pause is random, so that many writers do not come back as one.
            let spread = crate::keys::random::<1>().map_or(0, |byte| byte[0]);
            tokio::time::sleep(pause / 2 + pause / 2 * u32::from(spread) / 255).await;
            pause = (pause * 2).min(Duration::from_secs(10));
        }
    }

    async fn get(
        &self,
        object: &str,
        range: Option<Range<u64>>,
        max: u64,
    ) -> Result<Option<Bytes>> {
        let (path, want) = (self.path(object), range.clone().map(|r| r.end - r.start));
        let coming = AtomicU64::new(want.unwrap_or(0));
        let read = self
            .tried("read", object, &coming, || {
                let options =
                    GetOptions::new().with_range(range.clone().map(object_store::GetRange::from));
                read_bounded(self.store.as_ref(), &path, options, want.unwrap_or(max), &coming)
            })
            .await;
        let bytes = match read {
            Ok(Ok(bytes)) => bytes,
            Ok(Err(size)) => {
                let detail =
                    format!("it has {size} bytes, more than {} can be", want.unwrap_or(max));
                return Err(StoreError::corrupt(object, detail));
            }
            Err(StoreError::Request { source, .. }) if matches!(*source, Raw::NotFound { .. }) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        if want.is_some_and(|want| want != bytes.len() as u64) {
            return Err(StoreError::corrupt(object, "it is shorter than what refers to it says"));
        }
        self.counters.downloaded(bytes.len() as u64);
        Ok(Some(bytes))
    }

    async fn put(&self, object: &str, bytes: Bytes) -> Result<()> {
        let (path, length) = (self.path(object), bytes.len() as u64);
        self.tried("write", object, &AtomicU64::new(length), || {
            self.store.put(&path, PutPayload::from(bytes.clone()))
        })
        .await?;
        self.counters.uploaded(length);
        Ok(())
    }

    async fn create(&self, object: &str, bytes: Bytes) -> Result<Created> {
        let (path, length) = (self.path(object), bytes.len() as u64);
        let created = self
            .tried("create", object, &AtomicU64::new(length), || {
                let options = PutOptions::from(PutMode::Create);
                self.store.put_opts(&path, PutPayload::from(bytes.clone()), options)
            })
            .await;
        match created {
            Ok(_) => {
                self.counters.uploaded(length);
                Ok(Created::New)
            }
            Err(StoreError::Request { source, .. })
                if matches!(*source, Raw::AlreadyExists { .. } | Raw::Precondition { .. }) =>
            {
                // A repeated create reports that of one's own object: each has a nonce in it.
                let there = self.get(object, None, crate::log::MAX_ENTRY).await?;
                let there =
                    there.ok_or_else(|| StoreError::Missing { object: object.to_owned() })?;
                Ok(if there == bytes { Created::New } else { Created::Exists(there) })
            }
            Err(error) => Err(error),
        }
    }

    async fn delete(&self, object: &str) -> Result<()> {
        let path = self.path(object);
        let nothing = AtomicU64::new(0);
        match self.tried("delete", object, &nothing, || self.store.delete(&path)).await {
            Err(StoreError::Request { source, .. }) if matches!(*source, Raw::NotFound { .. }) => {
                Ok(())
            }
            other => other,
        }
    }

    async fn list(&self, prefix: &str, first: Option<usize>) -> Result<Vec<Listed>> {
        let path = self.path(prefix);
        // Stores give names in order; the local folder does not.
        let ordered = first.filter(|_| !self.store.to_string().starts_with("LocalFileSystem"));
        let coming = Arc::new(AtomicU64::new(0));
        let found: Vec<ObjectMeta> = self
            .tried("list", prefix, &coming, || {
                let coming = coming.clone();
                let stream = self.store.list(Some(&path)).inspect_ok(move |_| {
                    coming.fetch_add(LISTED, Ordering::Relaxed);
                });
                async move {
                    match ordered {
                        Some(count) => stream.take(count).try_collect().await,
                        None => stream.try_collect().await,
                    }
                }
            })
            .await?;
        let mut listed: Vec<Listed> = found
            .into_iter()
            .filter_map(|meta| {
                let object = self.name(&meta.location)?;
                Some(Listed { object, size: meta.size, modified: meta.last_modified.into() })
            })
            .collect();
        listed.sort_unstable_by(|a, b| a.object.cmp(&b.object));
        if let Some(count) = first {
            listed.truncate(count);
        }
        Ok(listed)
    }
}

/// Reads at most `max` bytes, and notes in `coming` how many there are; `Err` of the size if there are
/// more.
async fn read_bounded(
    store: &dyn ObjectStore,
    path: &Path,
    options: GetOptions,
    max: u64,
    coming: &AtomicU64,
) -> Result<Result<Bytes, u64>, Raw> {
    let answer = store.get_opts(path, options).await?;
    let size = answer.range.end.saturating_sub(answer.range.start);
    if size > max {
        return Ok(Err(size));
    }
    coming.store(size, Ordering::Relaxed);
    if matches!(answer.payload, GetResultPayload::File(..)) {
        return Ok(Ok(answer.bytes().await?));
    }
    let mut bytes = Vec::with_capacity(size as usize);
    let mut stream = answer.into_stream();
    while let Some(part) = stream.next().await {
        let part = part?;
        if (bytes.len() + part.len()) as u64 > size {
            return Ok(Err(bytes.len() as u64 + part.len() as u64));
        }
        bytes.extend_from_slice(&part);
    }
    Ok(Ok(bytes.into()))
}

impl Remote {
    /// A store that somebody else opened; `url` is for messages.
    pub(crate) fn new(
        store: Arc<dyn ObjectStore>,
        prefix: Path,
        url: String,
        limits: Limits,
    ) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("silo-store")
            .enable_all()
            .build()
            .map_err(|source| StoreError::Local { operation: "start threads", source })?;
        let inner = Inner { store, prefix, limits, counters: Counters::default() };
        Ok(Self { inner: Arc::new(inner), url, folder: None, runtime: Some(runtime) })
    }

    /// The folder of a local store.
    pub(crate) fn folder(&self) -> Option<&std::path::Path> {
        self.folder.as_deref()
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Requests since the store was opened.
    pub(crate) fn requests(&self) -> Requests {
        self.inner.counters.read()
    }

    /// Runs on the runtime's threads, so that it does not matter what thread waits.
    fn start<T: Send + 'static, F: Future<Output = Result<T>> + Send + 'static>(
        &self,
        operation: &'static str,
        object: &str,
        bytes: u64,
        work: impl FnOnce(Arc<Inner>) -> F,
    ) -> Pending<T> {
        let limits = &self.inner.limits;
        // Every attempt and every pause, with room for a create's reading back.
        let limit = (limits.attempt(bytes) + Duration::from_secs(10)) * (limits.attempts + 1) * 2;
        let (sender, answer) = sync_channel(1);
        let future = work(self.inner.clone());
        if let Some(runtime) = &self.runtime {
            runtime.spawn(async move {
                // Nobody waits any more if this fails.
                let _ = sender.send(future.await);
            });
        }
        Pending { answer, operation, object: object.to_owned(), limit }
    }

    pub(crate) fn start_get(&self, object: &str, range: Range<u64>) -> Pending<Bytes> {
        let name = object.to_owned();
        let bytes = range.end.saturating_sub(range.start);
        self.start("read", object, bytes, |inner| async move {
            let found = inner.get(&name, Some(range), bytes).await?;
            found.ok_or(StoreError::Missing { object: name })
        })
    }

    /// Reads bytes of an object.
    pub(crate) fn get_range(&self, object: &str, range: Range<u64>) -> Result<Bytes> {
        self.start_get(object, range).wait()
    }

    pub(crate) fn start_get_all(&self, object: &str, max: u64) -> Pending<Option<Bytes>> {
        let name = object.to_owned();
        self.start("read", object, max, |inner| async move { inner.get(&name, None, max).await })
    }

    /// Reads an object of at most `max` bytes, if it is there.
    pub(crate) fn get(&self, object: &str, max: u64) -> Result<Option<Bytes>> {
        self.start_get_all(object, max).wait()
    }

    pub(crate) fn start_put(&self, object: &str, bytes: Bytes) -> Pending<()> {
        let (name, length) = (object.to_owned(), bytes.len() as u64);
        self.start("write", object, length, |inner| async move { inner.put(&name, bytes).await })
    }

    /// Creates an object if there is none of that name.
    pub(crate) fn create(&self, object: &str, bytes: Bytes) -> Result<Created> {
        self.start_create(object, bytes).wait()
    }

    fn start_create(&self, object: &str, bytes: Bytes) -> Pending<Created> {
        let (name, length) = (object.to_owned(), bytes.len() as u64);
        self.start(
            "create",
            object,
            length,
            |inner| async move { inner.create(&name, bytes).await },
        )
    }

    /// Deletes an object; well if it is not there.
    pub(crate) fn delete(&self, object: &str) -> Result<()> {
        self.start_delete(object).wait()
    }

    pub(crate) fn start_delete(&self, object: &str) -> Pending<()> {
        let name = object.to_owned();
        self.start("delete", object, 0, |inner| async move { inner.delete(&name).await })
    }

    /// What there is under a folder, in order of names; only the first few if `first` says so.
    pub(crate) fn list(&self, prefix: &str, first: Option<usize>) -> Result<Vec<Listed>> {
        let name = prefix.to_owned();
        self.start("list", prefix, 64 << 20, |inner| async move { inner.list(&name, first).await })
            .wait()
    }

    /// Tries whether of several creates of one object exactly one wins, and its bytes stay.
    pub(crate) fn probe(&self) -> Result<()> {
        let refused =
            |detail: String| StoreError::NoCreateIfAbsent { url: self.url.clone(), detail };
        let nonce: [u8; 16] = crate::keys::random()?;
        let object = format!("{PROBES}/{}", ObjectId::of(&nonce));
        let tries: Vec<(Bytes, Pending<Created>)> = (0..4u8)
            .map(|writer| {
                let content = Bytes::from(vec![writer; 16]);
                (content.clone(), self.start_create(&object, content))
            })
            .collect();
        let mut winners = Vec::new();
        for (content, pending) in tries {
            match pending.wait() {
                Ok(Created::New) => winners.push(content),
                Ok(Created::Exists(_)) => {}
                Err(StoreError::Request { source, .. })
                    if matches!(*source, Raw::NotSupported { .. } | Raw::NotImplemented { .. }) =>
                {
                    return Err(refused(format!("it has no create-if-absent ({source})")));
                }
                Err(error) => return Err(error),
            }
        }
        let last = self.create(&object, Bytes::from_static(b"a late one"))?;
        self.delete(&object)?;
        match (winners.as_slice(), last) {
            ([winner], Created::Exists(there)) if *winner == there => Ok(()),
            ([_], _) => Err(refused("the object of the create that won was replaced later".into())),
            (all, _) => Err(refused(format!("of 4 creates of one object {} won", all.len()))),
        }
    }
}

use crate::layout::{ObjectId, PROBES};
