//! A soak: machines under load on three hosts that are moved, suspended, copied, taken back in time, killed
//! at, cut off and robbed of their hosts in random order, each by a thread of its own, and of the lease
//! store, lines, network agents and the edge all at once. What their clients asked for and were told is
//! recorded and checked (see [`history`]); no acknowledged write may be lost, no machine may run twice, and
//! each must serve again after whatever was done.
//!
//! Used by `tests/soak.rs`, for a short time by `make test` and for as long as one likes by `make soak`.
//! The deeds follow from the seed alone ([`plan`]); when they meet each other does not.

mod actor;
pub mod history;
pub mod plan;
pub mod registers;

use crate::{BOOT, Stage};
use actor::Actor;
use architect::{
    fleet::Fleet,
    rig::{Host, Rig, RigConfig, RigError},
};
use history::Violation;
use nix::fcntl::{AT_FDCWD, Flock, FlockArg, RenameFlags, renameat2};
use plan::{Deeds, Forecast, HOSTS, Kind, Weather};
use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// How long anything may take here, beside whatever else the computer does.
const PATIENCE: Duration = Duration::from_secs(150);
/// The machines; their numbers count from one.
const KINDS: [Kind; 4] = [Kind::Plain, Kind::Protected, Kind::Forked, Kind::ProtectedHarmed];

/// What a soak came to.
#[derive(Debug)]
pub struct Outcome {
    /// Deeds done, by machine.
    pub deeds: Vec<u64>,
    /// Operations that clients asked for; of these, without an answer.
    pub operations: (usize, usize),
    /// Lives that were checked: one for each machine, each time that one went back, and each copy.
    pub lives: usize,
    /// What cannot have been.
    pub violations: Vec<Violation>,
    /// What else went wrong: a machine that did not serve again, or ran twice.
    pub failures: Vec<String>,
}

/// What all threads share.
struct World {
    stage: Mutex<Stage>,
    hosts: Vec<Host>,
    leases: PathBuf,
    folder: PathBuf,
    log: Mutex<File>,
    origin: Instant,
    seed: u64,
    over: AtomicBool,
}

impl World {
    fn stage(&self) -> MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Works with the fleet, briefly: everybody else waits.
    fn fleet<T>(&self, work: impl FnOnce(&mut Fleet) -> T) -> T {
        work(&mut self.stage().fleet)
    }

    fn say(&self, who: &str, what: &str) {
        let line = format!("{:9.3} {who}: {what}", self.origin.elapsed().as_secs_f64());
        eprintln!("{line}");
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = writeln!(log, "{line}");
    }

    /// The time as the history has it.
    fn now(&self) -> u64 {
        1 + self.origin.elapsed().as_nanos() as u64
    }

    fn goes_on(&self) -> bool {
        !self.over.load(Ordering::Relaxed)
    }

    /// Sleeps; false if it is over.
    fn pause(&self, time: Duration) -> bool {
        let until = Instant::now() + time;
        while self.goes_on() && Instant::now() < until {
            thread::sleep(Duration::from_millis(20).min(time));
        }
        self.goes_on()
    }

    fn be(&self, weather: Weather) {
        match weather {
            Weather::StoreAway(time) => {
                self.say("weather", &format!("the lease store is away for {time:?}"));
                // At one instant: an empty folder would be another store.
                let away = self.leases.with_extension("away");
                fs::write(&away, "no folder").unwrap();
                let exchange = || {
                    let flags = RenameFlags::RENAME_EXCHANGE;
                    renameat2(AT_FDCWD, &self.leases, AT_FDCWD, &away, flags).unwrap();
                };
                exchange();
                thread::sleep(time);
                exchange();
                fs::remove_file(&away).unwrap();
                self.say("weather", "the lease store is back");
            }
            Weather::LineDown(host, time) => {
                let one = &self.hosts[usize::from(host)];
                let two = &self.hosts[usize::from((host + 1) % HOSTS)];
                let between = format!("the line between hosts {} and {}", one.name, two.name);
                self.say("weather", &format!("{between} is down for {time:?}"));
                let line = format!("mig-{}", two.name);
                one.namespace.ip(&format!("link set dev {line} down\n")).unwrap();
                thread::sleep(time);
                let up =
                    format!("link set dev {line} up\nroute replace {} dev {line}\n", two.migration);
                one.namespace.ip(&up).unwrap();
                self.say("weather", &format!("{between} is up"));
            }
            Weather::AgentDies(host, time) => {
                let host = usize::from(host);
                let who = format!("the network agent of host {}", self.hosts[host].name);
                self.dies(&who, time, |rig| rig.kill_agent(host), |rig| rig.start_agent(host));
            }
            Weather::EdgeDies(time) => {
                self.dies("the edge", time, Rig::kill_edge, Rig::start_edge);
            }
        }
    }

    /// A daemon dies, and is started again as a supervisor does: until it stands.
    fn dies(
        &self,
        who: &str,
        time: Duration,
        kill: impl FnOnce(&mut Rig),
        start: impl Fn(&mut Rig) -> Result<(), RigError>,
    ) {
        self.say("weather", &format!("{who} dies, for {time:?}"));
        self.fleet(|fleet| kill(fleet.rig_mut()));
        thread::sleep(time);
        let until = Instant::now() + PATIENCE;
        while let Err(error) = self.fleet(|fleet| start(fleet.rig_mut())) {
            assert!(Instant::now() < until, "{who} does not come back: {error}");
            self.say("weather", &format!("{who}, again: {error}"));
        }
        self.say("weather", &format!("{who} is back"));
    }
}

/// Where a soak leaves its log and its history.
#[must_use]
pub fn folder() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |t| root.join(t));
    target.join("soak")
}

/// Soaks for so long after everything has booted. `None` if this computer lacks a capability.
#[must_use]
pub fn run(time: Duration, seed: u64) -> Option<Outcome> {
    let mut stage = Stage::with(RigConfig { hosts: HOSTS.into(), ..RigConfig::default() })?;
    let folder = folder();
    fs::create_dir_all(&folder).unwrap();
    // Histories are large: the last soak's are enough.
    let _alone = Flock::lock(File::create(folder.join("lock")).unwrap(), FlockArg::LockExclusive);
    let keys = folder.join("keys");
    fs::write(&keys, silo::store::KeyRing::generate_line("soak").unwrap()).unwrap();
    fs::set_permissions(&keys, fs::Permissions::from_mode(0o600)).unwrap();
    remove_stores(&folder);
    let mut booted = Vec::new();
    for (kind, number) in KINDS.into_iter().zip(1_u8..) {
        let spec = actor::spec(&stage, &folder, number, kind);
        let host = usize::from(number % HOSTS);
        booted.push((spec.clone(), stage.fleet.run(host, &spec).unwrap()));
    }
    for (_, at) in &booted {
        stage.fleet.runner(*at).wait_ready(BOOT * 4).unwrap();
    }
    let world = World {
        hosts: stage.fleet.rig().hosts().to_vec(),
        leases: stage.leases(),
        stage: Mutex::new(stage),
        log: Mutex::new(File::create(folder.join("log.txt")).unwrap()),
        folder,
        origin: Instant::now(),
        seed,
        over: AtomicBool::new(false),
    };
    world.say("soak", &format!("SEED={seed}, for {time:?}; {KINDS:?}"));
    let mut actors: Vec<_> = KINDS
        .into_iter()
        .zip(1_u8..)
        .zip(booted)
        .map(|((kind, number), (spec, at))| Actor::new(&world, number, kind, spec, at))
        .collect();
    let failures = play(&world, &mut actors, time);
    let deeds = actors.iter().map(|actor| actor.deeds).collect();
    let (mut history, mut lives) = (Vec::new(), Vec::new());
    for actor in actors {
        let (mut asked, mut lived) = actor.finish();
        history.append(&mut asked);
        lives.append(&mut lived);
    }
    keep(&history, &world.folder.join("history.jsonl"));
    keep(&lives, &world.folder.join("lives.jsonl"));
    let violations = history::check_lives(&history, &lives);
    for failure in &failures {
        world.say("soak", &format!("FAILED: {failure}"));
    }
    for violation in &violations {
        world.say("soak", &format!("VIOLATION: {violation}"));
    }
    let unknown = history.iter().filter(|operation| operation.answered.is_none()).count();
    let operations = (history.len(), unknown);
    let outcome = Outcome { deeds, operations, lives: lives.len(), violations, failures };
    world.say("soak", &format!("SEED={seed}: {outcome:?}"));
    remove_stores(&world.folder);
    Some(outcome)
}

/// All threads until the time is over; what went wrong.
fn play(world: &World, actors: &mut [Actor<'_>], time: Duration) -> Vec<String> {
    thread::scope(|scope| {
        let threads: Vec<_> = actors
            .iter_mut()
            .map(|actor| {
                scope.spawn(move || {
                    let kind = actor.kind();
                    let result = actor.play(Deeds::new(world.seed, actor.number(), kind));
                    if result.is_err() {
                        // The others end too: what there is to see is in the log.
                        world.over.store(true, Ordering::Relaxed);
                    }
                    result
                })
            })
            .collect();
        let weather = scope.spawn(move || {
            for (pause, weather) in Forecast::new(world.seed) {
                if !world.pause(pause) {
                    break;
                }
                world.be(weather);
            }
        });
        let until = Instant::now() + time;
        while world.goes_on() && Instant::now() < until {
            thread::sleep(Duration::from_millis(50));
        }
        world.over.store(true, Ordering::Relaxed);
        let mut failures: Vec<String> = threads
            .into_iter()
            .filter_map(|thread| {
                thread.join().unwrap_or_else(|_| Err("a thread panicked; see above".into())).err()
            })
            .collect();
        if weather.join().is_err() {
            failures.push("the weather panicked; see above".into());
        }
        failures
    })
}

/// Removes what machines left there: protected ones, suspended ones, those that slept.
fn remove_stores(folder: &Path) {
    for old in ["store", "saved", "asleep"] {
        let _ = fs::remove_dir_all(folder.join(old));
    }
}

/// Writes a history, an operation a line.
fn keep(lines: &[impl serde::Serialize], path: &Path) {
    let mut out = BufWriter::new(File::create(path).unwrap());
    for line in lines {
        serde_json::to_writer(&mut out, line).unwrap();
        out.write_all(b"\n").unwrap();
    }
    out.flush().unwrap();
}
