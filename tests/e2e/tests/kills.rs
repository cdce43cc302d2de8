//! Runners killed or stopped, lines and lease stores cut at every step of a move, under load: never two
//! copies, one runs at the end, no acknowledged write is lost, it moves again, and nothing is left behind.
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

use architect::{
    fleet::{FleetError, MachineSpec, RunnerId},
    load::{Load, LoadConfig, LoadHandle},
};
use drafter::{
    driver::qemu::{is_frozen, monitor_without_runner},
    lease::{FileStore, LeaseStore as _, MachineName, Nonce, Outcome},
    migrate::{messages::Mode, planner::Budgets},
    runner::api::{MigrateRequest, Phase, Request},
};
use e2e::{
    Stage,
    busy::{Work, start_oracle, verify_oracle},
    copies::{Copies, used},
    eventually,
    gate::{Gate, STEPS, Step},
    moves::{budgets, settled, slow, wait_phase},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    path::Path,
    time::{Duration, Instant},
};

const WORK: Work = Work { memory_mib: 48, hot_mib: 8, rate_mb_s: 10, file_mib: 8 };
/// How long anything may take here, beside whatever else the computer does.
const PATIENCE: Duration = Duration::from_secs(60);
/// Longer than an offer holds on any clock.
const LONGER_THAN_AN_OFFER: Duration = Duration::from_millis(2300);

/// What is done at a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Harm {
    KillSource,
    KillDestination,
    StopSource,
    StopDestination,
    Cut,
    CutLong,
    /// Neither end reaches the lease store, for longer than an offer.
    LoseStore,
    /// The source does not.
    LoseStoreAtSource,
    /// The destination does not.
    LoseStoreAtDestination,
}

const HARMS: [Harm; 9] = [
    Harm::KillSource,
    Harm::KillDestination,
    Harm::StopSource,
    Harm::StopDestination,
    Harm::Cut,
    Harm::CutLong,
    Harm::LoseStore,
    Harm::LoseStoreAtSource,
    Harm::LoseStoreAtDestination,
];

impl Harm {
    /// Within how long the machine is to be available again, counted from the return of what was out.
    const fn bar(self) -> Duration {
        match self {
            // The offer that a token may have named runs out first.
            Self::KillSource | Self::KillDestination | Self::Cut => Duration::from_secs(5),
            _ => Duration::from_secs(2),
        }
    }
}

/// A machine under load, with a runner on each host.
struct Theatre {
    load: Option<LoadHandle>,
    copies: Copies,
    stage: Stage,
    /// Where it is, and where it can go.
    at: RunnerId,
    other: RunnerId,
}

impl Theatre {
    fn open(tls: bool) -> Option<Self> {
        let mut stage = Stage::open()?;
        stage.lease_ways();
        let mut spec: MachineSpec = stage.spec("redis", 1);
        spec.tls = tls;
        spec.memory_mib = Some(128);
        let (at, other) = stage.pair(&spec);
        start_oracle(stage.fleet.runner(at), WORK);
        let config = LoadConfig {
            think: Duration::from_millis(2),
            answer_within: PATIENCE * 2,
            reconnect_within: PATIENCE,
            verify_within: PATIENCE,
            ..LoadConfig::default()
        };
        let client = stage.fleet.rig().client();
        let load = client.run(|| Load::start(Stage::public(1), config)).unwrap().unwrap();
        let states = [stage.fleet.state_of(0), stage.fleet.state_of(1)];
        let copies = Copies::watch(&states, "redis");
        Some(Self { load: Some(load), copies, stage, at, other })
    }

    fn host(&self, id: RunnerId) -> usize {
        usize::from(self.stage.fleet.runner(id).host == "b")
    }

    fn state(&self, id: RunnerId) -> String {
        self.stage.fleet.runner(id).status().map(|s| s.state).unwrap_or_default()
    }

    /// The client has answers; how long that took.
    #[track_caller]
    fn served(&self, when: &str) -> Duration {
        let since = Instant::now();
        let load = self.load.as_ref().unwrap();
        assert!(
            load.wait_for(20, PATIENCE),
            "no answers {when}: {:?}; {}",
            load.progress(),
            self.both()
        );
        since.elapsed()
    }

    fn both(&self) -> String {
        [self.at, self.other]
            .map(|id| {
                let runner = self.stage.fleet.runner(id);
                match runner.status() {
                    Ok(s) => format!(
                        "{}: {} ({}), lease {:?} {:?}, missing {:?}",
                        runner.host, s.state, s.detail, s.lease_owner, s.epoch, s.missing
                    ),
                    Err(e) => format!("{}: {e}; {}", runner.host, runner.log_tail()),
                }
            })
            .join("\n")
    }

    /// One copy runs, the other host waits; it is in `self.at` afterwards.
    #[track_caller]
    fn settle(&mut self, when: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let states = (self.state(self.at), self.state(self.other));
            match (states.0.as_str(), states.1.as_str()) {
                ("running", "standby") => break,
                ("standby", "running") => {
                    std::mem::swap(&mut self.at, &mut self.other);
                    break;
                }
                _ => {}
            }
            assert!(Instant::now() < deadline, "it does not settle {when}: {}", self.both());
            std::thread::sleep(Duration::from_millis(20));
        }
        settled(&self.stage.fleet, self.at);
        let left = |id: RunnerId| {
            let run = self.stage.fleet.runner(id).dir().run();
            run.join("guard.pid").exists()
                || (id == self.other && monitor_without_runner(&run).is_some())
        };
        eventually("no guard, and no monitor but the machine's, is left", PATIENCE, || {
            !left(self.at) && !left(self.other)
        });
        let status = self.stage.fleet.runner(self.at).status().unwrap();
        assert_eq!(
            status.lease_owner.as_deref(),
            Some(self.stage.fleet.runner(self.at).host.as_str())
        );
    }

    #[track_caller]
    fn moves_again(&mut self, when: &str) {
        let (at, other) = (self.at, self.other);
        let deadline = Instant::now() + PATIENCE;
        let moved = loop {
            let moved = self.stage.fleet.migrate(at, other, Mode::Hybrid, budgets(), |_| {});
            // What the line still had for the other host may have come after it had settled.
            let late =
                |e: &FleetError| e.to_string().contains("receiving, not waiting for a machine");
            if !moved.as_ref().is_err_and(late) || Instant::now() > deadline {
                break moved;
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        assert!(moved.is_ok(), "it does not move {when}: {moved:?}; {}", self.both());
        self.settle(when);
        assert_eq!(self.at, other, "{when}");
    }

    #[track_caller]
    fn finish(mut self) {
        self.served("at the end");
        verify_oracle(self.stage.fleet.runner(self.at));
        let report = self.load.take().unwrap().finish().unwrap();
        assert!(report.verified, "{report:?}");
        assert_eq!(
            (report.lost_writes, report.doubled_writes, report.wrong_answers),
            (0, 0, 0),
            "{report:?}"
        );
        self.copies.one("at the end");
    }

    fn logs(&self) -> [String; 2] {
        [self.at, self.other].map(|id| self.stage.fleet.runner(id).log())
    }

    /// What both runners have said since their logs were that long, in order.
    fn timeline(&self, since: [usize; 2]) -> String {
        let mut lines = Vec::new();
        for ((log, since), id) in self.logs().iter().zip(since).zip([self.at, self.other]) {
            let host = &self.stage.fleet.runner(id).host;
            lines.extend(log[since..].lines().map(|line| (line.to_owned(), host.clone())));
        }
        // Every line begins with its time, in the same colour.
        lines.sort();
        let plain = |line: &str| -> String {
            let mut parts = line.split('\x1b');
            let first = parts.next().unwrap_or_default();
            let rest = parts.filter_map(|part| part.split_once('m')).map(|(_, text)| text);
            std::iter::once(first).chain(rest).collect()
        };
        lines.iter().map(|(line, host)| format!("{host} {}\n", plain(line))).collect()
    }

    fn signal(&self, id: RunnerId, signal: Signal) {
        kill(Pid::from_raw(self.stage.fleet.runner(id).pid() as i32), signal).unwrap();
    }

    /// Has a copy run at the other host while neither host reaches the lease store, once the hand-over is
    /// written; its line and its monitor. `None` if it was refused.
    #[track_caller]
    fn unconfirmed(&mut self, run: &Path, when: &str) -> Option<(Gate, u32)> {
        let (from, to) = (self.at, self.other);
        let (source, destination) = (self.host(from), self.host(to));
        let address = self.stage.fleet.runner(to).address;
        let gate = Gate::at(&self.stage, destination, address, Step::Token);
        let request = MigrateRequest {
            to: gate.address,
            peer: self.stage.fleet.runner(to).host.clone(),
            mode: Mode::Hybrid,
            budgets: budgets(),
            dry_run: false,
            stored_as: None,
        };
        let mut client = self.stage.fleet.runner(from).client().unwrap();
        let _: u64 = client.get(&Request::Migrate(request)).unwrap();
        assert!(gate.wait(PATIENCE), "no token {when}");
        for host in [source, destination] {
            self.stage.lead_leases(host, false);
        }
        let monitor = monitor_without_runner(run).unwrap();
        let before = used(monitor);
        gate.open();
        let ran = || used(monitor) > before + 5_000_000 || is_frozen(run);
        eventually("it runs there, or is refused", PATIENCE, || {
            ran() || self.state(from) == "running"
        });
        if ran() {
            return Some((gate, monitor));
        }
        for host in [source, destination] {
            self.stage.lead_leases(host, true);
        }
        self.settle(when);
        None
    }

    /// One case; how long it took until the client had answers, from the return of what was out.
    #[track_caller]
    fn case(&mut self, step: Step, harm: Harm, mode: Mode) -> Option<Duration> {
        let when = format!("after {harm:?} at {step:?}, {mode}");
        let begun = self.logs().map(|log| log.len());
        let (from, to) = (self.at, self.other);
        let host = self.host(to);
        let gate = Gate::at(&self.stage, host, self.stage.fleet.runner(to).address, step);
        let request = MigrateRequest {
            to: gate.address,
            peer: self.stage.fleet.runner(to).host.clone(),
            mode,
            budgets: Budgets { blackout: Duration::from_millis(5), ..budgets() },
            dry_run: false,
            stored_as: None,
        };
        let mut client = self.stage.fleet.runner(from).client().unwrap();
        let _: u64 = client.get(&Request::Migrate(request)).unwrap();
        if !gate.wait(Duration::from_secs(20)) {
            // A move that has no such step, such as rounds of post-copy.
            gate.open();
            self.settle(&when);
            return None;
        }
        let since = match harm {
            Harm::KillSource | Harm::KillDestination => {
                let who = if harm == Harm::KillSource { from } else { to };
                self.stage.fleet.runner_mut(who).kill();
                let since = Instant::now();
                gate.open();
                if let Err(error) = self.stage.fleet.recover(who) {
                    panic!("{when}: {error}");
                }
                since
            }
            Harm::StopSource | Harm::StopDestination => {
                let who = if harm == Harm::StopSource { from } else { to };
                self.signal(who, Signal::SIGSTOP);
                gate.open();
                std::thread::sleep(LONGER_THAN_AN_OFFER);
                self.signal(who, Signal::SIGCONT);
                Instant::now()
            }
            Harm::Cut | Harm::CutLong => {
                gate.cut();
                if harm == Harm::CutLong {
                    std::thread::sleep(LONGER_THAN_AN_OFFER);
                }
                gate.mend();
                Instant::now()
            }
            Harm::LoseStore | Harm::LoseStoreAtSource | Harm::LoseStoreAtDestination => {
                let all = [(from, Harm::LoseStoreAtDestination), (to, Harm::LoseStoreAtSource)];
                let hosts = all.map(|(id, not)| (self.host(id), harm != not));
                let lead = |there: bool| {
                    for (host, _) in hosts.iter().filter(|(_, loses)| *loses) {
                        self.stage.lead_leases(*host, there);
                    }
                };
                lead(false);
                gate.open();
                std::thread::sleep(LONGER_THAN_AN_OFFER);
                lead(true);
                Instant::now()
            }
        };
        self.served(&when);
        let took = since.elapsed();
        if took > harm.bar() {
            eprintln!(
                "{when}: {took:?}, and {:?} are the bar\n{}",
                harm.bar(),
                self.timeline(begun)
            );
        }
        self.settle(&when);
        gate.cut();
        self.moves_again(&when);
        self.copies.one(&when);
        Some(took)
    }
}

#[test]
fn hop_check_03_36_post_copy_goes_on_after_a_cut_line_and_after_the_death_of_either_runner() {
    let Some(mut theatre) = Theatre::open(true) else { return };
    for round in 0..4 {
        let (from, to) = (theatre.at, theatre.other);
        let fleet = &theatre.stage.fleet;
        let job = fleet.start_move(from, to, Mode::PostCopy, slow(12_000_000), false).unwrap();
        wait_phase(fleet, from, job, Phase::PostCopy);
        eventually("the destination runs it", PATIENCE, || theatre.state(to) == "running");
        match round {
            0 => {
                // For long enough that both ends must notice.
                let (here, there) = (theatre.host(from), theatre.host(to));
                let hosts = theatre.stage.fleet.rig().hosts();
                let (namespace, name) = (&hosts[here].namespace, &hosts[there].name);
                namespace.ip(&format!("link set dev mig-{name} down")).unwrap();
                let says = |id: RunnerId, words: &str| {
                    let status = theatre.stage.fleet.runner(id).status().unwrap();
                    status.detail.contains(words)
                };
                eventually("both ends say what is the matter", PATIENCE, || {
                    says(from, "is not reached") && says(to, "blocks are missing")
                });
                let script = format!(
                    "link set dev mig-{name} up\nroute replace {} dev mig-{name}",
                    hosts[there].migration
                );
                namespace.ip(&script).unwrap();
            }
            1 | 3 => {
                theatre.stage.fleet.runner_mut(to).kill();
                theatre.stage.fleet.recover(to).unwrap();
            }
            _ => {
                theatre.stage.fleet.runner_mut(from).kill();
                theatre.stage.fleet.recover(from).unwrap();
            }
        }
        theatre.served("in post-copy");
        theatre.settle(&format!("in round {round}"));
        assert_eq!(theatre.at, to, "round {round}");
        verify_oracle(theatre.stage.fleet.runner(to));
        theatre.copies.one("in post-copy");
    }
    theatre.moves_again("after post-copy");
    theatre.finish();
}

/// A copy that runs unconfirmed loses its runner while the lease store is silent; then, of all that may
/// come first, this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum First {
    /// The source takes the machine back.
    Source,
    /// The write to the lease that the runner had begun gets there.
    LateWrite,
    /// The runner's successor.
    Successor,
}

#[test]
fn an_unconfirmed_copy_whose_runner_dies_stands_still_at_the_end_of_its_offer_until_the_lease_is_its_own()
 {
    let Some(mut theatre) = Theatre::open(false) else { return };
    for first in [First::Source, First::LateWrite, First::Successor] {
        let when = format!("where {first:?} comes first");
        let (from, to) = (theatre.at, theatre.other);
        let (source, destination) = (theatre.host(from), theatre.host(to));
        let run = theatre.stage.fleet.runner(to).dir().run();
        // On a busy computer a token may come too late for its offer.
        let begun = (0..10).find_map(|_| theatre.unconfirmed(&run, &when));
        let (gate, monitor) = begun.expect("a copy that runs unconfirmed");
        theatre.stage.fleet.runner_mut(to).kill();
        eventually("it is frozen", PATIENCE, || is_frozen(&run));
        assert_eq!(monitor_without_runner(&run), Some(monitor), "and was not ended");
        let stood = used(monitor);

        let store = FileStore::open(&theatre.stage.leases(), PATIENCE).unwrap();
        let name = MachineName::new("redis").unwrap();
        let handed = store.read(&name).unwrap().unwrap();
        let handing = handed.handing_to.clone().expect("it is being handed over");
        let stays = first == First::Source;
        if !stays {
            theatre.signal(from, Signal::SIGSTOP);
        }
        if first == First::LateWrite {
            let late = handed.taken(handing.to, handing.attempt, Nonce::random().unwrap());
            let written = store.compare_and_set(&name, Some(&handed), &late).unwrap();
            assert_eq!(written, Outcome::Won);
        }
        theatre.stage.lead_leases(source, true);
        if stays {
            theatre.served(&when);
            assert!(is_frozen(&run), "what the guard froze stays so {when}");
        }
        // What it had begun when it was frozen is counted a moment later.
        let ran = Duration::from_nanos(used(monitor) - stood);
        assert!(ran < Duration::from_millis(2), "it stands still {when}: {ran:?}");
        theatre.stage.lead_leases(destination, true);
        theatre.stage.fleet.recover(to).unwrap();
        if !stays {
            theatre.signal(from, Signal::SIGCONT);
        }
        theatre.served(&when);
        theatre.settle(&when);
        assert_eq!(theatre.at, if stays { from } else { to }, "{when}");
        if !stays {
            assert_eq!(monitor_without_runner(&run), Some(monitor), "the same copy runs {when}");
        }
        gate.cut();
        theatre.moves_again(&when);
        theatre.copies.one(&when);
    }
    theatre.finish();
}

#[test]
fn hop_check_04_05_06_whatever_dies_at_whichever_step_one_copy_runs_and_nothing_is_lost() {
    let Some(mut theatre) = Theatre::open(false) else { return };
    let all = std::env::var_os("KILLS_ALL").is_some();
    // Without, a ninth of the table, which has every step and every harm: the same in every run, so that
    // a failure is found again.
    let part = std::env::var("KILLS_PART").map_or(1, |part| part.parse().unwrap());
    let mut table = Vec::new();
    for (row, step) in STEPS.into_iter().enumerate() {
        for (column, harm) in HARMS.into_iter().enumerate() {
            if !all && (row + column) % HARMS.len() != part % HARMS.len() {
                continue;
            }
            let mode = if step == Step::PostCopy { Mode::PostCopy } else { Mode::Hybrid };
            let took = theatre.case(step, harm, mode);
            let took =
                took.map_or("no such step".into(), |took| format!("{:.2} s", took.as_secs_f64()));
            eprintln!("case: {step:?} {harm:?} {took}");
            table.push(format!("| {step:?} | {harm:?} | {took} |"));
        }
    }
    eprintln!("| step | harm | served again after |\n|---|---|---|\n{}", table.join("\n"));
    theatre.finish();
}
