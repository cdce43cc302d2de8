//! Machines that survive the loss of their host, and the loss of hosts.

use crate::{Stage, eventually, place::Place};
use architect::{
    fleet::{MachineSpec, RunnerId},
    load::{Increments, PATIENCE},
};
use drafter::runner::api::{ProtectionState, Status, TakenOver};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    net::TcpStream,
    time::{Duration, Instant},
};

/// How long anything here may take.
pub const LIMIT: Duration = Duration::from_secs(120);

/// A machine with a network and its Redis at the edge, protected wherever it runs, and where its generations
/// are kept.
#[must_use]
pub fn spec(stage: &Stage, more: &[&str]) -> (MachineSpec, Place) {
    let place = Place::new();
    let mut spec = stage.spec("redis", 1);
    let (url, keys) = (place.url(), place.keys().display().to_string());
    spec.extra = ["--protect", &url, "--protect-keys", &keys].map(String::from).into();
    spec.extra.extend(more.iter().map(|word| (*word).to_owned()));
    (spec, place)
}

/// A stand-in at `host`, when it is prepared.
pub fn stand_in(stage: &mut Stage, host: usize, spec: &MachineSpec) -> RunnerId {
    let package = spec.package.display().to_string();
    let words = ["stand-in", "redis", "--package", &package].map(String::from).into();
    let id = stage.fleet.start(host, spec, words).unwrap();
    eventually("the stand-in is prepared", LIMIT, || {
        let status = stage.fleet.runner(id).status().unwrap();
        status.state == "stand-in" && status.monitor_pid.is_some()
    });
    id
}

/// How its protection does; of a runner that has ended there is none.
#[must_use]
pub fn protection(stage: &Stage, at: RunnerId) -> Option<ProtectionState> {
    // One that has ended answers nothing.
    stage.fleet.runner(at).status().ok()?.protection
}

/// Waits until it is.
#[track_caller]
pub fn is_protected(stage: &Stage, at: RunnerId) {
    let runner = stage.fleet.runner(at);
    let begun = Instant::now();
    loop {
        let status = runner.status();
        let is_so = status.as_ref().is_ok_and(|status| {
            let word = status.protection.as_ref().is_some_and(|state| state.word == "protected");
            word && status.backup.as_ref().is_some_and(|backup| backup.generations > 1)
        });
        if is_so {
            return;
        }
        let log = || {
            let host = &runner.host;
            let hosts = stage.fleet.rig().hosts();
            let at = hosts.iter().position(|place| place.name == *host).unwrap();
            let keeper = stage.fleet.state_of(at).join("keeper.log");
            let keeper = std::fs::read_to_string(keeper).unwrap_or_default();
            format!("{}\nkeeper:\n{keeper}", runner.log_tail())
        };
        assert!(begun.elapsed() < LIMIT, "it is not protected: {status:?}\n{}", log());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits for so many more generations.
#[track_caller]
pub fn stores_more(stage: &Stage, at: RunnerId, count: u64) {
    let newest = || {
        let backup = stage.fleet.runner(at).status().unwrap().backup;
        backup.and_then(|backup| backup.newest).unwrap_or(0)
    };
    let before = newest();
    eventually("generations follow", LIMIT, || newest() >= before + count);
}

/// Waits until it runs there.
#[track_caller]
pub fn taken_over(stage: &Stage, at: RunnerId) -> TakenOver {
    let mut taken = None;
    eventually("the stand-in runs it", LIMIT, || {
        taken = protection(stage, at).and_then(|state| state.taken_over);
        taken.is_some()
    });
    let taken = taken.unwrap();
    eprintln!("{taken:?}");
    taken
}

/// Runner, monitor and guard.
#[must_use]
pub fn processes(stage: &Stage, at: RunnerId) -> [Pid; 3] {
    let status: Status = stage.fleet.runner(at).status().unwrap();
    let guard = status.protection.unwrap().guard_pid.unwrap();
    [status.runner_pid, status.monitor_pid.unwrap(), guard].map(|pid| Pid::from_raw(pid as i32))
}

/// Sends it to all of them.
pub fn signal(to: &[Pid], what: Signal) {
    for pid in to {
        let _ = kill(*pid, what);
    }
}

/// Ends everything of the machine on a host at once.
pub fn die(stage: &mut Stage, at: RunnerId) -> Instant {
    let all = processes(stage, at);
    signal(&all, Signal::SIGKILL);
    let died = Instant::now();
    stage.fleet.runner_mut(at).kill();
    died
}

/// A client that increments as fast as it is answered.
#[must_use]
pub fn increments(stage: &Stage) -> Increments {
    let (client, to) = (stage.fleet.rig().client().clone(), Stage::public(1));
    let connect = move || {
        let connected = client.run(|| TcpStream::connect_timeout(&to, PATIENCE));
        connected.map_err(std::io::Error::other)?
    };
    Increments::start(connect).unwrap()
}

/// Waits until the client is answered.
#[track_caller]
pub fn goes_on(load: &Increments) {
    assert!(load.wait_after(Instant::now(), LIMIT).is_some(), "the client is not answered");
}

/// How much of what was answered before `died` is forgotten, and when the first answer came after it.
#[track_caller]
pub fn forgotten(load: &Increments, died: Instant) -> (Duration, Instant) {
    // What was on its way still comes.
    let first = load.wait_after(died + Duration::from_millis(100), LIMIT);
    let first = first.expect("the client is answered again");
    (load.lost(first, died), first.at)
}
