//! `handover.fork.`: ten copies of a running machine on its host, by `drafter fork`.
//!
//! A machine of 512 MiB whose Redis holds 50 MiB. What is told: from the start of the command until the
//! agent of the last of ten copies has answered under its own name and address, with its network open;
//! how long the machine stood still for it; and what a copy has of its own, which is what it has
//! written, a second later, of its memory and with its monitor.

use super::{Setting, groups::spread, ours};
use crate::{
    fleet::{Fleet, MachineSpec, RunnerId},
    rig::{MACHINE, Rig, RigConfig},
};
use anyhow::{Context, ensure};
use bench::{Row, Samples, Target};
use serde::Deserialize;
use std::{fs, net::Ipv4Addr, time::Duration};

/// Beginning of the names of these bars.
pub(super) const BARS: &str = "handover.fork.";

const COPIES: usize = 10;
const FORKS: usize = 5;
const MEMORY_MIB: u64 = 512;
const DATA_MIB: u64 = 50;
const BOOT: Duration = Duration::from_secs(120);
const LIMIT: Duration = Duration::from_secs(60);

/// What the command tells, of what is used here.
#[derive(Deserialize)]
struct Report {
    pause_ms: f64,
    image_ms: f64,
    copies: Vec<Copy>,
}

#[derive(Deserialize)]
struct Copy {
    name: String,
    monitor_pid: Option<u32>,
    ran_ms: Option<f64>,
    error: Option<String>,
}

struct Site {
    fleet: Fleet,
    source: RunnerId,
}

impl Site {
    fn new(setting: &Setting) -> anyhow::Result<Self> {
        let config =
            RigConfig { prefix: setting.prefix.clone(), leases: true, ..RigConfig::default() };
        let rig = Rig::new(config).context("building the rig")?;
        ours::clear(&rig);
        let mut fleet = Fleet::new(rig)?;
        let mut spec = MachineSpec::new("source", &setting.package);
        spec.memory_mib = Some(MEMORY_MIB);
        spec.address = Some(MACHINE);
        spec.extra = vec!["--accelerator".into(), setting.accelerator.clone()];
        let source = fleet.run(0, &spec)?;
        fleet.runner(source).wait_ready(BOOT)?;
        let site = Self { fleet, source };
        // A thousand bytes each.
        let script = format!(
            "for i = 1, {} do redis.call('set', 'key' .. i, string.rep(i, 1000):sub(1, 1000)) end \
             return 'OK'",
            DATA_MIB * 1024
        );
        let fill = ["redis-cli", "eval", &script, "0"];
        let (code, out) = site.fleet.runner(site.source).exec(&fill, LIMIT)?;
        ensure!(code == 0 && out.trim() == "OK", "Redis was not filled ({code}): {out}");
        Ok(site)
    }

    /// A command of ours in the first host.
    fn command(&self, words: &[&str]) -> anyhow::Result<String> {
        let program =
            crate::programs::command("drafter").context("no drafter beside this program")?;
        let mut command = self.fleet.rig().hosts()[0].namespace.command(program);
        command.arg("--state").arg(self.fleet.state_of(0)).arg("--json").args(words);
        let output = command.output().context("starting drafter")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "drafter {} failed: {said}", words.join(" "));
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn fork(&self) -> anyhow::Result<Report> {
        let [a, b, c, _] = MACHINE.octets();
        let first = Ipv4Addr::new(a, b, c, 100).to_string();
        let copies = COPIES.to_string();
        let words =
            ["fork", "source", "--copies", &copies, "--prefix", "copy", "--address", &first];
        let report: Report = serde_json::from_str(&self.command(&words)?)?;
        for copy in &report.copies {
            ensure!(copy.error.is_none(), "{}: {:?}", copy.name, copy.error);
        }
        Ok(report)
    }

    fn end(&self, report: &Report) -> anyhow::Result<()> {
        for copy in &report.copies {
            self.command(&["stop", &copy.name, "--grace-s", "0"])?;
            self.command(&["remove", &copy.name])?;
        }
        Ok(())
    }
}

/// What a monitor has of the guest's memory and altogether for itself alone, MiB.
fn own_mib(pid: u32) -> anyhow::Result<(f64, f64)> {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let (mut of_memory, mut own, mut all) = (false, 0.0, 0.0);
    for line in maps.lines() {
        let kib = |rest: &str| -> f64 {
            rest.trim().trim_end_matches("kB").trim().parse().unwrap_or(0.0)
        };
        if line.split_whitespace().next().is_some_and(|word| word.contains('-')) {
            of_memory = line.contains("/memfd:staging");
        } else if let Some(rest) = line.strip_prefix("Anonymous:") {
            all += kib(rest);
            own += if of_memory { kib(rest) } else { 0.0 };
        }
    }
    Ok((own / 1024.0, all / 1024.0))
}

pub(super) fn fork(setting: &mut Setting) -> anyhow::Result<Vec<Row>> {
    let site = Site::new(setting)?;
    let (mut all, mut pauses, mut images) = (Vec::new(), Vec::new(), Vec::new());
    let (mut own, mut monitors) = (Vec::new(), Vec::new());
    // Files are read for the first time by the first.
    for number in 0..=setting.times(FORKS) {
        setting.abandon.check()?;
        let report = site.fork()?;
        std::thread::sleep(Duration::from_secs(1));
        let mut each = Vec::new();
        for pid in report.copies.iter().filter_map(|copy| copy.monitor_pid) {
            each.push(own_mib(pid)?);
        }
        let last = report.copies.iter().filter_map(|copy| copy.ran_ms).fold(0.0, f64::max);
        println!(
            "   ten copies after {last:.0} ms, the image after {:.0} ms, {:.1} ms of pause",
            report.image_ms, report.pause_ms
        );
        if number > 0 {
            all.push(last / 1e3);
            pauses.push(report.pause_ms);
            images.push(report.image_ms);
            own.extend(each.iter().map(|(own, _)| *own));
            monitors.extend(each.iter().map(|(_, all)| *all));
        }
        site.end(&report)?;
    }
    let samples = |values: Vec<f64>| Samples::new(values).context("a value is not a number");
    let mut rows = Vec::new();
    let one = Some(Target::AtMost(1.0));
    rows.extend(spread(
        "handover.fork.ten-copies.until-all-answer",
        "s",
        &samples(all)?,
        one,
        None,
    ));
    rows.extend(spread("handover.fork.pause", "ms", &samples(pauses)?, None, None));
    rows.extend(spread("handover.fork.image", "ms", &samples(images)?, None, None));
    rows.extend(spread("handover.fork.own-memory.of-a-copy", "MiB", &samples(own)?, None, None));
    rows.extend(spread(
        "handover.fork.with-monitor.of-a-copy",
        "MiB",
        &samples(monitors)?,
        None,
        None,
    ));
    Ok(rows)
}
