//! Keys, backup, restore, fork, prune, verify: on real processes, in a local folder as store.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use common::{
    Client, FLUSH,
    silo::{Running, Said, command, http, silo},
};
use nix::sys::signal::Signal;
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

const MIB: usize = 1 << 20;

/// A store, keys, and an image that is backed up.
struct Rig {
    dir: tempfile::TempDir,
}

impl Rig {
    fn new() -> Self {
        let rig = Self { dir: tempfile::tempdir().unwrap() };
        silo(["keys", "create", &rig.path("keys")]).good();
        rig
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn path(&self, name: &str) -> String {
        self.at(name).to_str().unwrap().to_owned()
    }

    fn url(&self) -> String {
        format!("file://{}", self.path("store"))
    }

    /// A command with the store and keys in its environment.
    fn command(&self, arguments: &[&str]) -> std::process::Command {
        let mut command = command(["--json"].iter().chain(arguments));
        command.env("SILO_STORE", self.url()).env("SILO_KEY_FILE", self.path("keys"));
        command
    }

    fn silo(&self, arguments: &[&str]) -> Said {
        self.command(arguments).output().unwrap().into()
    }

    fn image(&self, seed: u64, bytes: usize) -> Vec<u8> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut content = Vec::with_capacity(bytes + 8);
        while content.len() < bytes {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            content.extend(state.to_le_bytes());
        }
        content.truncate(bytes);
        content[bytes / 2..bytes / 4 * 3].fill(0);
        fs::write(self.at("image"), &content).unwrap();
        content
    }

    /// Makes a generation of the image; its number.
    fn back_up(&self) -> u64 {
        let image = self.path("image");
        let said = self.silo(&["sync", "--once", "--line", "acme/vm", "--file", &image]).good();
        said.json()["number"].as_u64().unwrap()
    }

    fn restored(&self, line: &str, number: Option<u64>) -> Vec<u8> {
        let to = self.at("restored");
        let _ = fs::remove_file(&to);
        let number = number.map(|number| number.to_string());
        let to_text = self.path("restored");
        let mut arguments = vec!["restore", line, "--to", &to_text];
        if let Some(number) = &number {
            arguments.extend(["--generation", number]);
        }
        self.silo(&arguments).good();
        fs::read(to).unwrap()
    }
}

#[test]
fn any_generation_is_restored_and_what_did_not_change_is_not_stored_again() {
    let rig = Rig::new();
    let one = rig.image(1, 3 * MIB + 77);
    let first = rig.back_up();
    let mut two = one.clone();
    two[100_000..100_010].fill(9);
    fs::write(rig.at("image"), &two).unwrap();
    let image = rig.path("image");
    let said = rig.silo(&["sync", "--once", "--line", "acme/vm", "--file", &image]).good().json();
    assert_eq!(
        said["zero_blocks"].as_u64().unwrap() + said["known_blocks"].as_u64().unwrap() + 1,
        said["blocks"]
    );
    let second = said["number"].as_u64().unwrap();
    assert!(rig.restored("acme/vm", Some(first)) == one);
    assert!(rig.restored("acme/vm", None) == two);
    let listed = rig.silo(&["generations", "acme/vm"]).good().json();
    let numbers: Vec<_> =
        listed["generations"].as_array().unwrap().iter().map(|g| &g["number"]).collect();
    assert_eq!(numbers, [second, first]);
    let shown = rig.silo(&["generations", "acme/vm", "--show", &first.to_string()]).good().json();
    assert_eq!(shown["devices"][0]["bytes"], one.len());

    // A file that is there is not overwritten, and nobody else can read what was sealed.
    let to = rig.path("restored");
    rig.silo(&["restore", "acme/vm", "--to", &to]).failed(1, "exists already");
    rig.silo(&["restore", "acme/vm", "--to", &to, "--overwrite"]).good();
    rig.silo(&["restore", "acme/none", "--to", "x"]).failed(1, "has no generation");
    rig.silo(&["restore", "acme/../x", "--to", "x"]).failed(1, "cannot name a line");
    rig.silo(&["restore", "acme/vm", "--device", "x", "--to", "x"]).failed(1, "has no device");
    for name in ["packs", "maps", "lines"] {
        let found = walk(&rig.at("store").join(name));
        let leaked = found.iter().any(|file| {
            let bytes = fs::read(file).unwrap();
            bytes.windows(64).any(|window| window == &one[4096..4160])
        });
        assert!(!leaked, "content lies in the open under {name}");
    }
}

fn walk(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}

#[test]
fn lost_wrong_and_exposed_keys_are_named_and_rotation_keeps_old_generations_readable() {
    let rig = Rig::new();
    let content = rig.image(2, MIB);
    rig.back_up();
    let mode =
        |mode| fs::set_permissions(rig.at("keys"), fs::Permissions::from_mode(mode)).unwrap();
    assert_eq!(fs::metadata(rig.at("keys")).unwrap().permissions().mode() & 0o777, 0o600);
    mode(0o644);
    rig.silo(&["restore", "acme/vm", "--to", "x"]).failed(1, "keys");
    mode(0o600);
    silo(["keys", "create", &rig.path("keys")]).failed(1, "could not make");
    silo(["keys", "create", &rig.path("other"), "--id", "2"]).good();
    let other = rig.path("other");
    rig.silo(&["restore", "acme/vm", "--keys", &other, "--to", "x"]).failed(1, "key \"1\" is lost");

    let rotate = ["keys", "rotate", &rig.path("keys"), "--id", "2027", "--tenant", "acme"];
    assert_eq!(rig.silo(&rotate).good().json()["wrapped"], 1);
    let listed = silo(["--json", "keys", "list", &rig.path("keys")]).good().json();
    assert_eq!(listed["ids"], serde_json::json!(["2027", "1"]));
    assert!(rig.restored("acme/vm", None) == content);
    assert_eq!(fs::metadata(rig.at("keys")).unwrap().permissions().mode() & 0o777, 0o600);
    // Keys by the environment, as one line.
    let keys = fs::read_to_string(rig.at("keys")).unwrap().replace('\n', ";");
    let to = rig.path("by-env");
    let mut command = command(["restore", "acme/vm", "--store", &rig.url(), "--to", &to]);
    Said::from(command.env("SILO_KEYS", keys).output().unwrap()).good();
    assert!(fs::read(&to).unwrap() == content);
}

#[test]
fn prune_says_what_would_go_and_deletes_nothing_until_it_is_told_to() {
    let rig = Rig::new();
    let numbers: Vec<u64> = (0..4)
        .map(|seed| {
            rig.image(seed, 256 << 10);
            rig.back_up()
        })
        .collect();
    let before = walk(&rig.at("store"));
    let said = rig.silo(&["prune", "acme/vm", "--keep-last", "2"]).good().json();
    assert_eq!(said["dry_run"], true);
    assert_eq!(said["deleted"], serde_json::json!([numbers[1], numbers[0]]));
    assert_eq!(walk(&rig.at("store")), before);
    rig.silo(&["prune", "acme/vm"]).failed(1, "no rule says what stays");
    let said = rig.silo(&["prune", "acme/vm", "--keep-last", "2", "--delete"]).good().json();
    assert_eq!(said["kept"], 2);
    let listed = rig.silo(&["generations", "acme/vm"]).good().json();
    assert_eq!(listed["generations"].as_array().unwrap().len(), 2);

    // Collecting says what it would condemn, condemns, and deletes at the next run.
    let would = rig.silo(&["collect", "--grace", "0s", "--dry-run"]).good().json();
    assert!(would["condemned"]["objects"].as_array().unwrap().len() >= 2, "{would}");
    let packs = walk(&rig.at("store").join("packs")).len();
    rig.silo(&["collect", "--grace", "0s"]).good();
    assert_eq!(walk(&rig.at("store").join("packs")).len(), packs);
    let swept = rig.silo(&["collect", "--grace", "0s"]).good().json();
    assert!(swept["deleted"]["objects"].as_array().unwrap().len() >= 2, "{swept}");
    assert!(walk(&rig.at("store").join("packs")).len() < packs);
    rig.silo(&["verify", "--depth", "full"]).good();
    rig.restored("acme/vm", None);
}

#[test]
fn verify_finds_a_corrupted_and_a_missing_pack_and_says_what_depends_on_it() {
    let rig = Rig::new();
    rig.image(3, MIB);
    let number = rig.back_up();
    for depth in ["quick", "full", "scrub"] {
        rig.silo(&["verify", "--depth", depth]).good();
    }
    let pack = walk(&rig.at("store").join("packs")).remove(0);
    let good = fs::read(&pack).unwrap();
    let mut bad = good.clone();
    let middle = bad.len() / 2;
    bad[middle] ^= 1;
    fs::write(&pack, &bad).unwrap();
    for depth in ["full", "scrub"] {
        let said = rig.silo(&["verify", "--depth", depth]);
        assert_eq!(said.code, 3, "{depth}: {said:?}");
        let name = pack.file_name().unwrap().to_str().unwrap();
        let object = said.json()["problems"][0]["object"].as_str().unwrap().to_owned();
        assert!(object.ends_with(name), "{object}");
    }
    let said = rig.silo(&["verify", "acme/vm", "--depth", "full"]);
    assert_eq!(said.json()["problems"][0]["affects"][0], format!("acme/vm {number}"));
    let to = rig.path("restored");
    rig.silo(&["restore", "acme/vm", "--to", &to]).failed(1, "the unfinished file was removed");
    assert!(!rig.at("restored").exists());
    fs::remove_file(&pack).unwrap();
    let said = rig.silo(&["verify", "--depth", "quick"]);
    assert!(said.code == 3 && said.out.contains("missing"), "{said:?}");
}

#[test]
fn a_fork_goes_its_own_way_without_a_copy() {
    let rig = Rig::new();
    let base = rig.image(4, MIB);
    rig.back_up();
    let packs = walk(&rig.at("store").join("packs")).len();
    rig.silo(&["fork", "acme/vm", "acme/mine"]).good();
    assert_eq!(walk(&rig.at("store").join("packs")).len(), packs);
    rig.silo(&["fork", "acme/vm", "acme/mine"]).failed(1, "exists already");
    assert!(rig.restored("acme/mine", None) == base);
    let other = rig.image(5, MIB);
    rig.back_up();
    assert!(rig.restored("acme/mine", None) == base);
    assert!(rig.restored("acme/vm", None) == other);
}

/// Waits until the figure of a metric is at least this.
fn wait_for(address: &str, metric: &str, least: f64) {
    let deadline = Instant::now() + common::LIMIT;
    loop {
        let (_, text) = http(address, "GET", "/metrics");
        let value = text.lines().find_map(|line| line.strip_prefix(metric)?.trim().parse().ok());
        if value.is_some_and(|value: f64| value >= least) {
            return;
        }
        assert!(Instant::now() < deadline, "{metric} does not reach {least}:\n{text}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

const GENERATIONS: &str = "silo_backup_generations_total{line=\"acme/vm\"}";

fn sync(rig: &Rig, socket: &str) -> Running {
    let (image, socket) = (rig.path("image"), rig.path(socket));
    let what = ["sync", "--line", "acme/vm", "--file", &image, "--socket", &socket];
    let how = ["--max-age", "200ms", "--metrics", "127.0.0.1:0"];
    Running::of(&mut rig.command(&[&what[..], &how].concat()))
}

#[test]
fn after_kill_9_of_a_continuous_backup_the_newest_generation_is_one_moment_of_the_device() {
    let rig = Rig::new();
    let size = 2 * MIB;
    fs::write(rig.at("image"), vec![0; size]).unwrap();
    let running = sync(&rig, "s");
    let metrics = running.ready["metrics"].as_str().unwrap().to_owned();
    let (mut client, _) = Client::go(&rig.at("s")).unwrap();
    // Every block of the device gets the number of the turn, in order; so at any moment the numbers
    // never grow along the device, and differ by at most one.
    let block = 64 << 10;
    let mut turn = 0_u8;
    let deadline = Instant::now() + common::LIMIT;
    while turn < 3 || !has_generations(&metrics, 4.0) {
        assert!(Instant::now() < deadline, "no generations");
        turn = turn.checked_add(1).unwrap_or(1);
        for at in (0..size).step_by(block) {
            assert_eq!(client.write(at as u64, &vec![turn; block], 0).unwrap(), 0);
        }
        assert_eq!(client.call(FLUSH, 0, 0, 0).unwrap(), 0);
    }
    running.signal(Signal::SIGKILL);
    assert_eq!(running.wait().code, 128 + 9);

    rig.silo(&["verify", "--depth", "full"]).good();
    let restored = rig.restored("acme/vm", None);
    let turns: Vec<u8> = restored.chunks(block).map(|chunk| chunk[0]).collect();
    assert!(restored.chunks(block).all(|chunk| chunk.iter().all(|byte| *byte == chunk[0])), "torn");
    let (first, last) = (turns[0], *turns.last().unwrap());
    let change = turns.iter().position(|turn| *turn != first).unwrap_or(turns.len());
    assert!(turns[change..].iter().all(|turn| *turn == last), "not one moment: {turns:?}");
    assert!(
        first == last || first == last.wrapping_add(1) || (first, last) == (1, 255),
        "{turns:?}"
    );
}

fn has_generations(address: &str, least: f64) -> bool {
    let (_, text) = http(address, "GET", "/metrics");
    let value = text.lines().find_map(|line| line.strip_prefix(GENERATIONS)?.trim().parse().ok());
    value.is_some_and(|value: f64| value >= least)
}

#[test]
fn a_second_writer_of_a_line_fences_the_first_which_ends_with_the_reason() {
    let rig = Rig::new();
    let content = rig.image(6, MIB);
    let running = sync(&rig, "s");
    let metrics = running.ready["metrics"].as_str().unwrap().to_owned();
    wait_for(&metrics, GENERATIONS, 1.0);
    // Another host takes the line over.
    let copy = rig.path("copy");
    fs::write(&copy, &content).unwrap();
    let said = rig.silo(&["sync", "--once", "--line", "acme/vm", "--file", &copy]).good().json();
    let (mut client, _) = Client::go(&rig.at("s")).unwrap();
    assert_eq!(client.write(0, &[1; 4096], 0).unwrap(), 0);
    let ended = running.wait().failed(1, "taken over by another writer");
    assert!(ended.err.contains("acme/vm"), "{ended:?}");
    let listed = rig.silo(&["generations", "acme/vm"]).good().json();
    assert_eq!(listed["generations"][0]["number"], said["number"]);
    assert!(rig.restored("acme/vm", None) == content);
}

#[test]
fn an_orderly_end_stores_what_was_written_last_and_a_lazy_restore_serves_it_at_once() {
    let rig = Rig::new();
    let mut content = rig.image(7, MIB);
    let running = sync(&rig, "s");
    let (mut client, _) = Client::go(&rig.at("s")).unwrap();
    assert_eq!(client.write(5000, &vec![3; 50_000], 0).unwrap(), 0);
    drop(client);
    running.stop().good();
    content[5000..55_000].fill(3);
    assert!(rig.restored("acme/vm", None) == content);

    let socket = rig.path("lazy");
    let lazy = ["restore", "acme/vm", "--lazy", "--socket", &socket];
    let running = Running::of(&mut rig.command(&lazy));
    let (mut client, size) = Client::go(&rig.at("lazy")).unwrap();
    assert_eq!(size, MIB as u64);
    assert_eq!(client.write(0, &[1; 512], 0).unwrap(), 1);
    assert!(client.read(0, MIB as u32).unwrap() == content);
    drop(client);
    running.stop().good();

    let layer = rig.path("layer");
    let lazy = [&lazy[..], &["--layer", &layer]].concat();
    let running = Running::of(&mut rig.command(&lazy));
    let (mut client, _) = Client::go(&rig.at("lazy")).unwrap();
    assert_eq!(client.write(100, &[8; 9000], 0).unwrap(), 0);
    assert_eq!(client.call(FLUSH, 0, 0, 0).unwrap(), 0);
    running.signal(Signal::SIGKILL);
    running.wait();
    let running = Running::of(&mut rig.command(&lazy));
    let (mut client, _) = Client::go(&rig.at("lazy")).unwrap();
    content[100..9100].fill(8);
    assert!(client.read(0, MIB as u32).unwrap() == content);
    drop(client);
    running.stop().good();
}

#[test]
fn layers_of_a_group_are_backed_up_by_config_at_one_moment_and_secrets_come_from_files() {
    let rig = Rig::new();
    let base = rig.image(8, MIB);
    let config = rig.path("silo.toml");
    fs::write(
        &config,
        format!(
            "[device.root]\nsource = {{ file = {{ path = \"image\" }} }}\noverlays = [\"layer\"]\n\
             create-overlays = true\nexpose = {{ nbd = {{ unix = \"root.sock\" }} }}\n\
             [device.log]\nsize = \"1M\"\nsource = \"memory\"\nexpose = {{ nbd = {{ unix = \"log.sock\" }} }}\n\
             [group.vm]\ndevices = [\"root\"]\n[group.rest]\ndevices = [\"log\"]\n\
             [backup]\ngroup = \"vm\"\ntenant = \"acme\"\nkeys = {{ file = \"keys\" }}\nmax-age = \"200ms\"\n\
             store = {{ url = \"{}\" }}\nretention = {{ last = 1 }}\n\
             [metrics]\nlisten = \"127.0.0.1:0\"\n",
            rig.url()
        ),
    )
    .unwrap();
    let running = Running::start(["sync", "--config", &config]);
    let metrics = running.ready["metrics"].as_str().unwrap().to_owned();
    wait_for(&metrics, GENERATIONS, 1.0);
    let (mut client, _) = Client::go(&rig.at("root.sock")).unwrap();
    assert_eq!(client.write(4096, &[1; 4096], 0).unwrap(), 0);
    wait_for(&metrics, GENERATIONS, 2.0);
    drop(client);
    running.stop().good();
    let mut wanted = base;
    wanted[4096..8192].fill(1);
    let to = rig.path("restored");
    let restore = ["restore", "acme/vm", "--backup-config", &config, "--to", &to];
    silo(restore).good();
    assert!(fs::read(&to).unwrap() == wanted);
    let pruned = silo(["--json", "prune", "--backup-config", &config, "--delete"]).good().json();
    assert_eq!(pruned["kept"], 1);
}
