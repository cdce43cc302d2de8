//! `handover.protect.` and `handover.loss.`: what it costs a machine to survive the loss of its host, and
//! what that is worth when the host is lost.
//!
//! One guest of 256 MiB that writes 20 MB/s and serves Redis, protected at an interval of 1 s: its pauses,
//! how long until a generation is durable, and what it takes of the guest, measured in turns with and
//! without: of the processor (what its thread runs in user mode, out of the kernel's faults and not
//! waiting for others), and, beside it, of the speed of a loop. The speed counts caches too, and whatever
//! the host's own speed does meanwhile; where that changes, only the processor's time can be believed.
//! Then its host dies (runner, monitor and guard at once), back and forth between two hosts: when a client
//! is answered again, how much of what was answered is forgotten, and how much the stand-in says it may be;
//! the same under output commit at 200 ms. Last, `handover.protect.move.`: it moves under output commit, how
//! long a client has to wait, and when its destination has stored a generation that looked only at what the
//! source had not stored. The cost to the guest is told at 200 ms and 5 s too, to choose by.

use super::{
    Setting,
    cell::Cell,
    groups::{none_of, spread},
    ours,
    processor::Processors,
    store::LocalStore,
};
use crate::{
    fleet::{Fleet, MachineSpec, RunnerId},
    load::{Increments, PATIENCE},
    rig::{MACHINE, PUBLIC, Rig, RigConfig, wait_for},
};
use anyhow::{Context, ensure};
use bench::{Row, Samples, Target};
use drafter::{
    migrate::{messages::Mode, planner::Budgets},
    runner::api::{BackupRequest, ProtectRequest, ProtectionState, Request, TakenOver},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

const REDIS: u16 = 6379;
const BOOT: Duration = Duration::from_secs(90);
const LIMIT: Duration = Duration::from_secs(60);
const EVERY: Duration = Duration::from_secs(1);
/// How long the protected guest is looked at.
const WATCHED: Duration = Duration::from_secs(16);
/// How long a stand-in watches before a host is lost.
const WATCH: Duration = Duration::from_secs(3);
/// The interval under output commit.
const OFTEN: Duration = Duration::from_millis(200);
/// As it is by default.
const TERM_MS: u64 = 3000;
/// Least time for which a guest that computes is looked at.
const TURN: Duration = Duration::from_secs(4);
/// Until it computes, and after it was looked at.
const MARGIN: Duration = Duration::from_secs(1);
/// How often it is measured with protection, and without before and after that.
const TURNS: usize = 7;
const TURNS_OF_OTHERS: usize = 3;
/// Losses of a host for each row.
const LOSSES: usize = 5;

struct Site {
    fleet: Fleet,
    spec: MachineSpec,
    owner: RunnerId,
    host: usize,
    store: LocalStore,
}

/// What a guest that computes got.
struct Computed {
    /// Of a processor.
    share: f64,
    speed: f64,
}

/// What protection takes of a guest, percent, in the median.
struct Cost {
    processor: f64,
    speed: f64,
}

/// One loss.
struct Loss {
    /// From the death to the first answer.
    available: Duration,
    /// Of that, from the instant at which the machine ran.
    answered: Duration,
    /// What was answered and is forgotten.
    lost: Duration,
    taken: TakenOver,
}

impl Site {
    /// A machine that is protected as `how` says, or not at all.
    fn new(setting: &Setting, how: &[&str]) -> anyhow::Result<Self> {
        let config =
            RigConfig { prefix: setting.prefix.clone(), leases: true, ..RigConfig::default() };
        let rig = Rig::new(config).context("building the rig")?;
        ours::clear(&rig);
        let mut fleet = Fleet::new(rig)?;
        let store = LocalStore::new().context("making a folder for the store")?;
        let mut spec = MachineSpec::new("protected", &setting.package);
        spec.memory_mib = Some(256);
        spec.address = Some(MACHINE);
        spec.ports = vec![(REDIS, REDIS)];
        spec.extra = vec!["--accelerator".into(), setting.accelerator.clone()];
        if !how.is_empty() {
            let (url, keys) = (store.url(), store.keys().display().to_string());
            spec.extra.extend(["--protect", &url, "--protect-keys", &keys].map(String::from));
            spec.extra.extend(how.iter().map(|word| (*word).to_owned()));
        }
        let owner = fleet.run(0, &spec)?;
        fleet.runner(owner).wait_ready(BOOT)?;
        let site = Self { fleet, spec, owner, host: 0, store };
        let words = ours::oracle_words(Cell::new(256, 20));
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        site.exec(&words)?;
        Ok(site)
    }

    fn exec(&self, words: &[&str]) -> anyhow::Result<String> {
        let (code, out) = self.fleet.runner(self.owner).exec(words, LIMIT)?;
        ensure!(code == 0, "\"{}\" in the guest ended with {code}: {out}", words.join(" "));
        Ok(out)
    }

    fn protection(&self, at: RunnerId) -> Option<ProtectionState> {
        self.fleet.runner(at).status().ok()?.protection
    }

    /// Waits until a loss of its host would be survived.
    fn wait_protected(&self) -> anyhow::Result<()> {
        let protected = || {
            let status = self.fleet.runner(self.owner).status();
            status.is_ok_and(|status| {
                status.protection.is_some_and(|p| p.word == "protected")
                    && status.backup.is_some_and(|backup| backup.generations > 2)
            })
        };
        ensure!(wait_for(LIMIT, protected), "the machine is not protected within {LIMIT:?}");
        Ok(())
    }

    /// How much a guest that computes as fast as it can has of a processor for so long, and how fast it
    /// is, in anything.
    fn computes(&self, time: Duration) -> anyhow::Result<Computed> {
        let status = self.fleet.runner(self.owner).status()?;
        let processors = Processors::of(status.monitor_pid.context("it has no monitor")?)?;
        let seconds = (time + 2 * MARGIN).as_secs().to_string();
        let words = ["/usr/bin/oracle", "slowdown", "--seconds", &seconds, "--slice-ms", "20"];
        std::thread::scope(|scope| {
            let loops = scope.spawn(|| self.exec(&words));
            std::thread::sleep(MARGIN);
            let first = processors.read()?;
            std::thread::sleep(time);
            let share = processors.read()?.share_since(&first);
            let said = loops.join().map_err(|_| anyhow::anyhow!("the thread panicked"))??;
            let json: serde_json::Value = serde_json::from_str(&said)?;
            let speed = json["batches_per_second"].as_f64();
            let speed = speed.context("the oracle's answer lacks batches_per_second")?;
            Ok(Computed { share, speed })
        })
    }

    /// Protects an unprotected machine, and waits until what its first generations cost is over.
    fn protect(&self, every: Duration, output_commit: bool) -> anyhow::Result<()> {
        let every_ms = Some(every.as_millis() as u64);
        let backup = BackupRequest { every_ms, ..self.store.backup("machines/protected") };
        let request = ProtectRequest { backup, term_ms: TERM_MS, output_commit, host_beat: None };
        let mut client = self.fleet.runner(self.owner).client()?;
        client.set_deadline(Some(LIMIT))?;
        client.call(&Request::Protect(request), |_| {})?;
        self.wait_protected()
    }

    fn end_protection(&self) -> anyhow::Result<()> {
        let mut client = self.fleet.runner(self.owner).client()?;
        client.set_deadline(Some(LIMIT))?;
        client.call(&Request::EndProtect, |_| {})?;
        Ok(())
    }

    /// What protection takes of an unprotected guest: in turns, each next to the ones without before and
    /// after it, so that a host that changes changes both.
    fn cost(&self, every: Duration, output_commit: bool, turns: usize) -> anyhow::Result<Cost> {
        let time = (every * 2).max(TURN);
        let mut without = self.computes(time)?;
        let (mut shares, mut speeds) = (Vec::new(), Vec::new());
        let lost = |before: f64, with: f64, after: f64| (1.0 - with / before.midpoint(after)) * 1e2;
        for _ in 0..turns {
            self.protect(every, output_commit)?;
            let with = self.computes(time)?;
            self.end_protection()?;
            let next = self.computes(time)?;
            shares.push(lost(without.share, with.share, next.share));
            speeds.push(lost(without.speed, with.speed, next.speed));
            without = next;
        }
        println!("   cost to the guest at {every:?}, in turns: of the processor {shares:.1?} %");
        println!("   of the speed of a loop {speeds:.1?} %");
        let median = |values: Vec<f64>| Samples::new(values).and_then(|v| v.median());
        let (processor, speed) = (median(shares), median(speeds));
        let (processor, speed) = processor.zip(speed).context("no turn was measured")?;
        Ok(Cost { processor, speed })
    }

    fn increments(&self) -> anyhow::Result<Increments> {
        let client = self.fleet.rig().client().clone();
        let to = SocketAddr::from((PUBLIC, REDIS));
        let connect = move || {
            let connected = client.run(|| TcpStream::connect_timeout(&to, PATIENCE));
            connected.map_err(std::io::Error::other)?
        };
        Ok(Increments::start(connect)?)
    }

    /// The host dies; the other takes over.
    fn lose(&mut self, load: &Increments) -> anyhow::Result<Loss> {
        let other = 1 - self.host;
        let package = self.spec.package.display().to_string();
        let words = ["stand-in", "protected", "--package", &package].map(String::from).into();
        let next = self.fleet.start(other, &self.spec, words)?;
        let prepared =
            || self.fleet.runner(next).status().is_ok_and(|status| status.monitor_pid.is_some());
        ensure!(wait_for(LIMIT, prepared), "the stand-in is not prepared within {LIMIT:?}");
        self.wait_protected()?;
        // So long that the stand-in knows its signs of life, then any moment between two generations.
        std::thread::sleep(WATCH);
        let spread = self.fleet.runner(next).pid() % 977;
        std::thread::sleep(Duration::from_millis(u64::from(spread)));
        ensure!(load.wait_after(Instant::now(), LIMIT).is_some(), "the client is not answered");

        let status = self.fleet.runner(self.owner).status()?;
        let guard = status.protection.and_then(|protection| protection.guard_pid);
        let all = [Some(status.runner_pid), status.monitor_pid, guard];
        for pid in all.into_iter().flatten() {
            let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL);
        }
        let died = Instant::now();
        self.fleet.runner_mut(self.owner).kill();
        let first = load.wait_after(died + Duration::from_millis(100), LIMIT);
        let first = first.context("nobody answers after the loss of the host")?;
        let lost = load.lost(first, died);
        (self.owner, self.host) = (next, other);
        let mut taken = None;
        let told = || {
            taken = self.protection(next).and_then(|protection| protection.taken_over);
            taken.is_some()
        };
        ensure!(wait_for(LIMIT, told), "the stand-in does not say what it did");
        let taken = taken.context("no report")?;
        let ran = ours::instant_of_boot(taken.ran_at_ns).context("no clock")?;
        let loss = Loss {
            available: first.at - died,
            answered: first.at.saturating_duration_since(ran),
            lost,
            taken,
        };
        println!(
            "   answered again after {:.2} s, {:.2} s of answers forgotten (it says at most {:.2})",
            loss.available.as_secs_f64(),
            loss.lost.as_secs_f64(),
            loss.taken.lost_ms.unwrap_or(f64::NAN) / 1e3
        );
        Ok(loss)
    }

    /// It moves to and fro, under output commit.
    fn moves(&mut self, setting: &Setting, count: usize) -> anyhow::Result<Vec<Row>> {
        let load = self.increments()?;
        let (mut gaps, mut stored) = (Vec::new(), Vec::new());
        for _ in 0..count {
            setting.abandon.check()?;
            self.wait_protected()?;
            ensure!(load.wait_after(Instant::now(), LIMIT).is_some(), "the client is not answered");
            let other = 1 - self.host;
            let to = self.fleet.receive(other, &self.spec)?;
            let began = Instant::now();
            let budgets = Budgets::default();
            self.fleet.migrate(self.owner, to, Mode::Hybrid, budgets, |_| {})?;
            let moved = Instant::now();
            self.fleet.runner_mut(self.owner).kill();
            (self.owner, self.host) = (to, other);
            let mut backup = None;
            let first = || {
                backup = self.fleet.runner(to).status().ok().and_then(|status| status.backup);
                backup.as_ref().is_some_and(|backup| backup.generations > 0)
            };
            ensure!(wait_for(LIMIT, first), "no generation after a move");
            stored.push(moved.elapsed().as_secs_f64() * 1e3);
            ensure!(backup.is_some_and(|backup| backup.from_changes), "it looked at everything");
            let after = load.wait_after(Instant::now(), LIMIT).context("no answer after a move")?;
            gaps.push(load.longest_between(began, after.at).as_secs_f64() * 1e3);
        }
        ensure!(load.went_back().is_none(), "a client saw time go back: {:?}", load.went_back());
        let gaps = Samples::new(gaps).context("a measured value is not a number")?;
        let stored = Samples::new(stored).context("a measured value is not a number")?;
        let mut rows = spread("handover.protect.move.client-gap", "ms", &gaps, None, None);
        rows.extend(spread("handover.protect.move.until-stored", "ms", &stored, None, None));
        Ok(rows)
    }

    fn retire(self) {
        let client = self.fleet.runner(self.owner).client();
        if let Ok(mut client) = client {
            let _ = client.call(&Request::Stop { grace_s: 0 }, |_| {});
        }
    }
}

pub(super) fn protect(setting: &mut Setting) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    let most = |bar: &str, value: f64, unit: &str, target: Option<f64>| {
        Row::judged(bar, value, unit, None, target.map(Target::AtMost))
    };
    let site = Site::new(setting, &[])?;
    let bar = "handover.protect.cost-to-the-guest";
    let cost = site.cost(EVERY, false, setting.times(TURNS))?;
    rows.push(most(bar, cost.processor, "%", Some(5.0)));
    rows.push(most(&format!("{bar}.speed"), cost.speed, "%", None));
    let others = [("every-5s", Duration::from_secs(5), false), ("every-200ms", OFTEN, true)];
    for (name, every, output_commit) in others {
        setting.abandon.check()?;
        let cost = site.cost(every, output_commit, setting.times(TURNS_OF_OTHERS))?;
        rows.push(most(&format!("{bar}.{name}"), cost.processor, "%", None));
        rows.push(most(&format!("{bar}.{name}.speed"), cost.speed, "%", None));
    }
    site.retire();

    setting.abandon.check()?;
    let mut site = Site::new(setting, &["--every", "1s"])?;
    site.wait_protected()?;
    let (start, mut durable, mut newest) = (Instant::now(), Vec::new(), 0);
    while start.elapsed() < WATCHED {
        let backup = site.fleet.runner(site.owner).status()?.backup.context("no backup")?;
        if backup.newest.unwrap_or(0) > newest {
            newest = backup.newest.unwrap_or(0);
            durable.extend(backup.durable_ms);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let durable = Samples::new(durable).context("a measured value is not a number")?;
    let backup = site.fleet.runner(site.owner).status()?.backup.context("no backup")?;
    let (median, longest) = backup.pauses_ms.context("no pause")?;
    rows.push(most("handover.protect.pause.median", median, "ms", Some(10.0)));
    rows.push(most("handover.protect.pause.max", longest, "ms", None));
    rows.extend(spread("handover.protect.until-durable", "ms", &durable, None, None));
    let risk = EVERY.as_secs_f64() + durable.max().context("no generation")? / 1e3;
    let bar = "handover.protect.interval-and-until-durable.max";
    rows.push(most(bar, risk, "s", Some(1.5)));

    let load = site.increments()?;
    let count = setting.times(LOSSES);
    let mut losses = Vec::new();
    for _ in 0..count {
        setting.abandon.check()?;
        losses.push(site.lose(&load)?);
    }
    let seconds = |value: &dyn Fn(&Loss) -> f64| {
        Samples::new(losses.iter().map(value)).context("a measured value is not a number")
    };
    let available = seconds(&|loss| loss.available.as_secs_f64())?;
    let five = Some(Target::AtMost(5.0));
    rows.extend(spread("handover.loss.available", "s", &available, five, None));
    type Part = fn(&Loss) -> f64;
    let parts: [(&str, Part); 4] = [
        ("silence", |loss| loss.taken.detected_ms / 1e3),
        ("lease", |loss| loss.taken.taken_ms / 1e3),
        ("restore", |loss| loss.taken.restored_ms / 1e3),
        ("first-answer", |loss| loss.answered.as_secs_f64()),
    ];
    for (part, value) in parts {
        let median = seconds(&value)?.median().context("no loss")?;
        rows.push(most(&format!("handover.loss.part.{part}.median"), median, "s", None));
    }
    let lost = seconds(&|loss| loss.lost.as_secs_f64())?.max().context("no loss")?;
    rows.push(most("handover.loss.work.max", lost, "s", Some(1.5)));
    let says = seconds(&|loss| loss.taken.lost_ms.map_or(f64::INFINITY, |ms| ms / 1e3))?;
    let (median, longest) = (says.median(), says.max());
    rows.push(most("handover.loss.work.says.median", median.context("no loss")?, "s", Some(1.5)));
    rows.push(most("handover.loss.work.says.max", longest.context("no loss")?, "s", None));
    let untrue = losses
        .iter()
        .filter(|loss| loss.taken.lost_ms.is_none_or(|says| loss.lost.as_secs_f64() * 1e3 > says));
    rows.push(none_of("handover.loss.work.more-than-it-says", untrue.count() as u64));
    drop(load);
    site.retire();

    setting.abandon.check()?;
    let more = ["--every", "200ms", "--output-commit"];
    let mut site = Site::new(setting, &more)?;
    site.wait_protected()?;
    let load = site.increments()?;
    let mut forgotten = 0;
    for _ in 0..count {
        setting.abandon.check()?;
        forgotten += u64::from(!site.lose(&load)?.lost.is_zero());
    }
    rows.push(none_of("handover.loss.work.output-commit", forgotten));
    let begin = load.newest().context("no answer")?.number;
    std::thread::sleep(Duration::from_secs(5));
    let rate = (load.newest().context("no answer")?.number - begin) as f64 / 5.0;
    if rate > 0.0 {
        rows.push(most("handover.protect.output-commit.answer.mean", 1e3 / rate, "ms", None));
    }
    drop(load);
    rows.extend(site.moves(setting, count)?);
    site.retire();
    Ok(rows)
}
