//! Our side: machines on a rig, moved back and forth, each move with what the client felt of it.

use super::{Abandon, cell::Cell, journal::Journal};
use crate::{
    fleet::{Fleet, MachineSpec, RunnerId},
    load::{Load, LoadConfig, LoadHandle},
    rig::{MACHINE, PUBLIC, Rig, line},
};
use anyhow::{Context, bail, ensure};
use drafter::{
    migrate::{messages::Mode, planner::Budgets, timings::MoveReport},
    runner::{
        api::{BackupReport, BackupRequest, Request},
        state::{MachineDir, machines},
    },
};
use nix::sched::{CloneFlags, setns};
use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// The port of Redis, in the machine and at the edge.
const REDIS: u16 = 6379;
/// How long a translated guest may take to boot on a busy computer.
const BOOT: Duration = Duration::from_secs(90);
/// How long the oracle may take to fill the memory of the largest guest.
const FILL: Duration = Duration::from_secs(90);
/// How long one question to the oracle may take, a complete pass apart.
const ASK: Duration = Duration::from_secs(20);
/// How long a complete pass may take.
const PASS: Duration = Duration::from_secs(200);
/// How long a load runs before a machine is moved, so that its rate is what it is called.
pub(super) const SETTLE: Duration = Duration::from_millis(250);

/// What the oracle in a guest has found.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub(super) struct Findings {
    /// Pages compared.
    pub(super) pages: u64,
    /// Pages and blocks of the file that held something else, and errors of the file.
    pub(super) wrong: u64,
}

impl Findings {
    /// Reads the oracle's JSON.
    pub(super) fn read(text: &str) -> anyhow::Result<Findings> {
        let json: serde_json::Value =
            serde_json::from_str(text).with_context(|| format!("the oracle said {text:?}"))?;
        let number = |name: &str| {
            json[name].as_u64().with_context(|| format!("the oracle's answer lacks {name}: {text}"))
        };
        Ok(Findings {
            pages: number("pages_checked")?,
            wrong: number("mismatches")? + number("file_mismatches")? + number("file_errors")?,
        })
    }
}

/// The words that start the oracle in a guest.
pub(super) fn oracle_words(cell: Cell) -> Vec<String> {
    let mut words: Vec<String> =
        ["/usr/bin/oracle", "run", "--background"].map(String::from).into();
    let mut option = |name: &str, value: &dyn ToString| {
        words.extend([format!("--{name}"), value.to_string()]);
    };
    option("memory-mib", &cell.watched_mib());
    option("hot-mib", &cell.hot_mib());
    option("rate-mb-s", &cell.rate_mb_s);
    option("check-mb-s", &8);
    option("file", &"/var/lib/oracle.file");
    option("file-mib", &2);
    option("file-writes-s", &10);
    words
}

/// A rig with runners.
pub(super) struct Bed {
    pub(super) fleet: Fleet,
    package: PathBuf,
    accelerator: String,
    machines: usize,
}

impl Bed {
    /// Builds the rig of a cell, and says what its line reaches.
    pub(super) fn new(
        cell: Cell,
        prefix: &str,
        package: &Path,
        accelerator: &str,
    ) -> anyhow::Result<(Bed, line::Line)> {
        let rig = Rig::new(cell.link.rig(prefix)).context("building the rig")?;
        clear(&rig);
        let [a, b] = rig.hosts() else { bail!("the rig has not two hosts") };
        let line = line::measure(a, b, Duration::from_millis(700))?;
        let fleet = Fleet::new(rig)?;
        let bed = Bed {
            fleet,
            package: package.to_owned(),
            accelerator: accelerator.to_owned(),
            machines: 0,
        };
        Ok((bed, line))
    }

    /// Boots a machine on the first host, starts its oracle, and lets the second host wait for it.
    /// `keep_stay` lets a host keep what it knows of a machine that left, so that it comes back
    /// quickly. `network` gives it a network and a port at the edge.
    pub(super) fn boot(
        &mut self,
        cell: Cell,
        keep_stay: bool,
        network: bool,
    ) -> anyhow::Result<Machine> {
        self.machines += 1;
        let mut spec = MachineSpec::new(&format!("bench-{}", self.machines), &self.package);
        spec.memory_mib = Some(cell.memory_mib);
        spec.tls = cell.tls;
        spec.extra = vec!["--accelerator".into(), self.accelerator.clone()];
        if !keep_stay {
            spec.extra.extend(["--keep-stay-mib".into(), "0".into()]);
        }
        if network {
            spec.address = Some(MACHINE);
            spec.ports = vec![(REDIS, REDIS)];
        }
        let first = self.fleet.run(0, &spec)?;
        let second = self.fleet.receive(1, &spec)?;
        self.fleet.runner(first).wait_ready(BOOT)?;
        let machine = Machine { runners: [first, second], at: 0, cell, load: None };
        machine.start_oracle(self)?;
        Ok(machine)
    }

    /// Ends a machine that is not needed any more, to have its memory back.
    pub(super) fn retire(&self, machine: &Machine) {
        for &id in &machine.runners {
            let asked = self.fleet.runner(id).client().and_then(|mut client| {
                client.set_deadline(Some(Duration::from_secs(20)))?;
                client.call(&Request::Stop { grace_s: 0 }, |_| {})
            });
            if let Err(error) = asked {
                tracing::warn!(%error, "a machine that was measured did not end; it ends with the rig");
            }
        }
    }
}

/// Ends monitors that a killed benchmark left, and forgets its machines: a rig keeps state.
pub(super) fn clear(rig: &Rig) {
    for host in rig.hosts() {
        let state = rig.folder().join(format!("state-{}", host.name));
        for name in machines(&state).unwrap_or_default() {
            let run = MachineDir::at(&state, &name).run();
            if let Err(error) = drafter::driver::qemu::stop_without_runner(&run) {
                tracing::warn!(%error, name, "a monitor of an earlier run may be left");
            }
        }
        // What cannot be removed shows when the next machine starts.
        let _ = fs::remove_dir_all(&state);
    }
    let _ = fs::remove_dir_all(rig.folder().join("leases"));
}

/// A machine that is measured.
pub(super) struct Machine {
    runners: [RunnerId; 2],
    at: usize,
    cell: Cell,
    load: Option<LoadHandle>,
}

/// One move.
pub(super) struct Sample {
    /// What the source says.
    pub(super) report: MoveReport,
    /// The longest silence of the client that overlaps the move, milliseconds.
    pub(super) gap_ms: Option<f64>,
    /// The same for the parts of the move, to see where it comes from.
    pub(super) gaps: Option<Gaps>,
}

/// The longest silences that overlap parts of a move, milliseconds.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub(super) struct Gaps {
    /// From the request to the pause.
    pub(super) before_ms: f64,
    /// The one that was there while the machine was paused.
    pub(super) pause_ms: f64,
    /// After that one, until the end.
    pub(super) after_ms: f64,
}

/// An instant from the source's clock, which is also ours: a rig is one computer.
pub(super) fn instant_of(monotonic_ns: u64) -> Option<Instant> {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).ok()?;
    let ago = Duration::from(now).checked_sub(Duration::from_nanos(monotonic_ns))?;
    Instant::now().checked_sub(ago)
}

/// The same, from this computer's `CLOCK_BOOTTIME`.
pub(super) fn instant_of_boot(boot_ns: u64) -> Option<Instant> {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).ok()?;
    let ago = Duration::from(now).checked_sub(Duration::from_nanos(boot_ns))?;
    Instant::now().checked_sub(ago)
}

fn gaps(load: &LoadHandle, start: Instant, report: &MoveReport) -> Option<Gaps> {
    let pause = instant_of(report.paused_at_ns)?;
    let run = pause + Duration::from_secs_f64(report.blackout_ms / 1e3);
    let ms = |from, to| load.gap_between(from, to).as_secs_f64() * 1e3;
    let pause_ms = ms(pause, run);
    let answered = pause + Duration::from_secs_f64(pause_ms / 1e3) + Duration::from_millis(1);
    // The part before ends a little early, or the pause's own silence would be in it.
    let margin = Duration::from_secs_f64(pause_ms / 1e3);
    let early = pause.checked_sub(margin)?.max(start);
    Some(Gaps { before_ms: ms(start, early), pause_ms, after_ms: ms(answered, Instant::now()) })
}

impl Machine {
    fn runner(&self) -> RunnerId {
        self.runners[self.at]
    }

    /// Runs a command in the guest that must succeed; its output.
    pub(super) fn exec(
        &self,
        bed: &Bed,
        words: &[&str],
        limit: Duration,
    ) -> anyhow::Result<String> {
        let (code, out) = bed.fleet.runner(self.runner()).exec(words, limit)?;
        ensure!(code == 0, "\"{}\" in the guest ended with {code}: {out}", words.join(" "));
        Ok(out)
    }

    fn start_oracle(&self, bed: &Bed) -> anyhow::Result<()> {
        let words = oracle_words(self.cell);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        self.exec(bed, &words, FILL).context("starting the oracle")?;
        Ok(())
    }

    /// Another rate of writing: the oracle begins anew.
    pub(super) fn set_rate(&mut self, bed: &Bed, rate_mb_s: u64) -> anyhow::Result<()> {
        self.exec(bed, &["/usr/bin/oracle", "stop"], ASK)?;
        self.cell.rate_mb_s = rate_mb_s;
        self.start_oracle(bed)
    }

    /// Lets the oracle write, or rest while something else is measured.
    pub(super) fn writes(&self, bed: &Bed, on: bool) -> anyhow::Result<()> {
        let word = if on { "resume-writes" } else { "pause-writes" };
        self.exec(bed, &["/usr/bin/oracle", word], ASK).map(drop)
    }

    /// A complete pass of the oracle over memory and file. What it finds wrong is an answer, not
    /// an error.
    pub(super) fn verify(&self, bed: &Bed) -> anyhow::Result<Findings> {
        let words = ["/usr/bin/oracle", "verify"];
        let (_, out) = bed.fleet.runner(self.runner()).exec(&words, PASS)?;
        Findings::read(&out)
    }

    /// Stores a generation of it.
    pub(super) fn back_up(
        &self,
        bed: &Bed,
        request: &BackupRequest,
    ) -> anyhow::Result<BackupReport> {
        let mut client = bed.fleet.runner(self.runner()).client()?;
        client.set_deadline(Some(PASS))?;
        Ok(client.get(&Request::Backup(request.clone()))?)
    }

    /// Starts the Redis client.
    pub(super) fn start_load(&mut self, bed: &Bed) -> anyhow::Result<()> {
        let path = Path::new("/run/netns").join(bed.fleet.rig().client().name());
        let enter = move || Ok(setns(fs::File::open(path)?, CloneFlags::CLONE_NEWNET)?);
        let config = LoadConfig { enter: Some(Box::new(enter)), ..LoadConfig::default() };
        self.load = Some(Load::start(SocketAddr::from((PUBLIC, REDIS)), config)?);
        Ok(())
    }

    /// The client's longest silence in a time in which nothing moves, milliseconds.
    pub(super) fn quiet_gap(&self, time: Duration) -> Option<f64> {
        let start = Instant::now();
        std::thread::sleep(time);
        let load = self.load.as_ref()?;
        Some(load.gap_between(start, Instant::now()).as_secs_f64() * 1e3)
    }

    /// The running client.
    pub(super) fn take_load(&mut self) -> Option<LoadHandle> {
        self.load.take()
    }

    /// Moves it to the other host, and writes down how that went.
    pub(super) fn go(
        &mut self,
        bed: &Bed,
        mode: Mode,
        journal: &mut Journal,
        abandon: &Abandon,
    ) -> anyhow::Result<Sample> {
        abandon.check()?;
        let (from, to) = (self.runners[self.at], self.runners[1 - self.at]);
        let start = Instant::now();
        let result = bed.fleet.migrate(from, to, mode, Budgets::default(), |_| {});
        let report = match result {
            Ok(report) => report,
            Err(error) => {
                let logs = [from, to].map(|id| bed.fleet.runner(id).log_tail()).join("\n--\n");
                journal.failed(self.cell, &error.to_string());
                return Err(anyhow::Error::new(error).context(format!(
                    "a {mode} move of {}; the ends of the logs:\n{logs}",
                    self.cell
                )));
            }
        };
        self.at = 1 - self.at;
        let gap_ms = self.load.as_ref().map(|load| {
            // The client must have had its say before the silence counts as over.
            load.wait_for(3, Duration::from_secs(5));
            load.gap_between(start, Instant::now()).as_secs_f64() * 1e3
        });
        let gaps = self.load.as_ref().and_then(|load| gaps(load, start, &report));
        let sample = Sample { report, gap_ms, gaps };
        journal.moved(self.cell, &sample);
        Ok(sample)
    }
}
