//! Pins: who reads a generation for long says so in the store, and nothing that it refers to is
//! collected meanwhile, also if the generation itself is pruned.
//!
//! ```text
//! name     pins/<tenant>/<line>/<!number>-<lease in seconds>-<random>
//! content  "SILOPIN1" | packs v, id of each [32] | map: 0, or 1 and its reference | BLAKE3 of all before [32]
//! ```
//! A pin counts for as long as its lease after it was written, by the store's clock; its reader
//! writes it again three times in that time. One whose reader was killed runs out by itself, and is
//! removed by [`Store::tidy`](crate::Store::tidy).
//!
//! Why that is enough: a reader reads the entry, writes the pin, and then looks whether the entry is
//! still there. If it is, then whatever prunes it does so after the pin was written; and a collection
//! that does not find the entry any more reads the pins after that. If it is not, the reader has an
//! error that says so. `tests/collection_model.rs` tries every order of these steps too.

use crate::{
    StoreError,
    error::Result,
    format::map::MapRef,
    generation::Generation,
    layout::{self, LineName, ObjectId, PINS},
    log::{MAX_ENTRY, Refers},
    remote::Listed,
    store::Store,
    wire::{Malformed, Reader, put_varint},
};
use bytes::Bytes;
use std::{
    collections::BTreeSet,
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread::{Builder, JoinHandle},
    time::{Duration, Instant, SystemTime},
};

const MAGIC: &[u8; 8] = b"SILOPIN1";
/// The longest lease that counts, whatever a pin says.
const MAX_LEASE: Duration = Duration::from_secs(7 * 24 * 3600);
/// How long a reader may not reach the store before what it reads may be collected.
const USUAL_LEASE: Duration = Duration::from_secs(15 * 60);
/// The shortest: a store's clock may count whole seconds only.
const MIN_LEASE: Duration = Duration::from_secs(3);

fn encode(refers: &Refers) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    put_varint(&mut out, refers.packs.len() as u64);
    refers.packs.iter().for_each(|pack| out.extend_from_slice(&pack.0));
    match &refers.map {
        None => out.push(0),
        Some((map, ..)) => {
            out.push(1);
            map.encode(&mut out);
        }
    }
    let hash = blake3::hash(&out);
    out.extend_from_slice(hash.as_bytes());
    out
}

fn decode(bytes: &[u8]) -> Result<(Vec<ObjectId>, Option<MapRef>), Malformed> {
    let (content, hash) = bytes.split_last_chunk::<32>().ok_or("it ends too early")?;
    if blake3::hash(content).as_bytes() != hash {
        return Err("it is not what was stored");
    }
    let mut reader = Reader::new(content);
    if reader.array()? != *MAGIC {
        return Err("it is no pin");
    }
    let count = reader.count(32)?;
    let packs = (0..count).map(|_| reader.array().map(ObjectId)).collect::<Result<_, _>>()?;
    let map = match reader.u8()? {
        0 => None,
        1 => Some(MapRef::decode(&mut reader)?),
        _ => return Err("a map is neither there nor not"),
    };
    reader.end()?;
    Ok((packs, map))
}

/// Decodes any bytes as a pin.
pub fn fuzz_pin(bytes: &[u8]) {
    let _ = decode(bytes);
    let hash = blake3::hash(bytes);
    let _ = decode(&[bytes, hash.as_bytes()].concat());
}

/// A pin in a listing.
struct Found {
    line: LineName,
    number: u64,
    lease: Duration,
    listed: Listed,
}

impl Found {
    fn of(listed: Listed) -> Option<Self> {
        let (line, number, lease) = layout::parse_pin(&listed.object)?;
        Some(Self { line, number, lease: lease.min(MAX_LEASE), listed })
    }

    /// How long ago its lease ended.
    fn over(&self, now: SystemTime) -> Option<Duration> {
        let age = now.duration_since(self.listed.modified).ok()?;
        age.checked_sub(self.lease).filter(|over| !over.is_zero())
    }
}

impl Store {
    fn pins(&self, prefix: &str) -> Result<Vec<Found>> {
        Ok(self.remote.list(prefix, None)?.into_iter().filter_map(Found::of).collect())
    }

    /// Calls `each` with what the pins that count at `now` refer to. A damaged one stops it: what it
    /// refers to is not known before its lease ends.
    pub(crate) fn pinned(
        &self,
        now: SystemTime,
        mut each: impl FnMut(Vec<ObjectId>, Option<MapRef>) -> Result<()>,
    ) -> Result<()> {
        for pin in self.pins(PINS)? {
            if pin.over(now).is_some() {
                continue;
            }
            let object = pin.listed.object;
            // Its reader may have ended by now.
            let Some(bytes) = self.remote.get(&object, MAX_ENTRY)? else { continue };
            let decoded = decode(&bytes);
            let (packs, map) = decoded.map_err(|detail| StoreError::corrupt(object, detail))?;
            each(packs, map)?;
        }
        Ok(())
    }

    /// The generations of a line that somebody reads, by this host's clock.
    pub(crate) fn pinned_of(&self, line: &LineName, now: SystemTime) -> Result<BTreeSet<u64>> {
        let pins = self.pins(&layout::pins_of(line))?.into_iter();
        let counts = pins.filter(|pin| pin.line == *line && pin.over(now).is_none());
        Ok(counts.map(|pin| pin.number).collect())
    }

    /// Pins whose lease ended at least `grace` ago.
    pub(crate) fn old_pins(&self, now: SystemTime, grace: Duration) -> Result<Vec<String>> {
        let pins = self.pins(PINS)?.into_iter();
        let old = pins.filter(|pin| pin.over(now).is_some_and(|over| over >= grace));
        Ok(old.map(|pin| pin.listed.object).collect())
    }
}

#[derive(Default)]
struct State {
    ended: bool,
}

struct Shared {
    store: Arc<Store>,
    object: String,
    content: Bytes,
    lease: Duration,
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn write(&self) -> Result<()> {
        self.store.remote.start_put(&self.object, self.content.clone()).wait()
    }

    /// Writes it again until the end, then removes it.
    fn keep(&self) {
        let mut written = Instant::now();
        loop {
            let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            let waited = self.changed.wait_timeout_while(state, self.lease / 3, |s| !s.ended);
            let ended = waited.unwrap_or_else(PoisonError::into_inner).0.ended;
            if ended {
                break;
            }
            match self.write() {
                Ok(()) => written = Instant::now(),
                Err(error) => tracing::warn!(
                    %error,
                    pin = self.object,
                    left = ?self.lease.saturating_sub(written.elapsed()),
                    "what is being read is not pinned any more once its lease has ended"
                ),
            }
        }
        if let Err(error) = self.store.remote.delete(&self.object) {
            tracing::warn!(%error, pin = self.object, "it stays until its lease ends");
        }
    }
}

/// A pin that is being kept. Dropping it removes it.
pub(crate) struct Pin {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner).ended = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // Bounded by the limits of a request; a panic was reported when it happened.
            let _ = thread.join();
        }
    }
}

impl Generation {
    /// Keeps everything that this refers to in the store until the last holder of this drops it, also
    /// if the generation is pruned. Costs a small object that is written now and again each third of
    /// `lease`, so the store must let this host write. A process that is killed keeps it for `lease`
    /// longer.
    ///
    /// # Errors
    /// [`StoreError::Pruned`] if that has happened already; else if the store cannot be written, and
    /// then nothing is kept.
    pub fn pin(&self, lease: Duration) -> Result<()> {
        let mut pin = self.pin.lock().unwrap_or_else(PoisonError::into_inner);
        if pin.is_some() {
            return Ok(());
        }
        let lease = lease.clamp(MIN_LEASE, MAX_LEASE);
        let random = crate::keys::random()?;
        let shared = Arc::new(Shared {
            store: self.store.clone(),
            object: layout::pin(&self.line, self.number(), lease, random),
            content: encode(&self.refers).into(),
            lease,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        shared.write()?;
        let keeper = shared.clone();
        let thread = Builder::new()
            .name("silo-pin".to_owned())
            .spawn(move || keeper.keep())
            .map_err(|source| StoreError::Local { operation: "start a thread", source })?;
        // From here on it is removed again when something fails.
        let kept = Pin { shared, thread: Some(thread) };
        if !self.is_there()? {
            return Err(self.pruned());
        }
        *pin = Some(kept);
        Ok(())
    }

    /// [`Generation::pin`]s it for as long as it is open (15 minutes after a kill), where the store lets
    /// this host write; where it does not, a warning says so.
    ///
    /// # Errors
    /// [`StoreError::Pruned`] if that has happened already.
    pub fn pin_if_possible(&self) -> Result<()> {
        match self.pin(USUAL_LEASE) {
            Err(error) if !matches!(error, StoreError::Pruned { .. }) => {
                tracing::warn!(
                    line = %self.line, number = self.number(), %error,
                    "a generation that is read is not pinned: do not prune it meanwhile"
                );
                Ok(())
            }
            pinned => pinned,
        }
    }

    /// Ends the pin now rather than when the last holder drops this.
    pub fn unpin(&self) {
        let pin = self.pin.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(pin);
    }

    /// Whether the entry is still in the line's log.
    fn is_there(&self) -> Result<bool> {
        let entry = self.line.entry(self.number());
        match self.store.remote.get_range(&entry, 0..8) {
            Ok(_) => Ok(true),
            Err(StoreError::Missing { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn pruned(&self) -> StoreError {
        StoreError::Pruned { line: self.line.to_string(), number: self.number() }
    }

    /// Something that this refers to is missing: is that because it was pruned?
    pub(crate) fn explained(&self, error: StoreError) -> StoreError {
        match error {
            StoreError::Missing { .. } if self.is_there().is_ok_and(|there| !there) => {
                self.pruned()
            }
            error => error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_come_back_and_a_changed_one_is_refused() {
        let packs = [ObjectId([1; 32]), ObjectId([2; 32])];
        let mut bytes = MAGIC.to_vec();
        put_varint(&mut bytes, 2);
        packs.iter().for_each(|pack| bytes.extend_from_slice(&pack.0));
        bytes.push(0);
        let hash = blake3::hash(&bytes);
        bytes.extend_from_slice(hash.as_bytes());
        assert_eq!(decode(&bytes).unwrap(), (packs.to_vec(), None));
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert!(decode(&changed).is_err(), "byte {at}");
            assert!(decode(&bytes[..at]).is_err(), "{at} bytes");
        }
    }

    #[test]
    fn a_pin_counts_for_its_lease_and_never_longer_than_a_week() {
        let (now, hour) = (SystemTime::now(), Duration::from_secs(3600));
        let found = |age: Duration, lease: Duration| {
            let line = LineName::new("acme", "vm").unwrap();
            let object = layout::pin(&line, 3, lease, [7; 8]);
            Found::of(Listed { object, size: 1, modified: now - age }).unwrap()
        };
        assert_eq!(found(hour, 2 * hour).over(now), None);
        assert_eq!(found(2 * hour, hour).over(now), Some(hour));
        // A store whose clock is ahead.
        assert_eq!(found(Duration::ZERO, hour).over(now - hour), None);
        let week = 7 * 24 * hour;
        assert_eq!(found(week + hour, 100 * week).over(now), Some(hour));
    }
}
