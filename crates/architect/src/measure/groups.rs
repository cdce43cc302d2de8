//! What is measured, and what is promised of it. A group shares a rig; its bars begin with the
//! prefixes that it names.

use super::{
    Setting, backups,
    cell::{Cell, Link},
    evacuate, follow, fork,
    ours::{Bed, Machine, SETTLE, Sample},
    protect, sleep, versus,
};
use anyhow::{Context, ensure};
use bench::{Row, Samples, Target};
use drafter::migrate::messages::Mode;

/// Megabytes, as in memory.
const MIB: f64 = 1_048_576.0;

/// Measurements that share a rig.
pub(super) struct Group {
    /// For messages.
    pub(super) name: &'static str,
    /// What it does, for people.
    pub(super) about: &'static str,
    /// What its bars' names begin with.
    pub(super) bars: &'static [&'static str],
    /// Measures.
    pub(super) run: fn(&mut Setting) -> anyhow::Result<Vec<Row>>,
}

impl Group {
    /// Whether it makes bars whose names begin with `prefix`.
    pub(super) fn concerns(&self, prefix: &str) -> bool {
        self.bars.iter().any(|bar| bar.starts_with(prefix) || prefix.starts_with(bar))
    }
}

/// All of them, the most important first.
pub(super) const ALL: &[Group] = &[
    Group {
        name: "busy",
        about: "1 GiB at 100 MB/s with a Redis client, 200 moves back and forth (hybrid, TLS)",
        bars: &[
            "move.blackout.1gib.100mbs.fast.tls",
            "move.gap.",
            "move.client.",
            "move.return.",
            "move.fault.",
            "move.mismatches.hybrid",
        ],
        run: busy,
    },
    Group {
        name: "quiet",
        about: "1 GiB with a Redis client and nothing else, 40 moves back and forth (hybrid, TLS)",
        bars: &["move.quiet."],
        run: quiet,
    },
    Group {
        name: "modes",
        about: "256 MiB, 100 moves in a row in pre-copy and in post-copy, with the checker",
        bars: &[
            "move.mismatches.pre-copy",
            "move.mismatches.post-copy",
            "move.blackout.pre-copy",
            "move.blackout.post-copy",
        ],
        run: modes,
    },
    Group {
        name: "sizes",
        about: "whole moves of 256 MiB and 4 GiB at 100 MB/s, next to QEMU's",
        bars: &["move.size.", "move.versus.256mib.100mbs.fast", "move.versus.4gib.100mbs.fast"],
        run: sizes,
    },
    Group {
        name: "rates",
        about: "whole moves of 1 GiB, idle and at 20, 100 and 400 MB/s, next to QEMU's",
        bars: &[
            "move.versus.1gib.idle.fast",
            "move.versus.1gib.20mbs.fast",
            "move.versus.1gib.100mbs.fast.plain",
            "move.versus.1gib.400mbs.fast",
            "move.slowdown.",
        ],
        run: rates,
    },
    Group {
        name: "tls",
        about: "whole moves of 1 GiB at 100 MB/s, mutual TLS next to QEMU's TLS",
        bars: &["move.versus.1gib.100mbs.fast.tls"],
        run: tls,
    },
    Group {
        name: "far",
        about: "whole moves of 1 GiB at 100 MB/s over round trips of 20 and 80 ms, next to QEMU's",
        bars: &["move.versus.1gib.100mbs.20ms", "move.versus.1gib.100mbs.80ms"],
        run: far,
    },
    Group {
        name: "narrow",
        about: "whole moves of 1 GiB at 100 MB/s over 1 Gbit/s, next to QEMU's",
        bars: &["move.versus.1gib.100mbs.1000mbit"],
        run: narrow,
    },
    Group {
        name: "backups",
        about: "256 MiB at 100 MB/s, 30 generations to a store in a folder, with the checker",
        bars: &["backup.machine."],
        run: backups::backups,
    },
    Group {
        name: "protect",
        about: "256 MiB at 20 MB/s with Redis, a generation a second, and hosts that die",
        bars: &["handover.protect.", "handover.loss."],
        run: protect::protect,
    },
    Group {
        name: "sleep",
        about: "512 MiB with Redis and 50 MiB changed, suspended to a store and resumed elsewhere",
        bars: sleep::BARS,
        run: sleep::sleep,
    },
    Group {
        name: "follow",
        about: "192 MiB with Redis, bulk, a download, UDP and IPv6, and an old host that is cut off",
        bars: &[follow::BARS],
        run: follow::follow,
    },
    Group {
        name: "fork",
        about: "512 MiB with Redis, ten copies on its host, five times",
        bars: &[fork::BARS],
        run: fork::fork,
    },
    Group {
        name: "evacuate",
        about: "20 machines of 128 MiB leave a host over 1 Gbit/s, a client at each",
        bars: &[evacuate::BARS],
        run: evacuate::evacuate,
    },
];

/// A value of each sample.
pub(super) fn values(
    samples: &[Sample],
    value: impl Fn(&Sample) -> Option<f64>,
) -> anyhow::Result<Samples> {
    Samples::new(samples.iter().filter_map(value)).context("a measured value is not a number")
}

fn blackouts(samples: &[Sample]) -> anyhow::Result<Samples> {
    values(samples, |sample| Some(sample.report.blackout_ms))
}

/// Rows of a figure that has a median, a largest value and, where there are enough, a 99th
/// percentile.
pub(super) fn spread(
    bar: &str,
    unit: &str,
    samples: &Samples,
    median: Option<Target>,
    p99: Option<Target>,
) -> Vec<Row> {
    let row = |what: &str, value: Option<f64>, target| {
        value.map(|value| Row::judged(&format!("{bar}.{what}"), value, unit, None, target))
    };
    let rows = [
        row("median", samples.median(), median),
        row("p99", samples.p99(), p99),
        row("max", samples.max(), None),
    ];
    if p99.is_some() && samples.p99().is_none() {
        println!("   {bar}.p99 is left out: {} moves, 200 are needed", samples.count());
    }
    rows.into_iter().flatten().collect()
}

/// A count that must be zero.
pub(super) fn none_of(bar: &str, count: u64) -> Row {
    Row::judged(bar, count as f64, "", None, Some(Target::AtMost(0.0)))
}

/// Moves back and forth, with the given pause before each.
fn back_and_forth(
    setting: &mut Setting,
    bed: &Bed,
    machine: &mut Machine,
    mode: Mode,
    count: usize,
) -> anyhow::Result<Vec<Sample>> {
    let mut samples = Vec::with_capacity(count);
    for _ in 0..count {
        samples.push(machine.go(bed, mode, &mut setting.journal, &setting.abandon)?);
        // The guest goes on with its work: changes pile up as they do between real moves.
        std::thread::sleep(SETTLE / 4);
    }
    Ok(samples)
}

fn busy(setting: &mut Setting) -> anyhow::Result<Vec<Row>> {
    let cell = Cell::new(1024, 100);
    let (mut bed, line) = setting.bed(cell)?;
    let mut machine = bed.boot(cell, true, true)?;
    machine.start_load(&bed)?;
    std::thread::sleep(SETTLE);
    let quiet = machine.quiet_gap(std::time::Duration::from_secs(2)).context("no client")?;
    println!("   the client's longest silence in 2 s without a move: {quiet:.1} ms");
    // The first two touch all memory of both hosts and are moves to a stranger.
    back_and_forth(setting, &bed, &mut machine, Mode::Hybrid, 2)?;
    let count = setting.times(200);
    let samples = back_and_forth(setting, &bed, &mut machine, Mode::Hybrid, count)?;
    let load = machine.take_load().context("the client has gone")?;
    let client = load.finish()?;
    let findings = machine.verify(&bed)?;

    let blackout = blackouts(&samples)?;
    let bar = format!("move.blackout.{cell}");
    let mut rows =
        spread(&bar, "ms", &blackout, Some(Target::AtMost(10.0)), Some(Target::AtMost(30.0)));
    let gap = values(&samples, |sample| sample.gap_ms)?;
    let allowed = allowed_gap(&samples)?;
    rows.extend(spread(
        &format!("move.gap.{cell}"),
        "ms",
        &gap,
        Some(Target::AtMost(allowed)),
        None,
    ));
    rows.push(Row::judged("move.gap.without-a-move.2s-max", quiet, "ms", None, None));
    rows.extend(parts(&samples, "1gib.100mbs")?);
    for problem in &client.problems {
        println!("   client: {problem}");
    }
    ensure!(client.operations > 0, "the client completed nothing");
    rows.push(none_of("move.client.reconnects", client.reconnects));
    rows.push(none_of("move.client.errors", client.errors + u64::from(!client.verified)));
    rows.push(none_of("move.client.lost-writes", client.lost_writes + client.wrong_answers));
    rows.push(none_of("move.client.doubled-writes", client.doubled_writes));
    if let Some(rto) = client.tcp.rto {
        rows.push(none_of("move.client.retransmission-time-outs", rto));
    }
    rows.push(none_of("move.mismatches.hybrid", findings.wrong));
    rows.push(Row::judged(
        "move.mismatches.hybrid.pages-checked",
        findings.pages as f64,
        "pages",
        None,
        None,
    ));
    rows.push(returned(&samples)?);
    let faults = values(&samples, |sample| {
        (sample.report.faults.demanded > 0).then_some(sample.report.faults.p50_us as f64)
    })?;
    if let Some(median) = faults.median() {
        rows.push(Row::judged("move.fault.p50", median, "µs", None, None));
    }
    let faults = values(&samples, |sample| {
        (sample.report.faults.demanded > 0).then_some(sample.report.faults.p99_us as f64)
    })?;
    if let Some(median) = faults.median() {
        rows.push(Row::judged("move.fault.p99.median-of-moves", median, "µs", None, None));
    }
    rows.push(line_row(cell, line.bits_per_second_late));
    Ok(rows)
}

/// The same client on a guest that does nothing else: what of the gap is the move's own, and what
/// is the price of sharing one translated processor with a busy neighbour.
fn quiet(setting: &mut Setting) -> anyhow::Result<Vec<Row>> {
    let cell = Cell::new(1024, 0);
    let (mut bed, _) = setting.bed(cell)?;
    let mut machine = bed.boot(cell, true, true)?;
    // Its checks of memory and file are something else, too.
    machine.exec(&bed, &["/usr/bin/oracle", "stop"], std::time::Duration::from_secs(10))?;
    machine.start_load(&bed)?;
    std::thread::sleep(SETTLE);
    back_and_forth(setting, &bed, &mut machine, Mode::Hybrid, 2)?;
    let count = setting.times(40);
    let samples = back_and_forth(setting, &bed, &mut machine, Mode::Hybrid, count)?;
    let blackout = blackouts(&samples)?;
    let gap = values(&samples, |sample| sample.gap_ms)?;
    let allowed = allowed_gap(&samples)?;
    let client = machine.take_load().context("the client has gone")?.finish()?;
    println!("   the client's kernel sent {} segments again", client.tcp.retransmits);
    let mut rows = spread("move.quiet.blackout", "ms", &blackout, Some(Target::AtMost(10.0)), None);
    rows.extend(spread("move.quiet.gap", "ms", &gap, Some(Target::AtMost(allowed)), None));
    Ok(rows)
}

/// What a client may notice, in the median: the blackout, 40 ms, and the lease's round trip, before
/// whose end no frame leaves the destination (it is a synced file here).
fn allowed_gap(samples: &[Sample]) -> anyhow::Result<f64> {
    let released = values(samples, |sample| Some(sample.report.confirmed_ms))?;
    Ok(released.median().context("no move")? + 40.0)
}

/// Where the blackout goes, in the median; not promised, but what one looks at next.
fn parts(samples: &[Sample], name: &str) -> anyhow::Result<Vec<Row>> {
    type Part = fn(&Sample) -> f64;
    let parts: [(&str, Part); 8] = [
        ("pause", |s| s.report.blackout.pause_ms),
        ("scan", |s| s.report.blackout.scan_ms),
        ("save", |s| s.report.blackout.save_ms),
        ("send", |s| s.report.blackout.send_ms),
        ("arm", |s| s.report.blackout.arm_ms),
        ("load", |s| s.report.blackout.load_ms),
        ("run", |s| s.report.blackout.run_ms),
        ("gap-after-blackout", |s| {
            s.gap_ms.map_or(0.0, |gap| (gap - s.report.blackout_ms).max(0.0))
        }),
    ];
    let mut rows = Vec::new();
    for (part, value) in parts {
        if let Some(median) = values(samples, |sample| Some(value(sample)))?.median() {
            let bar = format!("move.gap.part.{name}.{part}");
            rows.push(Row::judged(&bar, median, "ms", None, None));
        }
    }
    Ok(rows)
}

/// What moves of a machine that comes back send beyond what changed: 2 % and 1 MiB are allowed.
fn returned(samples: &[Sample]) -> anyhow::Result<Row> {
    let over = values(samples, |sample| {
        let report = &sample.report;
        let changed =
            report.rounds.iter().map(|round| round.set_bytes).sum::<u64>() + report.dirty_bytes;
        report.returned.then(|| (report.bytes_sent as f64 - changed as f64 * 1.02) / MIB)
    })?;
    let worst = over.max().context("no move was that of a machine that came back")?;
    let bar = "move.return.beyond-changed-and-2-percent.max";
    Ok(Row::judged(bar, worst, "MiB", None, Some(Target::AtMost(1.0))))
}

/// What the line itself reaches.
pub(super) fn line_row(cell: Cell, bits_per_second: f64) -> Row {
    let bar = format!("move.line.{}", cell.link);
    Row::judged(&bar, bits_per_second / 1e6, "Mbit/s", None, None)
}

fn modes(setting: &mut Setting) -> anyhow::Result<Vec<Row>> {
    // Pre-copy alone ends only where the link is faster than the guest writes.
    let cell = Cell::new(256, 20);
    let (mut bed, _) = setting.bed(cell)?;
    let mut machine = bed.boot(cell, true, false)?;
    let mut rows = Vec::new();
    let mut before = machine.verify(&bed)?;
    for mode in [Mode::PreCopy, Mode::PostCopy] {
        let count = setting.times(100);
        let samples = back_and_forth(setting, &bed, &mut machine, mode, count)?;
        let findings = machine.verify(&bed)?;
        rows.push(none_of(&format!("move.mismatches.{mode}"), findings.wrong - before.wrong));
        rows.push(Row::judged(
            &format!("move.mismatches.{mode}.pages-checked"),
            (findings.pages - before.pages) as f64,
            "pages",
            None,
            None,
        ));
        before = findings;
        let bar = format!("move.blackout.{mode}.{cell}");
        rows.extend(spread(&bar, "ms", &blackouts(&samples)?, Some(Target::AtMost(10.0)), None));
    }
    Ok(rows)
}

fn sizes(setting: &mut Setting) -> anyhow::Result<Vec<Row>> {
    use super::stock::{DEFAULT, MULTIFD, POST_COPY, TUNED};
    let plain = |mib, rate| Cell { tls: false, ..Cell::new(mib, rate) };
    let (small, large) = (plain(256, 100), plain(4096, 100));
    let (mut bed, line) = setting.bed(small)?;
    let mut rows = vec![line_row(small, line.bits_per_second_late)];
    let plan = [(DEFAULT, 3), (TUNED, 3), (MULTIFD, 3), (POST_COPY, 5)];
    let mut pair = versus::Pair::boot(setting, &mut bed, small)?;
    let (more, small_ones) = pair.compare(setting, &bed, 15, &plan)?;
    rows.extend(more);
    pair.retire(&bed);
    let plan = [(DEFAULT, 1), (TUNED, 1), (MULTIFD, 1), (POST_COPY, 2)];
    let mut pair = versus::Pair::boot(setting, &mut bed, large)?;
    let (more, large_ones) = pair.compare(setting, &bed, 10, &plan)?;
    rows.extend(more);
    let small = blackouts(&small_ones)?.median().context("no move of the small guest")?;
    let large = blackouts(&large_ones)?.median().context("no move of the large guest")?;
    let bar = "move.size.blackout.4gib-to-256mib";
    let target = Target::AtMost(small * 1.5 + 4.0);
    rows.push(Row::judged(bar, large, "ms", Some(small), Some(target)));
    Ok(rows)
}

fn rates(setting: &mut Setting) -> anyhow::Result<Vec<Row>> {
    use super::stock::{DEFAULT, MULTIFD, POST_COPY, TUNED};
    let cell = Cell { tls: false, ..Cell::new(1024, 0) };
    let (mut bed, line) = setting.bed(cell)?;
    let mut rows = vec![line_row(cell, line.bits_per_second_late)];
    let mut pair = versus::Pair::boot(setting, &mut bed, cell)?;
    rows.extend(pair.compare(setting, &bed, 10, &[(DEFAULT, 1), (POST_COPY, 3)])?.0);
    rows.extend(pair.slowdown(setting, &bed)?);
    pair.set_rate(&bed, 20)?;
    rows.extend(pair.compare(setting, &bed, 10, &[(DEFAULT, 1), (POST_COPY, 3)])?.0);
    pair.set_rate(&bed, 100)?;
    let plan = [(DEFAULT, 1), (TUNED, 3), (MULTIFD, 3), (POST_COPY, 3)];
    rows.extend(pair.compare(setting, &bed, 10, &plan)?.0);
    pair.set_rate(&bed, 400)?;
    let plan = [(DEFAULT, 1), (TUNED, 2), (MULTIFD, 2), (POST_COPY, 3)];
    rows.extend(pair.compare(setting, &bed, 10, &plan)?.0);
    Ok(rows)
}

/// One cell on a rig of its own.
fn alone(
    setting: &mut Setting,
    cell: Cell,
    count: usize,
    plan: &[(crate::baseline::Mode, usize)],
) -> anyhow::Result<Vec<Row>> {
    let (mut bed, line) = setting.bed(cell)?;
    let mut pair = versus::Pair::boot(setting, &mut bed, cell)?;
    let mut rows = pair.compare(setting, &bed, count, plan)?.0;
    rows.push(line_row(cell, line.bits_per_second_late));
    Ok(rows)
}

fn tls(setting: &mut Setting) -> anyhow::Result<Vec<Row>> {
    alone(setting, Cell::new(1024, 100), 10, &[(super::stock::POST_COPY, 3)])
}

fn far(setting: &mut Setting) -> anyhow::Result<Vec<Row>> {
    use super::stock::{DEFAULT, POST_COPY};
    let mut rows = Vec::new();
    for delay_ms in [20, 80] {
        let link = Link { delay_ms, megabits: None };
        let cell = Cell { link, tls: false, ..Cell::new(1024, 100) };
        rows.extend(alone(setting, cell, 10, &[(DEFAULT, 1), (POST_COPY, 2)])?);
    }
    Ok(rows)
}

fn narrow(setting: &mut Setting) -> anyhow::Result<Vec<Row>> {
    use super::stock::{DEFAULT, MULTIFD, POST_COPY, TUNED};
    let link = Link { delay_ms: 0, megabits: Some(1000) };
    let cell = Cell { link, tls: false, ..Cell::new(1024, 100) };
    let plan = [(DEFAULT, 1), (TUNED, 1), (MULTIFD, 1), (POST_COPY, 2)];
    alone(setting, cell, 5, &plan)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_chooses_the_groups_that_make_its_bars() {
        let names = |prefix: &str| -> Vec<&str> {
            ALL.iter().filter(|group| group.concerns(prefix)).map(|group| group.name).collect()
        };
        assert_eq!(names("").len(), ALL.len());
        // All but the backups, losses of hosts, sleep, forks, evacuations, and what clients feel of moves.
        assert_eq!(names("move.").len(), ALL.len() - 6);
        assert_eq!(names("handover."), ["protect", "sleep", "fork", "evacuate"]);
        assert_eq!(names("backup.machine.pause"), ["backups"]);
        assert_eq!(names("move.size"), ["sizes"]);
        assert_eq!(names("move.gap.1gib"), ["busy"]);
        assert_eq!(names("move.mismatches."), ["busy", "modes"]);
        assert_eq!(names("move.versus.1gib.100mbs.fast.tls.total"), ["tls"]);
        assert_eq!(names("conduit.gap.machine.udp"), names("conduit."));
        assert_eq!(names("conduit.").len(), 1);
        assert!(names("silo.").is_empty());
    }

    #[test]
    fn a_99th_percentile_of_too_few_moves_is_left_out_and_the_rest_stays() {
        let samples = Samples::new([1.0, 2.0, 9.0]).unwrap();
        let rows = spread("b", "ms", &samples, None, Some(Target::AtMost(3.0)));
        let bars: Vec<_> = rows.iter().map(|row| (row.bar.as_str(), row.value)).collect();
        assert_eq!(bars, [("b.median", 2.0), ("b.max", 9.0)]);
    }
}
