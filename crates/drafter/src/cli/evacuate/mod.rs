//! `evacuate`: all machines of this host leave before a deadline.
//!
//! Each machine is measured, [`evacuation::plan`] decides, and the plan is told before anything moves.
//! Then so many moves run at once as the plan reckoned with; whoever is not expected to leave in time is
//! tried last. A machine that cannot leave runs on here.

use super::{Format, StateArgs, backup::parse_time, moves::HostAt};
use crate::{
    migrate::{messages::Mode, planner::Budgets, reception::ASK_LIMIT, timings::MoveReport},
    runner::{
        api::{Client, LoadReport, MigrateRequest, Request},
        state::{self, MachineDir},
    },
};
use anyhow::{Context, bail};
use clap::Args;
use evacuation::{Bytes, Load, Plan, Rate, Terms, Way};
use serde::Serialize;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
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
    #[arg(long, value_name = "FILE", required_unless_present = "to_host")]
    to: Option<PathBuf>,
    /// A host that takes every machine (`receive --any`), and where it listens; may be given several times.
    /// Machines that the file does not name are spread over these, by size
    #[arg(long, value_name = "HOST=ADDRESS:PORT")]
    to_host: Vec<HostAt>,
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

/// Where a machine goes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Destination {
    place: Place,
    worth: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    /// To a runner that waits for it.
    Runner(HostAt),
    /// To the first of these hosts that has a runner for it.
    Hosts(Vec<HostAt>),
}

/// Spreads machines over hosts by their bytes, the largest first, each to the host with the fewest so far;
/// the others are asked, in the same order, should that refuse it.
fn spread(loads: &[(&str, u64)], hosts: &[HostAt]) -> BTreeMap<String, Destination> {
    let mut taken: Vec<(u64, &HostAt)> = hosts.iter().map(|host| (0, host)).collect();
    let mut largest: Vec<_> = loads.to_vec();
    largest.sort_by_key(|&(name, bytes)| (std::cmp::Reverse(bytes), name));
    let mut all = BTreeMap::new();
    for (name, bytes) in largest {
        taken.sort_by_key(|(taken, _)| *taken);
        let place = Place::Hosts(taken.iter().map(|(_, host)| (*host).clone()).collect());
        if let Some((first, _)) = taken.first_mut() {
            *first += bytes;
        }
        all.insert(name.to_owned(), Destination { place, worth: 1 });
    }
    all
}

/// What became of a machine.
#[derive(Debug, Serialize)]
struct Outcome {
    machine: String,
    /// The host that has it now, if it left.
    host: Option<String>,
    way: Option<Way>,
    /// Whether the plan expected it to leave in time.
    expected: bool,
    /// From the beginning of the evacuation until nothing of it was needed here, seconds.
    safe_s: Option<f64>,
    /// Whether that was before the deadline.
    in_time: bool,
    blackout_ms: Option<f64>,
    error: Option<String>,
}

#[derive(Debug, Serialize)]
struct Report<'a> {
    plan: &'a Plan,
    loads: &'a [Load],
    verdict: String,
    outcomes: Vec<Outcome>,
}

/// Reads the file of destinations.
fn destinations(path: &Path) -> anyhow::Result<BTreeMap<String, Destination>> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    parse_destinations(&text).map_err(|why| anyhow::anyhow!("{}: {why}", path.display()))
}

fn parse_destinations(text: &str) -> Result<BTreeMap<String, Destination>, String> {
    let mut all = BTreeMap::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        let wrong = |what: String| format!("line {}: {what}", number + 1);
        let words: Vec<&str> = line.split_whitespace().collect();
        let (&[machine, host, address], rest) = words
            .split_first_chunk::<3>()
            .ok_or_else(|| wrong("write MACHINE HOST ADDRESS:PORT [WORTH]".into()))?;
        state::check_name(machine).map_err(wrong)?;
        identity::HostName::new(host).map_err(|e| wrong(e.to_string()))?;
        let address =
            address.parse().map_err(|_| wrong(format!("\"{address}\" is no ADDRESS:PORT")))?;
        let worth = match rest {
            [] => 1,
            [worth] => worth
                .parse()
                .map_err(|_| wrong(format!("\"{worth}\" is no worth: write a whole number")))?,
            more => return Err(wrong(format!("{} words too many", more.len() - 1))),
        };
        let place = Place::Runner(HostAt { host: host.to_owned(), address });
        let to = Destination { place, worth };
        if all.insert(machine.to_owned(), to).is_some() {
            return Err(wrong(format!("\"{machine}\" has a destination already")));
        }
    }
    Ok(all)
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
    Load {
        name: report.machine.clone(),
        weight: to.map_or(1, |to| to.worth),
        bytes: Bytes(bytes),
        in_store: Bytes(0),
        dirties: Rate(per_second),
        hot: Bytes(hot),
        destination: to.is_some(),
        generation_age: report.generation_age_s.and_then(|s| Duration::try_from_secs_f64(s).ok()),
    }
}

/// What there is on this host.
#[derive(Default)]
struct Measured {
    reports: Vec<LoadReport>,
    /// Machines that run and could not be measured (they are on the move, say), and why.
    unknown: Vec<(String, String)>,
}

/// Measures all running machines of this host, side by side.
fn measure(state: &StateArgs, sample: Duration) -> anyhow::Result<Measured> {
    let names = state::machines(&state.state)?;
    let ask = |name: &str| -> Option<Result<LoadReport, String>> {
        let mut client = Client::connect(&MachineDir::at(&state.state, name).socket()).ok()?;
        client.set_deadline(Some(sample + ANSWER)).ok()?;
        let status: crate::runner::api::Status = client.get(&Request::Status).ok()?;
        // One that waits for a machine, or has ended, has nothing to save.
        if matches!(status.state.as_str(), "standby" | "stopped" | "failed" | "receiving") {
            return None;
        }
        let sample_ms = sample.as_millis() as u64;
        Some(client.get(&Request::Load { sample_ms }).map_err(|e| e.to_string()))
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

fn mode(way: Way) -> Mode {
    match way {
        Way::Hybrid | Way::HybridWithStore => Mode::Hybrid,
        // Stores are not planned with, so that nobody is suspended.
        Way::PostCopy | Way::PostCopyWithStore | Way::Suspend => Mode::PostCopy,
    }
}

/// Moves one machine, to the end.
fn go(state: &StateArgs, name: &str, to: &Destination, way: Way) -> Result<Left, String> {
    let text = |e: crate::runner::api::ClientError| e.to_string();
    // For each answer: a job that is followed tells ten times a second how far it is. A runner that hangs
    // keeps no other machine from leaving.
    let client = |limit| -> Result<Client, crate::runner::api::ClientError> {
        let client = Client::connect(&MachineDir::at(&state.state, name).socket())?;
        client.set_deadline(Some(limit))?;
        Ok(client)
    };
    let HostAt { host, address } = match &to.place {
        Place::Runner(runner) => runner.clone(),
        Place::Hosts(hosts) => {
            let mut refused = Vec::new();
            // By a connection each: a late answer is never taken for another host's.
            let ask = |host: &HostAt| host.ask(&mut client(ASK_LIMIT + ANSWER)?);
            let asked = hosts.iter().find_map(|host| match ask(host) {
                Ok(address) => Some(HostAt { host: host.host.clone(), address }),
                Err(why) => {
                    refused.push(why.to_string());
                    None
                }
            });
            asked.ok_or_else(|| refused.join("; "))?
        }
    };
    let request = MigrateRequest {
        to: address,
        peer: host.clone(),
        mode: mode(way),
        budgets: Budgets::default(),
        dry_run: false,
    };
    let mut client = client(ANSWER).map_err(text)?;
    let job: u64 = client.get(&Request::Migrate(request)).map_err(text)?;
    let report = client.get(&Request::Follow { job }).map_err(text)?;
    Ok(Left { host, report })
}

/// A machine that has left.
struct Left {
    host: String,
    report: MoveReport,
}

pub(super) fn evacuate(
    args: &EvacuateArgs,
    state: &StateArgs,
    format: Format,
) -> anyhow::Result<()> {
    let began = Instant::now();
    let mut to = args.to.as_deref().map_or(Ok(BTreeMap::new()), destinations)?;
    let Measured { reports, unknown } = measure(state, args.sample)?;
    if !args.to_host.is_empty() {
        let unnamed = reports.iter().filter(|report| !to.contains_key(&report.machine));
        let loads: Vec<_> =
            unnamed.map(|one| (one.machine.as_str(), one.memory_bytes + one.disk_bytes)).collect();
        to.extend(spread(&loads, &args.to_host));
    }
    let loads: Vec<Load> =
        reports.iter().map(|report| load(report, to.get(&report.machine))).collect();
    let terms = Terms {
        deadline: args.deadline.saturating_sub(began.elapsed()),
        reserve_percent: args.reserve,
        line: Rate::from_megabits(args.line),
        parallel: args.parallel,
        setup: SETUP,
        store: false,
    };
    let plan = evacuation::plan(&loads, &terms);
    let verdict = plan.verdict(&loads, &terms).to_string();
    if format == Format::Human {
        println!("{verdict}");
        for (name, why) in &unknown {
            println!("  not planned with: \"{name}\": {why}");
        }
    }
    let mut outcomes = Vec::new();
    if !args.dry_run {
        outcomes = run(&plan, &loads, &to, args, began, &|name, to, way| go(state, name, to, way));
    }
    let stays = unknown.into_iter().map(|(machine, why)| Outcome {
        machine,
        host: None,
        way: None,
        expected: false,
        safe_s: None,
        in_time: false,
        blackout_ms: None,
        error: Some(why),
    });
    outcomes.extend(stays);
    let failed = outcomes.iter().filter(|outcome| outcome.error.is_some()).count();
    let late = outcomes.iter().filter(|one| one.error.is_none() && !one.in_time).count();
    let report = Report { plan: &plan, loads: &loads, verdict, outcomes };
    format.print(&report, || lines(&report.outcomes))?;
    match (args.dry_run, failed, late) {
        (true, ..) if !plan.saves_all() || failed > 0 => {
            bail!("not all machines of this host can be saved")
        }
        (true, ..) | (_, 0, 0) => Ok(()),
        _ => bail!("{failed} machines are still here, {late} left after the deadline"),
    }
}

fn lines(outcomes: &[Outcome]) -> String {
    let line = |one: &Outcome| match (&one.error, one.safe_s) {
        (None, Some(safe)) => format!(
            "  {}: safe at {} after {safe:.1} s ({}, blackout {:.1} ms){}",
            one.machine,
            one.host.as_deref().unwrap_or("-"),
            one.way.map_or("", Way::name),
            one.blackout_ms.unwrap_or_default(),
            if one.in_time { "" } else { ", after the deadline" }
        ),
        (why, _) => format!("  {}: still here: {}", one.machine, why.as_deref().unwrap_or("-")),
    };
    outcomes.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// How a machine is moved.
type Go<'a> = &'a (dyn Fn(&str, &Destination, Way) -> Result<Left, String> + Sync);

/// Does the plan: so many machines at a time, in its order, then those who are left.
fn run(
    plan: &Plan,
    loads: &[Load],
    to: &BTreeMap<String, Destination>,
    args: &EvacuateArgs,
    began: Instant,
    go: Go<'_>,
) -> Vec<Outcome> {
    let planned = plan.steps.iter().map(|step| (step.machine, Some(step.way), true));
    let left = plan.left.iter().map(|left| (left.machine, left.way, false));
    let todo: Vec<(usize, Option<Way>, bool)> = planned.chain(left).collect();
    let next = Mutex::new(todo.iter());
    let outcomes = Mutex::new(Vec::new());
    let work = || {
        loop {
            let one = next.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some(&(machine, way, expected)) = one else { return };
            let name = &loads[machine].name;
            let result = match (way, to.get(name)) {
                (Some(way), Some(to)) => go(name, to, way),
                _ => Err("nobody has named a host for it".into()),
            };
            let safe = began.elapsed();
            let mut outcome = Outcome {
                machine: name.clone(),
                host: None,
                way,
                expected,
                safe_s: None,
                in_time: false,
                blackout_ms: None,
                error: None,
            };
            match result {
                Ok(Left { host, report }) => {
                    outcome.host = Some(host);
                    outcome.safe_s = Some(safe.as_secs_f64());
                    outcome.in_time = safe <= args.deadline;
                    outcome.blackout_ms = Some(report.blackout_ms);
                }
                Err(why) => outcome.error = Some(why),
            }
            outcomes.lock().unwrap_or_else(PoisonError::into_inner).push(outcome);
        }
    };
    thread::scope(|scope| {
        for _ in 0..args.parallel.max(1) {
            scope.spawn(work);
        }
    });
    outcomes.into_inner().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_are_read_and_what_is_wrong_is_named_with_its_line() {
        let text = "# where they go\n redis  b 10.0.0.2:7500\nweb c [::1]:7501 5 # dear\n\n";
        let all = parse_destinations(text).unwrap();
        assert_eq!(all.len(), 2);
        assert_eq!((all["redis"].worth, all["web"].worth), (1, 5));
        let web = HostAt { host: "c".into(), address: "[::1]:7501".parse().unwrap() };
        assert_eq!(all["web"].place, Place::Runner(web));
        for (bad, what) in [
            ("redis b", "line 1: write MACHINE"),
            ("\nredis B 10.0.0.2:1", "line 2: \"B\" cannot name a host"),
            ("redis b 10.0.0.2", "no ADDRESS:PORT"),
            ("redis b 10.0.0.2:1 dear", "no worth"),
            ("redis b 10.0.0.2:1 1 2 3", "2 words too many"),
            ("a b 10.0.0.2:1\na c 10.0.0.3:1", "line 2: \"a\" has a destination already"),
            ("../a b 10.0.0.2:1", "line 1: "),
        ] {
            let why = parse_destinations(bad).unwrap_err();
            assert!(why.contains(what), "{bad}: {why}");
        }
    }

    #[test]
    fn machines_are_spread_by_size_and_every_host_is_asked_in_turn() {
        let hosts = ["b=10.0.0.2:1", "c=10.0.0.3:1"].map(|host| host.parse::<HostAt>().unwrap());
        let all = spread(&[("s", 10), ("l", 100), ("m", 60), ("t", 50)], &hosts);
        let first = |name: &str| match &all[name].place {
            Place::Hosts(order) => {
                assert_eq!(order.len(), 2);
                order[0].host.clone()
            }
            other => panic!("{other:?}"),
        };
        // b: 100, then c: 60, c: 110, b: 110.
        assert_eq!(["l", "m", "t", "s"].map(first), ["b", "c", "c", "b"].map(String::from));
        assert!(spread(&[], &hosts).is_empty());
    }

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
        };
        let one = load(&seen, None);
        assert_eq!((one.bytes, one.dirties), (Bytes(1024 << 20), Rate(2 << 20)));
        assert_eq!((one.hot, one.destination), (Bytes(8 << 20), false));
        assert_eq!(one.generation_age, Some(Duration::from_millis(2500)));
        let unseen = load(&LoadReport { written_bytes: None, ..seen }, None);
        assert_eq!(unseen.hot, Bytes(1000 << 20));
    }
}
