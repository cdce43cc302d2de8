//! Which compression pays: by the ratio of samples, the speed of the codecs on this processor and
//! the speed of the line, all measured as the move goes. Pure: times come in as arguments.

use std::time::Duration;

/// How plain content is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Not at all.
    Plain,
    /// LZ4: fast.
    Lz4,
    /// zstd at its fastest regular level: smaller.
    Zstd,
}

/// What coding each byte by its frequency would leave of `sample`, 0 to 1.
pub(super) fn entropy(sample: &[u8]) -> f64 {
    let mut counts = [0u32; 256];
    for &byte in sample {
        counts[usize::from(byte)] += 1;
    }
    let total = sample.len().max(1) as f64;
    let bits: f64 = counts
        .iter()
        .filter(|count| **count > 0)
        .map(|&count| f64::from(count) / total)
        .map(|share| -share * share.log2())
        .sum();
    bits / 8.0
}

/// Content that does not shrink below this share is sent plain: unpacking costs the other end too.
const WORTH: f64 = 0.9;
/// A sample is taken at least every so many runs, and at every run while content compresses.
const RARELY: u32 = 16;
/// Weight of a new measurement.
const WEIGHT: f64 = 0.25;
/// A line's speed is taken over at least so much time spent writing.
const WINDOW: Duration = Duration::from_millis(20);

#[derive(Clone, Copy, Debug)]
struct Codec {
    /// Bytes of content per second.
    speed: f64,
    /// Packed over plain.
    ratio: f64,
}

/// Chooses for one connection.
#[derive(Debug)]
pub struct Chooser {
    line: f64,
    lz4: Codec,
    zstd: Codec,
    /// What zstd makes of what LZ4 left, as it showed last.
    advantage: f64,
    /// Runs until the next sample.
    countdown: u32,
    gap: u32,
    written: u64,
    writing: Duration,
}

impl Default for Chooser {
    /// Starts with a fast line and the speeds of an ordinary processor; both are soon measured.
    fn default() -> Self {
        Self {
            line: 2e9,
            lz4: Codec { speed: 6e8, ratio: 1.0 },
            zstd: Codec { speed: 3e8, ratio: 1.0 },
            advantage: 0.75,
            countdown: 0,
            gap: 0,
            written: 0,
            writing: Duration::ZERO,
        }
    }
}

impl Chooser {
    /// `bytes` were handed to the line, and that took `elapsed` (waiting for it included).
    pub fn wrote(&mut self, bytes: u64, elapsed: Duration) {
        self.written += bytes;
        self.writing += elapsed;
        if self.writing >= WINDOW {
            let speed = self.written as f64 / self.writing.as_secs_f64();
            self.line += WEIGHT * (speed - self.line);
            (self.written, self.writing) = (0, Duration::ZERO);
        }
    }

    /// The line is not faster than this, by somebody's will.
    pub fn limit(&mut self, bytes_per_second: f64) {
        self.line = self.line.min(bytes_per_second);
    }

    /// What the line takes, bytes per second.
    #[must_use]
    pub fn line(&self) -> f64 {
        self.line
    }

    /// Whether the next run should be sampled first; counts down.
    pub fn wants_sample(&mut self) -> bool {
        let due = self.countdown == 0;
        self.countdown = if due { self.gap } else { self.countdown - 1 };
        due
    }

    /// A sample of `before` bytes became `after` with LZ4, which finds repeats only; `entropy` is
    /// what coding single bytes would leave of it, 0 to 1, which zstd does too.
    pub fn sampled(&mut self, before: usize, after: usize, entropy: f64) {
        self.lz4.ratio = (after as f64 / before.max(1) as f64).min(1.0);
        self.zstd.ratio = (self.lz4.ratio * self.advantage).min(entropy);
        if self.lz4.ratio >= WORTH {
            self.zstd.ratio = entropy;
        }
        let compresses = self.zstd.ratio < WORTH;
        self.gap = if compresses { 0 } else { (self.gap * 2 + 1).min(RARELY) };
        self.countdown = self.gap;
    }

    /// A run of `before` bytes became `after`, in `elapsed`.
    pub fn packed(&mut self, method: Method, before: usize, after: usize, elapsed: Duration) {
        let codec = match method {
            Method::Plain => return,
            Method::Lz4 => &mut self.lz4,
            Method::Zstd => &mut self.zstd,
        };
        let speed = before as f64 / elapsed.as_secs_f64().max(1e-9);
        codec.speed += WEIGHT * (speed - codec.speed);
        let ratio = after as f64 / before.max(1) as f64;
        if method == Method::Zstd && self.lz4.ratio < WORTH {
            let advantage = (ratio / self.lz4.ratio).min(1.0);
            self.advantage += WEIGHT * (advantage - self.advantage);
        }
    }

    /// The best for content like the last sample. One thread packs and writes in turn, so that the
    /// times of both add up.
    #[must_use]
    pub fn choose(&self) -> Method {
        let cost = |codec: &Codec| 1.0 / codec.speed + codec.ratio / self.line;
        let plain = 1.0 / self.line;
        let candidates = [(Method::Lz4, &self.lz4), (Method::Zstd, &self.zstd)];
        candidates
            .into_iter()
            .filter(|(_, codec)| codec.ratio < WORTH)
            .map(|(method, codec)| (method, cost(codec)))
            .fold((Method::Plain, plain), |best, next| if next.1 < best.1 { next } else { best })
            .0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(bytes_per_second: f64) -> Chooser {
        let mut chooser = Chooser::default();
        for _ in 0..50 {
            chooser.wrote((bytes_per_second / 10.0) as u64, Duration::from_millis(100));
        }
        chooser
    }

    #[test]
    fn text_is_packed_hard_on_a_slow_line_lightly_on_a_fast_one_and_not_at_all_in_memory() {
        for (speed, expected) in [(1e7, Method::Zstd), (1e8, Method::Lz4), (5e9, Method::Plain)] {
            let mut chooser = line(speed);
            chooser.sampled(4096, 1800, 0.6);
            assert_eq!(chooser.choose(), expected, "at {speed} bytes per second");
        }
    }

    #[test]
    fn noise_is_sent_plain_even_on_a_slow_line_and_sampled_rarely() {
        let mut chooser = line(1e6);
        let mut samples = 0;
        for _ in 0..160 {
            if chooser.wants_sample() {
                samples += 1;
                chooser.sampled(4096, 4112, 0.995);
            }
            assert_eq!(chooser.choose(), Method::Plain);
        }
        assert!(samples < 20, "{samples} samples of 160 runs");
    }

    #[test]
    fn digits_that_never_repeat_are_left_to_zstd() {
        let mut chooser = line(1e7);
        chooser.sampled(4096, 4112, 0.42);
        assert_eq!(chooser.choose(), Method::Zstd);
    }

    #[test]
    fn a_line_that_slows_down_changes_the_choice() {
        let mut chooser = line(5e9);
        chooser.sampled(4096, 1000, 0.5);
        assert_eq!(chooser.choose(), Method::Plain);
        for _ in 0..50 {
            chooser.wrote(1_000_000, Duration::from_millis(100));
        }
        assert_eq!(chooser.choose(), Method::Zstd);
    }
}
