//! A link with a rate and a delay: two tunnel interfaces, and threads that carry each packet from
//! one to the other at its time. Per packet and below TCP, so slow start, windows and losses are
//! real; a proxy of streams would hide all three.
//!
//! One direction:
//!
//! ```text
//!  tun in a ─ reader ─► when does it leave the router? (rate) ─► queue ─ writer ─► tun in b
//!                       a full router queue drops the packet      at its time + delay
//! ```
//!
//! At 500 Mbit/s and more (or without a rate) packets are TCP segments of up to 64 KiB, as a
//! network card with segmentation offload gets them; below that, single packets.

use super::{Host, RigError, io_failed, link_name};
use conduit::{Tap, tap};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::{
    collections::VecDeque,
    fs::File,
    io::{Read, Write},
    os::fd::AsFd,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// A direction of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// One way.
    pub delay: Duration,
    /// `None`: no limit.
    pub bits_per_second: Option<u64>,
}

/// Large segments are carried whole from this rate on.
const LARGE_FROM: u64 = 500_000_000;
/// The shortest router queue, and what it holds at any rate.
const QUEUE_TIME: Duration = Duration::from_millis(10);
const QUEUE_BYTES: u64 = 256 * 1024;
/// All that one direction may hold without a rate.
const HELD_BYTES: u64 = 256 << 20;
/// Largest packet with its header.
const PACKET: usize = 66 * 1024;
/// `virtio_net_hdr` before each packet.
const HEADER: usize = 10;
/// Ethernet around each packet of 1500 bytes, with preamble and gap.
const FRAMING: u64 = 38;

impl Shape {
    fn large(self) -> bool {
        self.bits_per_second.is_none_or(|b| b >= LARGE_FROM)
    }

    /// How long the link is busy with `bytes` of packet.
    fn airtime(self, bytes: u64) -> Duration {
        let Some(rate) = self.bits_per_second else { return Duration::ZERO };
        let bits = (bytes + bytes.div_ceil(1500) * FRAMING) * 8;
        Duration::from_nanos((u128::from(bits) * 1_000_000_000 / u128::from(rate)) as u64)
    }

    /// How long a packet may wait in the router before it is dropped: one round trip's worth, as
    /// routers are sized.
    fn patience(self) -> Duration {
        (self.delay * 2).max(QUEUE_TIME).max(self.airtime(QUEUE_BYTES))
    }
}

/// The router at the sending end of a direction: decides when a packet arrives. Knows no clock.
#[derive(Debug)]
struct Router {
    shape: Shape,
    busy_until: Option<Instant>,
}

impl Router {
    /// When a packet that comes now arrives at the other end; `None` if it is dropped.
    fn schedule(&mut self, now: Instant, bytes: u64) -> Option<Instant> {
        let starts = self.busy_until.map_or(now, |b| b.max(now));
        if starts - now > self.shape.patience() {
            return None;
        }
        let leaves = starts + self.shape.airtime(bytes);
        self.busy_until = Some(leaves);
        Some(leaves + self.shape.delay)
    }
}

/// Packets on their way, in the order of their arrival times.
#[derive(Default)]
struct Waiting {
    packets: VecDeque<(Instant, Vec<u8>)>,
    bytes: u64,
}

/// One direction.
#[derive(Default)]
struct Pipe {
    waiting: Mutex<Waiting>,
    arrived: Condvar,
    stop: AtomicBool,
    dropped: AtomicU64,
}

/// A running link. Dropping it removes it.
pub struct Shaper {
    pipes: [Arc<Pipe>; 2],
    threads: Vec<JoinHandle<()>>,
}

impl Shaper {
    /// Makes the link between two hosts; both interfaces are there and down when it returns.
    pub(super) fn start(a: &Host, b: &Host, shape: Shape) -> Result<Self, RigError> {
        let end = |at: &Host, to: &Host| {
            let name = link_name(to);
            let opened = at.namespace.run(|| tap::open_tunnel(&name, shape.large()))?;
            let tap = opened.map_err(io_failed(format!("make {name} in {}", at.namespace)))?;
            at.namespace.ip(&format!("link set dev {name} mtu 1500 txqueuelen 4096\n"))?;
            Ok::<_, RigError>(tap)
        };
        let (in_a, in_b) = (end(a, b)?, end(b, a)?);
        let mut this = Self { pipes: [Arc::default(), Arc::default()], threads: Vec::new() };
        let [there, back] = this.pipes.clone();
        this.carry(&in_a, &in_b, shape, there)?;
        this.carry(&in_b, &in_a, shape, back)?;
        Ok(this)
    }

    fn carry(
        &mut self,
        from: &Tap,
        to: &Tap,
        shape: Shape,
        pipe: Arc<Pipe>,
    ) -> Result<(), RigError> {
        let copy =
            |tap: &Tap| tap.fd.try_clone().map(File::from).map_err(io_failed("duplicate a tunnel"));
        let (from, to) = (copy(from)?, copy(to)?);
        let reading = pipe.clone();
        let read = move || read_packets(from, Router { shape, busy_until: None }, &reading);
        let write = move || write_packets(to, &pipe);
        let start = |name: &str, run: Box<dyn FnOnce() + Send>| {
            thread::Builder::new().name(name.into()).spawn(run).map_err(io_failed("start a thread"))
        };
        self.threads.push(start("line-in", Box::new(read))?);
        self.threads.push(start("line-out", Box::new(write))?);
        Ok(())
    }

    /// Packets that full router queues have dropped, both directions.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.pipes.iter().map(|p| p.dropped.load(Ordering::Relaxed)).sum()
    }
}

impl Drop for Shaper {
    fn drop(&mut self) {
        for pipe in &self.pipes {
            pipe.stop.store(true, Ordering::Release);
            pipe.arrived.notify_all();
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn read_packets(mut from: File, mut router: Router, pipe: &Pipe) {
    let mut packet = vec![0; PACKET];
    while !pipe.stop.load(Ordering::Acquire) {
        let Ok(size) = from.read(&mut packet) else {
            // Nothing there, or the interface is down for now: look again soon.
            let mut wait = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
            let _ = poll(&mut wait, PollTimeout::from(50_u8));
            if !wait[0].any().unwrap_or(false) {
                continue;
            }
            if wait[0].revents().is_some_and(|r| r.contains(PollFlags::POLLERR)) {
                thread::sleep(Duration::from_millis(5));
            }
            continue;
        };
        let bytes = size.saturating_sub(HEADER) as u64;
        let due = router.schedule(Instant::now(), bytes);
        let mut queue = pipe.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(due) = due.filter(|_| queue.bytes + size as u64 <= HELD_BYTES) else {
            pipe.dropped.fetch_add(1, Ordering::Relaxed);
            continue;
        };
        queue.bytes += size as u64;
        queue.packets.push_back((due, packet[..size].to_vec()));
        // The writer sleeps through a queue that is not empty; only the first packet wakes it.
        let first = queue.packets.len() == 1;
        drop(queue);
        if first {
            pipe.arrived.notify_one();
        }
    }
}

fn write_packets(mut to: File, pipe: &Pipe) {
    // Else the kernel rounds each sleep up by 50 microseconds.
    let _ = nix::sys::prctl::set_timerslack(1);
    loop {
        let mut queue = pipe.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        while queue.packets.is_empty() {
            if pipe.stop.load(Ordering::Acquire) {
                return;
            }
            queue = pipe.arrived.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        let (due, packet) = queue.packets.pop_front().expect("not empty, seen under the lock");
        queue.bytes -= packet.len() as u64;
        drop(queue);
        loop {
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            if pipe.stop.load(Ordering::Acquire) {
                return;
            }
            thread::sleep(left.min(Duration::from_millis(100)));
        }
        // Refused while the interface is down: lost, as on a cut line.
        let _ = to.write(&packet);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MBIT_100: Shape =
        Shape { delay: Duration::from_millis(20), bits_per_second: Some(100_000_000) };

    #[test]
    fn packets_leave_at_the_rate_and_arrive_after_the_delay() {
        let start = Instant::now();
        let mut router = Router { shape: MBIT_100, busy_until: None };
        let airtime = Duration::from_nanos(1538 * 8 * 10);
        for n in 1..=100 {
            let due = router.schedule(start, 1500).unwrap();
            assert_eq!(due - start, airtime * n + MBIT_100.delay);
        }
        let later = start + Duration::from_secs(1);
        let due = router.schedule(later, 1500).unwrap();
        assert_eq!(due - later, airtime + MBIT_100.delay, "an idle link keeps no credit");
    }

    #[test]
    fn a_full_router_drops_and_goes_on_when_it_has_room_again() {
        let start = Instant::now();
        let mut router = Router { shape: MBIT_100, busy_until: None };
        let taken = (0..10_000).filter(|_| router.schedule(start, 1500).is_some()).count();
        // One round trip of 40 ms at 100 Mbit/s is 325 packets.
        assert!((320..=330).contains(&taken), "{taken}");
        assert!(router.schedule(start + Duration::from_millis(1), 1500).is_some());
    }

    #[test]
    fn a_link_without_a_rate_only_delays() {
        let start = Instant::now();
        let shape = Shape { delay: Duration::from_millis(5), bits_per_second: None };
        let mut router = Router { shape, busy_until: None };
        for _ in 0..1000 {
            assert_eq!(router.schedule(start, 65_000), Some(start + shape.delay));
        }
    }
}
