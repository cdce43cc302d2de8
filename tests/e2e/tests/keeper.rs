//! Machines that share one sign of life of their host: its keeper dies or stands still, one of the machines
//! loses its runner, a host stands still; each goes on where it should, in one place, and the others notice
//! nothing.
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

use architect::rig::RigConfig;
use drafter::lease::{self, BeatName, FileStore, HostName, LeaseStore as _, MachineName};
use e2e::{
    BOOT, Stage, eventually,
    place::Place,
    protected::{
        LIMIT, die, forgotten, goes_on, increments, is_protected, processes, protection, signal,
        spec, stand_in, stores_more, taken_over,
    },
};
use nix::{
    sys::{
        signal::{Signal, kill},
        socket::{getsockopt, sockopt::PeerCredentials},
    },
    unistd::Pid,
};
use silo::store::{Environment, StoreUrl};
use silo_testing::Moto;
use std::{os::unix::net::UnixStream, time::Duration};

/// The keeper of a host.
fn keeper(stage: &Stage, host: usize) -> Option<Pid> {
    let socket = stage.fleet.state_of(host).join("keeper.sock");
    let line = UnixStream::connect(socket).ok()?;
    getsockopt(&line, PeerCredentials).ok().map(|peer| Pid::from_raw(peer.pid()))
}

#[test]
fn machines_that_share_their_hosts_sign_of_life_are_kept_and_lost_each_for_itself() {
    let Some(mut stage) = Stage::with(RigConfig { hosts: 2, ..RigConfig::default() }) else {
        return;
    };
    let more = ["--every", "300ms", "--term", "2s", "--host-beat"];
    let (spec, place) = spec(&stage, &more);
    let a = stage.fleet.run(0, &spec).unwrap();
    let mut other = stage.plain_spec("other");
    let (url, keys) = (place.url(), place.keys().display().to_string());
    other.extra = ["--protect", &url, "--protect-keys", &keys].map(String::from).into();
    other.extra.extend(more.map(str::to_owned));
    let beside = stage.fleet.run(0, &other).unwrap();
    for id in [a, beside] {
        stage.fleet.runner(id).wait_ready(BOOT).unwrap();
        is_protected(&stage, id);
        assert_eq!(protection(&stage, id).unwrap().beat.as_deref(), Some("a"));
    }
    let load = increments(&stage);
    goes_on(&load);

    // One sign of life, whatever the number of machines.
    let store = FileStore::open(&stage.leases(), Duration::from_secs(1)).unwrap();
    let host = HostName::new("a").unwrap();
    let beat = |name: &BeatName| store.read_beat(name).unwrap();
    let of_host = BeatName::of_host(host.clone());
    let of_runner =
        |machine: &str| BeatName::of_runner(host.clone(), MachineName::new(machine).unwrap());
    assert!(beat(&of_host).is_some());
    assert_eq!(beat(&of_runner("redis")), None);
    assert_eq!(beat(&of_runner("other")), None);

    // Its keeper dies: another begins the next life, and the machines get their leases back.
    for how in [Signal::SIGKILL, Signal::SIGSTOP] {
        let life = beat(&of_host).unwrap().of.incarnation;
        let before = keeper(&stage, 0).unwrap();
        kill(before, how).unwrap();
        eventually("another keeper begins another life", LIMIT, || {
            beat(&of_host).is_some_and(|beat| beat.of.incarnation > life)
        });
        for id in [a, beside] {
            is_protected(&stage, id);
        }
        goes_on(&load);
        assert_eq!(load.went_back(), None);
        eventually("the one before has ended", LIMIT, || kill(before, None).is_err());
    }

    // One machine loses all that it has; its host lives, and gives it up. The other goes on.
    let b = stand_in(&mut stage, 1, &spec);
    let freezes = protection(&stage, beside).unwrap().freezes;
    let life = beat(&of_host).unwrap().of.incarnation;
    stores_more(&stage, a, 8);
    goes_on(&load);
    let died = die(&mut stage, a);
    let taken = taken_over(&stage, b);
    assert_eq!(taken.from, "a");
    let (lost, again) = forgotten(&load, died);
    eprintln!("{lost:?} lost, it says {:?} ms; again after {:?}", taken.lost_ms, again - died);
    let says = taken.lost_ms.map(|ms| Duration::from_secs_f64(ms / 1e3));
    assert!(says.is_none_or(|most| lost <= most), "{lost:?} is lost, it says {says:?}");
    assert_eq!(protection(&stage, beside).unwrap().freezes, freezes, "the other stood still");
    assert_eq!(beat(&of_host).unwrap().of.incarnation, life, "its host's life has ended");

    // A runner and its machine stand still, their host's keeper does not: they are given up, and what comes
    // back ends its copy.
    is_protected(&stage, b);
    let a = stand_in(&mut stage, 0, &spec);
    goes_on(&load);
    let frozen = processes(&stage, b);
    signal(&frozen, Signal::SIGSTOP);
    let died = std::time::Instant::now();
    taken_over(&stage, a);
    forgotten(&load, died);
    signal(&frozen, Signal::SIGCONT);
    eventually("the copy at b has ended", LIMIT, || kill(frozen[1], None).is_err());
    goes_on(&load);
    assert_eq!(load.went_back(), None);

    // A runner is gone and another comes in time: nothing is given up.
    is_protected(&stage, a);
    let epoch = stage.fleet.runner(a).status().unwrap().epoch;
    stage.fleet.runner_mut(a).kill();
    stage.fleet.recover(a).unwrap();
    is_protected(&stage, a);
    goes_on(&load);
    assert_eq!(load.went_back(), None);
    let now = stage.fleet.runner(a).status().unwrap().epoch;
    assert!(now > epoch, "a runner that comes later takes the lease first: {epoch:?}, {now:?}");
    is_protected(&stage, beside);

    // A machine with another term does not get into it, and says why.
    let mut third = other.clone();
    third.name = "third".into();
    let at = third.extra.iter().position(|word| word == "2s").unwrap();
    third.extra[at] = "4s".into();
    let c = stage.fleet.run(0, &third).unwrap();
    stage.fleet.runner(c).wait_ready(BOOT).unwrap();
    eventually("it says why it is not protected", LIMIT, || {
        protection(&stage, c).is_some_and(|state| state.detail.contains("the same --term"))
    });
    is_protected(&stage, beside);
}

#[test]
fn machines_whose_leases_are_objects_share_a_sign_of_life_unless_they_are_told_otherwise() {
    let Some(mut stage) = Stage::open() else { return };
    let Some(moto) = Moto::install() else { return };
    let moto = stage.fleet.rig().hosts()[0].namespace.run(|| moto.start()).unwrap();
    let leases = moto.address("leases");
    let place = Place::new();
    let spec = |name: &str, own: bool| {
        let mut spec = stage.plain_spec(name);
        let (url, keys) = (place.url(), place.keys().display().to_string());
        let words = ["--protect", &url, "--protect-keys", &keys, "--term", "2s"];
        spec.extra = words.map(String::from).into();
        if own {
            spec.extra.push("--host-beat=false".into());
        }
        spec.lease = Some(leases.clone());
        spec.environment =
            Moto::CREDENTIALS.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        spec
    };
    let specs = [spec("one", false), spec("two", false), spec("alone", true)];
    let ids = specs.map(|spec| stage.fleet.run(0, &spec).unwrap());
    let beats = ["a", "a", "a/alone"];
    for (id, beat) in ids.into_iter().zip(beats) {
        stage.fleet.runner(id).wait_ready(BOOT).unwrap();
        is_protected(&stage, id);
        assert_eq!(protection(&stage, id).unwrap().beat.as_deref(), Some(beat));
    }
    let beat = |name: BeatName| {
        let url: StoreUrl = leases.parse().unwrap();
        let environment = Environment::given(Moto::CREDENTIALS);
        let read = || {
            let store = lease::open_bucket(&url, &environment, LIMIT).unwrap();
            store.read_beat(&name).unwrap()
        };
        stage.fleet.rig().hosts()[0].namespace.run(read).unwrap()
    };
    let host = HostName::new("a").unwrap();
    let of = |machine| BeatName::of_runner(host.clone(), MachineName::new(machine).unwrap());
    let of_host = || beat(BeatName::of_host(host.clone()));
    assert!(of_host().is_some() && beat(of("alone")).is_some());
    assert_eq!((beat(of("one")), beat(of("two"))), (None, None));

    // It is renewed, and by whoever comes after a keeper that died.
    let life = of_host().unwrap().of.incarnation;
    kill(keeper(&stage, 0).unwrap(), Signal::SIGKILL).unwrap();
    eventually("another keeper begins another life", LIMIT, || {
        of_host().is_some_and(|beat| beat.of.incarnation > life)
    });
    for id in ids {
        is_protected(&stage, id);
    }
    // The other two may have stood still meanwhile; the one with a sign of its own has not.
    assert_eq!(protection(&stage, ids[2]).unwrap().freezes, 0);
}
