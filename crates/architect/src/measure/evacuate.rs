//! `handover.evacuate.`: a host with twenty small machines is emptied by `drafter evacuate` over a line
//! of 1 Gb/s, with a client at each of them.
//!
//! What is promised: done within 30 s, half of the blackouts at most 20 ms, and no client notices more
//! than a pause. The command plans as it does for a person; what it foresaw stands beside what came.

use super::{
    Setting,
    cell::Link,
    groups::{none_of, spread},
    ours,
};
use crate::{
    fleet::{Fleet, MachineSpec, RunnerId},
    load::{Load, LoadConfig, LoadHandle},
    rig::{MACHINE, PUBLIC, Rig},
};
use anyhow::{Context, ensure};
use bench::{Row, Samples, Target};
use nix::sched::{CloneFlags, setns};
use serde::Deserialize;
use std::{
    fmt::Write as _,
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    time::Duration,
};

/// Beginning of the names of these bars.
pub(super) const BARS: &str = "handover.evacuate.";

const MACHINES: usize = 20;
const MEMORY_MIB: u64 = 128;
const MEGABITS: u64 = 1000;
const REDIS: u16 = 6379;
/// The port of the first machine at the edge.
const PORT: u16 = 16_400;
const DEADLINE_S: u64 = 30;
const BLACKOUT_MS: f64 = 20.0;
const BOOT: Duration = Duration::from_secs(180);
/// Each client asks twice a second: a guest is to use less than a fiftieth of a processor.
const THINK: Duration = Duration::from_millis(500);

/// What the command tells, of what is used here.
#[derive(Deserialize)]
struct Report {
    plan: evacuation::Plan,
    outcomes: Vec<Outcome>,
}

#[derive(Deserialize)]
struct Outcome {
    machine: String,
    safe_s: Option<f64>,
    blackout_ms: Option<f64>,
    error: Option<String>,
}

struct Site {
    fleet: Fleet,
    clients: Vec<LoadHandle>,
    receivers: Vec<(String, RunnerId)>,
}

fn spec(setting: &Setting, number: usize) -> MachineSpec {
    let mut spec = MachineSpec::new(&format!("small-{number}"), &setting.package);
    let [a, b, c, first] = MACHINE.octets();
    spec.memory_mib = Some(MEMORY_MIB);
    spec.address = Some(Ipv4Addr::new(a, b, c, first + number as u8));
    spec.ports = vec![(PORT + number as u16, REDIS)];
    spec.extra = vec!["--accelerator".into(), setting.accelerator.clone()];
    spec
}

impl Site {
    fn new(setting: &Setting, count: usize) -> anyhow::Result<Self> {
        let link = Link { delay_ms: 0, megabits: Some(MEGABITS) };
        let rig = Rig::new(link.rig(&setting.prefix)).context("building the rig")?;
        ours::clear(&rig);
        let mut fleet = Fleet::new(rig)?;
        let mut receivers = Vec::new();
        for number in 0..count {
            setting.abandon.check()?;
            let spec = spec(setting, number);
            let runner = fleet.run(0, &spec)?;
            receivers.push((spec.name.clone(), fleet.receive(1, &spec)?));
            // One after the other: all at once, none would be there in time.
            fleet.runner(runner).wait_ready(BOOT)?;
        }
        let mut clients = Vec::new();
        for number in 0..count {
            let path = Path::new("/run/netns").join(fleet.rig().client().name());
            let enter = move || Ok(setns(fs::File::open(path)?, CloneFlags::CLONE_NEWNET)?);
            let config = LoadConfig {
                enter: Some(Box::new(enter)),
                keys: 6,
                think: THINK,
                ..LoadConfig::default()
            };
            let to = SocketAddr::from((PUBLIC, PORT + number as u16));
            clients.push(Load::start(to, config)?);
        }
        Ok(Self { fleet, clients, receivers })
    }

    /// Where each machine goes, as the command reads it.
    fn destinations(&self) -> String {
        let mut text = String::new();
        for (name, id) in &self.receivers {
            let runner = self.fleet.runner(*id);
            // Into a string it does not fail.
            let _ = writeln!(text, "{name} {} {}", runner.host, runner.address);
        }
        text
    }

    /// Runs the command in the first host.
    fn evacuate(&self) -> anyhow::Result<Report> {
        let file = self.fleet.rig().folder().join("destinations");
        fs::write(&file, self.destinations())?;
        let drafter = crate::programs::command("drafter").context("the drafter command")?;
        let output = self.fleet.rig().hosts()[0]
            .namespace
            .command(&drafter)
            .arg("--state")
            .arg(self.fleet.state_of(0))
            .args(["evacuate", "--json", "--to"])
            .arg(&file)
            .args(["--deadline", &format!("{DEADLINE_S}s"), "--line", &MEGABITS.to_string()])
            .output()?;
        // It fails when a machine stayed, which is an answer here.
        let said = String::from_utf8_lossy(&output.stderr);
        serde_json::from_slice(&output.stdout)
            .with_context(|| format!("drafter evacuate said no JSON; on standard error: {said}"))
    }
}

pub(super) fn evacuate(setting: &mut Setting) -> anyhow::Result<Vec<Row>> {
    let count = if setting.quick { 4 } else { MACHINES };
    let mut site = Site::new(setting, count)?;
    let report = site.evacuate()?;
    for outcome in &report.outcomes {
        if let Some(why) = &outcome.error {
            println!("   {}: {why}", outcome.machine);
        }
    }
    ensure!(report.outcomes.len() == count, "{} machines were told of", report.outcomes.len());
    let stayed = report.outcomes.iter().filter(|outcome| outcome.error.is_some()).count();
    let (mut errors, mut lost, mut resets) = (0, 0, 0);
    for client in std::mem::take(&mut site.clients) {
        // It must have had an answer after the last move.
        client.wait_for(2, Duration::from_secs(20));
        let seen = client.finish()?;
        for problem in &seen.problems {
            println!("   client: {problem}");
        }
        errors += seen.errors + u64::from(!seen.verified);
        lost += seen.lost_writes + seen.wrong_answers + seen.doubled_writes;
        resets += seen.reconnects;
    }
    let safe = report.outcomes.iter().filter_map(|outcome| outcome.safe_s).fold(0.0, f64::max);
    let blackouts = Samples::new(report.outcomes.iter().filter_map(|one| one.blackout_ms))
        .context("a measured value is not a number")?;
    let name = format!("{BARS}{count}x{MEMORY_MIB}mib.{MEGABITS}mbit");
    let foreseen = report.plan.safe_in.as_secs_f64();
    let time = Target::AtMost(DEADLINE_S as f64);
    let mut rows = vec![
        Row::judged(&format!("{name}.time"), safe, "s", None, Some(time)),
        Row::judged(&format!("{name}.foreseen"), foreseen, "s", None, None),
        none_of(&format!("{name}.left-behind"), stayed as u64),
        none_of(&format!("{name}.client-errors"), errors),
        none_of(&format!("{name}.client-reconnects"), resets),
        none_of(&format!("{name}.lost-writes"), lost),
    ];
    let bar = format!("{name}.blackout");
    rows.extend(spread(&bar, "ms", &blackouts, Some(Target::AtMost(BLACKOUT_MS)), None));
    Ok(rows)
}
