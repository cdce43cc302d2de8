//! Moves with a store beside them: what the newest generation of a line has need not go over the
//! line between the hosts.
//!
//! ```text
//!  source: InStore ── "this block has that name in the generation" ──► promise (BLAKE3) ──┐
//!                                                                                         ▼
//!  store  ◄────────────── StorePlace reads the block, the session checks the hash ── destination
//! ```
//!
//! Callers: `silo serve` and `silo connect`. What must hold: the source promises a block only if the
//! generation's name for it is the name of the bytes that it has now; the destination takes nothing
//! from a store that has not the hash that the source named; a store that is gone is an answer
//! within the limits that it was opened with, and is tried again.

use crate::{
    device::DeviceName,
    io::BlockDevice,
    moving::{
        assist::{Cancel, Fetch, FetchError, Wanted},
        codec::Naming,
        source::Stored,
    },
    store::{Generation, GenerationDevice, StoreError},
};
use silo_block::block::BlockIndex;
use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Opens the newest generation. Called again when the store was not reached, or has a newer one.
pub type Open = Box<dyn Fn() -> Result<Arc<Generation>, StoreError> + Send + Sync>;

/// Between two attempts to open a generation.
const AGAIN: Duration = Duration::from_secs(1);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a generation has of the devices of a source.
pub struct InStore {
    open: Open,
    opened: Mutex<Option<Opened>>,
}

struct Opened {
    generation: Arc<Generation>,
    /// Where each device is in it; none for one that it does not have, or not in such blocks.
    devices: HashMap<DeviceName, Option<usize>>,
    padded: Vec<u8>,
}

impl InStore {
    /// `open` is called at the start of every look.
    #[must_use]
    pub fn new(open: Open) -> Self {
        Self { open, opened: Mutex::new(None) }
    }
}

impl Stored for InStore {
    fn look(&self) -> io::Result<()> {
        let generation = (self.open)()?;
        *lock(&self.opened) =
            Some(Opened { generation, devices: HashMap::new(), padded: Vec::new() });
        Ok(())
    }

    fn has(&self, device: &DeviceName, block: BlockIndex, content: &[u8]) -> io::Result<bool> {
        let mut opened = lock(&self.opened);
        let Some(Opened { generation, devices, padded }) = &mut *opened else { return Ok(false) };
        let at =
            *devices.entry(device.clone()).or_insert_with(|| generation.find(device.as_str()).ok());
        let Some(at) = at else { return Ok(false) };
        let geometry = generation.devices()[at].geometry;
        if block.0 >= geometry.blocks() || geometry.length(block) != content.len() as u64 {
            return Ok(false);
        }
        let Some((key, name)) = generation.block_name(at, block)? else { return Ok(false) };
        if content.len() as u64 == geometry.block() {
            return Ok(generation.name(key, content) == Some(name));
        }
        // The last block of a device is named as if zeros followed it.
        padded.clear();
        padded.extend_from_slice(content);
        padded.resize(geometry.block() as usize, 0);
        Ok(generation.name(key, padded) == Some(name))
    }
}

/// A line of a store as a place to fetch blocks from.
pub struct StorePlace {
    name: String,
    open: Open,
    naming: Naming,
    state: Mutex<State>,
    /// Held while a generation is being opened; never under the other.
    opening: Mutex<()>,
}

#[derive(Default)]
struct State {
    generation: Option<Arc<Generation>>,
    devices: HashMap<DeviceName, Arc<GenerationDevice>>,
    /// When the store was asked for a generation last, and what it said if that went wrong.
    asked: Option<Instant>,
    trouble: Option<(io::ErrorKind, String)>,
}

impl StorePlace {
    /// `name` is for messages; `naming` is that of the session.
    #[must_use]
    pub fn new(name: &str, naming: Naming, open: Open) -> Self {
        let (state, opening) = Default::default();
        Self { name: name.to_owned(), open, naming, state, opening }
    }

    /// The device in the generation that is open, or in the newest if none is.
    fn device(&self, name: &DeviceName) -> Result<Arc<GenerationDevice>, FetchError> {
        if lock(&self.state).generation.is_none() {
            self.open_newest(None)?;
        }
        let mut state = lock(&self.state);
        let State { generation, devices, .. } = &mut *state;
        let Some(generation) = generation else { return Err(FetchError::Missing) };
        if let Some(device) = devices.get(name) {
            return Ok(device.clone());
        }
        let opened = GenerationDevice::new(generation, name.as_str(), 0);
        let device = Arc::new(opened.map_err(|error| failed(error.into()))?);
        devices.insert(name.clone(), device.clone());
        Ok(device)
    }

    /// Opens the newest generation, unless that was tried just now, or another than `not` is open
    /// by now. Who has one already does not wait for it.
    fn open_newest(&self, not: Option<u64>) -> Result<(), FetchError> {
        let _one = lock(&self.opening);
        {
            let state = lock(&self.state);
            if state.generation.as_ref().map(|generation| generation.number()) != not {
                return Ok(());
            }
            if state.asked.is_some_and(|asked| asked.elapsed() < AGAIN) {
                return match &state.trouble {
                    Some((kind, text)) => Err(failed(io::Error::new(*kind, text.clone()))),
                    None => Ok(()),
                };
            }
        }
        let opened = (self.open)();
        let state = &mut *lock(&self.state);
        state.asked = Some(Instant::now());
        match opened {
            Ok(generation) => {
                let number = |generation: &Arc<Generation>| generation.number();
                if state.generation.as_ref().map(number) != Some(generation.number()) {
                    state.devices.clear();
                }
                (state.generation, state.trouble) = (Some(generation), None);
                Ok(())
            }
            Err(error) => {
                let error = io::Error::from(error);
                state.trouble = Some((error.kind(), error.to_string()));
                Err(failed(error))
            }
        }
    }

    fn read(&self, wanted: &Wanted, buf: &mut [u8]) -> Result<(), FetchError> {
        let device = self.device(&wanted.device)?;
        device.read_at(wanted.offset, buf).map_err(failed)
    }
}

fn failed(error: io::Error) -> FetchError {
    if error.kind() == io::ErrorKind::NotFound {
        FetchError::Missing
    } else {
        FetchError::Failed(error)
    }
}

impl Fetch for StorePlace {
    fn name(&self) -> &str {
        &self.name
    }

    fn fetch(&self, wanted: &Wanted, buf: &mut [u8], cancel: &Cancel) -> Result<(), FetchError> {
        if cancel.is_set() {
            return Err(FetchError::Cancelled);
        }
        self.read(wanted, buf)?;
        if self.naming.name(buf) == wanted.hash || cancel.is_set() {
            return Ok(());
        }
        // Promised of a generation that was made since this one was opened.
        let number = || lock(&self.state).generation.as_ref().map(|newest| newest.number());
        let before = number();
        self.open_newest(before)?;
        if number() == before {
            return Ok(());
        }
        self.read(wanted, buf)
    }
}
