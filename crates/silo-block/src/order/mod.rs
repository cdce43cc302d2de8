//! Which block goes next.

/// Why a block is sent, most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// Somebody waits for it.
    Demand,
    /// Somebody will probably need it soon.
    Prefetch,
    /// It was sent before and has been written since.
    Dirty,
    /// It was never sent.
    Bulk,
}

impl Class {
    /// All, most urgent first.
    pub const ALL: [Self; 4] = [Self::Demand, Self::Prefetch, Self::Dirty, Self::Bulk];
}
