//! A line between two namespaces that is slow, and does not keep the order: two taps, and threads that carry
//! frames from each to the other when their time has come. What the kernel's netem does, where there is none.
//! What agents and edge say to each other (TCP) may take another time than machines' frames.

use super::Space;
use crate::{KernelError, Tap, tap};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read, Write},
    os::fd::AsFd,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// How long frames are under way, each way.
#[derive(Clone, Copy, Debug, Default)]
pub struct Shape {
    /// Those of TCP.
    pub words: Duration,
    /// All others.
    pub frames: Duration,
    /// Each so-many-th takes that much longer, and is overtaken.
    pub late: Option<(u64, Duration)>,
}

/// See the module. Dropped, its interfaces go.
pub struct Line {
    shape: Arc<Mutex<Shape>>,
    overtaken: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

/// Longest time until an end is noticed.
const LOOK: Duration = Duration::from_millis(20);
/// `virtio_net_hdr` before each frame.
const HEADER: usize = 10;
const BATCH: usize = 64;

impl Line {
    /// Joins two namespaces by interfaces of these names; both are up.
    pub fn join(
        one: &Space,
        interface: &str,
        other: &Space,
        its: &str,
    ) -> Result<Self, KernelError> {
        let open = |space: &Space, name: &str| -> Result<File, KernelError> {
            let fail = |e: io::Error| KernelError::new(format!("make the line's end {name}"), e);
            let Tap { fd, .. } = space.run(|| tap::open_temporary(name)).map_err(fail)?;
            space.ip(&format!("link set {name} txqueuelen 10000 up\n"))?;
            Ok(File::from(fd))
        };
        let ends = [open(one, interface)?, open(other, its)?];
        let (shape, overtaken, stop) = (Arc::default(), Arc::default(), Arc::default());
        let mut line = Self { shape, overtaken, stop, threads: Vec::new() };
        for (from, to) in [(0, 1), (1, 0)] {
            let fail = |e| KernelError::new("carry frames", e);
            let from = ends[from].try_clone().map_err(fail)?;
            let to = ends[to].try_clone().map_err(fail)?;
            let (shape, stop) = (line.shape.clone(), line.stop.clone());
            let overtaken = line.overtaken.clone();
            line.threads.push(thread::spawn(move || carry(from, to, &shape, &overtaken, &stop)));
        }
        Ok(line)
    }

    /// From now on, for what is sent from now on.
    pub fn set(&self, shape: Shape) {
        *self.shape.lock().unwrap_or_else(PoisonError::into_inner) = shape;
    }

    /// Frames that came before one that was sent before them.
    #[must_use]
    pub fn overtaken(&self) -> u64 {
        self.overtaken.load(Ordering::Relaxed)
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// IPv4 and TCP.
fn is_word(frame: &[u8]) -> bool {
    frame.get(HEADER + 12..HEADER + 14) == Some(&[0x08, 0x00])
        && frame.get(HEADER + 14 + 9) == Some(&6)
}

fn carry(
    mut from: File,
    mut to: File,
    shape: &Mutex<Shape>,
    overtaken: &AtomicU64,
    stop: &AtomicBool,
) {
    // By the time at which they come, then as they were sent.
    let mut under_way = BTreeMap::<(Instant, u64), Box<[u8]>>::new();
    let (mut sent, mut newest) = (0_u64, 0_u64);
    let mut buffer = vec![0; 128 * 1024];
    while !stop.load(Ordering::Relaxed) {
        let next = under_way.first_key_value().map(|((at, _), _)| *at);
        let wait = next.map_or(LOOK, |at| at.saturating_duration_since(Instant::now()).min(LOOK));
        // A whole millisecond too late rather than a busy wait.
        let wait =
            PollTimeout::try_from(wait + Duration::from_micros(999)).unwrap_or(PollTimeout::ZERO);
        let _ = poll(&mut [PollFd::new(from.as_fd(), PollFlags::POLLIN)], wait);
        for _ in 0..BATCH {
            // Nothing there, or an interface that is going.
            let Ok(size) = from.read(&mut buffer) else { break };
            let frame = &buffer[..size];
            let Shape { words, frames, late } =
                *shape.lock().unwrap_or_else(PoisonError::into_inner);
            let mut delay = if is_word(frame) { words } else { frames };
            sent += 1;
            if let Some((each, more)) = late
                && sent.is_multiple_of(each)
            {
                delay += more;
            }
            under_way.insert((Instant::now() + delay, sent), frame.into());
        }
        let now = Instant::now();
        while let Some(first) = under_way.first_entry().filter(|first| first.key().0 <= now) {
            let ((_, number), frame) = first.remove_entry();
            overtaken.fetch_add(u64::from(number < newest), Ordering::Relaxed);
            newest = newest.max(number);
            // Like any line, it loses what the other end does not take.
            let _ = to.write_all(&frame);
        }
    }
}
