//! Content by hash from other silos ("swarming"): whoever has the bytes, whatever device they are
//! in there.
//!
//! One request at a time on a connection: `Ask {number, length, hash}` and `Answer {number, found,
//! content}`. A side that serves reads the block again and checks the hash before it answers, so
//! that a device that was written since is a missing block and not a wrong one.

use super::{Cancel, Fetch, FetchError, Wanted};
use crate::{
    codec::Naming,
    peer::{Connection, Dial},
    wire::{Ask, Found},
};
use silo_block::{
    block::BlockIndex, geometry::Geometry, io::BlockDevice, session::messages::BlockHash,
};
use std::{
    collections::HashMap,
    io,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

/// Idle connections that are kept to one peer.
const KEPT: usize = 16;

/// Finds content by hash.
pub trait Lookup: Send + Sync {
    /// The content with this hash, of `length` bytes, into `buf`; false if it is not here.
    ///
    /// # Errors
    /// If it is here and cannot be read.
    fn find(&self, hash: &BlockHash, buf: &mut [u8]) -> io::Result<bool>;
}

/// Which block of which device has which hash. Wrong entries do no harm: they are found out when
/// the block is read.
#[derive(Default)]
pub struct HashIndex {
    devices: RwLock<Vec<(Arc<dyn BlockDevice>, Geometry)>>,
    places: RwLock<HashMap<BlockHash, (u32, BlockIndex)>>,
    naming: Naming,
}

impl HashIndex {
    /// An empty one, for hashes of this kind.
    #[must_use]
    pub fn new(naming: Naming) -> Self {
        Self { naming, ..Self::default() }
    }

    /// Adds all blocks of a device that are not zero, by reading it.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn add(&self, device: Arc<dyn BlockDevice>, geometry: Geometry) -> io::Result<()> {
        let mut buffer = vec![0; geometry.block() as usize];
        let mut found = Vec::new();
        for block in (0..geometry.blocks()).map(BlockIndex) {
            let part = &mut buffer[..geometry.length(block) as usize];
            device.read_at(geometry.offset(block), part)?;
            if !silo_block::block::is_zero(part) {
                found.push((self.naming.name(part), block));
            }
        }
        let mut devices = self.devices.write().unwrap_or_else(PoisonError::into_inner);
        let number = devices.len() as u32;
        devices.push((device, geometry));
        let mut places = self.places.write().unwrap_or_else(PoisonError::into_inner);
        places.extend(found.into_iter().map(|(hash, block)| (hash, (number, block))));
        Ok(())
    }
}

impl Lookup for HashIndex {
    fn find(&self, hash: &BlockHash, buf: &mut [u8]) -> io::Result<bool> {
        let places = self.places.read().unwrap_or_else(PoisonError::into_inner);
        let Some((number, block)) = places.get(hash).copied() else { return Ok(false) };
        drop(places);
        let devices = self.devices.read().unwrap_or_else(PoisonError::into_inner);
        let Some((device, geometry)) = devices.get(number as usize) else { return Ok(false) };
        let (device, geometry) = (device.clone(), *geometry);
        drop(devices);
        if geometry.length(block) != buf.len() as u64 {
            return Ok(false);
        }
        device.read_at(geometry.offset(block), buf)?;
        Ok(self.naming.name(buf) == *hash)
    }
}

/// A local copy of content as a place to fetch from: an older image, another device.
pub struct ByHash<L> {
    name: String,
    lookup: L,
}

impl<L: Lookup> ByHash<L> {
    /// `name` is for messages.
    pub fn new(name: &str, lookup: L) -> Self {
        Self { name: name.to_owned(), lookup }
    }
}

impl<L: Lookup> Fetch for ByHash<L> {
    fn name(&self) -> &str {
        &self.name
    }

    fn fetch(&self, wanted: &Wanted, buf: &mut [u8], _: &Cancel) -> Result<(), FetchError> {
        if self.lookup.find(&wanted.hash, buf)? { Ok(()) } else { Err(FetchError::Missing) }
    }
}

/// Another silo as a place to fetch from.
pub struct PeerFetch {
    name: String,
    dial: Dial,
    deadline: Duration,
    idle: Mutex<Vec<Connection>>,
    number: AtomicU64,
}

impl PeerFetch {
    /// `deadline` is for one block.
    #[must_use]
    pub fn new(dial: Dial, deadline: Duration) -> Self {
        let name = format!("host {}", dial.peer());
        Self { name, dial, deadline, idle: Mutex::default(), number: AtomicU64::new(1) }
    }

    fn ask(
        &self,
        connection: &mut Connection,
        wanted: &Wanted,
        buf: &mut [u8],
    ) -> io::Result<bool> {
        let number = self.number.fetch_add(1, Ordering::Relaxed);
        let ask = Ask { number, length: wanted.length as u32, hash: wanted.hash };
        ask.write(&mut connection.outgoing)?;
        connection.outgoing.flush()?;
        connection.control.set_read_timeout(Some(self.deadline));
        let frame = connection.incoming.read().map_err(io::Error::other)?;
        let answer = Found::read(&frame).map_err(io::Error::other)?;
        if answer.number != number {
            return Err(io::Error::other("an answer to another question"));
        }
        match answer.content {
            Some(content) if content.len() == buf.len() => {
                buf.copy_from_slice(content);
                Ok(true)
            }
            Some(_) => Err(io::Error::other("an answer of another length")),
            None => Ok(false),
        }
    }
}

impl Fetch for PeerFetch {
    fn name(&self) -> &str {
        &self.name
    }

    fn fetch(&self, wanted: &Wanted, buf: &mut [u8], cancel: &Cancel) -> Result<(), FetchError> {
        if cancel.is_set() {
            return Err(FetchError::Cancelled);
        }
        let kept = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut connection = match kept {
            Some(connection) => connection,
            None => self.dial.fetch().map_err(io::Error::other)?,
        };
        // A connection that failed is dropped; the next request opens a new one.
        let found = self.ask(&mut connection, wanted, buf)?;
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < KEPT {
            idle.push(connection);
        }
        if found { Ok(()) } else { Err(FetchError::Missing) }
    }
}

/// Answers a peer that asks by hash, until it goes or is silent for `idle`.
///
/// # Errors
/// A connection that fails or breaks a rule; its end is none.
pub fn serve_fetch(
    mut connection: Connection,
    lookup: &dyn Lookup,
    idle: Duration,
) -> Result<(), crate::wire::WireError> {
    connection.control.set_read_timeout(Some(idle));
    let mut buffer = Vec::new();
    loop {
        let ask = match connection.incoming.read() {
            Ok(frame) => Ask::read(&frame)?,
            Err(crate::wire::WireError::Io(error))
                if matches!(
                    error.kind(),
                    io::ErrorKind::UnexpectedEof
                        | io::ErrorKind::TimedOut
                        | io::ErrorKind::ConnectionReset
                ) =>
            {
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        buffer.resize(ask.length as usize, 0);
        let found = match lookup.find(&ask.hash, &mut buffer) {
            Ok(found) => found,
            Err(error) => {
                // The other end goes on with another place; here somebody should know.
                tracing::warn!(%error, "a block that a peer asked for cannot be read");
                false
            }
        };
        let content = found.then_some(&buffer[..]);
        Found { number: ask.number, content }.write(&mut connection.outgoing)?;
        connection.outgoing.flush()?;
    }
}
