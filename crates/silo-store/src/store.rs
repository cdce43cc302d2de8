//! A store that was opened: its lines, their logs, and the keys of tenants.

use crate::{
    StoreError,
    error::Result,
    keys::{DataKey, KeyError, KeySource, Wrapped},
    layout::{self, LineName, parse_entry},
    log::{Entry, KeyEntry, Kind, LEAST_COMMIT, MAX_ENTRY},
    remote::{self, Created, Environment, Limits, Listed, Remote, Requests, StoreUrl},
    wire::Reader,
};
use bytes::Bytes;
use object_store::{ObjectStore, path::Path};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// What a store is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Restoring and verifying. Nothing is written, except by [`Generation::pin`](crate::Generation),
    /// and opening makes no request.
    Read,
    /// Everything. Opening tries whether create-if-absent has one winner, and marks a new store.
    Write,
}

/// A store. Share it by [`Arc`]; calls may come from any thread, and wait.
pub struct Store {
    pub(crate) remote: Remote,
    access: Access,
}

/// Largest object with a wrapped key, in bytes.
const MAX_KEY: u64 = 8192;

/// A generation, as a listing tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GenerationInfo {
    /// Its number in the line's log.
    pub number: u64,
    /// How often the line had been taken over when it was written.
    pub epoch: u64,
    /// When, by the writer's clock.
    pub made: SystemTime,
    /// Packs that the entry refers to, without those of its map.
    pub packs: usize,
}

/// What [`Store::rotate`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rotation {
    /// Data keys of the tenant.
    pub keys: usize,
    /// How many were wrapped again.
    pub wrapped: usize,
}

/// An entry's place and the size that a listing gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) number: u64,
    pub(crate) is_commit: bool,
}

/// What became of an attempt to add an entry to a log.
pub(crate) enum Appended {
    /// It is there.
    Done,
    /// Another one has the number.
    Taken(Box<Entry>),
}

impl Store {
    /// Opens a store by address.
    ///
    /// # Errors
    /// If the address or credentials make no sense; for writing, also if the store cannot be
    /// reached, lets two creates of one object win, or holds another format.
    pub fn open(
        url: &StoreUrl,
        access: Access,
        environment: &Environment,
        limits: Limits,
    ) -> Result<Arc<Self>> {
        Self::checked(remote::open(url, environment, limits)?, access)
    }

    /// Opens a store that somebody else made, under a folder of it. `name` is for messages.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn with_backend(
        backend: Arc<dyn ObjectStore>,
        folder: &str,
        name: &str,
        access: Access,
        limits: Limits,
    ) -> Result<Arc<Self>> {
        let prefix = Path::parse(folder)
            .map_err(|error| StoreError::Url { url: name.to_owned(), detail: error.to_string() })?;
        Self::checked(Remote::new(backend, prefix, name.to_owned(), limits)?, access)
    }

    fn checked(remote: Remote, access: Access) -> Result<Arc<Self>> {
        if access == Access::Write {
            remote.probe()?;
            let marker = Bytes::from_static(layout::FORMAT.as_bytes());
            if let Created::Exists(found) = remote.create(layout::MARKER, marker)? {
                let found = String::from_utf8_lossy(&found).chars().take(80).collect();
                let url = remote.url().to_owned();
                return Err(StoreError::Format { url, found, known: layout::FORMAT });
            }
        }
        Ok(Arc::new(Self { remote, access }))
    }

    /// Where it is.
    #[must_use]
    pub fn url(&self) -> &str {
        self.remote.url()
    }

    /// Requests made since it was opened.
    #[must_use]
    pub fn requests(&self) -> Requests {
        self.remote.requests()
    }

    pub(crate) fn must_write(&self) -> Result<()> {
        match self.access {
            Access::Write => Ok(()),
            Access::Read => {
                Err(StoreError::Busy(format!("{} was opened for reading only", self.url())))
            }
        }
    }

    /// All lines, or those of one tenant.
    ///
    /// # Errors
    /// If the store cannot be listed.
    pub fn lines(&self, tenant: Option<&str>) -> Result<Vec<LineName>> {
        let prefix = match tenant {
            None => layout::LINES.to_owned(),
            Some(tenant) => {
                layout::check_name("tenant", tenant)?;
                format!("{}/{tenant}", layout::LINES)
            }
        };
        let listed = self.remote.list(&prefix, None)?;
        let lines: BTreeSet<_> =
            listed.iter().filter_map(|l| parse_entry(&l.object)).map(|(line, _)| line).collect();
        Ok(lines.into_iter().collect())
    }

    /// The generations of a line, newest first.
    ///
    /// # Errors
    /// If the store cannot be read.
    pub fn generations(&self, line: &LineName) -> Result<Vec<GenerationInfo>> {
        let numbers: Vec<u64> = self
            .entries(line)?
            .into_iter()
            .filter(|found| found.is_commit)
            .map(|found| found.number)
            .collect();
        let mut infos = Vec::with_capacity(numbers.len());
        for entry in self.read_entries(line, &numbers)? {
            if let Kind::Commit(refers) = &entry.kind {
                infos.push(GenerationInfo {
                    number: entry.head.number,
                    epoch: entry.head.epoch,
                    made: UNIX_EPOCH + Duration::from_millis(entry.head.made.min(1 << 50)),
                    packs: refers.packs.len(),
                });
            }
        }
        Ok(infos)
    }

    /// All entries of a line, newest first.
    pub(crate) fn entries(&self, line: &LineName) -> Result<Vec<Found>> {
        Ok(Self::found(&self.remote.list(&line.prefix(), None)?, line))
    }

    fn found(listed: &[Listed], line: &LineName) -> Vec<Found> {
        let of_line = listed.iter().filter_map(|listed| {
            let (found, number) = parse_entry(&listed.object)?;
            let is_commit = listed.size >= LEAST_COMMIT;
            (found == *line).then_some(Found { number, is_commit })
        });
        of_line.collect()
    }

    /// The newest entries of a line, newest first: all in one request of a store that lists in
    /// order, whatever the length of the log.
    pub(crate) fn newest(&self, line: &LineName) -> Result<Vec<Found>> {
        // One page of every store at hand.
        const PAGE: usize = 1000;
        let listed = self.remote.list(&line.prefix(), Some(PAGE))?;
        let found = Self::found(&listed, line);
        if listed.len() == PAGE && !found.iter().any(|found| found.is_commit) {
            return self.entries(line);
        }
        Ok(found)
    }

    pub(crate) fn read_entry(&self, line: &LineName, number: u64) -> Result<Entry> {
        let object = line.entry(number);
        let bytes = self.remote.get(&object, MAX_ENTRY)?;
        let bytes = bytes.ok_or_else(|| StoreError::Missing { object: object.clone() })?;
        Self::decoded(line, number, &bytes)
    }

    fn decoded(line: &LineName, number: u64, bytes: &[u8]) -> Result<Entry> {
        let object = line.entry(number);
        let entry = Entry::decode(&object, bytes)?;
        if entry.head.number != number {
            return Err(StoreError::corrupt(object, "it is another entry of the log"));
        }
        Ok(entry)
    }

    /// Reads many entries, several at a time; those that are gone by now are left out.
    pub(crate) fn read_entries(&self, line: &LineName, numbers: &[u64]) -> Result<Vec<Entry>> {
        let mut entries = Vec::with_capacity(numbers.len());
        for group in numbers.chunks(16) {
            let pending: Vec<_> = group
                .iter()
                .map(|number| (*number, self.remote.start_get_all(&line.entry(*number), MAX_ENTRY)))
                .collect();
            for (number, pending) in pending {
                if let Some(bytes) = pending.wait()? {
                    entries.push(Self::decoded(line, number, &bytes)?);
                }
            }
        }
        Ok(entries)
    }

    /// Adds entry `number` to a log if that number is free.
    pub(crate) fn append(&self, line: &LineName, number: u64, bytes: Vec<u8>) -> Result<Appended> {
        match self.remote.create(&line.entry(number), bytes.into())? {
            Created::New => Ok(Appended::Done),
            Created::Exists(other) => {
                Ok(Appended::Taken(Box::new(Self::decoded(line, number, &other)?)))
            }
        }
    }

    /// The data key that a tenant's new content is sealed with; makes the first if there is none.
    pub(crate) fn tenant_key(
        &self,
        tenant: &str,
        keys: &dyn KeySource,
    ) -> Result<(DataKey, KeyEntry)> {
        let mut stored = self.stored_keys(tenant)?;
        if stored.is_empty() {
            let key = DataKey::generate(None)?;
            let wrapped = key.wrap(keys, &keys.current()?)?;
            let mut bytes = Vec::new();
            wrapped.encode(&mut bytes);
            // One of several first writers wins; all use its key.
            self.remote.create(&layout::key(tenant, 1, "first"), bytes.into())?;
            stored = self.stored_keys(tenant)?;
        }
        let newest = stored.into_values().next_back().unwrap_or_default();
        let (key, wrapped) = Self::unwrap_one(tenant, &newest, keys)?;
        Ok((key, KeyEntry { tenant: tenant.to_owned(), wrapped }))
    }

    /// The tenant's data keys as stored: for each number all its wrappings.
    fn stored_keys(&self, tenant: &str) -> Result<BTreeMap<u64, Vec<Wrapped>>> {
        layout::check_name("tenant", tenant)?;
        let mut stored: BTreeMap<u64, Vec<Wrapped>> = BTreeMap::new();
        for listed in self.remote.list(&layout::keys(tenant), None)? {
            let Some((number, _)) = layout::parse_key(&listed.object) else { continue };
            let Some(bytes) = self.remote.get(&listed.object, MAX_KEY)? else { continue };
            let mut reader = Reader::new(&bytes);
            let wrapped = Wrapped::decode(&mut reader)
                .and_then(|wrapped| reader.end().map(|()| wrapped))
                .map_err(|detail| StoreError::corrupt(&listed.object, detail))?;
            stored.entry(number).or_default().push(wrapped);
        }
        Ok(stored)
    }

    /// Unwraps by whichever of several wrappings the keys at hand fit.
    fn unwrap_one(
        tenant: &str,
        wrappings: &[Wrapped],
        keys: &dyn KeySource,
    ) -> Result<(DataKey, Wrapped)> {
        let ids = keys.ids();
        let fitting = wrappings.iter().find(|w| ids.contains(&w.by)).or(wrappings.first());
        let Some(wrapped) = fitting else {
            return Err(StoreError::Missing { object: layout::keys(tenant) });
        };
        let key = wrapped.unwrap(keys).map_err(|error| name_need(error, tenant))?;
        Ok((key, wrapped.clone()))
    }

    /// The data key that an entry speaks of: by the wrapping in the entry, or, if the tenant key was
    /// changed since, by one that was made then.
    pub(crate) fn data_key(&self, entry: &KeyEntry, keys: &dyn KeySource) -> Result<DataKey> {
        let id = entry.wrapped.id;
        match entry.wrapped.unwrap(keys) {
            Ok(key) => Ok(key),
            Err(KeyError::Lost { .. }) => {
                let stored = self.stored_keys(&entry.tenant)?;
                let mut wrappings: Vec<Wrapped> =
                    stored.into_values().flatten().filter(|wrapped| wrapped.id == id).collect();
                if wrappings.is_empty() {
                    wrappings.push(entry.wrapped.clone());
                }
                Ok(Self::unwrap_one(&entry.tenant, &wrappings, keys)?.0)
            }
            Err(error) => Err(name_need(error, &entry.tenant).into()),
        }
    }

    /// Wraps all data keys of a tenant with the current tenant key too, and makes a new data key for
    /// what is stored from now on. Packs stay. With `forget`, wrappings by other keys are deleted:
    /// entries that were written before are then read by the new wrapping.
    ///
    /// # Errors
    /// If a data key can be unwrapped with none of the keys at hand; then nothing was deleted.
    pub fn rotate(&self, tenant: &str, keys: &dyn KeySource, forget: bool) -> Result<Rotation> {
        self.must_write()?;
        let (current, stored) = (keys.current()?, self.stored_keys(tenant)?);
        let mut done = Rotation { keys: stored.len(), wrapped: 0 };
        let mut newest = None;
        for (number, wrappings) in &stored {
            let (key, _) = Self::unwrap_one(tenant, wrappings, keys)?;
            if !wrappings.iter().any(|wrapped| wrapped.by == current) {
                self.store_key(tenant, *number, &key, keys)?;
                done.wrapped += 1;
            }
            newest = Some((*number, key));
        }
        if let Some((number, key)) = newest {
            let next = DataKey::generate(Some(&key))?;
            self.store_key(tenant, number + 1, &next, keys)?;
        }
        if forget {
            for listed in self.remote.list(&layout::keys(tenant), None)? {
                let bytes = self.remote.get(&listed.object, MAX_KEY)?.unwrap_or_default();
                let by = Wrapped::decode(&mut Reader::new(&bytes)).map(|wrapped| wrapped.by);
                if by.is_ok_and(|by| by != current) {
                    self.remote.delete(&listed.object)?;
                }
            }
        }
        Ok(done)
    }

    fn store_key(
        &self,
        tenant: &str,
        number: u64,
        key: &DataKey,
        keys: &dyn KeySource,
    ) -> Result<()> {
        let by = keys.current()?;
        let mut bytes = Vec::new();
        key.wrap(keys, &by)?.encode(&mut bytes);
        let object = layout::key(tenant, number, &format!("by-{by}"));
        match self.remote.create(&object, bytes.into())? {
            Created::New => Ok(()),
            Created::Exists(_) => Err(StoreError::Busy(format!(
                "the keys of tenant \"{tenant}\" are being changed elsewhere; repeat it"
            ))),
        }
    }
}

/// Says in an error whose key is lost.
fn name_need(error: KeyError, tenant: &str) -> KeyError {
    let whose = |needs: String| format!("{needs} of tenant \"{tenant}\"");
    match error {
        KeyError::Lost { id, needs, source_of_keys, has } => {
            KeyError::Lost { id, needs: whose(needs), source_of_keys, has }
        }
        KeyError::Wrong { id, needs, source_of_keys } => {
            KeyError::Wrong { id, needs: whose(needs), source_of_keys }
        }
        other => other,
    }
}
