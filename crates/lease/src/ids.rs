//! The numbers and names of leases and offers.

use std::fmt;

/// Version of the right to run a machine: a higher one beats a lower one, everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch of the next owner.
    #[must_use]
    pub const fn next(self) -> Self {
        // One a nanosecond lasts for 584 years.
        Self(self.0 + 1)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "epoch {}", self.0)
    }
}

/// One try to boot or to move a machine: a random number, so that no two tries of any host share
/// one, without asking anybody.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AttemptId(pub u64);

impl AttemptId {
    /// A new one.
    ///
    /// # Errors
    /// The kernel has no random numbers (it always has, after early boot).
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = [0; 8];
        getrandom::fill(&mut bytes).map_err(|e| std::io::Error::other(e.to_string()))?;
        Ok(Self(u64::from_le_bytes(bytes)))
    }
}

impl fmt::Display for AttemptId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Marks one write to a lease, so that its author recognises it when the answer got lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Nonce(pub u128);

impl Nonce {
    /// A new one.
    ///
    /// # Errors
    /// As [`AttemptId::random`].
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).map_err(|e| std::io::Error::other(e.to_string()))?;
        Ok(Self(u128::from_le_bytes(bytes)))
    }
}

/// The position of an offer in its attempt: 1, 2, 3, …
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OfferSerial(pub u64);

impl fmt::Display for OfferSerial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "offer {}", self.0)
    }
}

/// A machine's name: 1 to 64 bytes of `[a-z0-9-]`, so that it is safe in file names and messages.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MachineName(String);

/// A name that breaks the rule of [`MachineName`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" cannot name a machine: use 1 to 64 lowercase letters, digits and hyphens")]
pub struct BadMachineName(pub String);

impl MachineName {
    /// Checks and takes a name.
    ///
    /// # Errors
    /// The name breaks the rule above.
    pub fn new(name: &str) -> Result<Self, BadMachineName> {
        let fits = (1..=64).contains(&name.len());
        let clean = name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        if fits && clean { Ok(Self(name.to_owned())) } else { Err(BadMachineName(name.to_owned())) }
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for MachineName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
