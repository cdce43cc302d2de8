//! From blocks to packs in the store: one pack is filled while others are on their way.

use crate::{
    StoreError,
    error::Result,
    format::pack::{Builder, PackRef},
    keys::{BlockName, DataKey},
    remote::{Pending, Remote},
    writer::Sealers,
};
use std::{
    collections::{HashMap, VecDeque},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

/// Spreads bytes over time: never more than `rate` a second on average, and never more than the
/// time of one pack ahead.
#[derive(Debug)]
pub(crate) struct Limiter {
    rate: Option<u64>,
    /// When what was let through so far is paid for.
    paid: Duration,
}

impl Limiter {
    pub(crate) fn new(rate: Option<u64>) -> Self {
        Self { rate: rate.filter(|rate| *rate > 0), paid: Duration::ZERO }
    }

    /// How long to wait at `now` before `bytes` may go.
    pub(crate) fn reserve(&mut self, now: Duration, bytes: u64) -> Duration {
        let Some(rate) = self.rate else { return Duration::ZERO };
        let begin = self.paid.max(now);
        self.paid = begin + Duration::from_secs_f64(bytes as f64 / rate as f64);
        begin - now
    }
}

/// Waits, but not when it is time to stop.
pub(crate) fn wait(time: Duration, stop: &AtomicBool) -> Result<()> {
    let until = Instant::now() + time;
    loop {
        if stop.load(Ordering::Relaxed) {
            return Err(StoreError::Stopped);
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        std::thread::sleep(left.min(Duration::from_millis(20)));
    }
}

/// How packs are made and sent.
#[derive(Clone, Copy, Debug)]
pub struct PackOptions {
    /// A pack is sent when it has so many bytes: 4 MiB to 16 MiB.
    pub target: usize,
    /// Packs on their way at one time. Memory is bounded by one more than that.
    pub in_flight: usize,
    /// Threads that compress and seal, beside the one that reads; 0: that one does it. A pack may
    /// then be longer than `target` by what waits for them.
    pub sealers: usize,
    /// How hard zstd tries.
    pub level: i32,
}

impl Default for PackOptions {
    fn default() -> Self {
        Self { target: 8 << 20, in_flight: 3, sealers: 0, level: 1 }
    }
}

impl PackOptions {
    /// Smallest [`PackOptions::target`] in bytes.
    pub const LEAST: usize = 4 << 20;
    /// Largest [`PackOptions::target`] in bytes.
    pub const MOST: usize = 16 << 20;
}

/// A pack that has a number; what it holds is in the store once `stored` says so.
pub(crate) struct Slot {
    pub(crate) pack: PackRef,
    pub(crate) state: State,
}

/// What is known of a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Being filled or sent; or sending failed, and it is not known whether it arrived.
    Unknown,
    /// The store said that it has it.
    Stored,
    /// About to be deleted by a collection: not to be used for anything new.
    Condemned,
}

pub(crate) struct Upload<'a> {
    remote: &'a Remote,
    key: &'a DataKey,
    options: PackOptions,
    packs: &'a mut Vec<Slot>,
    limiter: &'a mut Limiter,
    began: Instant,
    stop: &'a AtomicBool,
    open: HashMap<u8, (u32, Builder)>,
    /// Started with the first pack.
    sealers: Option<Sealers>,
    sent: VecDeque<(u32, Pending<()>)>,
    /// The first pack of this round, if it makes one.
    first: u32,
    pub(crate) bytes: u64,
    pub(crate) count: u64,
}

impl<'a> Upload<'a> {
    pub(crate) fn new(
        remote: &'a Remote,
        key: &'a DataKey,
        options: PackOptions,
        packs: &'a mut Vec<Slot>,
        limiter: &'a mut Limiter,
        began: Instant,
        stop: &'a AtomicBool,
    ) -> Self {
        let (open, sent) = (HashMap::new(), VecDeque::new());
        let first = packs.len() as u32;
        Self {
            remote,
            key,
            options,
            packs,
            limiter,
            began,
            stop,
            open,
            sealers: None,
            sent,
            first,
            bytes: 0,
            count: 0,
        }
    }

    /// Whether a pack can be referred to from what this round stores.
    pub(crate) fn usable(&self, pack: u32) -> bool {
        self.packs[pack as usize].state == State::Stored
            || self.open.values().any(|(number, _)| *number == pack)
            || self.sent.iter().any(|(number, _)| *number == pack)
    }

    /// Whether a pack is of this round.
    pub(crate) fn is_new(&self, pack: u32) -> bool {
        pack >= self.first
    }

    /// Stores a block; gives the number of its pack, and its slot.
    pub(crate) fn push(&mut self, shift: u8, name: BlockName, block: &[u8]) -> Result<(u32, u32)> {
        if !self.open.contains_key(&shift) {
            let number = self.packs.len() as u32;
            let id = crate::layout::ObjectId([0; 32]);
            let pack = PackRef { id, length: 0, index: 0, key: self.key.id, salt: [0; 16], shift };
            self.packs.push(Slot { pack, state: State::Unknown });
            self.open.insert(shift, (number, Builder::new(self.key, shift, self.options.level)?));
            if self.sealers.is_none() {
                self.sealers = Sealers::start(self.options.sealers, self.options.level)?;
            }
        }
        let target = self.options.target.clamp(PackOptions::LEAST, PackOptions::MOST);
        let Some((number, builder)) = self.open.get_mut(&shift) else {
            return Err(StoreError::Stopped);
        };
        let place = (*number, builder.push(name, block, self.sealers.as_ref())?);
        if builder.is_full(target) {
            self.send(shift)?;
        }
        Ok(place)
    }

    fn send(&mut self, shift: u8) -> Result<()> {
        let Some((number, builder)) = self.open.remove(&shift) else { return Ok(()) };
        debug_assert!(!builder.is_empty());
        let (pack, bytes) = builder.finish()?;
        self.packs[number as usize].pack = pack;
        while self.sent.len() >= self.options.in_flight.max(1) {
            self.settle()?;
        }
        wait(self.limiter.reserve(self.began.elapsed(), bytes.len() as u64), self.stop)?;
        self.bytes += bytes.len() as u64;
        self.count += 1;
        self.sent.push_back((number, self.remote.start_put(&pack.id.pack(), bytes)));
        Ok(())
    }

    fn settle(&mut self) -> Result<()> {
        if let Some((number, pending)) = self.sent.pop_front() {
            pending.wait()?;
            self.packs[number as usize].state = State::Stored;
        }
        Ok(())
    }

    /// Sends what is left and waits until all is stored.
    pub(crate) fn finish(&mut self) -> Result<()> {
        let shifts: Vec<u8> = self.open.keys().copied().collect();
        for shift in shifts {
            self.send(shift)?;
        }
        while !self.sent.is_empty() {
            self.settle()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_holds_on_average_and_idle_time_is_not_saved_up() {
        let mut limiter = Limiter::new(Some(1000));
        let mut now = Duration::from_secs(5);
        let mut sent = 0;
        for _ in 0..100 {
            now += limiter.reserve(now, 300);
            sent += 300;
        }
        let rate = f64::from(sent - 300) / (now - Duration::from_secs(5)).as_secs_f64();
        assert!((rate - 1000.0).abs() < 1.0, "{rate}");
        let later = now + Duration::from_secs(60);
        assert_eq!(limiter.reserve(later, 1000), Duration::ZERO);
        assert_eq!(limiter.reserve(later, 1000), Duration::from_secs(1));
        assert_eq!(Limiter::new(None).reserve(now, u64::MAX), Duration::ZERO);
    }
}
