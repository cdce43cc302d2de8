//! A host that takes whatever machine comes: `receive --any`, `migrate --to-host`, `evacuate --to-host`.
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

use drafter::{driver::qemu, migrate::messages::Mode};
use e2e::{
    BOOT, Stage, eventually,
    moves::{budgets, go},
    reception::{LIMIT, Reception, inside, on, state},
};
use identity::{HostName, Identity, Security, Stream};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};

#[test]
fn a_host_takes_whatever_machines_come_and_they_come_back() {
    let Some(mut stage) = Stage::open() else { return };
    let machines = ["one", "two"];
    for (number, name) in (1..).zip(machines) {
        let id = stage.fleet.run(0, &stage.spec(name, number)).unwrap();
        stage.fleet.runner(id).wait_ready(BOOT).unwrap();
        inside(&stage, 0, name, &format!("echo {name} > /tmp/note"));
    }
    let b = Reception::open::<&str>(&stage, 1, &[]);
    let evacuate = |more: &[&str]| {
        let words = ["evacuate", "--to-host", &b.name(), "--deadline", "60s", "--line", "1000"];
        on(&stage, 0, &[&words[..], more].concat())
    };
    // Nothing is started for a plan.
    assert_eq!(evacuate(&["--dry-run"]).json()["outcomes"], serde_json::json!([]));
    assert!(machines.iter().all(|name| state(&stage, 1, name).is_null()));
    let report = evacuate(&[]).json();
    for outcome in report["outcomes"].as_array().unwrap() {
        assert_eq!(
            (&outcome["host"], &outcome["in_time"]),
            (&"b".into(), &true.into()),
            "{report}"
        );
    }
    assert_eq!(report["outcomes"].as_array().unwrap().len(), 2, "{report}");
    for name in machines {
        assert_eq!(state(&stage, 1, name)["state"], "running");
        assert_eq!(inside(&stage, 1, name, "cat /tmp/note"), name);
        assert_eq!(state(&stage, 0, name)["state"], "standby");
    }

    // Whoever took them may die: they run on. Back goes one to a runner that has waited here since, and
    // has most of its memory.
    drop(b);
    let a = Reception::open::<&str>(&stage, 0, &[]);
    on(&stage, 1, &["migrate", "one", "--to-host", &a.name()]).succeeds();
    assert_eq!(inside(&stage, 0, "one", "cat /tmp/note"), "one");
    assert_eq!(state(&stage, 1, "two")["state"], "running");
    // One that runs there is not asked for.
    on(&stage, 0, &["migrate", "one", "--to-host", &a.name()])
        .fails_with(&["\"one\" is running there already"]);
    on(&stage, 1, &["stop", "two", "--grace-s", "0"]).succeeds();
}

#[test]
fn nobody_gets_a_runner_who_may_not_have_one_and_one_whose_machine_does_not_come_ends() {
    let Some(mut stage) = Stage::open() else { return };
    let id = stage.fleet.run(0, &stage.spec("one", 1)).unwrap();
    stage.fleet.runner(id).wait_ready(BOOT).unwrap();
    let b = Reception::open(&stage, 1, &["--accept-from", "c"]);
    on(&stage, 0, &["migrate", "one", "--to-host", &b.name()])
        .fails_with(&["takes this machine from c only, not from \"a\""]);
    assert!(state(&stage, 1, "one").is_null());
    drop(b);

    let b = Reception::open::<&str>(&stage, 1, &[]);
    let (folder, namespace) = {
        let rig = stage.fleet.rig();
        (rig.identity().unwrap(), &rig.hosts()[0].namespace)
    };
    let own = HostName::new("a").unwrap();
    let security = Security::Mutual(Identity::load(&folder, &own).unwrap());
    let ask = |line: &str| {
        let socket = namespace.run(|| TcpStream::connect(b.address)).unwrap().unwrap();
        let to = HostName::new("b").unwrap();
        let mut stream = Stream::client(socket, &to, &security, LIMIT).unwrap();
        stream.write_all(line.as_bytes()).and_then(|()| stream.flush()).unwrap();
        let mut answer = String::new();
        stream.control().set_read_timeout(Some(LIMIT));
        BufReader::new(&mut stream).take(4096).read_line(&mut answer).unwrap();
        answer
    };
    for (line, why) in [
        ("{\"host\":\"b\",\"machine\":\"one\"}\n", "its certificate is"),
        ("{\"host\":\"a\",\"machine\":\"../one\"}\n", "refused"),
        ("{\"host\":\"a\"}\n", "missing field"),
        ("ARCHITECT\n", "does not ask for a runner"),
    ] {
        let answer = ask(line);
        assert!(answer.contains("refused") && answer.contains(why), "{line}: {answer}");
    }
    assert!(state(&stage, 1, "one").is_null(), "a runner was started for a stranger");
    // A stranger to the authority gets no answer at all.
    let mut bare = namespace.run(|| TcpStream::connect(b.address)).unwrap().unwrap();
    bare.set_read_timeout(Some(LIMIT)).unwrap();
    bare.write_all(b"{\"host\":\"a\",\"machine\":\"one\"}\n").unwrap();
    let mut said = Vec::new();
    let _ = bare.read_to_end(&mut said);
    assert!(!String::from_utf8_lossy(&said).contains("runner"), "{said:?}");

    // Two who ask for one machine get one runner.
    let wanted = "{\"host\":\"a\",\"machine\":\"late\"}\n";
    let first = ask(wanted);
    assert!(first.contains("\"runner\""), "{first}");
    assert_eq!(ask(wanted), first);
    let waiting = state(&stage, 1, "late");
    assert_eq!(waiting["state"], "standby", "{waiting}");
    // Its process is stopped rather than waited for two minutes; what it was told stays.
    let record = stage.fleet.state_of(1).join("machines/late/runner.json");
    let record: Value = serde_json::from_slice(&std::fs::read(record).unwrap()).unwrap();
    assert_eq!(record["config"]["wait_ms"], 120_000, "{record}");
    let pid = waiting["runner_pid"].as_u64().unwrap() as i32;
    kill(Pid::from_raw(pid), Signal::SIGTERM).unwrap();
    eventually("it has ended", LIMIT, || state(&stage, 1, "late").is_null());
    assert_eq!(
        qemu::monitor_without_runner(&stage.fleet.state_of(1).join("machines/late/run")),
        None
    );
}

#[test]
fn a_runner_that_waits_for_a_time_ends_after_it_and_one_that_has_had_a_machine_does_not() {
    let Some(mut stage) = Stage::open() else { return };
    const WAIT: Duration = Duration::from_secs(6);
    let from = stage.fleet.run(0, &stage.plain_spec("one")).unwrap();
    stage.fleet.runner(from).wait_ready(BOOT).unwrap();
    let waits = |name: &str| {
        let mut spec = stage.plain_spec(name);
        spec.extra = ["--wait", "6s"].map(String::from).into();
        spec
    };
    let (mine, others) = (waits("one"), waits("two"));
    let to = stage.fleet.receive(1, &mine).unwrap();
    let lonely = stage.fleet.receive(1, &others).unwrap();
    go(&stage.fleet, from, to, Mode::Hybrid, budgets());
    go(&stage.fleet, to, from, Mode::Hybrid, budgets());
    let left = Instant::now();
    let record = || stage.fleet.runner(lonely).dir().read_record().unwrap().unwrap();
    eventually("it has waited", LIMIT, || !record().alive());
    assert_eq!(record().detail, "no machine came within 6s");
    while left.elapsed() < WAIT + Duration::from_secs(1) {
        assert_eq!(stage.fleet.runner(to).status().unwrap().state, "standby");
        thread::sleep(Duration::from_millis(100));
    }
    go(&stage.fleet, from, to, Mode::Hybrid, budgets());
}
