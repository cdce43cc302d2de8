//! Moves that do not go through: wherever they end, the machine runs in one place, is told where,
//! and moves at the next try.
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

use architect::{
    fleet::{Fleet, RunnerId},
    load::{Load, LoadConfig},
};
use drafter::{
    migrate::{messages::Mode, protocol::Frame},
    runner::api::{MigrateRequest, Phase, Request},
};
use e2e::{
    Stage,
    busy::{Work, sh, start_oracle, verify_oracle},
    eventually,
    moves::{budgets, cancel, follow, go, settled, slow, wait_phase},
    peer::{ScriptedDestination, Visit},
    proxy::{self, Rule},
};
use std::{
    fs,
    net::SocketAddr,
    time::{Duration, Instant},
};

const IDLE: Work = Work { memory_mib: 64, hot_mib: 8, rate_mb_s: 20, file_mib: 8 };

/// The machine runs at `at`, answers, and nothing in it is wrong.
#[track_caller]
fn runs_at(fleet: &Fleet, at: RunnerId) {
    let status = fleet.runner(at).status().unwrap();
    assert_eq!(status.state, "running", "{}", status.detail);
    assert_eq!(status.lease_owner.as_deref(), Some(fleet.runner(at).host.as_str()));
    verify_oracle(fleet.runner(at));
}

/// Starts a move to a scripted destination and takes its request.
fn visit(stage: &Stage, from: RunnerId, to: &ScriptedDestination, mode: Mode) -> (u64, Visit) {
    let request = MigrateRequest {
        to: to.address,
        peer: "b".into(),
        mode,
        budgets: budgets(),
        dry_run: false,
        stored_as: None,
    };
    let job = stage.fleet.runner(from).client().unwrap().get(&Request::Migrate(request)).unwrap();
    (job, to.accept())
}

#[test]
fn hop_check_31_a_move_can_be_cancelled_in_each_phase_and_the_machine_moves_afterwards() {
    let Some(mut stage) = Stage::open() else { return };
    let (a, b) = stage.pair(&stage.plain_spec("redis"));
    start_oracle(stage.fleet.runner(a), IDLE);
    let scripted = ScriptedDestination::listen(&stage);
    let fleet = &stage.fleet;

    // Prepare: the destination never answers.
    let (job, silent) = visit(&stage, a, &scripted, Mode::Hybrid);
    cancel(fleet, a, job);
    let why = follow(fleet, a, job).unwrap_err();
    assert!(why.contains("cancelled during prepare"), "{why}");
    drop(silent);
    runs_at(fleet, a);

    // Pre-copy: a round is never put in place.
    let (job, mut slow_one) = visit(&stage, a, &scripted, Mode::Hybrid);
    slow_one.ready();
    slow_one.offer(1);
    assert!(matches!(slow_one.next_frame(), Frame::RoundEnd(_)));
    cancel(fleet, a, job);
    let why = follow(fleet, a, job).unwrap_err();
    assert!(why.contains("cancelled during pre-copy"), "{why}");
    runs_at(fleet, a);

    // Switchover: the token is out, so the destination decides; it refuses.
    let (job, mut refusing) = visit(&stage, a, &scripted, Mode::Hybrid);
    refusing.ready();
    let token = refusing.until_token();
    let answer = cancel(fleet, a, job);
    assert!(answer.contains("handed over"), "{answer}");
    refusing.send(&Frame::Refused { attempt: token.attempt, reason: "by the script".into() });
    let why = follow(fleet, a, job).unwrap_err();
    assert!(why.contains("by the script") && why.contains("still running here"), "{why}");
    runs_at(fleet, a);

    // Post-copy: the machine runs there already, and all of it follows.
    let job = fleet.start_move(a, b, Mode::PostCopy, slow(40_000_000), false).unwrap();
    wait_phase(fleet, a, job, Phase::PostCopy);
    cancel(fleet, a, job);
    follow(fleet, a, job).unwrap();
    settled(fleet, b);
    runs_at(fleet, b);
    go(fleet, b, a, Mode::Hybrid, budgets());
    runs_at(fleet, a);
}

#[test]
fn hop_check_09_whatever_becomes_of_the_token_the_machine_runs_on_where_it_was() {
    let Some(mut stage) = Stage::open() else { return };
    let (a, b) = stage.pair(&stage.plain_spec("redis"));
    start_oracle(stage.fleet.runner(a), IDLE);
    let scripted = ScriptedDestination::listen(&stage);
    let fleet = &stage.fleet;
    let epoch = || fleet.runner(a).status().unwrap().epoch.unwrap();
    let first = epoch();

    // Nobody answers: the machine stays paused until the named offer is over on any clock.
    let (job, mut silent) = visit(&stage, a, &scripted, Mode::Hybrid);
    silent.ready();
    let token = silent.until_token();
    let sent = Instant::now();
    let why = follow(fleet, a, job).unwrap_err();
    assert!(why.contains("still running here"), "{why}");
    assert!(sent.elapsed() > Duration::from_millis(900), "it went on too early: {why}");
    assert!(sent.elapsed() < Duration::from_secs(20), "it came back late: {why}");
    assert_eq!(token.handed.record().unwrap().epoch.0, first);
    assert!(epoch() > first, "who takes a machine back begins a new epoch");
    // A word that comes too late changes nothing.
    let _ = silent
        .main
        .outgoing
        .write(&Frame::Refused { attempt: token.attempt, reason: "late".into() });
    runs_at(fleet, a);

    // The connection breaks with the token: the same, because it may have arrived.
    let before = epoch();
    let (job, mut broken) = visit(&stage, a, &scripted, Mode::PostCopy);
    broken.ready();
    broken.until_token();
    let sent = Instant::now();
    broken.main.control.shutdown();
    broken.fault.control.shutdown();
    let why = follow(fleet, a, job).unwrap_err();
    assert!(why.contains("still running here"), "{why}");
    assert!(sent.elapsed() > Duration::from_millis(900), "it went on too early: {why}");
    assert!(epoch() > before);
    runs_at(fleet, a);

    // The offer is not renewed: no token at all, and no pause.
    let (job, mut tired) = visit(&stage, a, &scripted, Mode::Hybrid);
    tired.ready();
    tired.offer(1);
    let Frame::RoundEnd(round) = tired.next_frame() else { panic!("no round") };
    std::thread::sleep(Duration::from_millis(2500));
    tired.send(&Frame::RoundApplied(round));
    loop {
        match tired.next_or_end() {
            Some(Frame::RoundEnd(round)) => tired.send(&Frame::RoundApplied(round)),
            Some(Frame::Token { .. }) => panic!("a token for an offer that is over"),
            Some(_) => {}
            None => break,
        }
    }
    let why = follow(fleet, a, job).unwrap_err();
    assert!(why.contains("still running here"), "{why}");
    runs_at(fleet, a);

    // Bytes that are no frames.
    let (job, mut foreign) = visit(&stage, a, &scripted, Mode::Hybrid);
    foreign.send(&Frame::Verdict(b"{\"refusals\": 7}".to_vec()));
    let why = follow(fleet, a, job).unwrap_err();
    assert!(why.contains("cannot be read") && why.contains("still running here"), "{why}");

    // After all that it moves.
    go(fleet, a, b, Mode::Hybrid, budgets());
    runs_at(fleet, b);
}

#[test]
fn hop_check_04_a_destination_that_is_killed_before_the_token_leaves_the_machine_running_and_movable()
 {
    let Some(mut stage) = Stage::open() else { return };
    let spec = stage.plain_spec("redis");
    let (a, b) = stage.pair(&spec);
    start_oracle(stage.fleet.runner(a), IDLE);

    // In standby.
    stage.fleet.runner_mut(b).kill();
    let lost = stage.fleet.migrate(a, b, Mode::Hybrid, budgets(), |_| {}).unwrap_err().to_string();
    assert!(lost.contains("still running here"), "{lost}");
    runs_at(&stage.fleet, a);

    // In pre-copy.
    let b = stage.fleet.receive(1, &spec).unwrap();
    let job = stage.fleet.start_move(a, b, Mode::Hybrid, slow(20_000_000), false).unwrap();
    let before = wait_phase(&stage.fleet, a, job, Phase::PreCopy);
    assert!(before.phase == Phase::PreCopy, "{before:?}");
    stage.fleet.runner_mut(b).kill();
    let why = follow(&stage.fleet, a, job).unwrap_err();
    assert!(why.contains("pre-copy") && why.contains("still running here"), "{why}");
    runs_at(&stage.fleet, a);

    // A runner that starts again finds its predecessor's monitor gone or ends it, and takes the
    // machine.
    let b = stage.fleet.receive(1, &spec).unwrap();
    go(&stage.fleet, a, b, Mode::Hybrid, budgets());
    runs_at(&stage.fleet, b);
}

#[test]
fn without_the_lease_store_there_is_no_switchover_and_the_machine_runs_on() {
    let Some(mut stage) = Stage::open() else { return };
    let (a, b) = stage.pair(&stage.plain_spec("redis"));
    start_oracle(stage.fleet.runner(a), IDLE);
    let fleet = &stage.fleet;

    // Something else is in its place.
    let (leases, away) = (stage.leases(), stage.leases().with_file_name("leases-away"));
    fs::rename(&leases, &away).unwrap();
    fs::write(&leases, "no folder").unwrap();
    let job = fleet.start_move(a, b, Mode::Hybrid, budgets(), false).unwrap();
    let why = follow(fleet, a, job).unwrap_err();
    assert!(why.contains("still running here"), "{why}");
    fs::remove_file(&leases).unwrap();
    fs::rename(&away, &leases).unwrap();
    settled(fleet, a);
    runs_at(fleet, a);

    // It is gone.
    fs::rename(&leases, &away).unwrap();
    let job = fleet.start_move(a, b, Mode::Hybrid, budgets(), false).unwrap();
    let why = follow(fleet, a, job).unwrap_err();
    assert!(why.contains("still running here"), "{why}");
    sh(fleet.runner(a), "true");
    fs::rename(&away, &leases).unwrap();
    runs_at(fleet, a);

    eventually("the destination waits again", Duration::from_secs(15), || {
        fleet.runner(b).status().unwrap().state == "standby"
    });
    go(fleet, a, b, Mode::Hybrid, budgets());
    runs_at(fleet, b);
}

#[test]
fn a_machine_that_lands_where_the_network_agent_is_dead_serves_again_when_that_is_back() {
    let Some(mut stage) = Stage::open() else { return };
    let mut spec = stage.spec("redis", 1);
    spec.memory_mib = Some(128);
    let (a, b) = stage.pair(&spec);
    let limit = Duration::from_secs(60);
    let config = LoadConfig {
        think: Duration::from_millis(2),
        answer_within: limit * 2,
        reconnect_within: limit,
        verify_within: limit,
        ..LoadConfig::default()
    };
    let client = stage.fleet.rig().client().clone();
    let load = client.run(|| Load::start(Stage::public(1), config)).unwrap().unwrap();
    assert!(load.wait_for(20, limit), "no answers before: {:?}", load.progress());

    // It dies when the machine is expected, and before that is there.
    let job = stage.fleet.start_move(a, b, Mode::Hybrid, slow(20_000_000), false).unwrap();
    let before = wait_phase(&stage.fleet, a, job, Phase::PreCopy);
    assert!(before.phase == Phase::PreCopy, "{before:?}");
    stage.fleet.rig_mut().kill_agent(1);
    eventually("it runs there and says that the network does not lead there", limit, || {
        let status = stage.fleet.runner(b).status().unwrap();
        status.state == "running" && status.detail.contains("see that `conduit agent` runs")
    });
    let status = stage.fleet.runner(b).status().unwrap();
    assert_eq!(status.lease_owner.as_deref(), Some("b"), "{}", status.detail);

    stage.fleet.rig_mut().start_agent(1).unwrap();
    assert!(load.wait_for(50, limit), "no answers afterwards: {:?}", load.progress());
    eventually("it has nothing to say any more", limit, || {
        stage.fleet.runner(b).status().unwrap().detail.is_empty()
    });
    settled(&stage.fleet, b);
    let report = load.finish().unwrap();
    assert!(report.is_clean(), "the client lost something: {report:?}");
    follow(&stage.fleet, a, job).unwrap();
    go(&stage.fleet, b, a, Mode::Hybrid, budgets());
    stage.fleet.runner(a).wait_ready(limit).unwrap();
}

/// Starts a move over a line that keeps frames back.
fn move_over(stage: &Stage, from: RunnerId, to: SocketAddr) -> u64 {
    let request = MigrateRequest {
        to,
        peer: "b".into(),
        mode: Mode::Hybrid,
        budgets: budgets(),
        dry_run: false,
        stored_as: None,
    };
    stage.fleet.runner(from).client().unwrap().get(&Request::Migrate(request)).unwrap()
}

#[test]
fn a_token_that_is_late_runs_nowhere_and_a_confirmation_that_is_late_changes_nothing() {
    let Some(mut stage) = Stage::open() else { return };
    let mut spec = stage.plain_spec("redis");
    spec.tls = false;
    let (a, b) = stage.pair(&spec);
    start_oracle(stage.fleet.runner(a), IDLE);
    let fleet = &stage.fleet;
    let epoch = |at| fleet.runner(at).status().unwrap().epoch.unwrap();
    let first = epoch(a);

    // The offer that the token names is over when it comes.
    let late: Rule = |frame| match frame {
        Frame::Token { .. } => Duration::from_secs(3),
        _ => Duration::ZERO,
    };
    let line = proxy::between(&stage, fleet.runner(b).address, late);
    let why = follow(fleet, a, move_over(&stage, a, line)).unwrap_err();
    assert!(why.contains("still running here"), "{why}");
    assert!(epoch(a) > first, "the token never left: {why}");
    // Past the token's arrival: nothing ran there, not even for a moment.
    eventually("the destination waits again", Duration::from_secs(15), || {
        fleet.runner(b).status().unwrap().state == "standby"
    });
    runs_at(fleet, a);

    // The confirmation is late: the source asks the store, which says whose the machine is.
    let late: Rule = |frame| match frame {
        Frame::Confirmed(_) => Duration::from_secs(4),
        _ => Duration::ZERO,
    };
    let line = proxy::between(&stage, fleet.runner(b).address, late);
    follow(fleet, a, move_over(&stage, a, line)).unwrap();
    settled(fleet, b);
    runs_at(fleet, b);
    assert_eq!(fleet.runner(a).status().unwrap().state, "standby");
    go(fleet, b, a, Mode::Hybrid, budgets());
    runs_at(fleet, a);
}
