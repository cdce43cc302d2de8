//! What the tests of this crate share.
#![allow(dead_code, unreachable_pub, reason = "each test uses a part")]
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

pub mod content;
pub mod early;
pub mod file;
pub mod killing;
pub mod memory;
pub mod rig;
pub mod tap;

use std::time::{Duration, Instant};

/// A mebibyte.
pub const MIB: u64 = 1 << 20;
/// The longest that a test waits for anything.
pub const WAIT: Duration = Duration::from_secs(60);

/// A stream of numbers that is the same for the same seed.
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// Fills with bytes that do not compress.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let word = self.next().to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    }
}

/// Waits until `done`, or fails with `what`.
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < WAIT, "waited {WAIT:?} for {what}");
        std::thread::park_timeout(Duration::from_millis(2));
    }
}
