//! `evacuate`: all machines of this host leave before a deadline.
//!
//! Each machine is measured, [`evacuation::plan`] decides, and the plan is told before anything moves.
//! Then so many moves run at once as the plan reckoned with; whoever is not expected to leave in time is
//! tried last. With a store, a machine can also leave by being put to sleep in it: by plan, where that
//! costs the line less, or because its move came to nothing. A machine that cannot leave runs on here.

mod course;
mod deeds;
mod destinations;
mod report;

use super::{
    Format, StateArgs, backup, backup::parse_time, machine::LEAVES, moves::HostAt, output::say,
};
use crate::{
    migrate::reception::{self, Offers},
    runner::{
        api::{Client, CompareRequest, HeldReport, LoadReport, Request, Status},
        state::{self, MachineDir},
    },
};
use anyhow::bail;
use clap::Args;
use course::Course;
use deeds::{ByRunners, SleepsIn};
use destinations::{Destination, Taker, destinations, spread};
use evacuation::{Bytes, Load, Plan, Rate, StoreUse, Terms};
use identity::HostName;
use report::{Outcome, Planned, lines, planned_lines};
use serde::Serialize;
use std::{
    collections::BTreeMap,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

/// What a move costs before its first byte: the destination's monitor starts, connections are made.
/// Measured with the translator on two busy processors; half of it elsewhere.
const SETUP: Duration = Duration::from_millis(300);
/// What a guest writes over and over, in samples' worth, where only a sample was seen.
const HOT_SAMPLES: u64 = 8;
/// How long a runner may take to answer beyond what it was asked to wait.
const ANSWER: Duration = Duration::from_secs(20);

/// `drafter evacuate`.
#[derive(Args, Debug)]
pub struct EvacuateArgs {
    /// Where machines go: a file with a line for each, MACHINE HOST ADDRESS:PORT [WORTH], naming a runner
    /// that waits there (`drafter receive`). WORTH (default 1) weighs it against the others when not all
    /// can leave
    #[arg(long, value_name = "FILE")]
    to: Option<PathBuf>,
    /// A host that takes every machine (`receive --any`), and where it listens; may be given several times.
    /// Machines that the file does not name are spread over these, by size
    #[arg(long, value_name = "HOST=ADDRESS:PORT")]
    to_host: Vec<HostAt>,
    /// A store that machines may be put to sleep in (as by `suspend --store`): those for which no host is
    /// named, those that cannot all move in time and of which the store has much already, and those whose
    /// move comes to nothing. Hosts of --to-host that were given the store wake them; if all of those were,
    /// and there is no --to, they also bring what it has of machines that move. s3://bucket/folder?…, gs://…,
    /// az://… or file:///folder; credentials come from the provider's usual variables
    #[arg(long, value_name = "URL", env = "SILO_STORE")]
    store: Option<String>,
    /// The file with the tenant's keys (`silo keys create`); without it the variable SILO_KEYS holds
    /// them
    #[arg(long, value_name = "FILE", env = "SILO_KEY_FILE")]
    keys: Option<PathBuf>,
    /// When this host is gone, from now, as 30s or 2m
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    deadline: Duration,
    /// What the line out of this host carries, Mb/s
    #[arg(long, value_name = "MBIT", value_parser = clap::value_parser!(u64).range(1..))]
    line: u64,
    /// Machines under way at once
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    parallel: u16,
    /// Part of the time that is not planned with, in percent
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u8).range(0..=90))]
    reserve: u8,
    /// How long each machine's writes are watched before the plan
    #[arg(long, value_name = "TIME", value_parser = parse_time, default_value = "500ms")]
    sample: Duration,
    /// Say who could be saved, and move nothing
    #[arg(long)]
    dry_run: bool,
}

/// The longest comparison with the store.
const LONGEST_COMPARISON: Duration = Duration::from_secs(10);

impl EvacuateArgs {
    /// The store that machines may sleep in, if one is named; there must be that or a host.
    fn sleeps(&self) -> anyhow::Result<Option<SleepsIn>> {
        let Some(store) = self.store.clone() else {
            if self.to.is_none() && self.to_host.is_empty() {
                bail!(
                    "say where machines go: --to FILE, --to-host HOST=ADDRESS:PORT, or --store URL to put \
                     them to sleep"
                );
            }
            return Ok(None);
        };
        let keys = self.keys.as_ref().map(std::path::absolute).transpose()?;
        backup::check_store(&store, keys.as_deref())?;
        Ok(Some(SleepsIn { store, keys }))
    }

    /// How long it may take to find out what the store has: a part of the time that there is.
    fn comparison(&self) -> Duration {
        (self.deadline / 10).min(LONGEST_COMPARISON)
    }
}

#[derive(Debug, Serialize)]
struct Report<'a> {
    plan: &'a Plan,
    loads: &'a [Load],
    /// The same by machine.
    planned: &'a [Planned],
    /// Machines that are not put to sleep although there is a store, and why.
    sleepless: BTreeMap<&'a str, String>,
    verdict: String,
    outcomes: Vec<Outcome>,
}

/// What is planned with.
fn load(report: &LoadReport, to: Option<&Destination>) -> Load {
    let bytes = report.memory_bytes + report.disk_bytes;
    // Where nobody saw what it writes, all of its memory may be written again.
    let (written, hot) = match report.written_bytes {
        Some(written) => (written, written.saturating_mul(HOT_SAMPLES).min(report.memory_bytes)),
        None => (report.memory_bytes, report.memory_bytes),
    };
    let per_second = written.saturating_mul(1000) / report.sample_ms.max(1);
    // Zeros cost neither a move nor a sleep anything.
    let zeros = report.held.iter().map(|held| held.zero_bytes).max();
    let bytes = bytes.saturating_sub(zeros.unwrap_or(0));
    let held = sleeps_of(report);
    let known =
        |held: Option<&HeldReport>| Bytes(held.map_or(0, |held| held.known_bytes.min(bytes)));
    Load {
        name: report.machine.clone(),
        weight: to.map_or(1, |to| to.worth),
        bytes: Bytes(bytes),
        in_store: known(held),
        brought: known(most_of(report)),
        dirties: Rate(per_second),
        hot: Bytes(hot),
        destination: to.is_some(),
        may_sleep: !report.protected && held.is_some_and(|held| held.error.is_none()),
        generation_age: report.generation_age_s.and_then(|s| Duration::try_from_secs_f64(s).ok()),
    }
}

/// What the store has of it as a machine that sleeps.
fn sleeps_of(report: &LoadReport) -> Option<&HeldReport> {
    let line = backup::sleeps_line(&report.machine);
    report.held.iter().find(|held| held.line == line)
}

/// The history that a destination can bring most of it from.
fn most_of(report: &LoadReport) -> Option<&HeldReport> {
    let useful = report.held.iter().filter(|held| held.error.is_none() && held.known_bytes > 0);
    useful.max_by_key(|held| held.known_bytes)
}

/// The histories that it is compared with: that of its sleeps, and that of its backup or protection, if that
/// is in the same store.
fn histories(
    sleeps: &SleepsIn,
    status: &Status,
    limit: Duration,
) -> anyhow::Result<Vec<CompareRequest>> {
    let limit_ms = limit.as_millis() as u64;
    let machine = &status.machine;
    let compare = |history, sleeps| CompareRequest { history, limit_ms, sleeps };
    let mut all = vec![compare(sleeps.request(machine)?, true)];
    let whole = |url: &str| url.trim_end_matches('/').to_owned();
    let own = status.backup.as_ref().filter(|own| whole(&own.store) == whole(&sleeps.store));
    if let Some(own) = own.filter(|own| own.line != all[0].history.line) {
        all.push(compare(sleeps.history(machine, own.line.clone())?, false));
    }
    Ok(all)
}

/// What there is on this host.
#[derive(Default)]
struct Measured {
    reports: Vec<LoadReport>,
    /// Machines that run and could not be measured (they are on the move, say), and why.
    unknown: Vec<(String, String)>,
}

/// Measures all running machines of this host, side by side; also what the store has of each.
fn measure(
    state: &StateArgs,
    args: &EvacuateArgs,
    sleeps: Option<&SleepsIn>,
) -> anyhow::Result<Measured> {
    let names = state::machines(&state.state)?;
    let (sample, comparison) = (args.sample, args.comparison());
    let ask = |name: &str| -> Option<Result<LoadReport, String>> {
        let mut client = Client::connect(&MachineDir::at(&state.state, name).socket()).ok()?;
        // A request to the store on its way when the time is over is waited for.
        client.set_deadline(Some(sample + comparison * 3 + ANSWER)).ok()?;
        let status: Status = client.get(&Request::Status).ok()?;
        // One that waits for a machine, or has ended, has nothing to save.
        if matches!(status.state.as_str(), "standby" | "stopped" | "failed" | "receiving") {
            return None;
        }
        let sample_ms = sample.as_millis() as u64;
        let compare =
            sleeps.map_or(Ok(Vec::new()), |sleeps| histories(sleeps, &status, comparison));
        Some(compare.map_err(|error| format!("{error:#}")).and_then(|compare| {
            client.get(&Request::Load { sample_ms, compare }).map_err(|e| e.to_string())
        }))
    };
    let answers: Vec<_> = thread::scope(|scope| {
        let asked: Vec<_> = names.iter().map(|name| scope.spawn(|| ask(name))).collect();
        asked
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| Some(Err("panicked".into()))))
            .collect()
    });
    let mut measured = Measured::default();
    for (name, answer) in names.iter().zip(answers) {
        match answer {
            Some(Ok(report)) => measured.reports.push(report),
            Some(Err(why)) => measured.unknown.push((name.clone(), why)),
            None => {}
        }
    }
    Ok(measured)
}

/// The hosts that take every machine, and what each says that it has. One that cannot be asked may still
/// take machines: whoever moves there will say why not.
fn takers(args: &EvacuateArgs, state: &StateArgs, reports: &[LoadReport]) -> Vec<Taker> {
    let config = reports.iter().find_map(|report| {
        let dir = MachineDir::at(&state.state, &report.machine);
        dir.read_record().ok().flatten().and_then(|record| record.config)
    });
    let look = |at: &HostAt| -> Result<Offers, String> {
        let config = config.as_ref().ok_or("no machine of this host is known")?;
        let here = HostName::new(&config.host).map_err(|error| error.to_string())?;
        let peer = HostName::new(&at.host).map_err(|error| error.to_string())?;
        let security = config.security.load(&here).map_err(|error| error.to_string())?;
        reception::look(at.address, &peer, &security, config.host.clone())
    };
    thread::scope(|scope| {
        let asked: Vec<_> =
            args.to_host.iter().map(|at| (at, scope.spawn(move || look(at)))).collect();
        let taker =
            |(at, thread): (&HostAt, thread::ScopedJoinHandle<'_, Result<Offers, String>>)| {
                let offers = thread.join().unwrap_or_else(|_| Err("panicked".into()));
                let offers = offers.inspect_err(|why| tracing::warn!("{why}")).ok();
                Taker { at: at.clone(), offers }
            };
        asked.into_iter().map(taker).collect()
    })
}

pub(super) fn evacuate(
    args: &EvacuateArgs,
    state: &StateArgs,
    format: Format,
) -> anyhow::Result<()> {
    let began = Instant::now();
    let mut to = args.to.as_deref().map_or(Ok(BTreeMap::new()), destinations)?;
    let sleeps = args.sleeps()?;
    let Measured { reports, unknown } = measure(state, args, sleeps.as_ref())?;
    let takers = takers(args, state, &reports);
    if !takers.is_empty() {
        let unnamed = reports.iter().filter(|report| !to.contains_key(&report.machine));
        let size = |one: &LoadReport| one.memory_bytes + one.disk_bytes;
        let loads: Vec<_> =
            unnamed.map(|one| (one.machine.as_str(), one.memory_bytes, size(one))).collect();
        to.extend(spread(&loads, &takers));
    }
    // What a plan says of a store must hold wherever a machine goes.
    let bring = args.to.is_none()
        && !takers.is_empty()
        && takers.iter().all(|host| host.offers.is_some_and(|offers| offers.store));
    let loads: Vec<Load> =
        reports.iter().map(|report| load(report, to.get(&report.machine))).collect();
    let terms = Terms {
        deadline: args.deadline.saturating_sub(began.elapsed()),
        reserve_percent: args.reserve,
        line: Rate::from_megabits(args.line),
        parallel: args.parallel,
        setup: SETUP,
        store: match (&sleeps, bring) {
            (None, _) => StoreUse::None,
            (Some(_), false) => StoreUse::Sleeps,
            (Some(_), true) => StoreUse::SleepsAndMoves,
        },
    };
    let plan = evacuation::plan(&loads, &terms);
    let verdict = plan.verdict(&loads, &terms).to_string();
    let planned = Planned::of(&plan, &loads, &to);
    let sleepless = sleepless(&reports);
    if format == Format::Human {
        say(&format!("{verdict}{}", planned_lines(&planned)));
        for (name, why) in &unknown {
            say(&format!("  not planned with: \"{name}\": {why}"));
        }
        for (name, why) in &sleepless {
            say(&format!("  not put to sleep: \"{name}\": {why}"));
        }
    }
    let mut outcomes = Vec::new();
    if !args.dry_run {
        let share = Rate(terms.line.0 / u64::from(terms.parallel.max(1)));
        let brings = reports
            .iter()
            .filter_map(|one| Some((one.machine.clone(), most_of(one)?.line.clone())))
            .collect();
        let deeds = ByRunners { state, sleeps: sleeps.as_ref(), brings: &brings, share };
        let course = Course {
            loads: &loads,
            to: &to,
            hosts: &args.to_host,
            terms: &terms,
            began,
            deadline: args.deadline,
            deeds: &deeds,
        };
        outcomes = course.run(&plan);
        ended(state, &outcomes);
    }
    let stays = unknown.into_iter().map(|(machine, why)| Outcome {
        machine,
        error: Some(why),
        ..Outcome::default()
    });
    outcomes.extend(stays);
    let failed = outcomes.iter().filter(|outcome| outcome.error.is_some()).count();
    let late = outcomes.iter().filter(|one| one.error.is_none() && !one.in_time).count();
    let (plan, loads, planned) = (&plan, &loads[..], &planned[..]);
    let report = Report { plan, loads, planned, sleepless, verdict, outcomes };
    format.print(&report, || lines(&report.outcomes))?;
    match (args.dry_run, failed, late) {
        (true, ..) if !plan.saves_all() || failed > 0 => {
            bail!("not all machines of this host can be saved")
        }
        (true, ..) | (_, 0, 0) => Ok(()),
        _ => bail!("{failed} machines are still here, {late} left after the deadline"),
    }
}

/// Waits until runners of machines that sleep have ended, so that nothing of them is in anybody's way here.
fn ended(state: &StateArgs, outcomes: &[Outcome]) {
    for outcome in outcomes.iter().filter(|outcome| outcome.asleep.is_some()) {
        let record = MachineDir::at(&state.state, &outcome.machine).read_record();
        let late = record.ok().flatten().filter(|record| !record.ends_within(LEAVES));
        if let Some(record) = late {
            tracing::warn!(
                machine = outcome.machine,
                "its runner (process {}) is still here",
                record.pid
            );
        }
    }
}

/// Machines that are not put to sleep although there is a store, and why.
fn sleepless(reports: &[LoadReport]) -> BTreeMap<&str, String> {
    let why = |report: &LoadReport| {
        let held = sleeps_of(report)?;
        let protected = report.protected.then_some("it is protected");
        protected.map(str::to_owned).or_else(|| held.error.clone())
    };
    reports.iter().filter_map(|report| Some((report.machine.as_str(), why(report)?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Command;
    use clap::Parser;

    #[test]
    fn a_machine_nobody_could_watch_may_write_all_of_its_memory() {
        let seen = LoadReport {
            machine: "a".into(),
            memory_bytes: 1000 << 20,
            disk_bytes: 24 << 20,
            missing_bytes: 0,
            written_bytes: Some(1 << 20),
            sample_ms: 500,
            generation_age_s: Some(2.5),
            protected: false,
            held: Vec::new(),
        };
        let one = load(&seen, None);
        assert_eq!((one.bytes, one.dirties), (Bytes(1024 << 20), Rate(2 << 20)));
        assert_eq!((one.hot, one.destination), (Bytes(8 << 20), false));
        assert_eq!(one.generation_age, Some(Duration::from_millis(2500)));
        let unseen = load(&LoadReport { written_bytes: None, ..seen }, None);
        assert_eq!(unseen.hot, Bytes(1000 << 20));
    }

    #[test]
    fn what_a_store_has_is_planned_with_and_a_machine_that_must_not_sleep_does_not() {
        let held = HeldReport {
            line: "machines/a.suspended".into(),
            generation: Some(3),
            known_bytes: 700 << 20,
            zero_bytes: 100 << 20,
            whole: true,
            error: None,
        };
        let seen = LoadReport {
            machine: "a".into(),
            memory_bytes: 1000 << 20,
            disk_bytes: 0,
            missing_bytes: 0,
            written_bytes: Some(0),
            sample_ms: 500,
            generation_age_s: None,
            protected: false,
            held: vec![held.clone()],
        };
        let one = load(&seen, None);
        assert_eq!((one.bytes, one.in_store), (Bytes(900 << 20), Bytes(700 << 20)));
        assert_eq!(one.brought, one.in_store);
        // Its backup helps only a move, and only if it has more.
        let line = "machines/a".to_owned();
        let backup = HeldReport { line, known_bytes: 800 << 20, ..held.clone() };
        let both = LoadReport { held: vec![held.clone(), backup], ..seen.clone() };
        let two = load(&both, None);
        assert_eq!((two.in_store, two.brought), (one.in_store, Bytes(800 << 20)));
        assert_eq!(most_of(&both).unwrap().line, "machines/a");
        assert!(one.may_sleep && sleepless(std::slice::from_ref(&seen)).is_empty());
        // More than there is would be a cost below nothing.
        let more = HeldReport { known_bytes: u64::MAX, ..held.clone() };
        let one = load(&LoadReport { held: vec![more], ..seen.clone() }, None);
        assert_eq!(one.in_store, one.bytes);

        let protected = LoadReport { protected: true, ..seen.clone() };
        let broken = HeldReport { error: Some("it is not there".into()), ..held };
        let broken = LoadReport { held: vec![broken], ..seen.clone() };
        for report in [&protected, &broken, &LoadReport { held: Vec::new(), ..seen }] {
            assert!(!load(report, None).may_sleep);
        }
        let why = |report| sleepless(&[report]).remove("a").unwrap();
        assert_eq!([protected, broken].map(why), ["it is protected", "it is not there"]);
    }

    #[derive(Debug, Parser)]
    struct Typed {
        #[command(subcommand)]
        command: Command,
    }

    fn typed(words: &[&str]) -> Result<EvacuateArgs, String> {
        let all = ["drafter", "evacuate", "--deadline", "30s", "--line", "100"];
        match Typed::try_parse_from([&all, words].concat()) {
            Ok(Typed { command: Command::Evacuate(args) }) => Ok(args),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn a_store_alone_is_somewhere_to_go_and_a_bad_one_is_named_before_anything_is_done() {
        assert!(typed(&["--to-host", "b=10.0.0.2:1"]).unwrap().sleeps().unwrap().is_none());
        assert!(typed(&["--to-host", "b"]).unwrap_err().contains("HOST=ADDRESS:PORT"));
        let error = |words: &[&str]| typed(words).unwrap().sleeps().unwrap_err().to_string();
        assert!(error(&[]).contains("--to FILE, --to-host HOST=ADDRESS:PORT, or --store URL"));
        let folder = tempfile::tempdir().unwrap();
        let keys = folder.path().join("keys").display().to_string();
        let why = error(&["--store", "ftp://somewhere", "--keys", &keys]);
        assert!(why.contains("\"ftp://somewhere\" is no store"), "{why}");
        let why = error(&["--store", "file:///somewhere", "--keys", &keys]);
        assert!(why.contains(&keys), "{why}");
        let long = typed(&["--store", "file:///somewhere"]).unwrap();
        assert_eq!(long.comparison(), Duration::from_secs(3));
    }
}
