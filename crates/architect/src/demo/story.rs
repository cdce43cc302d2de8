//! What happens: the machine boots, works, moves, and everybody is asked what was lost.

use super::{
    Args, HowToMove,
    echo::Echo,
    guest::{self, Work},
    moving,
    screen::Screen,
    stop::Stop,
};
use crate::{
    fleet::{Fleet, MachineSpec, RunnerId},
    load::{Load, LoadConfig, LoadHandle},
    rig,
    table::{Report, count, milliseconds},
};
use anyhow::{Context as _, bail};
use drafter::migrate::timings::MoveReport;
use nix::sched::{CloneFlags, setns};
use std::{
    fs::File,
    io,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

const NAME: &str = "redis";
const PORT: u16 = 6379;
/// Where the client's end of the machine's own connection listens.
const ECHO_PORT: u16 = 7000;
const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// How long the machine may take to be known as running where it arrived.
const ARRIVE_LIMIT: Duration = Duration::from_secs(60);
/// The client works undisturbed this long before the first move and between moves.
const REST: Duration = Duration::from_millis(700);
/// Operations that the client completes at least in that time, or something is wrong.
const WORK_LIMIT: Duration = Duration::from_secs(20);

/// A run from the rig to the report. Dropping it ends everything, the load first.
pub(super) struct Story<'a> {
    load: Option<LoadHandle>,
    echo: Option<Echo>,
    runners: Vec<RunnerId>,
    fleet: Fleet,
    stop: &'a Stop,
    screen: &'a Screen,
    args: &'a Args,
    how: HowToMove,
}

impl<'a> Story<'a> {
    pub(super) fn new(
        fleet: Fleet,
        stop: &'a Stop,
        screen: &'a Screen,
        args: &'a Args,
        how: HowToMove,
    ) -> Self {
        Self { load: None, echo: None, runners: Vec::new(), fleet, stop, screen, args, how }
    }

    /// The folder of the run.
    pub(super) fn folder(&self) -> PathBuf {
        self.fleet.rig().folder().to_owned()
    }

    /// All of it.
    pub(super) fn tell(&mut self, package: &Path) -> anyhow::Result<(Report, Vec<MoveReport>)> {
        self.boot(package)?;
        let started = self.put_to_work()?;
        let mut report = Report::default();
        let mut details = Vec::new();
        for number in 0..self.args.moves {
            let (row, detail) = self
                .move_on(number)
                .with_context(|| format!("move {} of {}", number + 1, self.args.moves))?;
            moving::show(self.screen, number + 1, self.args.moves, &row);
            report.moves.push(row);
            details.push(detail);
        }
        self.ask_everybody(&mut report, &started)?;
        Ok((report, details))
    }

    /// Where the machine is after that many moves, and where it goes next.
    fn ends(&self, moves: u32) -> (RunnerId, RunnerId) {
        let here = moves as usize % 2;
        (self.runners[here], self.runners[1 - here])
    }

    fn boot(&mut self, package: &Path) -> anyhow::Result<()> {
        let mut spec = MachineSpec::new(NAME, package);
        spec.memory_mib = Some(self.args.memory);
        spec.address = Some(rig::MACHINE);
        spec.ports = vec![(PORT, PORT)];
        spec.tls = !self.args.plaintext;
        self.screen.begin("starting the machine on host a");
        let machine = self.fleet.run(0, &spec)?;
        self.runners.push(machine);
        self.stop.check()?;
        // The other runner starts while the guest boots.
        let other = self.fleet.receive(1, &spec)?;
        self.runners.push(other);
        let begun = Instant::now();
        loop {
            self.stop.check()?;
            let runner = self.fleet.runner(machine);
            let Err(error) = runner.wait_ready(Duration::from_secs(1)) else { break };
            let status = runner.status()?;
            if !["running", "booting"].contains(&status.state.as_str()) {
                bail!("the machine is {} instead of booting: {}", status.state, status.detail);
            }
            if begun.elapsed() > BOOT_LIMIT {
                bail!("Redis is not ready after {} s: {error}", BOOT_LIMIT.as_secs());
            }
            let seconds = begun.elapsed().as_secs();
            self.screen.update(&format!("Linux and Redis boot on host a, {seconds} s"));
        }
        let memory = self.args.memory;
        self.screen.done("machine", &format!("{memory} MiB, Redis is ready on host a"));
        Ok(())
    }

    /// Starts the oracle, the connection from inside, and the client; returns what the oracle
    /// said at first.
    fn put_to_work(&mut self) -> anyhow::Result<guest::Answer> {
        let work = Work::new(self.args.memory, self.args.dirty_rate);
        self.screen.begin("putting the machine to work");
        let listener = self
            .fleet
            .rig()
            .client()
            .run(|| TcpListener::bind((rig::CLIENT, ECHO_PORT)))?
            .with_context(|| format!("listening at {}:{ECHO_PORT}", rig::CLIENT))?;
        self.echo = Some(Echo::start(listener)?);
        let runner = self.fleet.runner(self.runners[0]);
        let started = guest::start(runner, work)?;
        self.stop.check()?;
        guest::start_outbound(runner, SocketAddr::from((rig::CLIENT, ECHO_PORT)))?;
        self.stop.check()?;

        let namespace = Path::new("/run/netns").join(self.fleet.rig().client().name());
        let config = LoadConfig {
            enter: Some(Box::new(move || {
                setns(File::open(&namespace)?, CloneFlags::CLONE_NEWNET).map_err(io::Error::from)
            })),
            ..LoadConfig::default()
        };
        let address = SocketAddr::from((rig::PUBLIC, PORT));
        self.load = Some(Load::start(address, config)?);
        // Translated code warms up before anything is measured.
        self.rest(REST * 2)?;
        let done = format!(
            "one client connection, {} MB/s of writes in {} MiB, {} MiB checked, one connection out",
            work.rate, work.hot_mib, work.memory_mib
        );
        self.screen.done("at work", &done);
        Ok(started)
    }

    fn load(&self) -> &LoadHandle {
        self.load
            .as_ref()
            .expect("the client works from before the first move until after the last")
    }

    /// The client works undisturbed for a while.
    fn rest(&self, time: Duration) -> anyhow::Result<()> {
        let (until, before) = (Instant::now() + time, self.load().progress().operations);
        let goal = before + 20;
        let rested = self.stop.wait(WORK_LIMIT, || {
            Instant::now() >= until && self.load().progress().operations >= goal
        })?;
        if !rested {
            let progress = self.load().progress();
            bail!(
                "the client completed {} operations in {} s (errors: {}, reconnects: {})",
                progress.operations - before,
                WORK_LIMIT.as_secs(),
                progress.errors,
                progress.reconnects
            );
        }
        Ok(())
    }

    fn move_on(&self, number: u32) -> anyhow::Result<(crate::table::Move, MoveReport)> {
        let (from, to) = self.ends(number);
        let what = format!(
            "move {} of {}, {} → {}",
            number + 1,
            self.args.moves,
            self.fleet.runner(from).host,
            self.fleet.runner(to).host
        );
        self.screen.begin(&what);
        let mode = self.how.mode(number);
        let limit = moving::limit(self.args);
        let begun = Instant::now();
        let report = moving::one(&self.fleet, (from, to), mode, limit, self.stop, |progress| {
            self.screen.update(&format!("{what}: {}", moving::sentence(progress)));
        })?;
        let ended = Instant::now();
        let arrived = self.stop.wait(ARRIVE_LIMIT, || {
            self.fleet.runner(to).status().is_ok_and(|status| status.state == "running")
        })?;
        if !arrived {
            bail!("host {} does not say that the machine runs there", report.to);
        }
        // So that the answer after the move ends a silence that may still last.
        self.rest(REST)?;
        let gap = self.load().gap_between(begun, ended);
        Ok((moving::row(&report, gap), report))
    }

    /// What was lost: the oracle, the connection from inside, the client.
    fn ask_everybody(
        &mut self,
        report: &mut Report,
        started: &guest::Answer,
    ) -> anyhow::Result<()> {
        self.screen.begin("reading every page and every block of the file again");
        let (here, _) = self.ends(self.args.moves);
        let runner = self.fleet.runner(here);
        let before = guest::status(runner)?;
        let answer = guest::verify(runner)?;
        report.oracle = answer.result();
        report.further_problems.extend(answer.problems());
        let (outbound, last_error) = guest::outbound(runner)?;
        report.outbound = Some(outbound);
        report
            .further_problems
            .extend(last_error.map(|error| format!("the machine's own connection: {error}")));
        let accepted = self.echo.as_ref().map_or(0, Echo::connections);
        if accepted != 1 {
            report
                .further_problems
                .push(format!("the machine connected {accepted} times to the client, not once"));
        }
        self.stop.check()?;
        let load = self.load.take().expect("started before, and finished only here");
        report.client = load.finish()?;
        let wrote = before.rate_since(started);
        self.screen.done(
            "all read again",
            &format!("the machine wrote {wrote:.0} MB/s all the time, moves included"),
        );
        Ok(())
    }

    /// What may explain a failure: the ends of the runners' logs.
    pub(super) fn last_words(&self) -> String {
        let mut text = String::new();
        for &id in &self.runners {
            let runner = self.fleet.runner(id);
            text += &format!("--- the runner on host {} ---\n{}\n", runner.host, runner.log_tail());
        }
        text
    }

    /// For `--keep`.
    pub(super) fn how_to_look_around(&self) -> String {
        let program = std::env::current_exe().unwrap_or_else(|_| "architect".into());
        let program = program.display();
        let client = self.fleet.rig().client();
        let mut text = String::from("\nEverything is left running until Ctrl-C. To look around:\n");
        for (index, host) in self.fleet.rig().hosts().iter().enumerate() {
            let state = self.fleet.state_of(index);
            text +=
                &format!("  {program} list --state {}    # host {}\n", state.display(), host.name);
        }
        let (here, _) = self.ends(self.args.moves);
        let here = usize::from(here != self.runners[0]);
        let state = self.fleet.state_of(here);
        text += &format!(
            "  {program} exec --state {} {NAME} -- /usr/bin/redis-server --version\n",
            state.display()
        );
        text += &format!(
            "  ip netns exec {client} bash -c 'exec 3<>/dev/tcp/{}/{PORT}; echo PING >&3; head -1 <&3'\n",
            rig::PUBLIC
        );
        text + &format!("  ls {}/logs", self.folder().display())
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => 0.0,
        length if length % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

/// The whole run in one sentence.
pub(super) fn in_short(report: &Report, time: Duration) -> String {
    let blackout = median(report.moves.iter().map(|step| step.blackout_ms).collect());
    let gap = median(report.moves.iter().map(|step| step.client_gap_ms).collect());
    format!(
        "Median blackout {}, median client gap {}; {} operations a second; the whole run took {:.0} s.",
        milliseconds(blackout),
        milliseconds(gap),
        count(report.client.operations_per_second.round() as u64),
        time.as_secs_f64()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_or_between_the_two_in_the_middle() {
        assert_eq!(median(vec![]), 0.0);
        assert_eq!(median(vec![9.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 9.0]), 3.0);
    }
}
