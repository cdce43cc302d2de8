//! Evacuation: a host is taken back at a deadline, and its machines have one line to leave by. Which
//! of them leave, in which order, and by which way?
//!
//! ```text
//!   Load, Load, …  ┐                   ┌ Plan: steps with their times, who cannot be saved and why,
//!   Terms          ┴─▶ plan ⇄ foresee ─┴       and what it would take to save all
//! ```
//!
//! [`plan`] decides, [`foresee`] tells what comes of a decision: the line is shared equally by the
//! machines that are under way, each has a fixed cost before its first byte, and what it writes while
//! it is copied is sent again. Nothing here knows hosts, sockets or clocks: whoever evacuates a host
//! measures the loads, asks, and does the steps; and asks again when something turned out otherwise.
//!
//! What must hold: a plan never calls a machine saved that [`foresee`] does not; a machine that can
//! be saved in time at its least cost is not left behind for the sake of ones that are worth less; the
//! same input gives the same plan.

mod foresee;
mod plan;
mod subset;

pub use foresee::{Times, foresee};
pub use plan::{Fate, Left, Needed, Plan, Step, plan};

use serde::{Deserialize, Serialize};
use std::{fmt, time::Duration};

/// A number of bytes.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Bytes(pub u64);

/// Bytes per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Rate(pub u64);

impl Rate {
    /// From the unit in which lines are sold: 1 Mb/s is 125,000 bytes per second.
    #[must_use]
    pub const fn from_megabits(megabits: u64) -> Self {
        Self(megabits.saturating_mul(125_000))
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = self.0 as f64 / f64::from(1 << 20);
        if mib < 1024.0 { write!(f, "{mib:.1} MiB") } else { write!(f, "{:.2} GiB", mib / 1024.0) }
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let megabits = self.0 as f64 / 125_000.0;
        if megabits < 1000.0 {
            write!(f, "{megabits:.0} Mb/s")
        } else {
            write!(f, "{:.2} Gb/s", megabits / 1000.0)
        }
    }
}

/// What is known of a machine that is to leave. Measured where it can be, else estimated high.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Load {
    /// Its name, for people.
    pub name: String,
    /// What it is worth next to the others; 0 counts as 1.
    pub weight: u32,
    /// What a destination lacks of its memory and its disks, after zeros, duplicates and compression.
    pub bytes: Bytes,
    /// Of these, what a sleep in a store finds there already.
    pub in_store: Bytes,
    /// Of these, what a destination can bring from a store with the content of now.
    pub brought: Bytes,
    /// What it writes anew, of memory and disks.
    pub dirties: Rate,
    /// The most that it writes over and over: no copy has more than this to send again.
    pub hot: Bytes,
    /// Some host can take it while it runs.
    pub destination: bool,
    /// It can be put to sleep in a store, if there is one.
    pub may_sleep: bool,
    /// Its generations are in a store, so that it can come back from one: as of this long ago.
    pub generation_age: Option<Duration>,
}

/// What there is to leave by.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Terms {
    /// From now until the host is gone.
    pub deadline: Duration,
    /// Of that, the part that is not planned with, in percent: lines and guests are not as they were
    /// measured. 100 plans with nothing.
    pub reserve_percent: u8,
    /// What the line out of the host carries, for all machines together.
    pub line: Rate,
    /// How many machines are under way at once; 0 counts as 1.
    pub parallel: u16,
    /// What a move costs before its first byte: a monitor is started, connections are made.
    pub setup: Duration,
    /// What a store helps with.
    pub store: StoreUse,
}

impl Load {
    /// What it takes to say what all blocks are called, so that a destination finds those that it has: 32
    /// bytes for 4096.
    #[must_use]
    pub fn names(&self) -> Bytes {
        Bytes(self.bytes.0 / 128)
    }
}

/// What a store is good for, of an evacuation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StoreUse {
    /// There is none.
    #[default]
    None,
    /// Machines can be put to sleep in it.
    Sleeps,
    /// The same, and destinations of moves fetch from it what it has.
    SleepsAndMoves,
}

impl Terms {
    /// The time that is planned with.
    #[must_use]
    pub fn usable(&self) -> Duration {
        self.deadline * u32::from(100 - self.reserve_percent.min(100)) / 100
    }
}

/// How a machine leaves. In the order of what its clients notice of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// It is copied while it runs here, and handed over when that is nearly done.
    Hybrid,
    /// The same, without what a store has: the destination fetches that from there.
    HybridWithStore,
    /// It is handed over at once and copied afterwards: nothing is sent twice, and it waits for what it
    /// touches.
    PostCopy,
    /// The same, without what a store has.
    PostCopyWithStore,
    /// What the store lacks is stored while it runs here, then it is stopped, and what it wrote meanwhile
    /// follows; it goes on elsewhere later.
    Suspend,
}

impl Way {
    /// All of them, the gentlest first.
    pub const ALL: [Self; 5] = [
        Self::Hybrid,
        Self::HybridWithStore,
        Self::PostCopy,
        Self::PostCopyWithStore,
        Self::Suspend,
    ];

    /// Whether a machine can go this way.
    #[must_use]
    pub fn is_open(self, load: &Load, terms: &Terms) -> bool {
        let helps = terms.store == StoreUse::SleepsAndMoves && load.brought > load.names();
        match self {
            Self::Hybrid | Self::PostCopy => load.destination,
            Self::HybridWithStore | Self::PostCopyWithStore => load.destination && helps,
            Self::Suspend => terms.store != StoreUse::None && load.may_sleep,
        }
    }

    /// What is sent once, whatever the machine writes meanwhile.
    #[must_use]
    pub fn first_copy(self, load: &Load) -> Bytes {
        match self {
            Self::Hybrid | Self::PostCopy => load.bytes,
            Self::HybridWithStore | Self::PostCopyWithStore => {
                let lacking = load.bytes.0.saturating_sub(load.brought.0);
                Bytes(lacking.saturating_add(load.names().0))
            }
            Self::Suspend => Bytes(load.bytes.0.saturating_sub(load.in_store.0)),
        }
    }

    /// Whether it moves with what the store has.
    #[must_use]
    pub fn brings(self) -> bool {
        matches!(self, Self::HybridWithStore | Self::PostCopyWithStore)
    }

    /// Whether what the machine writes during the first copy is sent again.
    #[must_use]
    pub fn copies_while_it_runs_here(self) -> bool {
        matches!(self, Self::Hybrid | Self::HybridWithStore | Self::Suspend)
    }

    /// The most that is sent, however long it takes.
    #[must_use]
    pub fn most(self, load: &Load) -> Bytes {
        let first = self.first_copy(load);
        // Who has nothing to copy writes nothing meanwhile.
        let again = self.copies_while_it_runs_here() && first > Bytes(0);
        Bytes(first.0.saturating_add(if again { load.hot.0 } else { 0 }))
    }

    /// What is sent if it has the line for itself.
    #[must_use]
    pub fn alone(self, load: &Load, line: Rate) -> Bytes {
        let (first, most) = (self.first_copy(load), self.most(load));
        let written = u128::from(first.0) * u128::from(load.dirties.0) / u128::from(line.0.max(1));
        let written = u64::try_from(written).unwrap_or(u64::MAX);
        Bytes(first.0.saturating_add(written).min(most.0))
    }

    /// Its name, as in the commands.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Hybrid => "hybrid",
            Self::HybridWithStore => "hybrid with the store",
            Self::PostCopy => "post-copy",
            Self::PostCopyWithStore => "post-copy with the store",
            Self::Suspend => "suspended to the store",
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
pub(crate) mod samples {
    use super::*;

    pub(crate) const MIB: u64 = 1 << 20;

    /// A machine of so many MiB that writes little.
    pub(crate) fn load(name: &str, mib: u64) -> Load {
        Load {
            name: name.to_owned(),
            weight: 1,
            bytes: Bytes(mib * MIB),
            in_store: Bytes(0),
            brought: Bytes(0),
            dirties: Rate(MIB),
            hot: Bytes(4 * MIB),
            destination: true,
            may_sleep: true,
            generation_age: None,
        }
    }

    /// So many seconds at 1 Gb/s.
    pub(crate) fn terms(seconds: u64) -> Terms {
        Terms {
            deadline: Duration::from_secs(seconds),
            reserve_percent: 0,
            line: Rate::from_megabits(1000),
            parallel: 2,
            setup: Duration::from_millis(200),
            store: StoreUse::SleepsAndMoves,
        }
    }
}
