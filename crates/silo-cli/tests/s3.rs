//! The commands about backups next to a real S3 server over TCP: all of a backup's life, what goes
//! wrong on the way to the store, wrong keys, buckets and credentials.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use common::{
    Client, FLUSH, LIMIT,
    s3::{FOLDER, LINE, Load, MIB, Rig, figure, is_one_moment, uploader, wait_for},
    silo::{Running, Said, silo},
};
use silo_testing::{Fault, Rule, S3Server};
use std::{
    fs,
    time::{Duration, Instant},
};

const GENERATIONS: &str = "silo_backup_generations_total{line=\"acme/vm\"}";
const FAILURES: &str = "silo_backup_failures_total{line=\"acme/vm\"}";

fn metrics(running: &Running) -> String {
    running.ready["metrics"].as_str().unwrap().to_owned()
}

#[test]
fn a_backup_lives_its_whole_life_in_s3_with_credentials_from_environment_and_file() {
    let rig = Rig::new();
    let size = 3 * MIB + 77;
    let mut content = rig.image("image", 1, size);
    // Served and backed up by a config: its keys come from a variable of its own and from a file.
    let running = uploader(&rig, true);
    let address = metrics(&running);
    wait_for(&address, GENERATIONS, 1.0);
    let (mut client, _) = Client::go(&rig.at("sock")).unwrap();
    assert_eq!(client.write(100_000, &vec![7; 50_000], 0).unwrap(), 0);
    content[100_000..150_000].fill(7);
    wait_for(&address, GENERATIONS, 2.0);
    assert_eq!(client.write(MIB as u64, &[8; 4096], 0).unwrap(), 0);
    content[MIB..MIB + 4096].fill(8);
    drop(client);
    // The last write is stored by an orderly end.
    rig.check(&running.stop().good());
    let served = rig.numbers(LINE)[0];
    assert!(rig.restored(LINE, None) == content);

    // By flags and the provider's variables: another device has the same line, so it is refused.
    let image = rig.path("image");
    let same = rig.silo(&["sync", "--once", "--line", LINE, "--file", &image, "--label", "hand"]);
    let number = same.good().json()["number"].as_u64().unwrap();
    let shown = rig.silo(&["generations", LINE, "--show", &number.to_string()]).good().json();
    assert_eq!((&shown["label"], &shown["devices"][0]["bytes"]), (&"hand".into(), &size.into()));
    let lines = rig.silo(&["generations"]).good().json();
    assert_eq!(lines["lines"], serde_json::json!([LINE]));

    // Read when it is touched: by restore --lazy, by a config and expose, and by a mount.
    let lazy = rig.path("lazy");
    let running = Running::of(&mut rig.command(&["restore", LINE, "--lazy", "--socket", &lazy]));
    let (mut client, _) = Client::go(&rig.at("lazy")).unwrap();
    assert!(client.read_all(size).unwrap() == content);
    drop(client);
    rig.check(&running.stop().good());
    let config = rig.path("old.toml");
    let url = rig.server.url(FOLDER);
    let text = format!(
        "[device.old]\nsource = {{ generation = {{ line = \"{LINE}\", number = {served}, \
         device = \"disk\", keys = {{ file = \"keys\" }}, store = {{ url = \"{url}\" }} }} }}\n\
         expose = {{ nbd = {{ unix = \"old\" }} }}\nread-only = true\n"
    );
    fs::write(&config, text).unwrap();
    let expose = rig.path("old");
    for arguments in [
        vec!["serve", "--config", &config],
        vec!["expose", "nbd", "--socket", &expose, "--config", &config],
        vec!["mount", "--config", &config],
    ] {
        let running = Running::of(&mut rig.command(&arguments));
        let (mut client, _) = Client::go(&rig.at("old")).unwrap();
        assert!(client.read_all(size).unwrap() == content, "{arguments:?}");
        drop(client);
        rig.check(&running.stop().good());
    }

    rig.silo(&["fork", LINE, "acme/test"]).good();
    assert!(rig.restored("acme/test", None) == content);
    for depth in ["quick", "full", "scrub"] {
        rig.silo(&["verify", "--depth", depth]).good();
    }
    // Nothing goes without being told to.
    let before = rig.objects("");
    let said = rig.silo(&["prune", LINE, "--keep-last", "1"]).good().json();
    assert!(!said["deleted"].as_array().unwrap().is_empty(), "{said}");
    rig.silo(&["collect", "--grace", "0s", "--dry-run"]).good();
    assert_eq!(rig.objects(""), before);
    rig.nothing_leaks();
    assert!(rig.restored(LINE, None) == content);
    assert!(rig.restored("acme/test", None) == content);
}

/// Does `work` while requests meet `fault`.
fn with_fault<T>(rig: &Rig, rule: &Rule, work: impl FnOnce() -> T) -> T {
    let before = rig.server.faults().happened();
    rig.server.faults().add(rule.clone());
    let done = work();
    assert!(rig.server.faults().happened() > before, "nothing met {rule:?}");
    rig.server.faults().clear();
    done
}

#[test]
fn a_store_that_is_slow_fails_or_loses_answers_on_the_way_up_gets_the_generation_all_the_same() {
    let rig = Rig::new();
    let slow = Fault::Slow(Duration::from_millis(300));
    for (seed, method, contains, fault) in [
        (1, "PUT", "packs/", slow.clone()),
        (2, "PUT", "packs/", Fault::Status(500)),
        (3, "PUT", "packs/", Fault::LostAnswer(503)),
        // The commit itself: done, and its answer lost; the next attempt finds itself there.
        (4, "PUT", "lines/", Fault::LostAnswer(500)),
        (5, "PUT", "lines/", Fault::Status(503)),
        (6, "GET", "lines/", Fault::Truncated),
        (7, "GET", "list-type", Fault::Status(500)),
        (8, "PUT", "keys/", slow),
    ] {
        let content = rig.image("image", seed, MIB);
        let before = if seed == 1 { Vec::new() } else { rig.numbers(LINE) };
        let rule = Rule { times: 2, ..Rule::next(method, contains, fault.clone()) };
        // The tenant's data key is there after the first.
        let rule =
            if contains == "keys/" { Rule { contains: "probe/".into(), ..rule } } else { rule };
        let said = with_fault(&rig, &rule, || rig.back_up("image"));
        let numbers = rig.numbers(LINE);
        assert_eq!(numbers.len(), before.len() + 1, "{fault:?}");
        assert_eq!(said["number"], numbers[0]);
        assert!(rig.restored(LINE, None) == content, "{fault:?}");
    }
    rig.nothing_leaks();
}

#[test]
fn what_is_wrong_in_the_answers_of_a_store_is_never_restored() {
    let rig = Rig::new();
    let old = rig.image("image", 1, MIB);
    rig.back_up("image");
    let first = rig.objects("packs").remove(0);
    let new = rig.image("image", 2, MIB);
    rig.back_up("image");
    let second = rig.objects("packs").into_iter().find(|name| *name != first).unwrap();
    let to = rig.path("to");
    let restore = || rig.silo(&["restore", LINE, "--to", &to]);
    // Once or twice: it is asked again.
    for fault in [
        Fault::Slow(Duration::from_millis(300)),
        Fault::Status(500),
        Fault::Status(503),
        Fault::Truncated,
    ] {
        let rule = Rule { times: 2, ..Rule::next("GET", "packs/", fault.clone()) };
        with_fault(&rig, &rule, || restore().good());
        assert!(fs::read(&to).unwrap() == new, "{fault:?}");
        fs::remove_file(&to).unwrap();
    }
    // For good: an error that names the object, and no file that looks like a restored one.
    let stale = Fault::Stale(format!("{FOLDER}/{first}"));
    for (fault, words) in
        [(Fault::WrongBytes, "does not decrypt"), (stale, "is"), (Fault::Status(404), "missing")]
    {
        let rule = Rule::all("GET", "packs/", fault.clone());
        let said = with_fault(&rig, &rule, restore).failed(1, words);
        assert!(said.err.contains(&second), "{fault:?}: {said:?}");
        assert!(!rig.at("to").exists(), "{fault:?}");
        let rule = Rule::all("GET", "packs/", fault.clone());
        let said = with_fault(&rig, &rule, || rig.silo(&["verify", "--depth", "full"]));
        assert_eq!(said.code, 3, "{fault:?}: {said:?}");
    }
    // A log entry that is wrong, or another one.
    let entries = rig.objects("lines/acme/vm");
    let stale = Fault::Stale(format!("{FOLDER}/{}", entries[entries.len() - 1]));
    for fault in [Fault::WrongBytes, stale] {
        let said = with_fault(&rig, &Rule::all("GET", "lines/", fault.clone()), restore);
        assert_eq!(said.code, 1, "{fault:?}: {said:?}");
        assert!(!rig.at("to").exists(), "{fault:?}");
    }
    // Served lazily, a client gets an error for what is wrong, and the content once it is right.
    let lazy = rig.path("lazy");
    rig.server.faults().add(Rule::all("GET", "packs/", Fault::WrongBytes));
    let running = Running::of(&mut rig.command(&["restore", LINE, "--lazy", "--socket", &lazy]));
    let (mut client, _) = Client::go(&rig.at("lazy")).unwrap();
    // EIO
    assert_eq!(client.call(common::READ, 0, 0, 4096).unwrap(), 5);
    rig.server.faults().clear();
    assert!(client.read(0, MIB as u32).unwrap() == new);
    drop(client);
    running.stop().good();
    assert!(rig.restored(LINE, Some(rig.numbers(LINE)[1])) == old);
}

#[test]
fn a_store_that_goes_and_comes_back_costs_failures_and_no_content() {
    let rig = Rig::new();
    fs::write(rig.at("image"), vec![0; MIB]).unwrap();
    let running = uploader(&rig, true);
    let address = metrics(&running);
    wait_for(&address, GENERATIONS, 1.0);
    rig.server.go_away();
    let load = Load::start(&rig.at("sock"), MIB);
    // Writers go on while nothing can be stored; the figures say so.
    let text = wait_for(&address, FAILURES, 1.0);
    assert!(figure(&text, "silo_backup_changed_blocks{line=\"acme/vm\"}").unwrap() > 0.0, "{text}");
    rig.server.come_back().unwrap();
    let had = figure(&text, GENERATIONS).unwrap();
    wait_for(&address, GENERATIONS, had + 2.0);
    load.end();
    rig.check(&running.stop().good());
    let content = fs::read(rig.at("image")).unwrap();
    is_one_moment(&content);
    assert!(rig.restored(LINE, None) == content);

    // One that is not there at all ends a command in its time.
    rig.server.go_away();
    let began = Instant::now();
    rig.silo(&["generations"]).failed(1, "could not list");
    rig.silo(&["restore", LINE, "--to", &rig.path("never")]).failed(1, "in the store after");
    assert!(began.elapsed() < LIMIT, "{:?}", began.elapsed());
}

#[test]
fn wrong_keys_buckets_and_credentials_are_named_and_change_nothing() {
    let rig = Rig::new();
    let content = rig.image("image", 1, MIB);
    rig.back_up("image");
    let before = rig.objects("");
    let image = rig.path("image");
    let sync = ["sync", "--once", "--line", LINE, "--file", &image];
    let restore = ["restore", LINE, "--to", &rig.path("never")];

    // A wrong secret, an unknown key, a session that has expired (as STS says it), none at all.
    let [(access, _), (secret, value)] = rig.server.credentials();
    for (name, wrong) in [(secret, "not-the-secret"), (access, "nobody")] {
        for arguments in [&sync[..], &restore[..], &["generations"][..]] {
            let said = rig.said(rig.command(arguments).env(name, wrong));
            let said = said.failed(1, "403");
            assert!(!said.err.contains(value), "{said:?}");
        }
    }
    let expired = Rule::all("GET", "", Fault::Status(403));
    with_fault(&rig, &expired, || rig.silo(&restore).failed(1, "in the store"));
    // The config's own places: not there, readable by others, no text.
    let config = rig.path("silo.toml");
    let text = |key: &str| {
        format!(
            "[device.disk]\nsource = {{ file = {{ path = \"image\" }} }}\n[backup]\n\
             tenant = \"acme\"\nline = \"vm\"\nkeys = {{ file = \"keys\" }}\n[backup.store]\n\
             url = \"s3://{}/{FOLDER}\"\nendpoint = \"{}\"\nregion = \"us-east-1\"\n\
             access-key = {{ env = \"MY_ACCESS\" }}\nsecret-key = {key}\n",
            S3Server::BUCKET,
            rig.server.endpoint()
        )
    };
    fs::write(&config, text("{ file = \"secret\" }")).unwrap();
    let by_config = || {
        let mut command = rig.command(&["sync", "--once", "--config", &config]);
        rig.said(command.env_remove("SILO_STORE").env_remove("SILO_KEY_FILE").env("MY_ACCESS", "x"))
    };
    by_config().failed(1, "could not read the secret in");
    fs::write(rig.at("secret"), "not-the-secret").unwrap();
    by_config().failed(1, "others can read it; chmod 600");
    common::write_private(&rig.at("secret"), "not-the-secret");
    by_config().failed(1, "403");
    fs::write(&config, text("\"not-the-secret\"")).unwrap();
    assert_eq!(by_config().code, 2);

    // A bucket that is not there.
    let elsewhere = rig.server.url(FOLDER).replace("s3://bucket", "s3://nowhere");
    for arguments in [&sync[..], &restore[..]] {
        let said = rig.said(rig.command(arguments).env("SILO_STORE", &elsewhere));
        assert_eq!(said.code, 1, "{said:?}");
        assert!(said.err.contains("NoSuchBucket") || said.err.contains("404"), "{said:?}");
    }
    // Another folder of the same bucket holds nothing.
    let folder = rig.server.url("elsewhere");
    let said = rig.said(rig.command(&restore).env("SILO_STORE", &folder));
    said.failed(1, "has no generation");

    // Keys of somebody else: the line is not taken over by who cannot read it.
    silo(["keys", "create", &rig.path("others"), "--id", "2"]).good();
    for arguments in [&sync[..], &restore[..]] {
        let said = rig.said(rig.command(arguments).env("SILO_KEY_FILE", rig.path("others")));
        said.failed(1, "key \"1\" is lost");
    }
    // The same name, another key.
    silo(["keys", "create", &rig.path("twin"), "--id", "1"]).good();
    for arguments in [&sync[..], &restore[..]] {
        let said: Said = rig.said(rig.command(arguments).env("SILO_KEY_FILE", rig.path("twin")));
        assert_eq!(said.code, 1, "{said:?}");
        assert!(said.err.contains("key"), "{said:?}");
    }
    assert_eq!(rig.objects(""), before, "something was written");
    assert!(!rig.at("never").exists());
    assert!(rig.restored(LINE, None) == content);
}

#[test]
fn what_was_flushed_before_a_failed_round_is_in_the_next() {
    let rig = Rig::new();
    fs::write(rig.at("image"), vec![0; 2 * MIB]).unwrap();
    let running = uploader(&rig, false);
    let address = metrics(&running);
    wait_for(&address, GENERATIONS, 1.0);
    // Longer than a request is repeated.
    rig.server.faults().add(Rule::all("PUT", "packs/", Fault::Status(500)));
    let (mut client, _) = Client::go(&rig.at("sock")).unwrap();
    assert_eq!(client.write(4096, &[9; 8192], 0).unwrap(), 0);
    assert_eq!(client.call(FLUSH, 0, 0, 0).unwrap(), 0);
    wait_for(&address, FAILURES, 1.0);
    rig.server.faults().clear();
    let text = wait_for(&address, GENERATIONS, 2.0);
    let held = "silo_backup_held_seconds_count{line=\"acme/vm\"}";
    assert!(figure(&text, held).unwrap() >= 3.0, "each freeze is counted: {text}");
    let mut wanted = vec![0; 2 * MIB];
    wanted[4096..12_288].fill(9);
    assert!(rig.restored(LINE, None) == wanted);
    drop(client);
    rig.check(&running.stop().good());
}
