//! `silo serve` gives devices to `silo connect`, as processes, while a client writes.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use common::{
    Client, FLUSH,
    silo::{Running, http, silo},
};
use nix::sys::signal::Signal;
use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

const SIZE: usize = 8 << 20;
/// ESHUTDOWN, as the protocol counts.
const SHUTDOWN: u32 = 108;

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
        for name in ["source", "destination", "stranger"] {
            silo(["tls", "issue", tls, name]).good();
        }
        // A port that nobody has now; the source takes it in a moment.
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        Self { dir, address }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A config of two devices for one end of a move.
    fn config(&self, end: &str, peer: &str) -> String {
        let file = self.at(&format!("{end}.toml"));
        let address = &self.address;
        let way = if end == "source" { "listen" } else { "peer" };
        fs::write(
            &file,
            format!(
                "[device.memory]\nsize = \"{SIZE}\"\nsource = \"memory\"\n\
                 expose = {{ nbd = {{ unix = \"{end}-memory\" }} }}\n\
                 [device.disk]\nsize = {}\nblock-size = \"64K\"\n\
                 source = {{ file = {{ path = \"{end}.raw\", create = true }} }}\n\
                 expose = {{ nbd = {{ unix = \"{end}-disk\" }} }}\n\
                 [identity]\ndir = \"tls\"\nname = \"{end}\"\n\
                 [migrate]\n{way} = \"{address}\"\npeer-name = \"{peer}\"\nnote = \"{end}.note\"\n\
                 [metrics]\nlisten = \"127.0.0.1:0\"\n",
                SIZE + 1234
            ),
        )
        .unwrap();
        file.to_str().unwrap().to_owned()
    }
}

fn fill(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed | 1;
    (0..bytes)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

fn read_all(path: &Path, size: usize) -> Vec<u8> {
    let (mut client, found) = Client::go(path).unwrap();
    assert_eq!(found, size as u64);
    (0..size)
        .step_by(1 << 20)
        .flat_map(|at| client.read(at as u64, (size - at).min(1 << 20) as u32).unwrap())
        .collect()
}

/// A client that writes until it is told that the device has left; what it was promised.
fn writer(
    path: PathBuf,
    mut content: Vec<u8>,
    stop: Arc<AtomicBool>,
) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let (mut client, _) = Client::go(&path).unwrap();
        let mut turn = 0_u64;
        while !stop.load(Ordering::Relaxed) {
            turn += 1;
            let at = (turn.wrapping_mul(7_919) * 4_096) as usize % (content.len() - 10_000);
            let data = vec![turn as u8; 1 + (turn as usize * 37) % 9_000];
            match client.write(at as u64, &data, 0) {
                Ok(0) => content[at..at + data.len()].copy_from_slice(&data),
                // It has left, or the source has ended: this write was not promised.
                Ok(SHUTDOWN) | Err(_) => break,
                Ok(error) => panic!("error {error}"),
            }
        }
        content
    })
}

#[test]
fn a_group_moves_under_mutual_tls_while_clients_write_and_every_answered_write_is_there() {
    let rig = Rig::new();
    let source = Running::start(["serve", "--config", &rig.config("source", "destination")]);
    let (memory, disk) = (fill(1, SIZE), fill(2, SIZE + 1234));
    for (name, content) in [("source-memory", &memory), ("source-disk", &disk)] {
        let (mut client, _) = Client::go(&rig.at(name)).unwrap();
        for (at, part) in content.chunks(1 << 20).enumerate() {
            assert_eq!(client.write((at as u64) << 20, part, 0).unwrap(), 0);
        }
        assert_eq!(client.call(FLUSH, 0, 0, 0).unwrap(), 0);
    }
    let stop = Arc::new(AtomicBool::new(false));
    let writers = [
        writer(rig.at("source-memory"), memory, stop.clone()),
        writer(rig.at("source-disk"), disk, stop.clone()),
    ];
    let destination = Running::start(["connect", "--config", &rig.config("destination", "source")]);
    let served = destination.next();
    assert_eq!(served["devices"].as_array().unwrap().len(), 2);
    let [memory, disk] = writers.map(|writer| writer.join().unwrap());
    // Served at once, complete or not.
    assert!(read_all(&rig.at("destination-memory"), SIZE) == memory, "memory differs");
    assert!(read_all(&rig.at("destination-disk"), SIZE + 1234) == disk, "disk differs");
    assert_eq!(destination.next()["complete"], true);

    let metrics = served["metrics"].as_str().unwrap();
    let (_, text) = http(metrics, "GET", "/metrics");
    assert!(text.contains("silo_device_read_bytes_total{device=\"disk\"}"), "{text}");

    let said = source.wait().good();
    let report: serde_json::Value = serde_json::from_str(said.out.lines().last().unwrap()).unwrap();
    assert_eq!(report["moved"], true);
    assert!(report["bytes"].as_u64() > Some(2 * SIZE as u64), "{report}");
    // Whoever starts the source again does not get a second life of the devices.
    silo(["serve", "--config", rig.at("source.toml").to_str().unwrap()])
        .failed(1, "they were given away by session");

    let (mut client, _) = Client::go(&rig.at("destination-disk")).unwrap();
    assert_eq!(client.write(0, &[0x77; 4096], 0).unwrap(), 0);
    drop(client);
    destination.stop().good();
    silo(["connect", "--config", rig.at("destination.toml").to_str().unwrap()])
        .failed(1, "they are this host's already; run silo serve");
    let mut wanted = disk;
    wanted[..4096].fill(0x77);
    assert!(fs::read(rig.at("destination.raw")).unwrap() == wanted);
}

#[test]
fn another_name_in_the_certificate_gets_nothing_and_the_source_goes_on() {
    let rig = Rig::new();
    let source = Running::start(["serve", "--config", &rig.config("source", "destination")]);
    let stranger = rig.config("stranger", "source");
    let mut waiting = common::silo::command(["--json", "connect", "--config", &stranger]);
    let stranger = Running::of(&mut waiting);
    // Long enough for the first attempts to be refused.
    thread::sleep(Duration::from_millis(1500));
    let (mut client, _) = Client::go(&rig.at("source-memory")).unwrap();
    assert_eq!(client.write(0, &[1; 4096], 0).unwrap(), 0);
    assert!(!rig.at("stranger-memory").exists());
    stranger.stop().good();
    drop(client);
    source.stop().good();
}

#[test]
fn a_destination_that_dies_in_the_middle_leaves_the_source_in_use_and_a_second_one_gets_all() {
    let rig = Rig::new();
    let text = fs::read_to_string(rig.config("source", "destination")).unwrap();
    // Slow enough to be caught in the middle.
    fs::write(rig.at("source.toml"), text.replace("[metrics]", "bandwidth = \"4M\"\n[metrics]"))
        .unwrap();
    let config = rig.at("source.toml").to_str().unwrap().to_owned();
    let source = Running::start(["serve", "--config", &config]);
    let content = fill(3, SIZE);
    let (mut client, _) = Client::go(&rig.at("source-memory")).unwrap();
    for (at, part) in content.chunks(1 << 20).enumerate() {
        assert_eq!(client.write((at as u64) << 20, part, 0).unwrap(), 0);
    }
    let first = Running::start(["connect", "--config", &rig.config("destination", "source")]);
    let metrics = source.ready["metrics"].as_str().unwrap();
    let deadline = Instant::now() + common::LIMIT;
    while !http(metrics, "GET", "/metrics").1.contains("silo_move_phase{end=\"source\"} 1") {
        assert!(Instant::now() < deadline, "the move does not begin");
        thread::sleep(Duration::from_millis(10));
    }
    first.signal(Signal::SIGKILL);
    first.wait();
    assert_eq!(client.write(0, &[9; 8192], 0).unwrap(), 0);
    let mut wanted = content;
    wanted[..8192].fill(9);

    for name in ["destination.raw", "destination.note"] {
        let _ = fs::remove_file(rig.at(name));
    }
    let config = rig.at("destination.toml");
    let second = Running::start(["connect", "--config", config.to_str().unwrap()]);
    second.next();
    assert!(read_all(&rig.at("destination-memory"), SIZE) == wanted);
    assert_eq!(second.next()["complete"], true);
    source.wait().good();
    assert!(read_all(&rig.at("destination-memory"), SIZE) == wanted);
    second.stop().good();
}

#[test]
fn one_device_moves_by_flags_and_devices_that_do_not_fit_are_refused_with_the_reason() {
    let rig = Rig::new();
    let (address, socket) = (rig.address.clone(), rig.at("s"));
    let socket = socket.to_str().unwrap();
    let flags =
        ["serve", "--memory", "1M", "--socket", socket, "--plaintext", "--move-listen", &address];
    let source = Running::start(flags);
    let (mut client, _) = Client::go(&rig.at("s")).unwrap();
    assert_eq!(client.write(5000, &vec![4; 100_000], 0).unwrap(), 0);
    silo(["connect", &address, "--memory", "2M", "--plaintext"])
        .failed(1, "has 1048576 bytes in blocks of 4096 at the source, 2097152");
    assert_eq!(client.write(0, &[5; 512], 0).unwrap(), 0);
    drop(client);
    let there = rig.at("there");
    let there = there.to_str().unwrap();
    let flags = ["connect", &address, "--memory", "1M", "--plaintext", "--socket", there];
    let destination = Running::start(flags);
    destination.next();
    let mut wanted = vec![0; 1 << 20];
    wanted[5000..105_000].fill(4);
    wanted[..512].fill(5);
    assert!(read_all(&rig.at("there"), 1 << 20) == wanted);
    source.wait().good();
    destination.stop().good();

    // A device that stays when its process has ended is noted beside it: whatever command asks.
    let (file, there) = (rig.at("left.raw"), rig.at("came.raw"));
    fs::write(&file, fill(8, 1 << 20)).unwrap();
    let (file, there) = (file.to_str().unwrap(), there.to_str().unwrap());
    let flags =
        ["serve", "--file", file, "--socket", socket, "--plaintext", "--move-listen", &address];
    let source = Running::start(flags);
    let flags = ["connect", &address, "--file", there, "--create", "--size", "1M", "--plaintext"];
    silo([&flags[..], &["--once"]].concat()).good();
    source.wait().good();
    assert!(fs::read(there).unwrap() == fs::read(file).unwrap());
    for command in [
        &["serve", "--socket", socket][..],
        &["expose", "nbd", "--socket", socket],
        &["mount", "--socket", socket],
    ] {
        silo([command, &["--file", file]].concat()).failed(1, "they run elsewhere");
    }
    silo(["connect", &address, "--file", there, "--plaintext"]).failed(1, "run silo serve");
    Running::start(["serve", "--file", there, "--socket", socket]).stop().good();
    silo(["connect", "--memory", "1M", "--plaintext"]).failed(1, "where is the source?");
    silo(["connect", "x:1", "--memory", "1M"]).failed(2, "moving needs TLS");
}
