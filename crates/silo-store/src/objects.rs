//! Plain objects of a store, for who keeps blocks in it without packs: the same deadlines, repeated
//! requests and counting as the rest of this crate, and nothing of its formats.

use crate::{
    error::{Result, StoreError},
    remote::{Created, Environment, Limits, Remote, Requests, StoreUrl},
};
use bytes::Bytes;
use object_store::{ObjectStore, path::Path};
use std::sync::Arc;

/// Objects under one folder of a store. Calls wait, and may come from any thread.
pub struct Objects {
    remote: Remote,
}

impl Objects {
    /// By address. Makes no request.
    ///
    /// # Errors
    /// If the address or credentials make no sense.
    pub fn open(url: &StoreUrl, environment: &Environment, limits: Limits) -> Result<Self> {
        Ok(Self { remote: crate::remote::open(url, environment, limits)? })
    }

    /// In a store that somebody else made, under a folder of it. `name` is for messages.
    ///
    /// # Errors
    /// If the folder is not a path.
    pub fn with_backend(
        backend: Arc<dyn ObjectStore>,
        folder: &str,
        name: &str,
        limits: Limits,
    ) -> Result<Self> {
        let prefix = Path::parse(folder)
            .map_err(|error| StoreError::Url { url: name.to_owned(), detail: error.to_string() })?;
        Ok(Self { remote: Remote::new(backend, prefix, name.to_owned(), limits)? })
    }

    /// Where they are.
    #[must_use]
    pub fn url(&self) -> &str {
        self.remote.url()
    }

    /// Requests made so far.
    #[must_use]
    pub fn requests(&self) -> Requests {
        self.remote.requests()
    }

    /// Tries whether create-if-absent has one winner here.
    ///
    /// # Errors
    /// If it has not, or the store cannot be reached.
    pub fn probe(&self) -> Result<()> {
        self.remote.probe()
    }

    /// Reads objects of at most `max` bytes, all at once; `None` for one that is not there.
    ///
    /// # Errors
    /// The first that fails.
    pub fn read(&self, objects: &[String], max: u64) -> Result<Vec<Option<Bytes>>> {
        let started: Vec<_> =
            objects.iter().map(|object| self.remote.start_get_all(object, max)).collect();
        started.into_iter().map(crate::remote::Pending::wait).collect()
    }

    /// Writes objects, all at once.
    ///
    /// # Errors
    /// The first that fails; the others may have been written or not.
    pub fn write(&self, objects: Vec<(String, Bytes)>) -> Result<()> {
        let started: Vec<_> = objects
            .into_iter()
            .map(|(object, bytes)| self.remote.start_put(&object, bytes))
            .collect();
        // All are waited for: what was started is not left to surprise a later write.
        let results: Vec<_> = started.into_iter().map(crate::remote::Pending::wait).collect();
        results.into_iter().collect()
    }

    /// Makes an object, unless there is one of that name: then false. Two callers with the same
    /// bytes may both be told true.
    ///
    /// # Errors
    /// If the store fails.
    pub fn create(&self, object: &str, bytes: Bytes) -> Result<bool> {
        Ok(matches!(self.remote.create(object, bytes)?, Created::New))
    }

    /// Deletes objects, all at once; well if they are not there.
    ///
    /// # Errors
    /// The first that fails.
    pub fn delete(&self, objects: &[String]) -> Result<()> {
        let started: Vec<_> =
            objects.iter().map(|object| self.remote.start_delete(object)).collect();
        started.into_iter().try_for_each(crate::remote::Pending::wait)
    }

    /// The names under a folder, in order.
    ///
    /// # Errors
    /// If the store fails.
    pub fn list(&self, folder: &str) -> Result<Vec<String>> {
        let listed = self.remote.list(folder, None)?;
        Ok(listed.into_iter().map(|listed| listed.object).collect())
    }
}
