//! Chunks of packs are compressed and sealed here, on threads beside the one that reads and names
//! blocks if there are any.
//!
//! What must hold: a chunk is sealed once, under its number; whoever waits for one that no thread takes
//! any more is told so.

use crate::{StoreError, error::Result, format::pack::BOUND, keys::ObjectKey};
use std::{
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel},
    },
    thread::JoinHandle,
};

/// Chunks that may wait for a thread; whoever has another one seals it itself.
const WAITING: usize = 8;

/// A compressor that does not try for long what does not get smaller.
pub(crate) struct Squeezer {
    compressor: zstd::bulk::Compressor<'static>,
    /// Chunks to leave uncompressed before trying again.
    skip: u32,
    /// Chunks in a row that did not get smaller.
    stubborn: u32,
}

impl Squeezer {
    pub(crate) fn new(level: i32) -> Result<Self> {
        let compressor = zstd::bulk::Compressor::new(level)
            .map_err(|source| StoreError::Local { operation: "start zstd", source })?;
        Ok(Self { compressor, skip: 0, stubborn: 0 })
    }

    /// Appends a chunk to `out`; whether it was compressed.
    pub(crate) fn append(&mut self, chunk: &[u8], out: &mut Vec<u8>) -> bool {
        let (from, room) = (out.len(), chunk.len());
        if self.skip > 0 {
            self.skip -= 1;
        } else {
            out.resize(from + room, 0);
            // An error means that it does not fit: it did not get smaller.
            match self.compressor.compress_to_buffer(chunk, &mut out[from..]) {
                Ok(length) if length + length / 32 < room => {
                    out.truncate(from + length);
                    self.stubborn = 0;
                    return true;
                }
                _ => {
                    out.truncate(from);
                    self.stubborn += 1;
                    self.skip = (1 << self.stubborn.min(4)) - 1;
                }
            }
        }
        out.extend_from_slice(chunk);
        false
    }
}

/// What seals the chunks of one pack.
pub(crate) struct PackKey {
    pub(crate) key: ObjectKey,
    pub(crate) bound: [u8; BOUND],
}

impl PackKey {
    /// Appends chunk `number` to `out`, sealed; whether it was compressed.
    pub(crate) fn append(
        &self,
        number: u64,
        chunk: &[u8],
        squeezer: &mut Squeezer,
        out: &mut Vec<u8>,
    ) -> bool {
        let from = out.len();
        let packed = squeezer.append(chunk, out);
        self.key.seal(number, &self.bound, out, from);
        packed
    }
}

struct Job {
    key: Arc<PackKey>,
    number: u64,
    chunk: Vec<u8>,
    to: SyncSender<(Vec<u8>, bool)>,
}

/// A chunk that is sealed, or will be.
pub(crate) enum Sealed {
    Here(Vec<u8>, bool),
    Coming(Receiver<(Vec<u8>, bool)>),
}

impl Sealed {
    /// Whether it is here now.
    pub(crate) fn look(&mut self) -> bool {
        if let Self::Coming(coming) = self {
            match coming.try_recv() {
                Ok((bytes, packed)) => *self = Self::Here(bytes, packed),
                Err(TryRecvError::Empty) => return false,
                // Waiting for it says so.
                Err(TryRecvError::Disconnected) => {}
            }
        }
        true
    }

    pub(crate) fn wait(self) -> Result<(Vec<u8>, bool)> {
        match self {
            Self::Here(bytes, packed) => Ok((bytes, packed)),
            Self::Coming(coming) => coming.recv().map_err(|_| StoreError::Local {
                operation: "seal a chunk of a pack",
                source: std::io::Error::other("the thread that did it has ended"),
            }),
        }
    }
}

/// Threads that seal chunks.
pub(crate) struct Sealers {
    jobs: Option<SyncSender<Job>>,
    threads: Vec<JoinHandle<()>>,
}

impl Sealers {
    /// `None` for no threads.
    pub(crate) fn start(threads: usize, level: i32) -> Result<Option<Self>> {
        if threads == 0 {
            return Ok(None);
        }
        let (jobs, taken) = sync_channel::<Job>(WAITING);
        let taken = Arc::new(Mutex::new(taken));
        let mut sealers = Self { jobs: Some(jobs), threads: Vec::new() };
        for number in 0..threads {
            let (taken, mut squeezer) = (Arc::clone(&taken), Squeezer::new(level)?);
            let thread = std::thread::Builder::new().name(format!("seal-{number}"));
            let thread = thread.spawn(move || {
                loop {
                    let job = taken.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok(Job { key, number, chunk, to }) = job else { return };
                    let mut out = Vec::with_capacity(chunk.len() + crate::keys::TAG);
                    let packed = key.append(number, &chunk, &mut squeezer, &mut out);
                    // Nobody waits for it after an error.
                    let _ = to.send((out, packed));
                }
            });
            let thread = thread
                .map_err(|source| StoreError::Local { operation: "start a thread", source })?;
            sealers.threads.push(thread);
        }
        Ok(Some(sealers))
    }

    /// Seals a chunk: on one of the threads, or at once if they have enough to do.
    pub(crate) fn seal(
        &self,
        key: &Arc<PackKey>,
        number: u64,
        chunk: Vec<u8>,
        own: &mut Squeezer,
    ) -> Sealed {
        let (to, coming) = sync_channel(1);
        let job = Job { key: Arc::clone(key), number, chunk, to };
        let refused = match &self.jobs {
            Some(jobs) => match jobs.try_send(job) {
                Ok(()) => return Sealed::Coming(coming),
                Err(TrySendError::Full(job) | TrySendError::Disconnected(job)) => job,
            },
            None => job,
        };
        let mut out = Vec::with_capacity(refused.chunk.len() + crate::keys::TAG);
        let packed = key.append(number, &refused.chunk, own, &mut out);
        Sealed::Here(out, packed)
    }
}

impl Drop for Sealers {
    fn drop(&mut self) {
        drop(self.jobs.take());
        for thread in self.threads.drain(..) {
            // A panic of the thread has been reported by then.
            let _ = thread.join();
        }
    }
}
