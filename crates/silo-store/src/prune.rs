//! Which generations of a line stay, and deleting the others. What they held is deleted by the next
//! collection, if nothing else refers to it.
//!
//! What must hold: the newest generation always stays, and so do those that somebody reads. Of the log, only generations are deleted:
//! entries that took the line, and barriers, are small and are what stops a writer that slept.

use crate::{
    error::Result,
    layout::LineName,
    store::{GenerationInfo, Store},
};
use std::{
    collections::BTreeSet,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// How many generations stay. A generation stays if any rule keeps it; of each hour, day, week and
/// month (of 30 days) the newest counts. Times are UTC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retention {
    /// The newest so many.
    pub last: usize,
    /// One of each of the newest so many hours in which there is one.
    pub hourly: usize,
    /// Of days.
    pub daily: usize,
    /// Of weeks (beginning on Mondays).
    pub weekly: usize,
    /// Of months of 30 days.
    pub monthly: usize,
    /// All that are younger than this.
    pub within: Duration,
}

impl Retention {
    /// The numbers of the generations that stay; `generations` may be in any order.
    #[must_use]
    pub fn keeps(&self, generations: &[GenerationInfo], now: SystemTime) -> BTreeSet<u64> {
        let mut newest_first: Vec<&GenerationInfo> = generations.iter().collect();
        newest_first.sort_by_key(|info| std::cmp::Reverse(info.number));
        let numbers = |infos: &[&GenerationInfo]| -> Vec<u64> {
            infos.iter().map(|info| info.number).collect()
        };
        let mut keep: BTreeSet<u64> =
            numbers(&newest_first[..newest_first.len().min(self.last.max(1))])
                .into_iter()
                .collect();
        let young = |info: &&&GenerationInfo| {
            // A clock that went back makes nothing old.
            now.duration_since(info.made).map_or(true, |age| age < self.within)
        };
        keep.extend(newest_first.iter().filter(young).map(|info| info.number));
        const HOUR: u64 = 3600;
        const DAY: u64 = 24 * HOUR;
        // 1 January 1970 was a Thursday.
        for (count, length, shift) in [
            (self.hourly, HOUR, 0),
            (self.daily, DAY, 0),
            (self.weekly, 7 * DAY, 3 * DAY),
            (self.monthly, 30 * DAY, 0),
        ] {
            let mut seen = BTreeSet::new();
            for info in &newest_first {
                let since = info.made.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
                let period = (since + shift) / length;
                if seen.len() < count && seen.insert(period) {
                    keep.insert(info.number);
                }
            }
        }
        keep
    }
}

/// What pruning did, or would do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pruned {
    /// Deleted, newest first.
    pub deleted: Vec<GenerationInfo>,
    /// Kept.
    pub kept: usize,
    /// Of these, kept only because somebody reads them.
    pub in_use: usize,
}

impl Store {
    /// Deletes the generations of a line that no rule keeps; with `dry_run` only says which.
    ///
    /// # Errors
    /// If the store cannot be read or written; what was deleted by then is deleted.
    pub fn prune(
        &self,
        line: &LineName,
        retention: &Retention,
        now: SystemTime,
        dry_run: bool,
    ) -> Result<Pruned> {
        if !dry_run {
            self.must_write()?;
        }
        let generations = self.generations(line)?;
        let mut keep = retention.keeps(&generations, now);
        let wanted = keep.len();
        // Only so that they can be found again: for whoever reads them their pins are enough.
        let there = |number: &u64| generations.iter().any(|info| info.number == *number);
        keep.extend(self.pinned_of(line, now)?.into_iter().filter(there));
        let in_use = keep.len() - wanted;
        let (kept, deleted): (Vec<_>, Vec<_>) =
            generations.into_iter().partition(|info| keep.contains(&info.number));
        if !dry_run {
            for info in &deleted {
                self.remote.delete(&line.entry(info.number))?;
            }
        }
        Ok(Pruned { deleted, kept: kept.len(), in_use })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(number: u64, hours: u64) -> GenerationInfo {
        let made = UNIX_EPOCH + Duration::from_secs(hours * 3600);
        GenerationInfo { number, epoch: 1, made, packs: 0 }
    }

    #[test]
    fn each_rule_keeps_the_newest_of_its_periods() {
        let all: Vec<_> = (0..100).map(|n| at(n + 1, 1000 * 24 + n * 6)).collect();
        let now = all[99].made + Duration::from_secs(60);
        let keeps =
            |retention: Retention| retention.keeps(&all, now).into_iter().rev().collect::<Vec<_>>();
        assert_eq!(keeps(Retention::default()), [100]);
        assert_eq!(keeps(Retention { last: 3, ..Retention::default() }), [100, 99, 98]);
        assert_eq!(keeps(Retention { daily: 3, ..Retention::default() }), [100, 96, 92]);
        assert_eq!(keeps(Retention { hourly: 2, ..Retention::default() }), [100, 99]);
        let day = Duration::from_secs(24 * 3600);
        assert_eq!(keeps(Retention { within: day, ..Retention::default() }), [100, 99, 98, 97]);
        let weekly = keeps(Retention { weekly: 2, ..Retention::default() });
        assert_eq!(weekly.len(), 2);
        assert!((100 - weekly[1]) * 6 <= 7 * 24);
    }

    proptest! {
        #[test]
        fn the_newest_always_stays_and_more_rules_never_keep_less(
            hours in proptest::collection::vec(0u64..5000, 1..60),
            rules in proptest::array::uniform5(0usize..8), more in proptest::array::uniform5(0usize..3),
        ) {
            let all: Vec<_> = hours.iter().enumerate().map(|(n, h)| at(n as u64 + 1, *h)).collect();
            let retention = |[last, hourly, daily, weekly, monthly]: [usize; 5]| Retention {
                last, hourly, daily, weekly, monthly, within: Duration::ZERO,
            };
            let now = UNIX_EPOCH + Duration::from_secs(5000 * 3600);
            let few = retention(rules).keeps(&all, now);
            prop_assert!(few.contains(&(all.len() as u64)));
            let many = retention(std::array::from_fn(|i| rules[i] + more[i])).keeps(&all, now);
            prop_assert!(few.is_subset(&many));
        }
    }
}
