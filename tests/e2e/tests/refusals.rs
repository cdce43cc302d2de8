//! What a host does not take: each reason by its words, and both ends go on as if nothing had
//! been.
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

use drafter::{
    driver::Accelerator,
    migrate::messages::{Mode, PrepareRequest, Verdict},
    runner::api::{MigrateRequest, Request},
};
use e2e::{
    Stage,
    busy::sh,
    command::say,
    eventually,
    moves::{budgets, follow, go},
    peer::{ScriptedDestination, ScriptedSource},
    program,
};
use identity::{Authority, HostName};
use std::{fs, io::Write, net::TcpStream, path::Path, process::Command, thread, time::Duration};

/// A change of a request, and words of the refusal that it must get.
type Wrong = (&'static str, fn(&mut PrepareRequest));

const WRONG: [Wrong; 9] = [
    ("this runner waits for \"redis\", not for \"other\"", |r| r.shape.name = "other".into()),
    ("is not here; give it to the runner with --package", |r| r.package = "0".repeat(64)),
    ("install the same version there", |r| r.facts.driver = "qemu 1.0".into()),
    ("its clock would run wrong there", |r| r.shape.tsc_khz += r.shape.tsc_khz / 1000),
    ("force the same accelerator", |r| {
        r.facts.accelerator = match r.facts.accelerator {
            Accelerator::Tcg => Accelerator::Kvm,
            Accelerator::Kvm => Accelerator::Tcg,
        };
    }),
    ("MiB available", |r| {
        r.shape.memory_bytes = 1 << 44;
        r.devices[0].blocks = (1 << 44) / 4096;
    }),
    ("not one memory and its disks", |r| r.devices[0].blocks += 1),
    ("bases are not those of its package", |r| r.devices[1].base = Some("0".repeat(64))),
    ("but its certificate is \"a\"'s", |r| r.host = "b".into()),
];

#[test]
fn hop_check_10_11_20_a_destination_refuses_for_each_reason_in_prepare_and_stays_ready() {
    let Some(mut stage) = Stage::open() else { return };
    let (a, b) = stage.pair(&stage.plain_spec("redis"));
    let at = stage.fleet.runner(b).address;

    // A real request, to be changed in one point at a time.
    let scripted = ScriptedDestination::listen(&stage);
    let request = MigrateRequest {
        to: scripted.address,
        peer: "b".into(),
        mode: Mode::Hybrid,
        budgets: budgets(),
        dry_run: false,
        stored_as: None,
    };
    let job = stage.fleet.runner(a).client().unwrap().get(&Request::Migrate(request)).unwrap();
    let visit = scripted.accept();
    let honest = visit.request.clone();
    drop(visit);
    follow(&stage.fleet, a, job).unwrap_err();

    for (words, change) in WRONG {
        let mut request = honest.clone();
        change(&mut request);
        let verdict = ScriptedSource::connect(&stage, at).ask(&request);
        let said = verdict.refusals.join("; ");
        assert!(said.contains(words), "wanted \"{words}\", got \"{said}\"");
    }
    let verdict = ScriptedSource::connect(&stage, at).ask_raw(b"{}".to_vec());
    assert!(verdict.refusals.join(";").contains("cannot be read"), "{:?}", verdict.refusals);

    // A runner that takes one machine does not take another beside it.
    let mut first = ScriptedSource::connect(&stage, at);
    assert_eq!(first.ask(&honest).refusals, Vec::<String>::new());
    let second = ScriptedSource::connect(&stage, at).ask(&honest);
    assert!(second.refusals.join(";").contains("not waiting for a machine"), "{second:?}");
    drop(first);
    let waits = || {
        eventually("it waits again", Duration::from_secs(20), || {
            stage.fleet.runner(b).status().unwrap().state == "standby"
        });
    };
    waits();

    // Nor when they ask at once.
    for round in 0..5 {
        let mut sources: Vec<_> = (0..4).map(|_| ScriptedSource::connect(&stage, at)).collect();
        let verdicts: Vec<_> = thread::scope(|scope| {
            let asked: Vec<_> =
                sources.iter_mut().map(|source| scope.spawn(|| source.ask(&honest))).collect();
            asked.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let taken = verdicts.iter().filter(|verdict| verdict.refusals.is_empty()).count();
        assert_eq!(taken, 1, "round {round}: {verdicts:?}");
        let busy = |verdict: &Verdict| {
            verdict.refusals.is_empty() || verdict.refusals.join(";").contains("not waiting")
        };
        assert!(verdicts.iter().all(busy), "round {round}: {verdicts:?}");
        drop(sources);
        waits();
    }

    go(&stage.fleet, a, b, Mode::Hybrid, budgets());
    sh(stage.fleet.runner(b), "true");
}

#[test]
fn a_dry_run_gives_the_verdict_and_numbers_and_moves_nothing() {
    let Some(mut stage) = Stage::open() else { return };
    let (a, b) = stage.pair(&stage.plain_spec("redis"));
    let fleet = &stage.fleet;
    let job = fleet.start_move(a, b, Mode::Hybrid, budgets(), true).unwrap();
    let verdict = follow(fleet, a, job).unwrap();
    assert_eq!(verdict["verdict"], "ready", "{verdict}");
    assert_eq!(verdict["host"], "b");
    let number = |name: &str| verdict[name].as_f64().unwrap_or_else(|| panic!("{name}: {verdict}"));
    assert!(number("predicted_blackout_ms") > 0.0 && number("predicted_blackout_ms") < 1000.0);
    assert!(number("predicted_total_ms") > 0.0);
    assert!(number("bytes") > 1e6 && number("bytes") < 1e9);
    let status = fleet.runner(a).status().unwrap();
    assert_eq!((status.state.as_str(), status.lease_owner.as_deref()), ("running", Some("a")));
    assert_eq!(fleet.runner(b).status().unwrap().state, "standby");

    // Through the command, to a host that is not there.
    let said = say(
        stage.drafter(0).args([
            "migrate",
            "redis",
            "--dry-run",
            "--peer",
            "b",
            "--to",
            "10.89.0.3:9",
        ]),
        Duration::from_secs(30),
    );
    said.fails_with(&["connect", "still running here"]);
    go(fleet, a, b, Mode::Hybrid, budgets());
}

#[test]
fn hop_check_12_a_host_without_the_right_certificate_gets_no_machine_and_cannot_send_one() {
    let Some(mut stage) = Stage::open() else { return };
    let (a, b) = stage.pair(&stage.plain_spec("redis"));
    let folder = tempfile::tempdir().unwrap();
    let name = HostName::new("b").unwrap();

    // Another authority's, and one that is over.
    let foreign = folder.path().join("foreign");
    Authority::create(&foreign).unwrap().issue(&name, Duration::from_secs(3600)).unwrap();
    let expired = folder.path().join("expired");
    let ours = stage.fleet.rig().identity().unwrap();
    fs::create_dir(&expired).unwrap();
    for file in fs::read_dir(&ours)
        .unwrap()
        .flatten()
        .filter(|f| f.file_name().to_string_lossy().starts_with("ca."))
    {
        fs::copy(file.path(), expired.join(file.file_name())).unwrap();
    }
    Authority::open(&expired).unwrap().issue(&name, Duration::from_secs(1)).unwrap();

    let try_with = |what: &str, machine: &str, port: u16, words: &[&str]| {
        let to = format!("10.89.0.3:{port}");
        let said = say(
            stage
                .drafter(1)
                .args(["receive", machine, "--host", "b", "--listen", &to, "--detach", "--package"])
                .arg(stage.package())
                .args(words),
            Duration::from_secs(30),
        );
        if said.code != Some(0) {
            return said.err; // it did not even start, which is as good
        }
        thread::sleep(Duration::from_millis(1200)); // until the short one is over
        let said = say(
            stage.drafter(0).args(["migrate", "redis", "--peer", "b", "--to", &to]),
            Duration::from_secs(30),
        );
        assert!(said.code.is_some_and(|c| c != 0), "{what}: {said:?}");
        said.err
    };
    let text = |path: &Path| path.display().to_string();
    let said = try_with("foreign", "one", 7601, &["--certs", &text(&foreign)]);
    assert!(said.contains("certificate"), "{said}");
    let said = try_with("expired", "two", 7602, &["--certs", &text(&expired)]);
    assert!(said.contains("expired"), "{said}");
    let said = try_with("plaintext", "three", 7603, &["--plaintext"]);
    assert!(said.contains("still running here"), "{said}");

    let own = text(&stage.fleet.rig().identity().unwrap());
    let said = try_with("not asked", "four", 7604, &["--certs", &own, "--accept-from", "c,d"]);
    assert!(said.contains("takes this machine from c, d only, not from \"a\""), "{said}");

    // A peer without TLS is turned away, whatever it says.
    let at = stage.fleet.runner(b).address;
    let stream = stage.fleet.rig().hosts()[0].namespace.run(|| TcpStream::connect(at));
    let mut stream = stream.unwrap().unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(15))).unwrap();
    stream.write_all(b"DRFT\x01\0\0\0and sixteen bytes.").unwrap();
    let mut answer = Vec::new();
    let _ = std::io::Read::read_to_end(&mut stream, &mut answer);
    assert!(!answer.starts_with(b"DRFT"), "{answer:?}");
    assert_eq!(stage.fleet.runner(b).status().unwrap().state, "standby");

    // None of it is in the way of an honest move.
    go(&stage.fleet, a, b, Mode::Hybrid, budgets());
}

#[test]
fn hop_check_27_a_package_that_was_changed_or_cut_short_is_neither_run_nor_taken_over_the_wire() {
    let Some(mut stage) = Stage::open() else { return };
    let folder = tempfile::tempdir().unwrap();
    let copy = |name: &str| {
        let to = folder.path().join(name);
        let copied = Command::new("cp").arg("-a").arg(stage.package()).arg(&to).status().unwrap();
        assert!(copied.success());
        to
    };
    let run = |package: &Path| {
        say(
            stage.drafter(0).args(["run", "bad", "--plaintext", "--package"]).arg(package),
            Duration::from_secs(60),
        )
    };

    // One byte of the disk is another.
    let tampered = copy("tampered");
    let root = tampered.join("root.ext4");
    let mut bytes = fs::read(&root).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&root, &bytes).unwrap();
    run(&tampered).fails_with(&["root.ext4"]);

    // The disk ends early.
    let truncated = copy("truncated");
    let root = truncated.join("root.ext4");
    fs::File::options().write(true).open(&root).unwrap().set_len(middle as u64).unwrap();
    run(&truncated).fails_with(&["root.ext4"]);

    // An archive ends early.
    let archive = folder.path().join("redis.tar.zst");
    let packed = say(
        Command::new(program("drafter"))
            .args(["package", "pack"])
            .arg(stage.package())
            .arg(&archive),
        Duration::from_secs(120),
    );
    assert_eq!(packed.code, Some(0), "{packed:?}");
    let length = fs::metadata(&archive).unwrap().len();
    fs::File::options().write(true).open(&archive).unwrap().set_len(length / 2).unwrap();
    run(&archive).fails_with(&["redis.tar.zst"]);

    // Not a package at all.
    run(Path::new("/etc")).fails_with(&["/etc"]);

    // A destination looks at its copy before it takes a machine on top of it.
    let mut spec = stage.plain_spec("redis");
    let a = stage.fleet.run(0, &spec).unwrap();
    spec.package = tampered;
    let b = stage.fleet.receive(1, &spec).unwrap();
    let refused = stage.fleet.migrate(a, b, Mode::Hybrid, budgets(), |_| {}).unwrap_err();
    let refused = refused.to_string();
    assert!(refused.contains("root.ext4") && refused.contains("still running here"), "{refused}");
}
