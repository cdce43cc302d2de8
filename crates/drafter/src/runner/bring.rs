//! What this host's store has of a machine that arrives, put into its new memory and disks before its
//! source sends anything; they are then compared with what the source has, so that a generation that is
//! old, damaged or brought in part costs time and no data.
//!
//! What must hold: whoever waits goes on at the limit, whatever the store does; from then on nothing is
//! written here any more; and whoever waits hears whether anything was.

use super::{
    config::StoreAt,
    hosted::Content,
    restore::{History, described, restore_device},
};
use crate::{
    checkpoint::{
        MEMORY,
        restore::{DiskTarget, MemoryTarget},
    },
    migrate::messages::{PrepareRequest, StoredAs},
};
use silo::{device::Device as _, io::BlockDevice, store::Which};
use std::{
    io,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

/// The most that a source can wait for it: it gives the verdict a minute.
pub(super) const LIMIT: Duration = Duration::from_secs(40);
/// How often it is told how far this is.
const TELL: Duration = Duration::from_millis(500);

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Lets writes through until it is closed.
#[derive(Default)]
struct Gate {
    closed: RwLock<bool>,
    /// A write has come through, or may have in part.
    used: AtomicBool,
    /// Bytes of what is being brought.
    done: AtomicU64,
}

impl Gate {
    fn through(&self, write: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let closed = self.closed.read().unwrap_or_else(PoisonError::into_inner);
        if *closed {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "nobody waits for it any more"));
        }
        self.used.store(true, Ordering::Release);
        write()
    }

    /// Returns when nothing is being written any more.
    fn close(&self) {
        *self.closed.write().unwrap_or_else(PoisonError::into_inner) = true;
    }

    fn is_open(&self) -> bool {
        !*self.closed.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A device behind a gate.
struct Gated<T> {
    to: T,
    gate: Arc<Gate>,
}

impl<T: BlockDevice> BlockDevice for Gated<T> {
    fn size(&self) -> u64 {
        self.to.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.to.read_at(offset, buf)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.gate.through(|| self.to.write_at(offset, data))
    }

    fn flush(&self) -> io::Result<()> {
        self.to.flush()
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.gate.through(|| self.to.trim(offset, length))
    }

    fn zero(&self, offset: u64, length: u64, allocate: bool) -> io::Result<()> {
        self.gate.through(|| self.to.zero(offset, length, allocate))
    }
}

/// What came of it.
pub(super) struct Brought {
    /// Memory and disks may not be as new any more.
    pub(super) any: bool,
    /// Which generation is here; or why not, or not all of one.
    pub(super) came: Result<u64, String>,
}

/// Brings the newest generation of a history of the machine into new memory and disks.
pub(super) fn bring(
    from: StoreAt,
    stored: &StoredAs,
    request: &PrepareRequest,
    content: &Content,
    tell: &dyn Fn(u64),
) -> Brought {
    let limit = LIMIT.min(Duration::from_millis(stored.within_ms));
    let (line, request, content) = (stored.line.clone(), request.clone(), content.clone());
    within(limit, tell, move |gate| fetch(&from, &line, &request, &content, gate))
}

/// Waits for `work` as long as the limit is.
fn within(
    limit: Duration,
    tell: &dyn Fn(u64),
    work: impl FnOnce(&Arc<Gate>) -> Result<u64, String> + Send + 'static,
) -> Brought {
    let (gate, deadline) = (Arc::<Gate>::default(), Instant::now() + limit);
    let (done, ended) = mpsc::channel();
    let own = Arc::clone(&gate);
    let begun = std::thread::Builder::new().name("bring".into()).spawn(move || {
        let _ = done.send(work(&own));
    });
    let came = begun.map_err(text).and_then(|_| {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match ended.recv_timeout(left.min(TELL)) {
                Ok(came) => return came,
                Err(RecvTimeoutError::Disconnected) => return Err("it panicked".into()),
                Err(RecvTimeoutError::Timeout) if left.is_zero() => {
                    return Err(format!("not all of it came within {limit:?}"));
                }
                Err(RecvTimeoutError::Timeout) => tell(gate.done.load(Ordering::Relaxed)),
            }
        }
    });
    gate.close();
    Brought { any: gate.used.load(Ordering::Acquire), came }
}

fn fetch(
    from: &StoreAt,
    line: &str,
    request: &PrepareRequest,
    content: &Content,
    gate: &Arc<Gate>,
) -> Result<u64, String> {
    let generation = History::at(&from.store, line, from.keys.as_deref())?.open(Which::Newest)?;
    let (saved, _) = described(&generation)?;
    let fits = saved.package == request.package
        && saved.shape.name == request.shape.name
        && saved.shape.memory_bytes == request.shape.memory_bytes;
    if !fits {
        return Err(format!(
            "generation {} is of another machine, package or size of memory",
            generation.number()
        ));
    }
    generation.pin_if_possible().map_err(text)?;
    let bring = |name: &str, target: &dyn BlockDevice| {
        restore_device(&generation, name, target, &mut |done| {
            gate.done.store(done, Ordering::Relaxed);
            gate.is_open()
        })
    };
    for disk in &content.disks {
        let name = saved.disk_device(disk.name().as_str());
        bring(&name, &Gated { to: DiskTarget(Arc::clone(disk)), gate: Arc::clone(gate) })?;
    }
    let memory = MemoryTarget(Arc::clone(&content.memory));
    bring(MEMORY, &Gated { to: memory, gate: Arc::clone(gate) })?;
    Ok(generation.number())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    #[test]
    fn whoever_waits_goes_on_at_the_limit_and_nothing_is_written_after_that() {
        let written = Arc::new(AtomicU32::new(0));
        let (counts, (over, ended)) = (Arc::clone(&written), mpsc::channel());
        let brought = within(Duration::from_millis(50), &|_| {}, move |gate| {
            let write = || {
                gate.through(|| {
                    counts.fetch_add(1, Ordering::SeqCst);
                    Ok(())
                })
            };
            while write().is_ok() {}
            over.send(()).unwrap();
            Ok(1)
        });
        let then = written.load(Ordering::SeqCst);
        assert!(brought.any && then > 0);
        assert!(brought.came.unwrap_err().contains("within 50ms"));
        ended.recv_timeout(Duration::from_secs(20)).unwrap();
        assert_eq!(written.load(Ordering::SeqCst), then);
    }

    #[test]
    fn what_fails_half_way_tells_that_something_was_written_and_what_fails_before_that_does_not() {
        let half = within(LIMIT, &|_| {}, |gate| {
            gate.through(|| Err(io::Error::other("damaged"))).map_err(text)?;
            Ok(1)
        });
        assert!(half.any);
        assert_eq!(half.came.unwrap_err(), "damaged");
        let nothing = within(LIMIT, &|_| {}, |_| Err("it is not there".into()));
        assert!(!nothing.any && nothing.came.is_err());
        let all = within(LIMIT, &|_| {}, |gate| gate.through(|| Ok(())).map_err(text).map(|()| 7));
        assert!(all.any);
        assert_eq!(all.came.unwrap(), 7);
    }
}
