//! What each read may return. A block is two halves, each a number; every write makes a new number.

use std::collections::BTreeSet;

/// The values that a half may have.
#[derive(Clone, Debug)]
struct Half {
    /// From the one that the last flush covers to the newest.
    values: Vec<u64>,
    /// The newest is what is there; else (after a crash) any of them, until one was seen.
    known: bool,
}

pub(crate) struct Reference {
    halves: Vec<Half>,
    /// Numbers of writes that have not ended: no flush covers them.
    open: BTreeSet<u64>,
    next: u64,
}

/// What a flush covers, taken when it begins.
pub(crate) struct Covered(Vec<u64>);

impl Reference {
    pub(crate) fn new(halves: usize) -> Self {
        Self {
            halves: vec![Half { values: vec![0], known: true }; halves],
            open: BTreeSet::new(),
            next: 1,
        }
    }

    /// A number for a new write.
    pub(crate) fn number(&mut self) -> u64 {
        self.next += 1;
        self.open.insert(self.next);
        self.next
    }

    /// The writes of these numbers have ended.
    pub(crate) fn ended(&mut self, numbers: &[u64]) {
        self.open.retain(|number| !numbers.contains(number));
    }

    pub(crate) fn wrote(&mut self, half: usize, value: u64) {
        let half = &mut self.halves[half];
        half.values.push(value);
        half.known = true;
    }

    /// Checks what was read; after a crash this settles what is there.
    pub(crate) fn read(&mut self, half: usize, value: u64) -> Result<(), String> {
        let state = &mut self.halves[half];
        let fits = if state.known {
            state.values.last() == Some(&value)
        } else {
            state.values.contains(&value)
        };
        if !fits {
            return Err(format!("half {half} reads as {value}, may be {state:?}"));
        }
        if !state.known {
            *state = Half { values: vec![value], known: true };
        }
        Ok(())
    }

    /// The host of the guest died: writes that no flush covers may be lost.
    pub(crate) fn crashed(&mut self) {
        self.open.clear();
        for half in &mut self.halves {
            half.known = half.values.len() == 1;
        }
    }

    pub(crate) fn flush_begins(&self) -> Covered {
        // Where nothing is known, all that may be there stays possible.
        let ended = |half: &Half| half.values.iter().rfind(|v| !self.open.contains(v)).copied();
        let newest = |half: &Half| ended(half).filter(|_| half.known).unwrap_or(0);
        Covered(self.halves.iter().map(newest).collect())
    }

    pub(crate) fn flushed(&mut self, covered: &Covered) {
        for (half, value) in self.halves.iter_mut().zip(&covered.0) {
            if let Some(at) = half.values.iter().position(|known| known == value) {
                half.values.drain(..at);
            }
        }
    }
}
