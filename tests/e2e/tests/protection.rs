//! Machines that survive the loss of their host: hosts die at any instant under Redis load, are only
//! frozen and come back, lose their lease store; the machine goes on elsewhere, in one place, from its
//! last generation.
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

use architect::rig::RigConfig;
use architect::{
    fleet::RunnerId,
    load::{Increments, Load, LoadConfig},
};
use drafter::{
    driver::qemu,
    migrate::messages::Mode,
    runner::api::{MigrateRequest, Request, TakenOver},
};
use e2e::{
    BOOT, Stage, eventually,
    gate::{Gate, Step},
    moves::{budgets, go},
    protected::{
        LIMIT, die, forgotten, goes_on, increments, is_protected, processes, protection, signal,
        spec, stand_in, stores_more, taken_over,
    },
};
use nix::sys::signal::{Signal, kill};
use std::{
    fs,
    time::{Duration, Instant},
};

#[test]
fn a_protected_machine_survives_every_loss_of_its_host_in_one_place_and_loses_no_more_than_it_says()
{
    let Some(mut stage) = Stage::open() else { return };
    let (spec, _folder) = spec(&stage, &["--every", "300ms", "--term", "2s"]);
    let a = stage.fleet.run(0, &spec).unwrap();
    stage.fleet.runner(a).wait_ready(BOOT).unwrap();
    is_protected(&stage, a);
    let load = increments(&stage);
    goes_on(&load);

    // Its host dies without a word.
    let b = stand_in(&mut stage, 1, &spec);
    // The stand-in has seen it live for some time.
    stores_more(&stage, a, 8);
    goes_on(&load);
    let died = die(&mut stage, a);
    let taken = taken_over(&stage, b);
    let (lost, again) = forgotten(&load, died);
    let most = Duration::from_secs_f64(taken.lost_ms.unwrap() / 1e3);
    eprintln!("{lost:?} of work lost, at most {most:?}; answered again after {:?}", again - died);
    assert!(lost <= most, "{lost:?} of work lost, it says at most {most:?}");
    assert_eq!(taken.from, "a");

    // It stands still while its lease store is away, and goes on: nobody else has it.
    is_protected(&stage, b);
    goes_on_from_changes(&stage, b);
    let leases = stage.leases();
    let away = leases.with_extension("away");
    fs::rename(&leases, &away).unwrap();
    fs::write(&leases, "no folder").unwrap();
    eventually("it stands still", LIMIT, || {
        stage.fleet.runner(b).status().unwrap().state == "frozen"
    });
    let quiet = load.newest().unwrap().at;
    fs::remove_file(&leases).unwrap();
    fs::rename(&away, &leases).unwrap();
    goes_on(&load);
    assert!(protection(&stage, b).unwrap().freezes > 0);
    assert_eq!(load.went_back(), None);
    eprintln!("the lease store was away, the client waited {:?}", quiet.elapsed());

    // A host that only stood still comes back when another has the machine.
    is_protected(&stage, b);
    let a = stand_in(&mut stage, 0, &spec);
    goes_on(&load);
    let frozen = processes(&stage, b);
    signal(&frozen, Signal::SIGSTOP);
    let died = Instant::now();
    taken_over(&stage, a);
    forgotten(&load, died);
    signal(&frozen, Signal::SIGCONT);
    let monitor = frozen[1];
    eventually("the copy at b has ended", LIMIT, || kill(monitor, None).is_err());
    let record = stage.fleet.runner(b).dir().read_record().unwrap().unwrap();
    assert!(record.detail.contains("host \"a\" owns the machine now"), "{}", record.detail);
    goes_on(&load);
    assert_eq!(load.went_back(), None);
    stage.fleet.runner_mut(b).kill();

    // It moves, and is protected where it is then.
    is_protected(&stage, a);
    let b = stage.fleet.receive(1, &spec).unwrap();
    let report = go(&stage.fleet, a, b, Mode::Hybrid, budgets());
    assert_eq!(report.late_writes, 0, "{report}");
    is_protected(&stage, b);
    goes_on(&load);
    assert_eq!(load.went_back(), None);

    // Its runner dies and its monitor lives: the guard freezes that before anybody runs the machine.
    stage.fleet.runner_mut(a).kill();
    let a = stand_in(&mut stage, 0, &spec);
    let left = processes(&stage, b);
    stage.fleet.runner_mut(b).kill();
    taken_over(&stage, a);
    assert!(kill(left[1], None).is_ok(), "the monitor that lost its runner is still there, frozen");
    load.forget();
    goes_on(&load);
    assert_eq!(load.went_back(), None);
}

/// Its first generation here looked at what it had written here, not at all that it is.
#[track_caller]
fn goes_on_from_changes(stage: &Stage, at: RunnerId) {
    let backup = stage.fleet.runner(at).status().unwrap().backup.unwrap();
    assert!(backup.from_changes, "its first generation looked at everything: {backup:?}");
}

/// A move to `to`, held at a step; the job goes on at the source.
fn held_move(stage: &Stage, from: RunnerId, to: RunnerId, host: usize, step: Step) -> Gate {
    let destination = stage.fleet.runner(to);
    let gate = Gate::at(stage, host, destination.address, step);
    let request = MigrateRequest {
        to: gate.address,
        peer: destination.host.clone(),
        mode: if step == Step::PostCopy { Mode::PostCopy } else { Mode::Hybrid },
        budgets: budgets(),
        dry_run: false,
        stored_as: None,
    };
    let mut client = stage.fleet.runner(from).client().unwrap();
    let _: u64 = client.get(&Request::Migrate(request)).unwrap();
    assert!(gate.wait(LIMIT), "the move does not come to {step:?}");
    gate
}

#[track_caller]
fn loses_no_more_than_it_says(load: &Increments, died: Instant, taken: &TakenOver) {
    let (lost, again) = forgotten(load, died);
    eprintln!("{lost:?} lost, it says {:?} ms; again after {:?}", taken.lost_ms, again - died);
    let says = taken.lost_ms.map(|ms| Duration::from_secs_f64(ms / 1e3));
    assert!(
        says.is_none_or(|most| lost <= most),
        "{lost:?} of work lost, it says at most {says:?}"
    );
}

#[track_caller]
fn waits(stage: &Stage, at: RunnerId) {
    eventually("it waits for a machine", LIMIT, || {
        stage.fleet.runner(at).status().is_ok_and(|status| status.state == "standby")
    });
}

#[test]
fn a_protected_machine_that_moves_is_brought_back_whichever_of_its_hosts_is_lost_and_when() {
    let config = RigConfig { hosts: 3, ..RigConfig::default() };
    let Some(mut stage) = Stage::with(config) else { return };
    let (mut spec, _folder) = spec(&stage, &["--every", "300ms", "--term", "2s", "--host-beat"]);
    spec.tls = false;
    let a = stage.fleet.run(0, &spec).unwrap();
    stage.fleet.runner(a).wait_ready(BOOT).unwrap();
    is_protected(&stage, a);
    let load = increments(&stage);
    goes_on(&load);

    // Before the token the source is lost. Until then generations went on.
    let b = stage.fleet.receive(1, &spec).unwrap();
    let c = stand_in(&mut stage, 2, &spec);
    let gate = held_move(&stage, a, b, 1, Step::RoundApplied);
    stores_more(&stage, a, 3);
    goes_on(&load);
    let died = die(&mut stage, a);
    gate.cut();
    let taken = taken_over(&stage, c);
    assert_eq!(taken.from, "a");
    loses_no_more_than_it_says(&load, died, &taken);
    waits(&stage, b);

    // Before the token the destination is lost: the machine goes on, and was protected all the time.
    is_protected(&stage, c);
    let gate = held_move(&stage, c, b, 1, Step::Expect);
    stores_more(&stage, c, 2);
    stage.fleet.runner_mut(b).kill();
    gate.cut();
    is_protected(&stage, c);
    stores_more(&stage, c, 2);
    goes_on(&load);
    assert_eq!(load.went_back(), None);

    // A move that goes well: what was stored is not stored again, and a host that is lost right after it
    // is survived as any other.
    let a = stand_in(&mut stage, 0, &spec);
    let b = stage.fleet.receive(1, &spec).unwrap();
    let report = go(&stage.fleet, c, b, Mode::Hybrid, budgets());
    assert_eq!(report.late_writes, 0, "{report}");
    is_protected(&stage, b);
    goes_on_from_changes(&stage, b);
    goes_on(&load);
    assert_eq!(load.went_back(), None);
    let died = die(&mut stage, b);
    let taken = taken_over(&stage, a);
    assert_eq!(taken.from, "b");
    loses_no_more_than_it_says(&load, died, &taken);

    // After the token, with blocks missing: the destination is lost. What is left at the source is older
    // than what was seen; the stand-in takes the last generation, and the source is told.
    is_protected(&stage, a);
    let b = stage.fleet.receive(1, &spec).unwrap();
    stage.fleet.runner_mut(c).kill();
    let c = stand_in(&mut stage, 2, &spec);
    stores_more(&stage, a, 8);
    let gate = held_move(&stage, a, b, 1, Step::PostCopy);
    eventually("the destination owns it", LIMIT, || {
        stage.fleet.runner(b).status().unwrap().lease_owner.as_deref() == Some("b")
    });
    let died = die(&mut stage, b);
    gate.cut();
    let taken = taken_over(&stage, c);
    assert_eq!(taken.from, "b");
    loses_no_more_than_it_says(&load, died, &taken);
    waits(&stage, a);

    // The same, and the source is lost: nobody has what is missing. The destination gives the machine up.
    is_protected(&stage, c);
    stage.fleet.runner_mut(a).kill();
    let a = stand_in(&mut stage, 0, &spec);
    let b = stage.fleet.receive(1, &spec).unwrap();
    stores_more(&stage, c, 8);
    let gate = held_move(&stage, c, b, 1, Step::PostCopy);
    eventually("the destination owns it", LIMIT, || {
        stage.fleet.runner(b).status().unwrap().lease_owner.as_deref() == Some("b")
    });
    let died = die(&mut stage, c);
    gate.cut();
    let taken = taken_over(&stage, a);
    assert_eq!(taken.from, "b");
    loses_no_more_than_it_says(&load, died, &taken);
    is_protected(&stage, a);
    assert_eq!(load.went_back(), None);
}

#[test]
fn under_output_commit_a_move_a_loss_right_after_it_and_dead_runners_lose_no_acknowledged_write() {
    let Some(mut stage) = Stage::with(RigConfig { hosts: 3, ..RigConfig::default() }) else {
        return;
    };
    let more = ["--every", "200ms", "--term", "2s", "--output-commit", "--host-beat"];
    let (spec, _folder) = spec(&stage, &more);
    let a = stage.fleet.run(0, &spec).unwrap();
    stage.fleet.runner(a).wait_ready(BOOT).unwrap();
    is_protected(&stage, a);
    let client = stage.fleet.rig().client().clone();
    let config = LoadConfig {
        pipeline: 100,
        answer_within: Duration::from_secs(90),
        verify_within: Duration::from_secs(90),
        ..LoadConfig::default()
    };
    let load = client.run(|| Load::start(Stage::public(1), config)).unwrap().unwrap();
    let served = |when: &str| assert!(load.wait_for(500, LIMIT), "the client is not served {when}");
    served("at the beginning");

    // Its runner dies, and another takes the machine over within the term: protection goes on by itself.
    stage.fleet.runner_mut(a).kill();
    stage.fleet.recover(a).unwrap();
    is_protected(&stage, a);
    assert!(protection(&stage, a).unwrap().output_commit);
    served("after its runner was replaced");
    // The same, when the guard has frozen it.
    stage.fleet.runner_mut(a).kill();
    let run_dir = stage.fleet.runner(a).dir().run();
    eventually("the guard freezes it", LIMIT, || qemu::is_frozen(&run_dir));
    stage.fleet.recover(a).unwrap();
    is_protected(&stage, a);
    served("after it was frozen");

    // It moves, and its host is lost before all that it sent can be in a generation of that host.
    let b = stage.fleet.receive(1, &spec).unwrap();
    let c = stand_in(&mut stage, 2, &spec);
    let report = go(&stage.fleet, a, b, Mode::Hybrid, budgets());
    assert_eq!(report.late_writes, 0, "{report}");
    die(&mut stage, b);
    taken_over(&stage, c);
    is_protected(&stage, c);
    served("after the loss of its host");

    // A runner that comes back when another host has the machine ends its copy.
    let b = stand_in(&mut stage, 1, &spec);
    let left = processes(&stage, c);
    stage.fleet.runner_mut(c).kill();
    taken_over(&stage, b);
    stage.fleet.recover(c).unwrap();
    eventually("the copy at c has ended", LIMIT, || kill(left[1], None).is_err());
    waits(&stage, c);
    is_protected(&stage, b);
    served("at the end");
    let report = load.finish().unwrap();
    assert!(report.is_clean(), "{report:?}");
}

#[test]
fn under_output_commit_no_acknowledged_write_is_lost_with_a_host_and_no_connection_breaks() {
    let Some(mut stage) = Stage::open() else { return };
    let more = ["--every", "200ms", "--term", "2s", "--output-commit"];
    let (spec, _folder) = spec(&stage, &more);
    let mut owner = stage.fleet.run(0, &spec).unwrap();
    stage.fleet.runner(owner).wait_ready(BOOT).unwrap();
    is_protected(&stage, owner);
    let client = stage.fleet.rig().client().clone();
    // Each waits for its generation: many at a time.
    let config = LoadConfig {
        pipeline: 100,
        answer_within: Duration::from_secs(90),
        verify_within: Duration::from_secs(90),
        ..LoadConfig::default()
    };
    let load = client.run(|| Load::start(Stage::public(1), config)).unwrap().unwrap();
    for host in [1, 0] {
        assert!(load.wait_for(500, LIMIT), "the client is not served");
        let next = stand_in(&mut stage, host, &spec);
        is_protected(&stage, owner);
        assert!(load.wait_for(500, LIMIT), "the client is not served");
        die(&mut stage, owner);
        taken_over(&stage, next);
        owner = next;
        is_protected(&stage, owner);
        goes_on_from_changes(&stage, owner);
        assert!(protection(&stage, owner).unwrap().output_commit);
    }
    assert!(load.wait_for(500, LIMIT), "the client is not served");
    let report = load.finish().unwrap();
    assert!(report.is_clean(), "{report:?}");
}
