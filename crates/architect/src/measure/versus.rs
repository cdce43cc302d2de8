//! One of our machines and the same guest under a stock QEMU, side by side on one rig: they take
//! turns, so that what the computer does meanwhile hits both. While one is moved the other's
//! oracle rests.

use super::{
    Setting,
    cell::Cell,
    groups::values,
    ours::{Bed, Machine, SETTLE, Sample},
    stock::{self, Moved, Stock},
};
use crate::baseline;
use anyhow::Context;
use bench::{Row, Samples, Target};
use drafter::migrate::messages::Mode;
use std::time::Duration;

/// QEMU's blackouts above this (milliseconds) must be beaten by a factor.
const LONG_BLACKOUT_MS: f64 = 30.0;

/// The two.
pub(super) struct Pair {
    cell: Cell,
    ours: Machine,
    stock: Stock,
}

impl Pair {
    /// Boots both; neither keeps anything of a machine that left, so every move is a whole one.
    pub(super) fn boot(setting: &Setting, bed: &mut Bed, cell: Cell) -> anyhow::Result<Pair> {
        let ours = bed.boot(cell, false, false)?;
        ours.writes(bed, false)?;
        let stock = Stock::boot(bed, cell, &setting.package, &setting.accelerator)?;
        stock.writes(false)?;
        Ok(Pair { cell, ours, stock })
    }

    /// Ends both.
    pub(super) fn retire(self, bed: &Bed) {
        bed.retire(&self.ours);
    }

    /// Another rate of writing.
    pub(super) fn set_rate(&mut self, bed: &Bed, rate_mb_s: u64) -> anyhow::Result<()> {
        self.cell.rate_mb_s = rate_mb_s;
        self.ours.set_rate(bed, rate_mb_s)?;
        self.ours.writes(bed, false)?;
        self.stock.set_rate(rate_mb_s)?;
        self.stock.writes(false)
    }

    /// When QEMU counts as not converging: twice what its default limit of 128 MiB/s needs for all
    /// memory, and 5 s.
    fn deadline(&self) -> Duration {
        Duration::from_secs(5 + self.cell.memory_mib / 64)
    }

    /// Moves ours `count` times and QEMU's as `plan` says, by turns. Rows, and our moves.
    pub(super) fn compare(
        &mut self,
        setting: &mut Setting,
        bed: &Bed,
        count: usize,
        plan: &[(baseline::Mode, usize)],
    ) -> anyhow::Result<(Vec<Row>, Vec<Sample>)> {
        let count = setting.times(count);
        let mut ours = Vec::new();
        let mut theirs: Vec<(baseline::Mode, Vec<Moved>)> =
            plan.iter().map(|&(mode, _)| (mode, Vec::new())).collect();
        let rounds = plan.iter().map(|&(_, times)| setting.times(times)).max().unwrap_or(1);
        for round in 0..rounds {
            self.ours.writes(bed, true)?;
            std::thread::sleep(SETTLE);
            while ours.len() * rounds < count * (round + 1) {
                ours.push(self.ours.go(
                    bed,
                    Mode::Hybrid,
                    &mut setting.journal,
                    &setting.abandon,
                )?);
            }
            self.ours.writes(bed, false)?;
            for (at, &(mode, times)) in plan.iter().enumerate() {
                if round >= setting.times(times) {
                    continue;
                }
                self.stock.writes(true)?;
                std::thread::sleep(SETTLE);
                let deadline = self.deadline();
                let moved =
                    self.stock.go(mode, deadline, &mut setting.journal, &setting.abandon)?;
                theirs[at].1.push(moved);
                self.stock.writes(false)?;
            }
        }
        let rows = rows(self.cell, &ours, &theirs)?;
        Ok((rows, ours))
    }

    /// How much of its processor the guest gets while it is moved, next to a guest that stays.
    pub(super) fn slowdown(
        &mut self,
        setting: &mut Setting,
        bed: &Bed,
    ) -> anyhow::Result<Vec<Row>> {
        let spin = "oracle slowdown --seconds 4 --slice-ms 20 >/tmp/spin.json </dev/null 2>&1 &";
        let mut share = |moves: usize| -> anyhow::Result<f64> {
            self.ours.exec(bed, &["/bin/dash", "-c", spin], Duration::from_secs(10))?;
            std::thread::sleep(Duration::from_millis(500));
            for _ in 0..moves {
                self.ours.go(bed, Mode::Hybrid, &mut setting.journal, &setting.abandon)?;
            }
            std::thread::sleep(Duration::from_millis(5500));
            // A shell is in the package; the tools that one is used to are not.
            let read =
                "while read -r line || [ -n \"$line\" ]; do echo \"$line\"; done </tmp/spin.json";
            let out = self.ours.exec(bed, &["/bin/dash", "-c", read], Duration::from_secs(10))?;
            let json: serde_json::Value = serde_json::from_str(&out)?;
            json["mean_share"].as_f64().context("the oracle's answer lacks mean_share")
        };
        let (still, moved) = (share(0)?, share(1)?);
        let bar = "move.slowdown.speed-over-4-s-with-one-move";
        Ok(vec![Row::judged(bar, moved, "of full speed", Some(still), None)])
    }
}

fn median(values: impl IntoIterator<Item = f64>) -> anyhow::Result<Option<f64>> {
    Ok(Samples::new(values).context("a measured value is not a number")?.median())
}

/// The rows of a cell.
fn rows(
    cell: Cell,
    ours: &[Sample],
    theirs: &[(baseline::Mode, Vec<Moved>)],
) -> anyhow::Result<Vec<Row>> {
    let bar = |what: &str| format!("move.versus.{cell}.{what}");
    let mut rows = Vec::new();
    let blackout = values(ours, |sample| Some(sample.report.blackout_ms))?;
    let own = blackout.median().context("no move of ours")?;
    let limit = cell.link.blackout_limit();
    rows.push(Row::judged(&bar("blackout.median"), own, "ms", None, Some(Target::AtMost(limit))));
    rows.extend(blackout.max().map(|max| Row::judged(&bar("blackout.max"), max, "ms", None, None)));
    for (mode, moved) in theirs {
        let name = stock::name_of(*mode);
        let sound: Vec<&Moved> =
            moved.iter().filter(|m| m.outcome.converged && m.outcome.guest_alive).collect();
        let lost = moved.len() - sound.len();
        let count = |what: &str, lost: usize| {
            let of = format!("of {} runs", moved.len());
            Row::judged(&bar(&format!("qemu-{name}.{what}")), lost as f64, &of, None, None)
        };
        rows.push(count("not-converged-or-dead", lost));
        let down = median(sound.iter().filter_map(|m| m.outcome.downtime_ms))?;
        if matches!(mode, baseline::Mode::PreCopyDefault) {
            rows.push(third(&bar("blackout-to-qemu-default"), own, limit, down));
        } else if let Some(down) = down {
            let name = bar(&format!("blackout-to-qemu-{name}"));
            rows.push(Row::judged(&name, own, "ms", Some(down), None));
        }
        let target =
            matches!(mode, baseline::Mode::PostCopy { .. }).then_some(Target::RatioAtMost(1.2));
        let whole = values(ours, |sample| Some(sample.report.total_ms))?.median().unwrap_or(0.0);
        let transfer =
            values(ours, |sample| Some(sample.report.total_ms - sample.report.prepare_ms))?;
        let base = median(sound.iter().map(|m| m.whole_ms))?;
        rows.push(Row::judged(&bar(&format!("total-to-qemu-{name}")), whole, "ms", base, target));
        let base = median(sound.iter().map(|m| m.outcome.wall_ms))?;
        let own = transfer.median().unwrap_or(0.0);
        let name = bar(&format!("total-without-prepare-to-qemu-{name}"));
        rows.push(Row::judged(&name, own, "ms", base, target));
    }
    let memory = (cell.memory_mib << 20) as f64;
    let bytes = values(ours, |sample| Some(sample.report.bytes_sent as f64 / memory))?.median();
    let post = theirs.iter().filter(|(mode, _)| matches!(mode, baseline::Mode::PostCopy { .. }));
    let post = post.flat_map(|(_, moved)| moved).filter(|m| m.outcome.converged);
    let base = median(post.map(|m| m.outcome.bytes as f64 / memory))?;
    rows.extend(bytes.map(|bytes| {
        Row::judged(&bar("bytes-sent-to-qemu-post-copy"), bytes, "× memory", base, None)
    }));
    Ok(rows)
}

/// A third of QEMU's default blackout where that is long, or where it does not get there at all
/// (then there is no figure, and only our own limit can be kept or broken).
fn third(bar: &str, own: f64, limit: f64, theirs: Option<f64>) -> Row {
    match theirs {
        Some(down) if down > LONG_BLACKOUT_MS => {
            Row::judged(bar, own, "ms", Some(down), Some(Target::RatioAtMost(1.0 / 3.0)))
        }
        Some(down) => Row::judged(bar, own, "ms", Some(down), None),
        None => {
            let mut row = Row::judged(bar, own, "ms", None, Some(Target::AtMost(limit)));
            row.target += "; QEMU did not converge, or its guest died";
            row
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_third_is_asked_for_only_of_a_long_blackout() {
        assert_eq!(third("b", 9.0, 10.0, Some(60.0)).met, Some(true));
        assert_eq!(third("b", 21.0, 60.0, Some(60.0)).met, Some(false));
        assert_eq!(third("b", 9.0, 10.0, Some(12.0)).met, None);
    }

    #[test]
    fn where_qemu_does_not_get_there_our_own_limit_is_what_counts() {
        assert_eq!(third("b", 9.0, 10.0, None).met, Some(true));
        let row = third("b", 11.0, 10.0, None);
        assert_eq!((row.met, row.baseline), (Some(false), None));
        assert!(row.target.contains("did not converge"), "{}", row.target);
    }
}
