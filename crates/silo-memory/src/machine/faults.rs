//! The fault thread of one machine's memory: takes page faults from the userfaultfd, serves zero
//! blocks itself and asks for missing ones. It never waits for anything but the next fault.

use super::Shared;
use crate::sys::{CopyOutcome, Userfault};
use hdrhistogram::Histogram;
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::EventFd,
};
use silo_block::{
    block::{BLOCK_SIZE, BlockIndex, BlockRange},
    device::DeviceName,
};
use std::{
    io,
    os::fd::AsFd,
    sync::{Arc, PoisonError},
    thread::JoinHandle,
    time::Instant,
};

/// One block of zeros.
pub(super) static ZERO: [u8; BLOCK_SIZE] = [0; BLOCK_SIZE];

/// How many zero blocks a fault on one brings at most when the guest walks upwards.
const ZERO_CLUSTER: u64 = 16;

/// Faults and how long each kept a thread of the guest waiting.
pub struct FaultStats {
    service_us: Histogram<u64>,
    zero: u64,
    demanded: u64,
}

impl Default for FaultStats {
    fn default() -> Self {
        // One microsecond to one hour, two significant digits: never fails for these constants.
        let service_us = Histogram::new_with_bounds(1, 3_600_000_000, 2).expect("valid bounds");
        Self { service_us, zero: 0, demanded: 0 }
    }
}

/// [`FaultStats`] in numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct FaultSummary {
    /// Blocks that were fetched because the guest waited for them.
    pub demanded: u64,
    /// Faults on zero blocks, served here.
    pub zero: u64,
    /// Median time from the fault's arrival to its answer, microseconds.
    pub p50_us: u64,
    /// 99th percentile of the same.
    pub p99_us: u64,
    /// Longest of the same.
    pub max_us: u64,
}

impl FaultStats {
    pub(super) fn summary(&self) -> FaultSummary {
        FaultSummary {
            demanded: self.demanded,
            zero: self.zero,
            p50_us: self.service_us.value_at_quantile(0.5),
            p99_us: self.service_us.value_at_quantile(0.99),
            max_us: self.service_us.max(),
        }
    }
}

impl Shared {
    /// A demanded block that somebody waited for since `since` is in place.
    pub(super) fn served(&self, since: Instant) {
        let us = since.elapsed().as_micros() as u64;
        let mut stats = self.stats.lock().unwrap_or_else(PoisonError::into_inner);
        stats.demanded += 1;
        stats.service_us.saturating_record(us.max(1));
    }
}

/// Ends and joins its thread when dropped.
pub(super) struct FaultThread {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl FaultThread {
    pub(super) fn start(
        device: DeviceName,
        userfault: Arc<Userfault>,
        shared: Arc<Shared>,
        address: u64,
        blocks: u64,
    ) -> io::Result<Self> {
        let stop = Arc::new(EventFd::new()?);
        let server = FaultServer { device, userfault, shared, address, blocks, last_zero: 0 };
        let stop_seen = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("faults".into())
            .spawn(move || server.run(&stop_seen))?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for FaultThread {
    fn drop(&mut self) {
        if self.stop.write(1).is_ok()
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
    }
}

struct FaultServer {
    device: DeviceName,
    userfault: Arc<Userfault>,
    shared: Arc<Shared>,
    address: u64,
    blocks: u64,
    last_zero: u64,
}

impl FaultServer {
    fn run(mut self, stop: &EventFd) {
        let mut addresses = Vec::with_capacity(64);
        loop {
            let mut fds = [
                PollFd::new(self.userfault.as_fd(), PollFlags::POLLIN),
                PollFd::new(stop.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(error) => {
                    tracing::error!(device = %self.device, %error, "waiting for faults failed");
                    return;
                }
            }
            let ready = |at: usize| fds[at].revents().unwrap_or(PollFlags::empty());
            if !ready(1).is_empty() {
                return;
            }
            if ready(0).intersects(PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL) {
                return; // the monitor is gone
            }
            addresses.clear();
            if let Err(error) = self.userfault.faults(&mut addresses) {
                tracing::error!(device = %self.device, %error, "reading faults failed");
                return;
            }
            for &address in &addresses {
                self.serve(address);
            }
        }
    }

    fn serve(&mut self, address: u64) {
        let block = address.wrapping_sub(self.address) / BLOCK_SIZE as u64;
        if block >= self.blocks {
            tracing::warn!(device = %self.device, address, "fault outside the memory");
            return;
        }
        let (missing, demand) = {
            let mut holes = self.shared.holes.lock().unwrap_or_else(PoisonError::into_inner);
            let missing = holes.missing.contains(BlockIndex(block));
            let first = missing && {
                let mut first = false;
                holes.waiting.entry(block).or_insert_with(|| {
                    first = true;
                    Instant::now()
                });
                first
            };
            (missing, if first { holes.demand.clone() } else { None })
        };
        if missing {
            if let Some(demand) = demand {
                demand(BlockRange::new(block, 1));
            }
            return;
        }
        if let Err(error) = self.serve_zero(block) {
            tracing::error!(device = %self.device, block, %error, "serving a zero block failed");
        }
    }

    /// A hole that is not missing is zero. A guest that walks through fresh memory gets some of
    /// its neighbours too, as long as they are holes as well.
    fn serve_zero(&mut self, block: u64) -> io::Result<()> {
        static ZEROS: [u8; BLOCK_SIZE * ZERO_CLUSTER as usize] =
            [0; BLOCK_SIZE * ZERO_CLUSTER as usize];
        let walking = block == self.last_zero;
        let mut count = if walking { ZERO_CLUSTER.min(self.blocks - block) } else { 1 };
        if walking {
            let holes = self.shared.holes.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(next) = holes.missing.next_range(BlockIndex(block), 1) {
                count = count.min(next.start.0 - block);
            }
        }
        self.last_zero = block + count;
        let address = self.address + block * BLOCK_SIZE as u64;
        loop {
            match self.userfault.copy(address, &ZEROS[..count as usize * BLOCK_SIZE])? {
                CopyOutcome::Again(0) => {}
                // The neighbours are a bonus: what stopped the copy is not this fault's business.
                CopyOutcome::Done | CopyOutcome::Again(_) => break,
                CopyOutcome::Present(_) => {
                    self.userfault.wake(address, BLOCK_SIZE as u64)?;
                    break;
                }
            }
        }
        self.shared.stats.lock().unwrap_or_else(PoisonError::into_inner).zero += 1;
        Ok(())
    }
}
