//! How many bytes a mount keeps in flight: what the line carries in one round trip, found by
//! measuring, never more than the budget.
//!
//! It starts small and doubles for each round (a window's worth of bytes) that carried a quarter
//! more a second than the best before; when three rounds in a row did not, the line is full, and
//! the window becomes half as much again as best rate times smallest round trip. Every few rounds
//! it tries a quarter more. Rounds in which there was not enough to ask for teach nothing.
//!
//! No clock of its own: times come in.

use std::time::{Duration, Instant};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Smallest and largest request of background work, bytes.
pub(super) const MIN_REQUEST: u64 = 128 * KIB;
pub(super) const MAX_REQUEST: u64 = MIB;

const START: u64 = 4 * MIB;
/// Never fewer: enough for a few threads to copy side by side.
const FLOOR: u64 = 512 * KIB;
/// Requests that share a window.
const SHARES: u64 = 16;
/// Rounds without gain that mean a full line.
const FLAT: u32 = 3;
/// Rounds after which the line is looked at again.
const PROBE: u32 = 8;

pub(super) struct Window {
    limit: u64,
    size: u64,
    in_flight: u64,
    /// Smallest time that a request took, and the time a byte takes at best rate.
    round_trip: Option<Duration>,
    /// Bytes a second: the best of this probe period and of the one before.
    best: [f64; 2],
    full: bool,
    flat: u32,
    rounds: u32,
    round: Option<Round>,
}

struct Round {
    began: Instant,
    bytes: u64,
    /// Something had to wait for the window.
    pressed: bool,
}

impl Window {
    pub(super) fn new(limit: u64) -> Self {
        let limit = limit.max(FLOOR);
        Self {
            limit,
            size: START.min(limit),
            in_flight: 0,
            round_trip: None,
            best: [0.0; 2],
            full: false,
            flat: 0,
            rounds: 0,
            round: None,
        }
    }

    /// Bytes that may be in flight.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Smallest time a request took.
    pub(super) fn round_trip(&self) -> Option<Duration> {
        self.round_trip
    }

    /// Best rate seen lately, bytes a second.
    pub(super) fn rate(&self) -> f64 {
        self.best[0].max(self.best[1])
    }

    /// How large a request is: a share of the window.
    pub(super) fn request(&self) -> u64 {
        (self.size / SHARES).next_power_of_two().clamp(MIN_REQUEST, MAX_REQUEST)
    }

    /// Whether another request may leave.
    pub(super) fn has_room(&mut self) -> bool {
        let room = self.in_flight < self.size;
        if !room && let Some(round) = &mut self.round {
            round.pressed = true;
        }
        room
    }

    pub(super) fn sent(&mut self, now: Instant, bytes: u64) {
        self.in_flight += bytes;
        self.round.get_or_insert(Round { began: now, bytes: 0, pressed: false });
    }

    /// A request came back, or was given up (`took` is none).
    pub(super) fn done(&mut self, now: Instant, bytes: u64, took: Option<Duration>) {
        self.in_flight = self.in_flight.saturating_sub(bytes);
        let Some(took) = took else { return };
        self.round_trip = Some(self.round_trip.map_or(took, |least| least.min(took)));
        let Some(round) = &mut self.round else { return };
        round.bytes += bytes;
        let elapsed = now.saturating_duration_since(round.began);
        let least = self.round_trip.unwrap_or_default();
        if round.bytes >= self.size && elapsed >= least {
            let (rate, pressed) =
                (round.bytes as f64 / elapsed.as_secs_f64().max(1e-6), round.pressed);
            self.round = Some(Round { began: now, bytes: 0, pressed: false });
            self.end_round(rate, pressed);
        } else if self.in_flight == 0 {
            self.round = None; // idle time is not the line's
        }
    }

    fn end_round(&mut self, rate: f64, pressed: bool) {
        let gained = rate > 1.25 * self.rate();
        self.best[0] = self.best[0].max(rate);
        if !pressed {
            return;
        }
        self.rounds += 1;
        if self.full {
            self.steady();
            return;
        }
        self.flat = if gained { 0 } else { self.flat + 1 };
        if self.flat >= FLAT {
            self.full = true;
            self.rounds = 0;
            self.steady();
        } else {
            self.size = (self.size * 2).min(self.limit);
        }
    }

    fn steady(&mut self) {
        let carried = self.rate() * self.round_trip.unwrap_or_default().as_secs_f64();
        let mut size = carried * 1.5;
        if self.rounds >= PROBE {
            self.rounds = 0;
            self.best = [0.0, self.best[0]];
            size *= 1.25;
        }
        self.size = (size as u64).clamp(FLOOR.min(self.limit), self.limit);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{cmp::Reverse, collections::BinaryHeap};

    /// Runs a line of `rate` bytes a second and `trip` for `seconds`, and returns the bytes of its
    /// last half second and the largest window.
    fn run(window: &mut Window, rate: f64, trip: Duration, seconds: f64) -> (f64, u64) {
        let start = Instant::now();
        let at = |t: f64| start + Duration::from_secs_f64(t);
        let mut answers = BinaryHeap::new(); // (time in ns, sent in ns, bytes)
        let (mut now, mut line_free, mut late, mut largest) = (0.0f64, 0.0f64, 0.0, 0);
        while now < seconds {
            while window.has_room() {
                let bytes = window.request();
                window.sent(at(now), bytes);
                line_free = line_free.max(now) + bytes as f64 / rate;
                let back = line_free + trip.as_secs_f64();
                answers.push(Reverse(((back * 1e9) as u64, (now * 1e9) as u64, bytes)));
            }
            let Some(Reverse((back, sent, bytes))) = answers.pop() else { break };
            now = back as f64 / 1e9;
            let took = Duration::from_nanos(back - sent);
            window.done(at(now), bytes, Some(took));
            largest = largest.max(window.size());
            if now >= seconds - 0.5 {
                late += bytes as f64;
            }
        }
        (late, largest)
    }

    #[test]
    fn a_long_fat_line_is_filled_and_a_short_one_is_not_flooded() {
        for (rate, trip) in [(1e9, 40), (1e9, 10), (100e6, 100), (5e9, 1), (20e6, 20)] {
            let mut window = Window::new(256 << 20);
            let (late, _) = run(&mut window, rate, Duration::from_millis(trip), 4.0);
            assert!(
                late > 0.9 * rate / 2.0,
                "{rate} bytes/s at {trip} ms: got {} of it",
                late * 2.0 / rate
            );
            let carried = rate * trip as f64 / 1e3;
            let most = (carried * 4.0).max(4.0 * START as f64);
            assert!((window.size() as f64) < most, "{} in flight for {carried}", window.size());
        }
    }

    #[test]
    fn the_budget_is_kept() {
        let mut window = Window::new(8 << 20);
        let (_, largest) = run(&mut window, 1e10, Duration::from_millis(40), 2.0);
        assert_eq!(largest, 8 << 20);
    }

    #[test]
    fn idle_times_teach_nothing() {
        let mut window = Window::new(64 << 20);
        let start = Instant::now();
        for second in 0..20 {
            let now = start + Duration::from_secs(second);
            window.sent(now, MIB);
            window.done(now + Duration::from_millis(1), MIB, Some(Duration::from_millis(1)));
        }
        assert_eq!(window.size(), START);
        assert!(window.has_room());
    }
}
