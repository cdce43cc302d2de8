//! Where held frames wait, and at what pace they may go: queues per machine, bounded per machine, per
//! network and over all. No I/O; time comes in.
//!
//! Two orders are kept per machine: of TCP, and of everything else. TCP goes first and at once, since
//! its senders wait for answers; the rest goes at a pace that a socket with the usual buffer bears,
//! and at least four times as fast as it comes, so that the queue ends.

use super::{Bound, Limits, frame::Class};
use conduit_bpf::Key;
use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

/// What a frame costs beside its bytes.
const OVERHEAD: u64 = 64;
/// Frames that may leave at once after a rest. A socket with the kernel's usual buffer (208 KiB) takes
/// 92 datagrams of full size, or 277 small ones.
const BURST: f64 = 64.0;
/// Seconds of the pace that add up while nobody asks: the holder may come late by this.
const REST: f64 = 0.002;
/// A larger frame is many datagrams, which the kernel cuts on delivery.
const DATAGRAM: usize = 1500;
/// Times the rate of arrival that datagrams are given back at, at least.
const CATCH_UP: f64 = 4.0;
/// How long arrivals are counted for a rate.
const WINDOW: Duration = Duration::from_millis(100);

/// Which bound a frame met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Full {
    Machine,
    Network,
    Total,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Load {
    pub(super) frames: u64,
    pub(super) bytes: u64,
}

impl Load {
    pub(super) fn fits(self, cost: u64, bound: Bound) -> bool {
        self.frames < bound.frames && self.bytes + cost <= bound.bytes
    }

    pub(super) fn add(&mut self, cost: u64) {
        self.frames += 1;
        self.bytes += cost;
    }

    pub(super) fn sub(&mut self, cost: u64) {
        self.frames = self.frames.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(cost);
    }
}

struct Held {
    bytes: Box<[u8]>,
    at: Instant,
}

impl Held {
    fn cost(&self) -> u64 {
        cost(&self.bytes)
    }
}

pub(super) fn cost(frame: &[u8]) -> u64 {
    frame.len() as u64 + OVERHEAD
}

struct Machine {
    streams: VecDeque<Held>,
    datagrams: VecDeque<Held>,
    load: Load,
    pace: Pace,
}

/// A bucket of datagrams that may go, filled at a rate that follows that of arrivals.
struct Pace {
    tokens: f64,
    filled: Instant,
    counting: (Instant, u32),
    arrivals: f64,
}

impl Pace {
    fn new(now: Instant) -> Self {
        Self { tokens: BURST, filled: now, counting: (now, 0), arrivals: 0.0 }
    }

    fn arrived(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.counting.0);
        if passed >= WINDOW {
            self.arrivals = f64::from(self.counting.1) / passed.as_secs_f64();
            self.counting = (now, 0);
        }
        self.counting.1 += 1;
    }

    fn fill(&mut self, now: Instant, least: u32) {
        let passed = now.saturating_duration_since(self.filled).as_secs_f64();
        let rate = f64::from(least).max(self.arrivals * CATCH_UP);
        self.tokens = (self.tokens + rate * passed).min(BURST.max(rate * REST));
        self.filled = now;
    }
}

/// See the module.
pub(super) struct Queues {
    limits: Limits,
    machines: BTreeMap<Key, Machine>,
    networks: BTreeMap<u32, Load>,
    total: Load,
}

impl Queues {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            machines: BTreeMap::new(),
            networks: BTreeMap::new(),
            total: Load::default(),
        }
    }

    /// Takes a frame that came `at`, or says why not: what is newest is not taken.
    pub(super) fn push(
        &mut self,
        key: Key,
        class: Class,
        bytes: Box<[u8]>,
        at: Instant,
    ) -> Result<(), Full> {
        let cost = cost(&bytes);
        let network = self.networks.get(&key.net).copied().unwrap_or_default();
        let machine = self.machines.get(&key).map(|m| m.load).unwrap_or_default();
        if !machine.fits(cost, self.limits.machine) {
            return Err(Full::Machine);
        }
        if !network.fits(cost, self.limits.network) {
            return Err(Full::Network);
        }
        if !self.total.fits(cost, self.limits.total) {
            return Err(Full::Total);
        }
        let machine = self.machines.entry(key).or_insert_with(|| Machine {
            streams: VecDeque::new(),
            datagrams: VecDeque::new(),
            load: Load::default(),
            pace: Pace::new(at),
        });
        let held = Held { bytes, at };
        match class {
            Class::Stream => machine.streams.push_back(held),
            Class::Datagram => {
                machine.pace.arrived(at);
                machine.datagrams.push_back(held);
            }
        }
        machine.load.add(cost);
        self.networks.entry(key.net).or_default().add(cost);
        self.total.add(cost);
        Ok(())
    }

    /// The next frame of a machine that may go now.
    pub(super) fn take(&mut self, key: Key, now: Instant) -> Option<Box<[u8]>> {
        let least = self.limits.pace;
        let machine = self.machines.get_mut(&key)?;
        let held = match machine.streams.pop_front() {
            Some(held) => held,
            None => {
                machine.pace.fill(now, least);
                if machine.pace.tokens < 1.0 {
                    return None;
                }
                let held = machine.datagrams.pop_front()?;
                machine.pace.tokens -= held.bytes.len().div_ceil(DATAGRAM) as f64;
                held
            }
        };
        self.forget(key, held.cost());
        Some(held.bytes)
    }

    /// Every frame with the time since it came, the oldest of each machine first; none is left.
    pub(super) fn drain(&mut self, now: Instant) -> Vec<(Duration, Box<[u8]>)> {
        let machines = std::mem::take(&mut self.machines);
        self.networks.clear();
        self.total = Load::default();
        let held = machines.into_values().flat_map(|m| m.streams.into_iter().chain(m.datagrams));
        held.map(|h| (now.saturating_duration_since(h.at), h.bytes)).collect()
    }

    /// Throws a machine's frames away; says how many.
    pub(super) fn discard(&mut self, key: Key) -> u64 {
        self.discard_if(key, |_| true)
    }

    /// Throws away what has waited for longer than the limit.
    pub(super) fn expire(&mut self, key: Key, now: Instant) -> u64 {
        let age = self.limits.age;
        self.discard_if(key, |held| now.saturating_duration_since(held.at) > age)
    }

    fn discard_if(&mut self, key: Key, which: impl Fn(&Held) -> bool) -> u64 {
        let mut gone = Vec::new();
        if let Some(machine) = self.machines.get_mut(&key) {
            for queue in [&mut machine.streams, &mut machine.datagrams] {
                while queue.front().is_some_and(&which) {
                    gone.extend(queue.pop_front().map(|held| held.cost()));
                }
            }
        }
        for &cost in &gone {
            self.forget(key, cost);
        }
        gone.len() as u64
    }

    fn forget(&mut self, key: Key, cost: u64) {
        if let Some(machine) = self.machines.get_mut(&key) {
            machine.load.sub(cost);
        }
        let network = self.networks.entry(key.net).or_default();
        network.sub(cost);
        if network.frames == 0 {
            self.networks.remove(&key.net);
        }
        self.total.sub(cost);
    }

    /// Frames of one machine.
    pub(super) fn len(&self, key: Key) -> u64 {
        self.machines.get(&key).map_or(0, |m| m.load.frames)
    }

    /// A machine that will not be held for any more: its rate is forgotten too.
    pub(super) fn close(&mut self, key: Key) {
        if self.len(key) == 0 {
            self.machines.remove(&key);
        }
    }

    pub(super) fn total(&self) -> Load {
        self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: Key = Key { net: 1, address: std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST) };
    const OTHER: Key = Key { net: 2, ..KEY };

    fn limits() -> Limits {
        Limits {
            machine: Bound { frames: 3, bytes: 1000 },
            network: Bound { frames: 4, bytes: 10_000 },
            total: Bound { frames: 5, bytes: 100_000 },
            age: Duration::from_secs(1),
            pace: 1000,
        }
    }

    fn frame(n: u8) -> Box<[u8]> {
        Box::from([n])
    }

    #[test]
    fn the_newest_is_refused_by_the_name_of_the_bound_that_it_met() {
        let (now, mut queues) = (Instant::now(), Queues::new(limits()));
        for n in 0..3 {
            queues.push(KEY, Class::Datagram, frame(n), now).unwrap();
        }
        assert_eq!(queues.push(KEY, Class::Stream, frame(3), now), Err(Full::Machine));
        let same_net = Key { address: [10, 0, 0, 1].into(), ..KEY };
        queues.push(same_net, Class::Datagram, frame(0), now).unwrap();
        assert_eq!(queues.push(same_net, Class::Datagram, frame(1), now), Err(Full::Network));
        queues.push(OTHER, Class::Datagram, frame(0), now).unwrap();
        assert_eq!(queues.push(OTHER, Class::Datagram, frame(1), now), Err(Full::Total));
        assert_eq!(&*queues.take(KEY, now).unwrap(), [0], "the oldest stayed");
        queues.push(OTHER, Class::Datagram, frame(1), now).unwrap();
        let large = vec![0; 900].into();
        assert_eq!(queues.push(KEY, Class::Datagram, large, now), Err(Full::Machine), "bytes");
        for key in [KEY, same_net, OTHER] {
            queues.discard(key);
        }
        assert_eq!(queues.total(), Load::default());
    }

    #[test]
    fn streams_go_first_and_each_order_is_kept() {
        let (now, mut queues) = (Instant::now(), Queues::new(Limits::default()));
        for n in 0..10 {
            let class = if n % 2 == 0 { Class::Datagram } else { Class::Stream };
            queues.push(KEY, class, frame(n), now).unwrap();
        }
        let order: Vec<u8> = std::iter::from_fn(|| queues.take(KEY, now)).map(|f| f[0]).collect();
        assert_eq!(order, [1, 3, 5, 7, 9, 0, 2, 4, 6, 8]);
        assert_eq!(queues.len(KEY), 0);
    }

    /// Gives back for `time` in steps; what left in each.
    fn give(queues: &mut Queues, from: Instant, time: Duration, step: Duration) -> Vec<usize> {
        let steps = (time.as_nanos() / step.as_nanos()) as u32;
        (1..=steps)
            .map(|n| std::iter::from_fn(|| queues.take(KEY, from + step * n)).count())
            .collect()
    }

    #[test]
    fn datagrams_are_given_back_at_the_pace() {
        let (start, mut queues) = (Instant::now(), Queues::new(Limits::default()));
        let ms = Duration::from_millis;
        for n in 0..1000_u32 {
            queues.push(KEY, Class::Datagram, frame(0), start + ms(n.into())).unwrap();
        }
        let left = give(&mut queues, start + ms(1000), ms(200), ms(1));
        assert_eq!(left.iter().sum::<usize>(), 1000, "all in 200 ms");
        assert!(left[0] <= 64 && left[1..].iter().all(|&n| n <= 9), "{left:?}");
    }

    #[test]
    fn datagrams_that_come_fast_are_given_back_faster() {
        let (start, mut queues) = (Instant::now(), Queues::new(Limits::default()));
        for n in 0..10_000_u32 {
            let at = start + Duration::from_micros(20) * n;
            queues.push(KEY, Class::Datagram, frame(0), at).unwrap();
        }
        let from = start + Duration::from_millis(200);
        let left = give(&mut queues, from, Duration::from_millis(60), Duration::from_millis(1));
        assert_eq!(left.iter().sum::<usize>(), 10_000, "50,000 a second come, 200,000 go");
    }

    #[test]
    fn a_large_frame_counts_as_the_datagrams_that_are_in_it() {
        let (start, mut queues) = (Instant::now(), Queues::new(Limits::default()));
        for _ in 0..10 {
            queues.push(KEY, Class::Datagram, vec![0; 60_000].into(), start).unwrap();
        }
        let left = give(&mut queues, start, Duration::from_millis(10), Duration::from_millis(1));
        assert!(left.iter().sum::<usize>() <= 4, "{left:?}");
    }

    #[test]
    fn what_has_waited_too_long_is_thrown_away_and_no_more() {
        let (start, mut queues) = (Instant::now(), Queues::new(limits()));
        let ms = Duration::from_millis;
        queues.push(KEY, Class::Stream, frame(0), start).unwrap();
        queues.push(KEY, Class::Stream, frame(1), start + ms(500)).unwrap();
        assert_eq!(queues.expire(KEY, start + ms(1000)), 0);
        assert_eq!(queues.expire(KEY, start + ms(1200)), 1);
        assert_eq!(&*queues.take(KEY, start + ms(1200)).unwrap(), [1]);
    }
}
