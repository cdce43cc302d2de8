//! Moves by the command whose blocks come from elsewhere too: a store, other hosts, a file of the
//! destination; and the recorded order of first use.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use common::{
    Client, FLUSH,
    silo::{Running, command, silo},
};
use silo_testing::{Fault, Rule, S3Server};
use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
};

const SIZE: usize = 8 << 20;

fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut content = vec![0; bytes];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut content);
    content
}

fn free_address() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

/// Two hosts with certificates of one authority, and a third.
struct Rig {
    dir: tempfile::TempDir,
    address: String,
}

impl Rig {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tls = dir.path().join("tls");
        let tls = tls.to_str().unwrap();
        silo(["tls", "init", tls]).good();
        for name in ["source", "destination", "third", "fourth"] {
            silo(["tls", "issue", tls, name]).good();
        }
        Self { dir, address: free_address() }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn path(&self, name: &str) -> String {
        self.at(name).to_str().unwrap().to_owned()
    }

    /// A config of one end; `migrate` goes into that table, `more` behind it.
    fn config(&self, end: &str, migrate: &str, more: &str) -> String {
        let file = self.at(&format!("{end}.toml"));
        let (way, peer) = match end {
            "source" => (format!("listen = \"{}\"", self.address), "destination"),
            _ => (format!("peer = \"{}\"", self.address), "source"),
        };
        fs::write(
            &file,
            format!(
                "[device.disk]\nsize = {SIZE}\n\
                 source = {{ file = {{ path = \"{end}.raw\", create = true }} }}\n\
                 expose = {{ nbd = {{ unix = \"{end}.nbd\" }} }}\n\
                 [identity]\ndir = \"tls\"\nname = \"{end}\"\n\
                 [migrate]\n{way}\npeer-name = \"{peer}\"\nnote = \"{end}.note\"\n{migrate}\n{more}"
            ),
        )
        .unwrap();
        file.to_str().unwrap().to_owned()
    }
}

fn last_json(text: &str) -> serde_json::Value {
    serde_json::from_str(text.lines().last().unwrap()).unwrap()
}

fn write(socket: &Path, at: usize, data: &[u8]) {
    let (mut client, _) = Client::go(socket).unwrap();
    assert_eq!(client.write(at as u64, data, 0).unwrap(), 0);
    assert_eq!(client.call(FLUSH, 0, 0, 0).unwrap(), 0);
}

#[test]
fn what_the_store_has_comes_from_there_also_while_it_fails_and_both_ends_say_so() {
    for trouble in [None, Some(Fault::Status(503)), Some(Fault::WrongBytes)] {
        let rig = Rig::new();
        let server = S3Server::start(rig.dir.path()).unwrap();
        let (url, keys) = (server.url("backups"), rig.path("keys"));
        silo(["keys", "create", &keys]).good();
        let mut wanted = noise(1, SIZE);
        fs::write(rig.at("source.raw"), &wanted).unwrap();
        let sync = ["sync", "--once", "--line", "acme/vm", "--store", &url, "--keys", &keys];
        let mut once = command(sync);
        once.args(["--file", &rig.path("source.raw")]).envs(server.credentials());
        // A device by flags is called "disk".
        assert!(once.output().unwrap().status.success());
        let assist = format!(
            "[migrate.assist]\nline = \"acme/vm\"\nkeys = {{ file = \"keys\" }}\n\
             store = {{ url = \"{url}\" }}\n"
        );
        let source = rig.config("source", "bandwidth = \"2M\"\nin-flight = \"1M\"", &assist);
        let mut source = command(["--json", "serve", "--config", &source]);
        let source = Running::of(source.envs(server.credentials()));
        // Not in the store.
        write(&rig.at("source.nbd"), 3 << 20, &vec![5; 100_000]);
        wanted[3 << 20..(3 << 20) + 100_000].fill(5);
        if let Some(fault) = &trouble {
            let rule = Rule { skip: 4, times: 6, ..Rule::next("GET", "packs", fault.clone()) };
            server.faults().add(rule);
        }
        let destination = rig.config("destination", "", &assist);
        let mut destination = command(["--json", "connect", "--config", &destination]);
        let destination = Running::of(destination.envs(server.credentials()));
        destination.next();
        let report = destination.next();
        assert_eq!(report["complete"], true);
        let given = last_json(&source.wait().good().out);
        let from = |what: &str| report["blocks"][what].as_u64().unwrap();
        assert!(from("from_store") > 500, "{report}");
        assert!(from("from_source") >= 25, "{report}");
        assert!(given["spared"].as_u64().unwrap() > 500, "{given}");
        assert!(given["wire_bytes"].as_u64().unwrap() < SIZE as u64 * 3 / 4, "{given}");
        assert!(report["places"][0]["name"].as_str().unwrap().starts_with("store s3://"));
        destination.stop().good();
        assert!(fs::read(rig.at("destination.raw")).unwrap() == wanted, "{trouble:?}");
    }
}

#[test]
fn by_flags_the_source_may_go_while_the_store_still_brings_the_rest() {
    let rig = Rig::new();
    let server = S3Server::start(rig.dir.path()).unwrap();
    let (url, keys) = (server.url("backups"), rig.path("keys"));
    silo(["keys", "create", &keys]).good();
    let content = noise(2, SIZE);
    fs::write(rig.at("source.raw"), &content).unwrap();
    let (source, there) = (rig.path("source.raw"), rig.path("there.raw"));
    let beside = ["--assist", "acme/vm", "--assist-store", &url, "--assist-keys", &keys];
    let sync = ["sync", "--once", "--line", "acme/vm", "--store", &url, "--keys", &keys];
    assert!(
        command(sync)
            .args(["--file", &source])
            .envs(server.credentials())
            .status()
            .unwrap()
            .success()
    );
    let (socket, address) = (rig.path("s"), rig.address.clone());
    let mut serve = command(["--json", "serve", "--file", &source, "--socket", &socket]);
    serve.args(["--plaintext", "--move-listen", &address]).args(beside);
    let source = Running::of(serve.envs(server.credentials()));
    let mut connect = command(["--json", "connect", &address, "--file", &there, "--create"]);
    connect.args(["--size", "8M", "--plaintext", "--once", "--early-release"]).args(beside);
    let destination = Running::of(connect.envs(server.credentials()));
    let said = destination.wait().good();
    assert_eq!(last_json(&said.out)["complete"], true, "{said:?}");
    source.wait().good();
    assert!(fs::read(rig.at("there.raw")).unwrap() == content);
    let mut missing = command(["connect", &address, "--memory", "1M", "--plaintext"]);
    let said = missing.args(["--assist", "acme/vm"]).env_remove("SILO_STORE").output().unwrap();
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(said.contains("add --assist-store"), "{said}");
}

#[test]
fn an_image_that_others_have_goes_by_hash_and_comes_from_several_hosts() {
    let rig = Rig::new();
    let image = noise(3, SIZE);
    let mut wanted = image.clone();
    fs::write(rig.at("image.raw"), &image).unwrap();
    fs::write(rig.at("source.raw"), &image).unwrap();
    // Each of two hosts has half of it, and answers under TLS.
    fs::write(rig.at("half-a.raw"), &image[..SIZE / 2]).unwrap();
    fs::write(rig.at("half-b.raw"), &image[SIZE / 2..]).unwrap();
    let mut peers = Vec::new();
    let mut named = Vec::new();
    for (name, half) in [("third", "half-a.raw"), ("fourth", "half-b.raw")] {
        let (address, file) = (free_address(), rig.at(&format!("{name}.toml")));
        let text = format!(
            "[device.idle]\nsize = \"1M\"\nsource = \"memory\"\n\
             expose = {{ nbd = {{ unix = \"{name}.nbd\" }} }}\n\
             [identity]\ndir = \"tls\"\nname = \"{name}\"\n\
             [migrate]\nknown = {{ idle = \"{half}\" }}\n\
             share = {{ listen = \"{address}\", hosts = [\"destination\"] }}\n"
        );
        fs::write(&file, text).unwrap();
        peers.push(Running::start(["serve", "--config", file.to_str().unwrap()]));
        named.push(format!("{{ address = \"{address}\", name = \"{name}\" }}"));
    }
    let source = rig.config("source", "known = { disk = \"image.raw\" }", "");
    let source = Running::start(["serve", "--config", &source]);
    write(&rig.at("source.nbd"), 1 << 20, &[9; 4096]);
    wanted[1 << 20..(1 << 20) + 4096].fill(9);
    let peers_key = format!("peers = [{}]", named.join(", "));
    let destination = rig.config("destination", &peers_key, "");
    let destination = Running::start(["connect", "--config", &destination]);
    destination.next();
    let report = destination.next();
    let given = last_json(&source.wait().good().out);
    assert_eq!(given["blocks"]["held"].as_u64().unwrap(), SIZE as u64 / 4096 - 1, "{given}");
    assert!(given["wire_bytes"].as_u64().unwrap() < SIZE as u64 / 4, "{given}");
    for place in report["places"].as_array().unwrap() {
        assert!(place["fetched"].as_u64().unwrap() >= SIZE as u64 / 8192 - 1, "{report}");
    }
    destination.stop().good();
    peers.into_iter().for_each(|peer| drop(peer.stop().good()));
    assert!(fs::read(rig.at("destination.raw")).unwrap() == wanted);
}

#[test]
fn the_order_of_first_use_is_recorded_kept_and_shipped() {
    let rig = Rig::new();
    let content = noise(4, SIZE);
    fs::write(rig.at("source.raw"), &content).unwrap();
    let migrate = "first-touch = \"touches\"\nbandwidth = \"4M\"\nin-flight = \"1M\"";
    let source = Running::start(["serve", "--config", &rig.config("source", migrate, "")]);
    {
        // What a start would touch, from the end of the device.
        let (mut client, _) = Client::go(&rig.at("source.nbd")).unwrap();
        for block in [2000, 1999, 700, 1500] {
            client.read(block * 4096, 4096).unwrap();
        }
    }
    source.stop().good();
    let kept = fs::read(rig.at("touches/disk.touch")).unwrap();
    let kept = silo_block::order::touch::Manifest::decode(&kept).unwrap();
    let order: Vec<u64> = kept.order.iter().map(|range| range.start.0).collect();
    assert_eq!(order, [2000, 1999, 700, 1500]);
    // A later process ships what was kept.
    let source = Running::start(["serve", "--config", &rig.config("source", migrate, "")]);
    let destination = Running::start(["connect", "--config", &rig.config("destination", "", "")]);
    destination.next();
    assert_eq!(destination.next()["complete"], true);
    let given = last_json(&source.wait().good().out);
    assert_eq!(given["sent"]["prefetch"], 4, "{given}");
    destination.stop().good();
    assert!(fs::read(rig.at("destination.raw")).unwrap() == content);
    // Of another device it is refused.
    let file = rig.config("source", migrate, "").replace("source.toml", "other.toml");
    let text = fs::read_to_string(rig.at("source.toml")).unwrap();
    fs::write(&file, text.replace("source.raw", "other.raw").replace(&SIZE.to_string(), "4096000"))
        .unwrap();
    fs::remove_file(rig.at("source.note")).unwrap();
    silo(["serve", "--config", &file]).failed(1, "are of a device of 2048 blocks, this has 1000");
}
