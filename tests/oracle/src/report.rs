//! What the oracle has seen, as its JSON.

use crate::page::{Identity, Mismatch};
use std::fmt;

/// Something that is not as it must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Finding(String);

impl Finding {
    pub(crate) fn new(what: &str, wants: Identity, mismatch: &Mismatch) -> Self {
        Self(format!("{what} {} {mismatch}; wants {}", wants.number, wants.generation))
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The state of `oracle run`.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub(crate) struct Report {
    /// Pages under watch.
    pub(crate) pages: u64,
    /// Whether they are pinned in memory.
    pub(crate) locked: bool,
    /// Checks of pages so far.
    pub(crate) pages_checked: u64,
    /// Pages found wrong.
    pub(crate) mismatches: u64,
    /// The first of them, of memory or file.
    pub(crate) first_mismatch: Option<String>,
    /// Blocks of the file read back and checked.
    pub(crate) file_checks: u64,
    /// Blocks found wrong.
    pub(crate) file_mismatches: u64,
    /// Blocks written, each synced.
    pub(crate) file_writes: u64,
    /// Reads, writes and syncs that failed.
    pub(crate) file_errors: u64,
    /// The last of them.
    pub(crate) last_file_error: Option<String>,
    /// Memory written since the start, in 10^6 bytes, without the first filling.
    pub(crate) dirtied_mb: u64,
    /// Times that all pages were checked, by the slow round and by `verify`.
    pub(crate) passes: u64,
    /// Whether writing is paused.
    pub(crate) paused: bool,
    /// Longest time in which the memory thread did not get on although it wanted to, in
    /// microseconds of the guest's monotonic clock: a page that took long, another process on the
    /// processor, or a blackout, as far as the guest's clock runs on through it (under QEMU it
    /// stands still while the machine is stopped: measure blackouts from outside).
    pub(crate) longest_stall_us: u64,
    /// Time since the start by the guest's monotonic clock.
    pub(crate) running_ms: u64,
}

impl Report {
    /// Adds what a check of pages found.
    pub(crate) fn add_pages(&mut self, checked: u64, findings: &[Finding]) {
        self.pages_checked += checked;
        self.mismatches += findings.len() as u64;
        self.remember(findings);
    }

    /// Adds what a check of blocks found.
    pub(crate) fn add_blocks(&mut self, checked: u64, findings: &[Finding]) {
        self.file_checks += checked;
        self.file_mismatches += findings.len() as u64;
        self.remember(findings);
    }

    fn remember(&mut self, findings: &[Finding]) {
        if self.first_mismatch.is_none() {
            self.first_mismatch = findings.first().map(ToString::to_string);
        }
    }

    pub(crate) fn add_file_error(&mut self, error: &std::io::Error) {
        self.file_errors += 1;
        self.last_file_error = Some(error.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_finding_stays_and_all_are_counted() {
        let wants = Identity { number: 3, generation: 2, run: 1 };
        let first = Finding::new("page", wants, &Mismatch::Zero);
        let second = Finding::new("block", wants, &Mismatch::Generation { has: 1 });
        let mut report = Report::default();
        report.add_pages(10, &[first]);
        report.add_blocks(5, &[second]);
        assert_eq!((report.mismatches, report.file_mismatches), (1, 1));
        assert_eq!(report.first_mismatch.as_deref(), Some("page 3 is all zeros; wants 2"));
    }

    #[test]
    fn the_fields_that_tests_read_are_in_the_json() {
        let json = serde_json::to_value(Report::default()).unwrap();
        for field in [
            "pages_checked",
            "mismatches",
            "first_mismatch",
            "file_checks",
            "file_mismatches",
            "dirtied_mb",
            "passes",
        ] {
            assert!(json.get(field).is_some(), "{field}");
        }
    }
}
