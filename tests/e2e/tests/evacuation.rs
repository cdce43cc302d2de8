//! Hosts that are emptied with a store: machines that cannot move in time, have nowhere to go, or are
//! refused, sleep in the store and go on elsewhere, under clients that know every write.
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

use architect::load::{Load, LoadConfig, LoadHandle};
use drafter::migrate::reception::{self, Ask};
use e2e::{
    BOOT, Stage,
    busy::{Work, start_oracle},
    eventually,
    place::Place,
    reception::{LIMIT, Reception, inside, on, state},
};
use identity::{HostName, Identity, Security};
use serde_json::{Value, json};
use std::{fs, time::Duration};

const MIB: u64 = 1 << 20;
/// The part of the deadline that is planned with.
const USABLE: f64 = 0.85;
const DEADLINE_S: u64 = 60;

/// A client of machine `number`, which has had answers.
#[track_caller]
fn client(stage: &Stage, number: u8) -> LoadHandle {
    let config = LoadConfig {
        keys: 30,
        think: Duration::from_millis(5),
        answer_within: LIMIT,
        verify_within: LIMIT,
        ..LoadConfig::default()
    };
    let client = stage.fleet.rig().client();
    let load = client.run(|| Load::start(Stage::public(number), config)).unwrap().unwrap();
    served(&load);
    load
}

#[track_caller]
fn served(load: &LoadHandle) {
    assert!(load.wait_for(20, LIMIT), "no answers: {:?}", load.progress());
}

/// Ends a client, which must have noticed nothing but time.
#[track_caller]
fn all_is_there(load: LoadHandle) {
    served(&load);
    let report = load.finish().unwrap();
    assert!(report.is_clean(), "the client noticed: {report:?}");
    eprintln!("{} writes, silent for {:.0} ms", report.writes, report.longest_gap_ms);
}

fn evacuate(host: &Reception, more: &[String]) -> Vec<String> {
    let line = ["evacuate", "--to-host", &host.name(), "--deadline"].map(String::from);
    let mut words: Vec<String> = line.into();
    words.push(format!("{DEADLINE_S}s"));
    words.extend(more.iter().cloned());
    words
}

fn line(megabits: u64) -> Vec<String> {
    vec!["--line".into(), megabits.to_string()]
}

/// What an evacuation says of a machine.
#[track_caller]
fn of<'a>(report: &'a Value, list: &str, machine: &str) -> &'a Value {
    let all = report[list].as_array().unwrap();
    all.iter().find(|one| one["machine"] == machine).unwrap_or_else(|| panic!("{report}"))
}

/// Waits until all of a machine is on a host.
#[track_caller]
fn whole(stage: &Stage, host: usize, machine: &str) {
    eventually("all of it is here", LIMIT, || {
        let status = state(stage, host, machine);
        let missing = status["missing"].as_object();
        status["state"] == "running" && missing.is_some_and(|all| all.values().all(|n| *n == 0))
    });
}

/// Runs the command that wakes a machine as it was told, on a host, in the background.
#[track_caller]
fn wake_as_told(stage: &Stage, host: usize, outcome: &Value) {
    let told = outcome["asleep"]["resume"].as_str().unwrap();
    let mut words = told.split(' ');
    assert_eq!(words.next(), Some("drafter"), "{told}");
    let place = &stage.fleet.rig().hosts()[host];
    let mut command = stage.drafter(host);
    command.args(words).args(["--detach", "--host", &place.name, "--certs"]);
    command.arg(stage.fleet.rig().identity().unwrap());
    command.arg("--agent").arg(&place.agent_socket);
    command.args(["--listen", &format!("{}:7450", place.migration)]);
    e2e::command::say(&mut command, LIMIT).succeeds();
}

#[test]
fn a_machine_that_does_not_fit_through_the_line_sleeps_and_is_woken_where_the_others_moved() {
    let Some(mut stage) = Stage::open() else { return };
    let place = Place::new();
    let store = place.words();
    for (number, name, memory) in [(1, "small", 128), (2, "large", 256)] {
        let mut spec = stage.spec(name, number);
        spec.memory_mib = Some(memory);
        let id = stage.fleet.run(0, &spec).unwrap();
        stage.fleet.runner(id).wait_ready(BOOT).unwrap();
        if name == "small" {
            continue;
        }
        // What makes it large is written once.
        let work = Work { memory_mib: 96, hot_mib: 1, rate_mb_s: 1, file_mib: 4 };
        start_oracle(stage.fleet.runner(id), work);
        // It has slept before, so that the store has most of it.
        let mut words: Vec<String> = ["suspend", "large"].map(String::from).into();
        words.extend(store.iter().cloned());
        on(&stage, 0, &words).succeeds();
        let package = stage.package().display().to_string();
        let mut words: Vec<String> = ["resume", name, "--package", &package].map(Into::into).into();
        words.extend(store.iter().cloned());
        stage.fleet.start(0, &spec, words).unwrap();
        whole(&stage, 0, "large");
    }
    let clients = [client(&stage, 1), client(&stage, 2)];
    let b = Reception::open(&stage, 1, &store);

    // With a line on which all can move nobody sleeps; and what the store has is known, not guessed.
    let calm = calm(&stage, 0, &b, &store);
    let figure = |name: &str, what: &str| figure(&calm, name, what);
    let (known, bytes, hot) =
        (figure("large", "in_store"), figure("large", "bytes"), figure("large", "hot"));
    eprintln!("large: {} of {} MiB known, {} hot", known / MIB, bytes / MIB, hot / MIB);
    assert!(known > 64 * MIB && known < bytes, "the store has the oracle's memory: {calm}");
    assert_eq!(figure("small", "in_store"), 0, "{calm}");

    // A line on which both fit if the large one sends only what the store lacks, and not else. (Where a file
    // names hosts, what those can bring is not known.)
    let nobody = place.folder().join("nobody");
    fs::write(&nobody, "# no machine has a host of its own\n").unwrap();
    let file = vec!["--to".into(), nobody.display().to_string()];
    let narrow = narrow(&calm, "in_store", figure("small", "bytes"));
    let report = on(&stage, 0, &[evacuate(&b, &store), narrow, file].concat()).json();
    eprintln!("{}", report["verdict"]);
    let moved = of(&report, "outcomes", "small");
    assert_ne!(moved["way"], "suspend", "{report}");
    let slept = of(&report, "outcomes", "large");
    assert_eq!((&slept["way"], &slept["not_moved"]), (&json!("suspend"), &Value::Null), "{report}");
    for outcome in [moved, slept] {
        assert_eq!((&outcome["host"], &outcome["error"]), (&json!("b"), &Value::Null), "{report}");
        assert_eq!(
            (&outcome["expected"], &outcome["in_time"]),
            (&json!(true), &json!(true)),
            "{report}"
        );
    }
    let stored = slept["asleep"]["stored_bytes"].as_u64().unwrap();
    assert!(stored < bytes - known + hot, "it was told to cost less than it did: {report}");
    assert!(slept["woken_s"].as_f64() >= slept["safe_s"].as_f64(), "{report}");

    // Both run there with all that their clients were told, and nothing of them is here.
    clients.iter().for_each(served);
    whole(&stage, 1, "large");
    assert_eq!(state(&stage, 1, "small")["state"], "running");
    assert!(state(&stage, 0, "large").is_null());
    assert_eq!(state(&stage, 0, "small")["state"], "standby");
    let verify = |host: usize| {
        let said = inside(&stage, host, "large", "oracle verify");
        let oracle: Value = serde_json::from_str(&said).unwrap();
        assert_eq!((&oracle["ok"], &oracle["mismatches"]), (&json!(true), &json!(0)), "{oracle}");
    };
    verify(1);

    // Back on such a line the large one moves, with what that host brings from its store.
    let a = Reception::open(&stage, 0, &store);
    let calm = self::calm(&stage, 1, &a, &store);
    let narrow = self::narrow(&calm, "brought", self::figure(&calm, "small", "bytes"));
    let report = on(&stage, 1, &[evacuate(&a, &store), narrow].concat()).json();
    moved_with_the_store(&report, "large", &a.host, self::figure(&calm, "large", "brought"));
    clients.into_iter().for_each(all_is_there);
    whole(&stage, 0, "large");
    verify(0);
}

/// It moved there by plan, with most of what was known to be in the store.
#[track_caller]
fn moved_with_the_store(report: &Value, machine: &str, host: &str, known: u64) {
    eprintln!("{}", report["verdict"]);
    let moved = of(report, "outcomes", machine);
    let (way, expected) = (&moved["way"], &moved["expected"]);
    assert_eq!((way, expected), (&json!("hybrid-with-store"), &json!(true)), "{report}");
    assert_eq!((&moved["host"], &moved["error"]), (&json!(host), &Value::Null), "{report}");
    assert_eq!(moved["in_time"], true, "{report}");
    let brought = moved["known_bytes"].as_u64().unwrap();
    eprintln!("{} of {} MiB were brought", brought / MIB, known / MIB);
    assert!(brought > known / 2, "{report}");
}

/// A plan with a line on which all can move: nobody sleeps.
#[track_caller]
fn calm(stage: &Stage, host: usize, to: &Reception, store: &[String]) -> Value {
    let words = [&evacuate(to, store)[..], &line(1000), &["--dry-run".into()]].concat();
    let calm = on(stage, host, &words).json();
    let planned = calm["planned"].as_array().unwrap();
    let moves = |one: &Value| one["way"] == "hybrid" && one["to"] == to.host.as_str();
    assert!(!planned.is_empty() && planned.iter().all(moves), "{calm}");
    calm
}

/// What is planned with for a machine.
#[track_caller]
fn figure(report: &Value, name: &str, what: &str) -> u64 {
    let loads = report["loads"].as_array().unwrap();
    let load = loads.iter().find(|load| load["name"] == name).unwrap();
    load[what].as_u64().unwrap()
}

/// A line on which the large one and the others fit if it sends only what the store lacks, and not else.
#[track_caller]
fn narrow(calm: &Value, there: &str, others: u64) -> Vec<String> {
    let large = |what| figure(calm, "large", what);
    let bytes = large("bytes");
    let least = others + bytes - large(there) + bytes / 128 + large("hot");
    let most = others + bytes;
    assert!(least + 16 * MIB < most, "the guest writes too much for this test: {calm}");
    let middle = (least + most) / 2;
    line((middle as f64 / 125_000.0 / (DEADLINE_S as f64 * USABLE)) as u64)
}

#[test]
fn what_its_backup_or_its_protection_has_of_a_machine_is_brought_by_the_host_it_moves_to() {
    for protected in [false, true] {
        let Some(mut stage) = Stage::open() else { return };
        let place = Place::new();
        let store = place.words();
        let mut spec = stage.spec("large", 1);
        // One that survives the loss of its host moves to one that it survives, too.
        let (url, keys) = (place.url(), place.keys().display().to_string());
        let guarded = ["--protect", &url, "--protect-keys", &keys].map(String::from);
        let there = if protected { &guarded[..] } else { &store };
        if protected {
            spec.extra = guarded.to_vec();
        }
        let id = stage.fleet.run(0, &spec).unwrap();
        stage.fleet.runner(id).wait_ready(BOOT).unwrap();
        let work = Work { memory_mib: 64, hot_mib: 1, rate_mb_s: 1, file_mib: 4 };
        start_oracle(stage.fleet.runner(id), work);
        if !protected {
            let words = [&["backup", "large", "--every", "2s"].map(String::from), &store[..]];
            on(&stage, 0, &words.concat()).succeeds();
        }
        let load = client(&stage, 1);
        let b = Reception::open(&stage, 1, there);

        // It has never slept.
        let known =
            |calm: &Value| [figure(calm, "large", "brought"), figure(calm, "large", "in_store")];
        let plan = || calm(&stage, 0, &b, &store);
        let mut calm = plan();
        eventually("the store has most of it", LIMIT, || {
            calm = plan();
            known(&calm)[0] > 64 * MIB
        });
        assert_eq!(known(&calm)[1], 0, "{calm}");
        let narrow = narrow(&calm, "brought", 0);
        let report = on(&stage, 0, &[evacuate(&b, &store), narrow].concat()).json();
        moved_with_the_store(&report, "large", &b.host, known(&calm)[0]);
        all_is_there(load);
        whole(&stage, 1, "large");
        let said = inside(&stage, 1, "large", "oracle verify");
        let oracle: Value = serde_json::from_str(&said).unwrap();
        assert_eq!((&oracle["ok"], &oracle["mismatches"]), (&json!(true), &json!(0)), "{oracle}");
    }
}

#[test]
fn without_any_host_all_machines_sleep_and_the_command_that_is_told_wakes_them() {
    let Some(mut stage) = Stage::open() else { return };
    let place = Place::new();
    let id = stage.fleet.run(0, &stage.spec("one", 1)).unwrap();
    stage.fleet.runner(id).wait_ready(BOOT).unwrap();
    let load = client(&stage, 1);
    let evacuate = |more: &[String]| {
        let words = ["evacuate", "--deadline", "60s", "--line", "1000"].map(String::from);
        on(&stage, 0, &[&words[..], more].concat())
    };

    // What is wrong is said, and nothing is done.
    evacuate(&[]).fails_with(&["--to FILE", "--store URL"]);
    let no_keys = place.folder().join("no-keys").display().to_string();
    evacuate(&["--store".into(), place.url(), "--keys".into(), no_keys.clone()])
        .fails_with(&[&no_keys]);
    evacuate(&["--store".into(), "ftp://x".into(), "--keys".into(), no_keys])
        .fails_with(&["\"ftp://x\" is no store"]);
    let mut nowhere = place.words();
    nowhere[1] = format!("file://{}/store", place.keys().display());
    nowhere.push("--dry-run".into());
    let said = evacuate(&nowhere);
    said.fails_with(&["not all machines of this host can be saved"]);
    assert!(said.out.contains("it cannot sleep in the store"), "{said:?}");
    let dry = [place.words(), vec!["--dry-run".into()]].concat();
    let report = evacuate(&dry).json();
    assert_eq!(of(&report, "planned", "one")["way"], "suspend", "{report}");
    assert_eq!(report["outcomes"], json!([]), "{report}");
    assert_eq!(state(&stage, 0, "one")["state"], "running");

    let report = evacuate(&place.words()).json();
    let outcome = of(&report, "outcomes", "one");
    assert_eq!((&outcome["host"], &outcome["error"]), (&Value::Null, &Value::Null), "{report}");
    assert_eq!((&outcome["in_time"], &outcome["not_woken"]), (&json!(true), &Value::Null));
    eventually("its runner ends", LIMIT, || state(&stage, 0, "one").is_null());
    wake_as_told(&stage, 1, outcome);
    all_is_there(load);
    whole(&stage, 1, "one");
}

#[test]
fn a_machine_that_every_host_refuses_sleeps_and_wakes_where_it_may() {
    let Some(mut stage) = Stage::open() else { return };
    let place = Place::new();
    let store = place.words();
    // Its runner here takes it back from nobody but a host that there is not.
    let mut spec = stage.spec("one", 1);
    spec.extra = ["--accept-from", "c"].map(String::from).into();
    let id = stage.fleet.run(0, &spec).unwrap();
    stage.fleet.runner(id).wait_ready(BOOT).unwrap();
    let load = client(&stage, 1);
    let b = Reception::open(&stage, 1, &store);
    let report = on(&stage, 0, &[evacuate(&b, &store), line(1000)].concat()).json();
    assert_eq!(of(&report, "outcomes", "one")["way"], "hybrid", "{report}");
    served(&load);

    // Back it does not move, and is put to sleep; the host wakes it, in place of the runner that waits.
    let a = Reception::open(&stage, 0, &store);
    let report = on(&stage, 1, &[evacuate(&a, &store), line(1000)].concat()).json();
    let outcome = of(&report, "outcomes", "one");
    let why = outcome["not_moved"].as_str().unwrap_or_default();
    assert!(why.contains("takes this machine from c only, not from \"b\""), "{report}");
    assert_eq!((&outcome["way"], &outcome["host"]), (&json!("suspend"), &json!("a")), "{report}");
    assert_eq!((&outcome["expected"], &outcome["error"]), (&json!(true), &Value::Null));
    served(&load);
    whole(&stage, 0, "one");

    // A host that does not wake for this one: it sleeps on, and is woken by hand.
    drop((a, b));
    let more = [store.clone(), ["--accept-from", "c"].map(String::from).into()].concat();
    let b = Reception::open(&stage, 1, &more);
    let report = on(&stage, 0, &[evacuate(&b, &store), line(1000)].concat()).json();
    let outcome = of(&report, "outcomes", "one");
    for what in ["not_moved", "not_woken"] {
        let why = outcome[what].as_str().unwrap_or_default();
        assert!(why.contains("takes this machine from c only, not from \"a\""), "{what}: {report}");
    }
    assert_eq!((&outcome["host"], &outcome["error"]), (&Value::Null, &Value::Null), "{report}");
    assert!(state(&stage, 1, "one").is_null(), "something was started for it");
    // Nor is it woken because a host wants to have it that has not put it to sleep.
    let a = Reception::open(&stage, 0, &store);
    let wake = |host: usize, machine: &str| {
        let rig = stage.fleet.rig();
        let (name, namespace) = (&rig.hosts()[host].name, &rig.hosts()[host].namespace);
        let own = HostName::new(name).unwrap();
        let security = Security::Mutual(Identity::load(&rig.identity().unwrap(), &own).unwrap());
        let ask = Ask { host: name.clone(), machine: machine.into() };
        let to = HostName::new("a").unwrap();
        namespace.run(|| reception::wake(a.address, &to, &security, ask)).unwrap().unwrap_err()
    };
    let why = wake(1, "one");
    assert!(why.contains("it was put to sleep at host \"a\", and \"b\" asks for it"), "{why}");
    let why = wake(1, "nobody");
    assert!(why.contains("has no generation"), "{why}");
    drop(a);
    wake_as_told(&stage, 1, outcome);
    all_is_there(load);
    whole(&stage, 1, "one");
}
