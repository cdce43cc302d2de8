//! Backups of a machine that works: how long it stands still for one, and what the store gets of it.

use super::{
    Setting,
    cell::Cell,
    groups::{none_of, spread},
    ours::SETTLE,
    store::LocalStore,
};
use anyhow::{Context, ensure};
use bench::{Row, Samples, Target};
use drafter::runner::api::BackupReport;

/// Generations after the first.
const COUNT: usize = 30;
/// The most memory that may be copied while a machine stands still.
const MOST_PAUSED: f64 = 8.0;
/// Bytes in the store for each byte that was written, at most.
const MOST_STORED: f64 = 1.1;
const MIB: f64 = 1_048_576.0;

pub(super) fn backups(setting: &mut Setting) -> anyhow::Result<Vec<Row>> {
    let cell = Cell::new(256, 100);
    let (mut bed, _) = setting.bed(cell)?;
    let machine = bed.boot(cell, false, false)?;
    let store = LocalStore::new().context("making a folder for the store")?;
    let request = store.backup("bench/machine");
    std::thread::sleep(SETTLE);
    let first = machine.back_up(&bed, &request)?;
    let count = setting.times(COUNT);
    let mut later = Vec::with_capacity(count);
    for _ in 0..count {
        setting.abandon.check()?;
        std::thread::sleep(SETTLE);
        let report = machine.back_up(&bed, &request)?;
        ensure!(report.changes_only, "generation {} compared everything", report.number);
        later.push(report);
    }
    let findings = machine.verify(&bed)?;
    let of = |value: &dyn Fn(&BackupReport) -> f64| {
        Samples::new(later.iter().map(value)).context("a measured value is not a number")
    };
    let bar = format!("backup.machine.pause.{cell}");
    let mut rows = spread(&bar, "ms", &of(&|report| report.pause_ms)?, None, None);
    let copied = of(&|report| report.copied_paused_bytes as f64 / MIB)?.max();
    let stored =
        of(&|report| report.stored_bytes as f64 / (report.blocks as f64 * 4096.0))?.median();
    let (copied, stored) = (copied.context("no backup")?, stored.context("no backup")?);
    let figure = |bar: &str, value, unit: &str, target| {
        Row::judged(&format!("backup.machine.{bar}"), value, unit, None, target)
    };
    let (most, dear) = (Target::AtMost(MOST_PAUSED), Target::AtMost(MOST_STORED));
    rows.push(figure("copied-in-pause.max", copied, "MiB", Some(most)));
    rows.push(figure("stored-per-written.median", stored, "", Some(dear)));
    let first_mib = first.stored_bytes as f64 / MIB;
    rows.push(figure("first.stored", first_mib, "MiB", None));
    rows.push(figure("first.time", first.total_ms / 1e3, "s", None));
    let later_mib = of(&|report| report.stored_bytes as f64 / MIB)?.median();
    rows.push(figure("later.stored.median", later_mib.context("no backup")?, "MiB", None));
    rows.push(none_of("backup.machine.mismatches", findings.wrong));
    bed.retire(&machine);
    Ok(rows)
}
