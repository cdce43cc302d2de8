//! A soak: machines under load that are moved, suspended, killed at, cut off and robbed of their hosts in
//! random order, each by a thread of its own, and of the lease store and the line all at once. What their
//! clients asked for and were told is recorded and checked (see [`history`]); no acknowledged write may
//! be lost, no machine may run twice, and each must serve again after whatever was done.
//!
//! Used by `tests/soak.rs`, for a short time by `make test` and for as long as one likes by `make soak`.
//! The deeds follow from the seed alone ([`plan`]); when they meet each other does not.

mod actor;
pub mod history;
pub mod plan;
pub mod registers;

use crate::{BOOT, Stage};
use actor::Actor;
use architect::{fleet::Fleet, rig::Host};
use history::{Operation, Violation};
use nix::fcntl::{AT_FDCWD, Flock, FlockArg, RenameFlags, renameat2};
use plan::{Deeds, Forecast, Kind, Weather};
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
const KINDS: [Kind; 4] = [Kind::Plain, Kind::Protected, Kind::Plain, Kind::Protected];

/// What a soak came to.
#[derive(Debug)]
pub struct Outcome {
    /// Deeds done, by machine.
    pub deeds: Vec<u64>,
    /// Operations that clients asked for; of these, without an answer.
    pub operations: (usize, usize),
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
            Weather::LineDown(time) => {
                self.say("weather", &format!("the line between the hosts is down for {time:?}"));
                let [one, two] = &self.hosts[..] else { unreachable!("a soak has two hosts") };
                let line = format!("mig-{}", two.name);
                one.namespace.ip(&format!("link set dev {line} down\n")).unwrap();
                thread::sleep(time);
                let up =
                    format!("link set dev {line} up\nroute replace {} dev {line}\n", two.migration);
                one.namespace.ip(&up).unwrap();
                self.say("weather", "the line is up");
            }
        }
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
    let mut stage = Stage::open()?;
    let folder = folder();
    fs::create_dir_all(&folder).unwrap();
    // Histories are large: the last soak's are enough.
    let _alone = Flock::lock(File::create(folder.join("lock")).unwrap(), FlockArg::LockExclusive);
    let keys = folder.join("keys");
    fs::write(&keys, silo::store::KeyRing::generate_line("soak").unwrap()).unwrap();
    fs::set_permissions(&keys, fs::Permissions::from_mode(0o600)).unwrap();
    for old in ["store", "saved"] {
        let _ = fs::remove_dir_all(folder.join(old));
    }
    let mut booted = Vec::new();
    for (kind, number) in KINDS.into_iter().zip(1_u8..) {
        let spec = actor::spec(&stage, &folder, number, kind);
        booted.push((spec.clone(), stage.fleet.run(0, &spec).unwrap()));
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
    let history: Vec<_> = actors.into_iter().flat_map(Actor::finish).collect();
    keep(&history, &world.folder.join("history.jsonl"));
    let violations = history::check(&history);
    for failure in &failures {
        world.say("soak", &format!("FAILED: {failure}"));
    }
    for violation in &violations {
        world.say("soak", &format!("VIOLATION: {violation}"));
    }
    let unknown = history.iter().filter(|operation| operation.answered.is_none()).count();
    let outcome = Outcome { deeds, operations: (history.len(), unknown), violations, failures };
    world.say("soak", &format!("SEED={seed}: {outcome:?}"));
    let _ = fs::remove_dir_all(world.folder.join("store"));
    let _ = fs::remove_dir_all(world.folder.join("saved"));
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

/// Writes a history, an operation a line.
fn keep(history: &[Operation], path: &Path) {
    let mut out = BufWriter::new(File::create(path).unwrap());
    for operation in history {
        serde_json::to_writer(&mut out, operation).unwrap();
        out.write_all(b"\n").unwrap();
    }
    out.flush().unwrap();
}
