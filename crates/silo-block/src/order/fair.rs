//! Whose turn it is among the devices of a group: each gets a share of the line in proportion to
//! what it has left, so that all of them end their phases together and none waits for a large one.

/// Turns of a group of devices. A device that has had `b` bytes of the `r` that it had left is
/// `b / r` further in virtual time; the one that is behind is next.
#[derive(Clone, Debug)]
pub struct Fair {
    passed: Vec<f64>,
}

impl Fair {
    /// A group of so many devices.
    #[must_use]
    pub fn new(devices: usize) -> Self {
        Self { passed: vec![0.0; devices] }
    }

    /// The device whose turn it is, of those that have something left (bytes, by device).
    #[must_use]
    pub fn next(&self, left: impl IntoIterator<Item = u64>) -> Option<usize> {
        let candidates = left.into_iter().enumerate().filter(|(_, left)| *left > 0);
        let by_time = |a: &usize, b: &usize| self.passed[*a].total_cmp(&self.passed[*b]);
        candidates.map(|(device, _)| device).min_by(by_time)
    }

    /// A device had `bytes`, of `left` that it had before.
    pub fn took(&mut self, device: usize, bytes: u64, left: u64) {
        // Nobody saves up time in which they had nothing to send.
        let least = self.passed.iter().copied().fold(f64::INFINITY, f64::min);
        let most = self.passed[device];
        self.passed[device] += bytes as f64 / left.max(1) as f64;
        for passed in &mut self.passed {
            *passed = (*passed - least).max(most - least - 1.0).max(0.0);
        }
    }
}
