//! What each read may return. A block is two halves, each a number; every write makes a new number.

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
    next: u64,
}

/// What a flush covers, taken when it begins.
pub(crate) struct Covered(Vec<u64>);

impl Reference {
    pub(crate) fn new(halves: usize) -> Self {
        Self { halves: vec![Half { values: vec![0], known: true }; halves], next: 1 }
    }

    /// A number for a new write.
    pub(crate) fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
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
        for half in &mut self.halves {
            half.known = half.values.len() == 1;
        }
    }

    pub(crate) fn flush_begins(&self) -> Covered {
        // Where nothing is known, all that may be there stays possible.
        let newest = |half: &Half| if half.known { half.values[half.values.len() - 1] } else { 0 };
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
