//! Leases as objects of S3, GCS or Azure: `PREFIX/lease/MACHINE` and so on.
//!
//! A swap is a conditional put: if the object still has the version (ETag, generation) at which its
//! content was read, or if there is none. Versions that were seen are remembered, so that renewing one's
//! own record is one request. Before its first write a store is tried once for whether it keeps its
//! conditions: some servers take them and ignore them.

use super::{
    Key, MAX_CELL, Swap,
    remote::{Backend, Failure, chain},
};
use bucket::Bucket;
use object_store::{
    Error, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload, UpdateVersion, path::Path,
};
use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};
use tokio::sync::OnceCell;

/// Contents whose version is remembered.
const REMEMBERED: usize = 64;

#[derive(Clone)]
struct Seen {
    content: Vec<u8>,
    version: UpdateVersion,
}

/// A part of a bucket.
pub(crate) struct Objects {
    bucket: Bucket,
    /// For messages.
    url: String,
    seen: Mutex<HashMap<Key, Seen>>,
    tried: OnceCell<()>,
}

fn failure(error: &Error) -> Failure {
    let detail = chain(error);
    match error {
        Error::PermissionDenied { .. }
        | Error::Unauthenticated { .. }
        | Error::NotImplemented { .. }
        | Error::NotSupported { .. }
        | Error::InvalidPath { .. }
        | Error::UnknownConfigurationKey { .. } => Failure::Refused(detail),
        // Whatever it says of an object says the same of the bucket.
        Error::NotFound { .. } | Error::Precondition { .. } if no_bucket(&detail) => {
            Failure::Refused(detail)
        }
        _ => Failure::silent(detail),
    }
}

fn no_bucket(detail: &str) -> bool {
    ["NoSuchBucket", "ContainerNotFound", "The specified bucket does not exist"]
        .iter()
        .any(|text| detail.contains(text))
}

/// What became of a put.
enum Put {
    Done(UpdateVersion),
    /// It is not, or no longer, as the condition says.
    Otherwise,
}

impl Objects {
    /// Makes no request yet. `url` is for messages.
    pub(crate) fn new(bucket: Bucket, url: String) -> Self {
        Self { bucket, url, seen: Mutex::new(HashMap::new()), tried: OnceCell::new() }
    }

    fn path(&self, name: &str) -> Path {
        name.split('/').fold(self.bucket.prefix.clone(), Path::join)
    }

    fn seen(&self) -> MutexGuard<'_, HashMap<Key, Seen>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remember(&self, key: &Key, seen: Seen) {
        let mut all = self.seen();
        if all.len() >= REMEMBERED {
            all.clear();
        }
        all.insert(key.clone(), seen);
    }

    async fn read(&self, path: &Path) -> Result<Option<Seen>, Failure> {
        let answer = match self.bucket.store.get(path).await {
            Ok(answer) => answer,
            Err(error @ Error::NotFound { .. }) if no_bucket(&chain(&error)) => {
                return Err(failure(&error));
            }
            Err(Error::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(failure(&error)),
        };
        if answer.meta.size > MAX_CELL as u64 {
            return Err(Failure::Damaged(format!("it has {} bytes", answer.meta.size)));
        }
        let version = UpdateVersion {
            e_tag: answer.meta.e_tag.clone(),
            version: answer.meta.version.clone(),
        };
        let content = answer.bytes().await.map_err(|e| failure(&e))?.to_vec();
        Ok(Some(Seen { content, version }))
    }

    async fn put(
        &self,
        path: &Path,
        condition: Option<UpdateVersion>,
        new: &[u8],
    ) -> Result<Put, Failure> {
        let mode = condition.map_or(PutMode::Create, PutMode::Update);
        let payload = PutPayload::from(new.to_vec());
        match self.bucket.store.put_opts(path, payload, PutOptions::from(mode)).await {
            Ok(put) => Ok(Put::Done(UpdateVersion { e_tag: put.e_tag, version: put.version })),
            Err(error @ (Error::AlreadyExists { .. } | Error::Precondition { .. })) => {
                if no_bucket(&chain(&error)) { Err(failure(&error)) } else { Ok(Put::Otherwise) }
            }
            Err(error) => Err(failure(&error)),
        }
    }

    /// Of four puts with one condition at once, one must win, and none with a condition that is over.
    async fn probe(&self) -> Result<(), Failure> {
        let refused = |detail: &str| {
            Failure::Refused(format!(
                "the store does not keep the conditions of writes: {detail}; use S3, GCS, Azure, or a \
                 server that knows If-Match and If-None-Match"
            ))
        };
        let mut nonce = [0; 16];
        getrandom::fill(&mut nonce).map_err(|e| Failure::silent(e.to_string()))?;
        let path = self.path(&format!("probe/{:032x}", u128::from_le_bytes(nonce)));
        let mut first = None;
        let mut last: Option<UpdateVersion> = None;
        // Contents differ, since equal ones may have equal versions.
        for what in ["creates", "replacements"] {
            let put = |writer: u8| {
                let (path, condition) = (&path, last.clone());
                async move { self.put(path, condition, format!("{what} {writer}").as_bytes()).await }
            };
            let (a, b, c, d) = tokio::join!(put(1), put(2), put(3), put(4));
            let mut winners = Vec::new();
            for put in [a, b, c, d] {
                if let Put::Done(version) = put? {
                    winners.push(version);
                }
            }
            if winners.len() > 1 {
                let won = winners.len();
                return Err(refused(&format!("of 4 {what} of one object at once {won} won")));
            }
            // S3 may send all of them away when they meet.
            let winner = winners.pop();
            let winner = winner.ok_or_else(|| Failure::silent("no one of four writers won"))?;
            if winner.e_tag.is_none() && winner.version.is_none() {
                return Err(refused("it tells no version of an object"));
            }
            first = first.or_else(|| Some(winner.clone()));
            last = Some(winner);
        }
        if let Put::Done(_) = self.put(&path, first, b"a late one").await? {
            return Err(refused("it replaced an object that had been replaced"));
        }
        // Who may write and not delete leaves a few bytes here.
        let _ = self.bucket.store.delete(&path).await;
        Ok(())
    }
}

impl Backend for Objects {
    async fn get(&self, key: &Key) -> Result<Option<Vec<u8>>, Failure> {
        let found = self.read(&self.path(&key.path())).await?;
        Ok(found.map(|seen| {
            let content = seen.content.clone();
            self.remember(key, seen);
            content
        }))
    }

    async fn swap(&self, key: &Key, expected: Option<&[u8]>, new: &[u8]) -> Result<Swap, Failure> {
        self.tried.get_or_try_init(|| self.probe()).await?;
        let path = self.path(&key.path());
        let known = self.seen().get(key).filter(|s| Some(&*s.content) == expected).cloned();
        let there = match (known, expected) {
            (Some(known), _) => Some(known),
            (None, None) => None,
            (None, Some(_)) => self.read(&path).await?,
        };
        if there.as_ref().map(|seen| &*seen.content) != expected {
            return Ok(Swap::Found(there.map(|seen| seen.content)));
        }
        match self.put(&path, there.map(|seen| seen.version), new).await? {
            Put::Done(version) => {
                self.remember(key, Seen { content: new.to_vec(), version });
                Ok(Swap::Done)
            }
            Put::Otherwise => {
                self.seen().remove(key);
                let found = self.read(&path).await?;
                if found.as_ref().map(|seen| &*seen.content) == expected {
                    return Err(Failure::silent(
                        "it says that the condition fails, and that it holds",
                    ));
                }
                Ok(Swap::Found(found.map(|seen| seen.content)))
            }
        }
    }

    fn place(&self, key: &Key) -> String {
        format!("{} in {}", key.path(), self.url)
    }
}
