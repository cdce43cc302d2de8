//! A sign of life: what a protected machine's owner must show, again and again, to keep running it.
//!
//! One [`Beat`] per host (or per runner, where no host agent keeps one), renewed by compare-and-set;
//! the [`Record`](crate::Record)s of machines refer to it. So a store that bills requests sees one
//! write per host and term, however many machines there are. Whoever wants a machine of a silent host
//! fences the beat first: from then on no renewal can succeed, and every machine that refers to it
//! may be taken. The rules are those of drafter's `tenure`.

use crate::{HostName, MachineName, Nonce};
use std::{fmt, time::Duration};

/// Longest term that a beat may have: a day. What is longer is a mistake in units.
pub const LONGEST_TERM: Duration = Duration::from_secs(24 * 60 * 60);

/// Whose sign of life a beat is: a host's, or that of one machine's runner on a host.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BeatName {
    host: HostName,
    machine: Option<MachineName>,
}

impl BeatName {
    /// The beat that all machines of a host share.
    #[must_use]
    pub const fn of_host(host: HostName) -> Self {
        Self { host, machine: None }
    }

    /// The beat of one machine's runner on a host.
    #[must_use]
    pub const fn of_runner(host: HostName, machine: MachineName) -> Self {
        Self { host, machine: Some(machine) }
    }

    /// Reads what `Display` writes: `HOST` or `HOST/MACHINE`.
    ///
    /// # Errors
    /// Says which name is bad.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (host, machine) = match text.split_once('/') {
            Some((host, machine)) => (host, Some(machine)),
            None => (text, None),
        };
        let machine = machine.map(MachineName::new).transpose().map_err(|e| e.to_string())?;
        Ok(Self { host: HostName::new(host).map_err(|e| e.to_string())?, machine })
    }

    /// The host.
    #[must_use]
    pub const fn host(&self) -> &HostName {
        &self.host
    }

    /// The machine whose runner keeps it, if it is not the host's.
    #[must_use]
    pub const fn machine(&self) -> Option<&MachineName> {
        self.machine.as_ref()
    }
}

impl fmt::Display for BeatName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.machine {
            None => write!(f, "{}", self.host),
            Some(machine) => write!(f, "{}/{machine}", self.host),
        }
    }
}

/// One life of a beat: from a start of whoever keeps it until it is fenced.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BeatRef {
    /// Whose.
    pub name: BeatName,
    /// Which life: rises with every start, and after every fence. A beat at a higher one proves that
    /// the lower one is over.
    pub incarnation: u64,
}

impl fmt::Display for BeatRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "beat {} (life {})", self.name, self.incarnation)
    }
}

/// A sign of life, as the store has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Beat {
    /// Whose, and which life of it.
    pub of: BeatRef,
    /// Rises with every renewal.
    pub serial: u64,
    /// How long the keeper's machines may run from the moment at which it began to write this, by
    /// its own clock. In whole milliseconds.
    pub term: Duration,
    /// Set by a taker: this life is over, and no renewal of it succeeds any more.
    pub fenced_by: Option<HostName>,
    /// Different in every beat ever written.
    pub nonce: Nonce,
}

impl Beat {
    /// The first beat of the life after `before` (of the first life, if there was none).
    #[must_use]
    pub fn begun(name: BeatName, before: Option<u64>, term: Duration, nonce: Nonce) -> Self {
        let of = BeatRef { name, incarnation: before.unwrap_or(0).saturating_add(1) };
        Self { of, serial: 0, term, fenced_by: None, nonce }
    }

    /// The next renewal.
    #[must_use]
    pub fn renewed(&self, term: Duration, nonce: Nonce) -> Self {
        Self { serial: self.serial.saturating_add(1), term, nonce, ..self.clone() }
    }

    /// The end of this life, written by `by`.
    #[must_use]
    pub fn fenced(&self, by: HostName, nonce: Nonce) -> Self {
        Self { fenced_by: Some(by), nonce, ..self.clone() }
    }

    /// This very write, found in the store.
    #[must_use]
    pub fn is_same_write(&self, other: &Self) -> bool {
        self.nonce == other.nonce && self.of == other.of && self.serial == other.serial
    }

    /// Whether it proves that `life` is over.
    #[must_use]
    pub fn ends(&self, life: &BeatRef) -> bool {
        self.of.name == life.name
            && (self.of.incarnation > life.incarnation
                || (self.of.incarnation == life.incarnation && self.fenced_by.is_some()))
    }
}
