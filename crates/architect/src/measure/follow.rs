//! `conduit.gap.machine.`: what clients feel when a real machine moves, kind of flow by kind of flow, and
//! when its old host is cut off as soon as nothing is there any more.
//!
//! One guest of 192 MiB, moved back and forth between two hosts: with Redis under load and bulk into it;
//! with Redis and the old host's links down 0, 10 and 100 ms after all blocks are at the new one; with a
//! download that the guest has begun; with questions by UDP; with Redis over IPv6. What is promised of a
//! gap is as in `move.gap.`: the blackout, the lease's round trip, and 40 ms.

use super::{
    Setting,
    groups::none_of,
    ours::{self, instant_of},
};
use crate::{
    fleet::{Fleet, MachineSpec, RunnerId},
    load::{Load, LoadConfig, LoadHandle, Questions, Stream, TcpReport, Timeline},
    rig::{CLIENT, MACHINE, Namespace, PUBLIC, PUBLIC_V6, Rig, RigConfig},
};
use anyhow::{Context, bail, ensure};
use bench::{Row, Samples, Target};
use drafter::{
    migrate::{messages::Mode, planner::Budgets, timings::MoveReport},
    runner::api::Request,
};
use std::{
    net::{SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

/// Beginning of the names of these bars.
pub(super) const BARS: &str = "conduit.gap.machine.";

const REDIS: u16 = 6379;
const UDP: u16 = 7100;
const BULK: u16 = 7101;
const DOWNLOAD: u16 = 7200;
/// Into the guest, and out of the server that it downloads from; bytes a second.
const BULK_RATE: u64 = 50_000_000 / 8;
const DOWNLOAD_RATE: u64 = 4_000_000;
const LIMIT: Duration = Duration::from_secs(20);
const BOOT: Duration = Duration::from_secs(90);
/// How long the old host stays cut off: what is sent to it in vain shows long before.
const CUT: Duration = Duration::from_millis(1000);
/// How long flows run before a move, and are looked at after it.
const AROUND: Duration = Duration::from_millis(300);
/// What a gap may have beyond the blackout and the lease.
const BEYOND_MS: f64 = 40.0;

/// The machine and where it is.
struct Site {
    fleet: Fleet,
    client: Namespace,
    runners: [RunnerId; 2],
    at: usize,
}

/// What a flow felt of one move, milliseconds.
struct Felt {
    gap: f64,
    blackout: f64,
    /// The gap beyond the blackout and the lease.
    beyond: f64,
}

impl Site {
    fn new(setting: &Setting) -> anyhow::Result<Self> {
        let config =
            RigConfig { prefix: setting.prefix.clone(), leases: true, ..RigConfig::default() };
        let rig = Rig::new(config).context("building the rig")?;
        ours::clear(&rig);
        let client = rig.client().clone();
        let mut fleet = Fleet::new(rig)?;
        let mut spec = MachineSpec::new("follow", &setting.package);
        spec.memory_mib = Some(192);
        spec.address = Some(MACHINE);
        spec.address_v6 = "fd77::1".parse().ok();
        spec.ports = vec![(REDIS, REDIS), (BULK, BULK)];
        spec.extra_boot = vec!["--publish".into(), format!("{UDP}:{UDP}/udp")];
        spec.extra = vec!["--accelerator".into(), setting.accelerator.clone()];
        let runners = [fleet.run(0, &spec)?, fleet.receive(1, &spec)?];
        fleet.runner(runners[0]).wait_ready(BOOT)?;
        let site = Self { fleet, client, runners, at: 0 };
        site.oracle(&["answer", "--background", "--listen", &format!("0.0.0.0:{UDP}")])?;
        site.oracle(&["sink", "--background", "--listen", &format!("0.0.0.0:{BULK}")])?;
        Ok(site)
    }

    /// Runs the oracle in the guest.
    fn oracle(&self, words: &[&str]) -> anyhow::Result<String> {
        let argv: Vec<&str> = ["/usr/bin/oracle"].iter().chain(words).copied().collect();
        let (code, out) = self.fleet.runner(self.runners[self.at]).exec(&argv, LIMIT)?;
        ensure!(code == 0, "`{}` in the guest ended with {code}: {out}", argv.join(" "));
        Ok(out)
    }

    /// Moves it to the other host. `cut`: how long after all blocks are there the old host is cut off.
    fn go(&mut self, cut: Option<Duration>) -> anyhow::Result<MoveReport> {
        let (old, from, to) = (self.at, self.runners[self.at], self.runners[1 - self.at]);
        let job = self.fleet.start_move(from, to, Mode::Hybrid, Budgets::default(), false)?;
        if let Some(after) = cut {
            self.wait_whole(to)?;
            std::thread::sleep(after);
            self.fleet.rig().cut(old)?;
            std::thread::sleep(CUT);
            self.fleet.rig().reconnect(old)?;
        }
        let mut client = self.fleet.runner(from).client()?;
        client.set_deadline(Some(Duration::from_secs(60)))?;
        let value = client.call(&Request::Follow { job }, |_| {})?;
        self.wait_whole(to)?;
        self.at = 1 - old;
        self.wait_fleet()?;
        serde_json::from_value(value).context("a move's report")
    }

    /// Waits until the machine runs at `at` with all of its blocks; looks all the time.
    fn wait_whole(&self, at: RunnerId) -> anyhow::Result<()> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let status = self.fleet.runner(at).status()?;
            if status.state == "running" && status.missing.values().all(|n| *n == 0) {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "the machine is {} there: {}",
                status.state,
                status.detail
            );
        }
    }

    /// Waits until the edge hears all hosts, and they it.
    fn wait_fleet(&self) -> anyhow::Result<()> {
        let rig = self.fleet.rig();
        let well = || {
            let connected = |socket: &std::path::Path| {
                conduit::status(socket).is_ok_and(|s| s.link.starts_with("connected"))
            };
            let heard = conduit::status(&rig.edge_socket()).is_ok_and(|s| s.silent.is_empty());
            heard && rig.hosts().iter().all(|host| connected(&host.agent_socket))
        };
        ensure!(crate::rig::wait_for(LIMIT, well), "a host that was cut off is not heard again");
        Ok(())
    }

    /// Moves it `count` times with these flows, whose silences are in `lines`. What the worst of them
    /// felt, move by move.
    fn moves(
        &mut self,
        setting: &Setting,
        lines: &[Timeline],
        count: usize,
        cut: Option<Duration>,
    ) -> anyhow::Result<Vec<Felt>> {
        let mut all = Vec::with_capacity(count);
        for _ in 0..count {
            setting.abandon.check()?;
            std::thread::sleep(AROUND);
            let start = Instant::now();
            let report = self.go(cut)?;
            std::thread::sleep(AROUND);
            // Rounds take the guest's time too; the promise is of the switchover and what follows.
            let from = instant_of(report.paused_at_ns).context("no clock")?.max(start);
            let now = Instant::now();
            let silences = lines.iter().map(|line| line.longest_between(from, now));
            let gap = silences.max().unwrap_or_default().as_secs_f64() * 1e3;
            println!(
                "   gap {gap:.1} ms, blackout {:.1}, confirmed {:.1}",
                report.blackout_ms, report.confirmed_ms
            );
            all.push(Felt { gap, blackout: report.blackout_ms, beyond: gap - report.confirmed_ms });
        }
        Ok(all)
    }
}

/// The rows of one kind of flow.
struct Rows {
    bar: String,
    rows: Vec<Row>,
}

impl Rows {
    fn new(name: &str) -> Self {
        Self { bar: format!("{BARS}{name}"), rows: Vec::new() }
    }

    fn row(&mut self, what: &str, value: f64, unit: &str, target: Option<f64>) {
        let bar = format!("{} | {what}", self.bar);
        self.rows.push(Row::judged(&bar, value, unit, None, target.map(Target::AtMost)));
    }

    fn none(&mut self, what: &str, count: u64) {
        self.rows.push(none_of(&format!("{} | {what}", self.bar), count));
    }

    fn felt(&mut self, all: &[Felt]) -> anyhow::Result<()> {
        let of = |value: fn(&Felt) -> f64| {
            Samples::new(all.iter().map(value)).context("a value is not a number")
        };
        let median = |value| of(value)?.median().context("no move");
        self.row("blackout, median", median(|f| f.blackout)?, "ms", None);
        self.row("gap, median", median(|f| f.gap)?, "ms", None);
        let beyond = median(|f| f.beyond)?;
        self.row("gap beyond blackout and lease, median", beyond, "ms", Some(BEYOND_MS));
        let worst = of(|f| f.beyond)?.max().context("no move")?;
        self.row("gap beyond blackout and lease, worst", worst, "ms", None);
        Ok(())
    }

    fn tcp(&mut self, tcp: &TcpReport) {
        self.row("segments sent again from outside", tcp.retransmits as f64, "segments", None);
        if let Some(fired) = tcp.rto {
            self.none("retransmission time-outs outside", fired);
        }
    }

    /// A Redis client's end.
    fn client(&mut self, load: LoadHandle) -> anyhow::Result<()> {
        let report = load.finish()?;
        for problem in &report.problems {
            println!("   client: {problem}");
        }
        ensure!(report.operations > 0 && report.verified, "the client was not served: {report:?}");
        self.none("resets and errors", report.reconnects + report.errors);
        self.none(
            "writes lost or doubled",
            report.lost_writes + report.doubled_writes + report.wrong_answers,
        );
        self.tcp(&report.tcp);
        Ok(())
    }
}

/// Measures all of it.
pub(super) fn follow(setting: &mut Setting) -> anyhow::Result<Vec<Row>> {
    let mut site = Site::new(setting)?;
    // The first two touch all memory of both hosts.
    site.moves(setting, &[], 2, None)?;
    let count = if setting.quick { 1 } else { 6 };
    let mut rows = busy(&mut site, setting, count)?;
    for after in [0, 10, 100] {
        rows.extend(cut_off(&mut site, setting, count, after)?);
    }
    rows.extend(download(&mut site, setting, count)?);
    rows.extend(questions(&mut site, setting, count)?);
    rows.extend(over_ipv6(&mut site, setting, count)?);
    Ok(rows)
}

fn redis(site: &Site, at: SocketAddr) -> anyhow::Result<LoadHandle> {
    let load = site.client.run(|| Load::start(at, LoadConfig::default()))??;
    ensure!(load.wait_for(100, LIMIT), "Redis does not answer");
    Ok(load)
}

fn busy(site: &mut Site, setting: &Setting, count: usize) -> anyhow::Result<Vec<Row>> {
    let load = redis(site, (PUBLIC, REDIS).into())?;
    let to = SocketAddr::from((PUBLIC, BULK));
    let stream = site.client.run(|| TcpStream::connect_timeout(&to, LIMIT))??;
    let bulk = Stream::over(stream, BULK_RATE)?;
    ensure!(bulk.wait_for(BULK_RATE / 10, LIMIT), "no bulk reaches the guest");
    let mut rows = Rows::new("busy");
    rows.felt(&site.moves(setting, &[load.timeline()], count, None)?)?;
    rows.client(load)?;
    let sent = bulk.finish().context("the bulk broke")?;
    ensure!(sent.bytes > BULK_RATE, "only {} bytes of bulk were sent", sent.bytes);
    rows.row("bulk, segments sent again", sent.tcp.retransmits as f64, "segments", None);
    if let Some(fired) = sent.tcp.rto {
        rows.none("bulk, retransmission time-outs", fired);
    }
    let out = site.oracle(&["status", "--socket", "/run/oracle-sink.sock"])?;
    rows.none("bulk, streams that came with another hash", u64::from(!out.contains(&sent.hash)));
    Ok(rows.rows)
}

fn cut_off(
    site: &mut Site,
    setting: &Setting,
    count: usize,
    after_ms: u64,
) -> anyhow::Result<Vec<Row>> {
    let load = redis(site, (PUBLIC, REDIS).into())?;
    let mut rows = Rows::new(&format!("cut.{after_ms}ms"));
    let cut = Some(Duration::from_millis(after_ms));
    rows.felt(&site.moves(setting, &[load.timeline()], count, cut)?)?;
    rows.client(load)?;
    Ok(rows.rows)
}

fn download(site: &mut Site, setting: &Setting, count: usize) -> anyhow::Result<Vec<Row>> {
    let from = SocketAddr::from((CLIENT, DOWNLOAD));
    let listener = site.client.run(|| TcpListener::bind(from))??;
    site.oracle(&["download", "--background", "--from", &from.to_string()])?;
    let stream = Stream::serve(&listener, DOWNLOAD_RATE)?;
    ensure!(stream.wait_for(DOWNLOAD_RATE / 4, LIMIT), "the guest downloads nothing");
    let mut rows = Rows::new("download");
    rows.felt(&site.moves(setting, &[stream.timeline()], count, None)?)?;
    let sent = stream.finish().context("the download broke")?;
    let whole = || {
        let out = site.oracle(&["status", "--socket", "/run/oracle-download.sock"]);
        out.is_ok_and(|out| out.contains(&sent.hash))
    };
    rows.none(
        "downloads that came with another hash",
        u64::from(!crate::rig::wait_for(LIMIT, whole)),
    );
    rows.tcp(&sent.tcp);
    Ok(rows.rows)
}

fn questions(site: &mut Site, setting: &Setting, count: usize) -> anyhow::Result<Vec<Row>> {
    let to = SocketAddr::from((PUBLIC, UDP));
    let questions = site.client.run(|| Questions::start(to, Duration::from_millis(1)))??;
    if !questions.wait_for(500, LIMIT) {
        bail!("the guest answers no datagrams");
    }
    let mut rows = Rows::new("udp");
    rows.felt(&site.moves(setting, &[questions.timeline()], count, None)?)?;
    let all = questions.finish(Duration::from_secs(5));
    println!("   {all:?}");
    rows.none("at 1000 a second, without answer", all.sent - all.answered);
    rows.row("at 1000 a second, overtaken", all.reordered as f64, "answers", None);
    Ok(rows.rows)
}

fn over_ipv6(site: &mut Site, setting: &Setting, count: usize) -> anyhow::Result<Vec<Row>> {
    let load = redis(site, (PUBLIC_V6, REDIS).into())?;
    let mut rows = Rows::new("ipv6");
    rows.felt(&site.moves(setting, &[load.timeline()], count, None)?)?;
    rows.client(load)?;
    Ok(rows.rows)
}
