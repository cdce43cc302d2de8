//! `moves.jsonl`: one line for each move and each of QEMU's own migrations, with all that is known
//! of it, so that one can see where time goes. Rows are made from samples, never from this file.

use super::{cell::Cell, ours::Sample};
use crate::baseline::Outcome;
use anyhow::Context;
use serde_json::{Value, json};
use std::{
    fs::{self, File},
    io::Write,
    path::Path,
};

/// The open file.
pub(super) struct Journal(File);

impl Journal {
    /// Appends to the file in `folder`.
    pub(super) fn open(folder: &Path) -> anyhow::Result<Journal> {
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        let path = folder.join("moves.jsonl");
        let file = File::options().create(true).append(true).open(&path);
        Ok(Journal(file.with_context(|| format!("opening {}", path.display()))?))
    }

    fn write(&mut self, line: &Value) {
        // A journal that cannot be written is no reason to stop measuring.
        if let Err(error) = writeln!(self.0, "{line}") {
            tracing::warn!(%error, "moves.jsonl is incomplete");
        }
    }

    /// A group begins.
    pub(super) fn group(&mut self, name: &str) {
        self.write(&json!({ "group": name }));
    }

    /// A line was measured.
    pub(super) fn line(&mut self, cell: Cell, line: &crate::rig::line::Line) {
        self.write(&json!({ "line": cell.link.to_string(), "measured": line }));
    }

    /// One of our moves.
    pub(super) fn moved(&mut self, cell: Cell, sample: &Sample) {
        self.write(&json!({
            "cell": cell.to_string(), "gap_ms": sample.gap_ms, "gaps": sample.gaps,
            "move": sample.report,
        }));
    }

    /// One of our moves failed.
    pub(super) fn failed(&mut self, cell: Cell, why: &str) {
        self.write(&json!({ "cell": cell.to_string(), "failed": why }));
    }

    /// One of QEMU's own migrations, and the time it took with the start of its destination.
    pub(super) fn stock(&mut self, cell: Cell, outcome: &Outcome, whole_ms: f64) {
        self.write(&json!({
            "cell": cell.to_string(), "qemu": outcome, "whole_ms": whole_ms,
        }));
    }
}
