//! Moves by the command whose processes are killed in the middle: the same command goes on.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use ::silo::moving::ledger::{FileLedger, Ledger};
use common::{
    Client, FLUSH,
    silo::{Running, silo},
};
use nix::sys::signal::Signal;
use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

const SIZE: usize = 6 << 20;

struct Rig {
    dir: tempfile::TempDir,
    address: String,
    content: Vec<u8>,
}

impl Rig {
    /// A source with a disk of noise.
    fn new(seed: u64) -> Self {
        Self::within(&std::env::temp_dir(), seed)
    }

    fn within(parent: &Path, seed: u64) -> Self {
        let dir = tempfile::tempdir_in(parent).unwrap();
        let tls = dir.path().join("tls");
        let tls = tls.to_str().unwrap();
        silo(["tls", "init", tls]).good();
        for name in ["source", "destination"] {
            silo(["tls", "issue", tls, name]).good();
        }
        // A port that nobody has now; the source takes it in a moment.
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let mut content = vec![0; SIZE];
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes()).finalize_xof().fill(&mut content);
        fs::write(dir.path().join("source.raw"), &content).unwrap();
        Self { dir, address, content }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn config(&self, end: &str, more: &str) -> String {
        let file = self.at(&format!("{end}.toml"));
        let (way, peer) =
            if end == "source" { ("listen", "destination") } else { ("peer", "source") };
        fs::write(
            &file,
            format!(
                "[device.disk]\nsize = {SIZE}\n\
                 source = {{ file = {{ path = \"{end}.raw\", create = true }} }}\n\
                 expose = {{ nbd = {{ unix = \"{end}.nbd\" }} }}\n\
                 [identity]\ndir = \"tls\"\nname = \"{end}\"\n\
                 [migrate]\n{way} = \"{}\"\npeer-name = \"{peer}\"\nnote = \"{end}.note\"\n{more}\
                 [metrics]\nlisten = \"127.0.0.1:0\"\n",
                self.address
            ),
        )
        .unwrap();
        file.to_str().unwrap().to_owned()
    }

    fn source(&self, more: &str) -> Running {
        Running::start(["serve", "--config", &self.config("source", more)])
    }

    fn destination(&self) -> Running {
        Running::start(["connect", "--config", &self.config("destination", "")])
    }
}

/// Hands over at once, and sends so slowly that nearly everything is still to come.
const EARLY: &str = "bandwidth = \"1M\"\npre-copy = \"0s\"\nin-flight = \"1M\"\n";

fn read_all(path: &Path) -> Vec<u8> {
    let (mut client, size) = Client::go(path).unwrap();
    assert_eq!(size, SIZE as u64);
    let step = 1 << 20;
    (0..SIZE).step_by(step).flat_map(|at| client.read(at as u64, step as u32).unwrap()).collect()
}

fn kill(process: Running) {
    process.signal(Signal::SIGKILL);
    process.wait();
}

fn last_json(text: &str) -> serde_json::Value {
    serde_json::from_str(text.lines().last().unwrap()).unwrap()
}

#[test]
fn a_destination_killed_after_the_devices_changed_hands_goes_on_with_the_same_command() {
    // Memory of the host survives the process as a file does.
    let memory = Path::new("/dev/shm");
    for (source_too, parent) in
        [(false, &*std::env::temp_dir()), (true, &*std::env::temp_dir()), (true, memory)]
    {
        let rig = Rig::within(parent, 1);
        let mut source = rig.source(EARLY);
        let destination = rig.destination();
        destination.next();
        let mut wanted = rig.content.clone();
        {
            // Written there before it has come: whole blocks, part of one, and at the very end.
            let (mut client, _) = Client::go(&rig.at("destination.nbd")).unwrap();
            for (at, length, byte) in
                [(5 << 20, 8192, 1), ((4 << 20) + 100, 50, 2), (SIZE - 4096, 4096, 3)]
            {
                assert_eq!(client.write(at as u64, &vec![byte; length], 0).unwrap(), 0);
                wanted[at..at + length].fill(byte);
            }
            assert_eq!(client.call(FLUSH, 0, 0, 0).unwrap(), 0);
        }
        kill(destination);
        silo(["serve", "--config", rig.at("destination.toml").to_str().unwrap()])
            .failed(1, "have not come; silo connect goes on with the move");
        if source_too {
            kill(source);
            source = rig.source(EARLY);
            assert!(source.ready["leaving"].is_string(), "{}", source.ready);
            assert!(!rig.at("source.nbd").exists() || Client::go(&rig.at("source.nbd")).is_err());
        }
        let destination = rig.destination();
        let served = destination.next();
        assert_eq!(served["devices"][0]["device"], "disk", "{served}");
        assert!(read_all(&rig.at("destination.nbd")) == wanted, "the disk differs");
        let report = destination.next();
        assert_eq!(report["complete"], true, "{report}");
        let said = source.wait().good();
        assert_eq!(last_json(&said.out)["moved"], true);
        destination.stop().good();
        assert!(fs::read(rig.at("destination.raw")).unwrap() == wanted);
        silo(["serve", "--config", rig.at("source.toml").to_str().unwrap()])
            .failed(1, "they run elsewhere");
    }
}

#[test]
fn a_destination_killed_before_the_devices_changed_hands_gets_only_what_is_missing() {
    let rig = Rig::new(2);
    let source = rig.source("bandwidth = \"700K\"\nin-flight = \"1M\"\n");
    let destination = rig.destination();
    let absent = || {
        let note = FileLedger::new(rig.at("destination.note")).load().unwrap()?;
        Some(note.devices[0].record.absent.iter().map(|range| range.count).sum::<u64>())
    };
    let deadline = Instant::now() + common::LIMIT;
    // It notes from time to time what has come.
    while absent().is_none_or(|absent| absent > 1200) {
        assert!(Instant::now() < deadline, "nothing is noted");
        thread::sleep(Duration::from_millis(10));
    }
    kill(destination);
    let missing = absent().unwrap();
    assert!(missing > 0, "the move was over before");
    let destination = rig.destination();
    destination.next();
    assert_eq!(destination.next()["complete"], true);
    let report = last_json(&source.wait().good().out);
    assert_eq!(report["links"], 2, "{report}");
    // After the second handshake all that goes is what the note lacked, sent as dirty blocks are.
    assert!(report["sent"]["dirty"].as_u64().unwrap() <= missing, "{missing}: {report}");
    destination.stop().good();
    assert!(fs::read(rig.at("destination.raw")).unwrap() == rig.content);
}

#[test]
fn a_source_whose_destination_never_got_the_devices_has_them_back_and_gives_them_again() {
    let rig = Rig::new(3);
    let source = rig.source(EARLY);
    let destination = rig.destination();
    destination.next();
    kill(destination);
    kill(source);
    // As if its computer had burnt: all that a destination would know of the token is gone.
    for name in ["destination.raw", "destination.note"] {
        fs::remove_file(rig.at(name)).unwrap();
    }
    let source = rig.source("pre-copy = \"0s\"\n");
    assert!(source.ready["leaving"].is_string(), "{}", source.ready);
    let destination = rig.destination();
    // Back, and served, before it moves again.
    assert_eq!(source.next()["devices"][0]["device"], "disk");
    // The first session ended this process' only try; the next is a new command.
    let said = destination.wait();
    assert_eq!(said.code, 1, "{said:?}");
    let destination = rig.destination();
    destination.next();
    assert_eq!(destination.next()["complete"], true);
    assert_eq!(last_json(&source.wait().good().out)["moved"], true);
    destination.stop().good();
    assert!(fs::read(rig.at("destination.raw")).unwrap() == rig.content);
}

#[test]
fn after_restarts_of_both_ends_a_move_back_sends_the_difference_unless_somebody_touched_the_files()
{
    for touched in [false, true] {
        let rig = Rig::new(4);
        let source = rig.source("");
        let destination = rig.destination();
        destination.next();
        assert_eq!(destination.next()["complete"], true);
        source.wait().good();
        destination.stop().good();
        if touched {
            // The same length and another byte, as a mount of the old image would leave it.
            let mut old = fs::read(rig.at("source.raw")).unwrap();
            old[12_345] ^= 1;
            fs::write(rig.at("source.raw"), old).unwrap();
        }
        let turned = |end: &str, from: &str, to: &str| {
            let file = rig.config(end, "");
            let text = fs::read_to_string(&file).unwrap();
            fs::write(&file, text.replacen(from, to, 1)).unwrap();
            file
        };
        let there = turned("destination", "peer = ", "listen = ");
        let back = turned("source", "listen = ", "peer = ");
        // Served once more in between, and ended in order.
        Running::start(["serve", "--config", &there]).stop().good();
        let there = Running::start(["serve", "--config", &there]);
        let (mut client, _) = Client::go(&rig.at("destination.nbd")).unwrap();
        assert_eq!(client.write(3 << 20, &[8; 4096], 0).unwrap(), 0);
        drop(client);
        let home = Running::start(["connect", "--config", &back]);
        home.next();
        assert_eq!(home.next()["complete"], true);
        let report = last_json(&there.wait().good().out);
        home.stop().good();
        let mut wanted = rig.content.clone();
        wanted[3 << 20..(3 << 20) + 4096].fill(8);
        assert!(fs::read(rig.at("source.raw")).unwrap() == wanted, "touched: {touched}");
        let blocks: u64 =
            report["sent"].as_object().unwrap().values().map(|n| n.as_u64().unwrap()).sum();
        assert_eq!(blocks, if touched { SIZE as u64 / 4096 } else { 1 }, "{report}");
    }
}

#[test]
fn a_note_whose_file_is_gone_is_not_believed_of_a_file_that_would_be_made_anew() {
    let rig = Rig::new(5);
    let source = rig.source("bandwidth = \"700K\"\nin-flight = \"1M\"\n");
    let destination = rig.destination();
    let some = || {
        let note = FileLedger::new(rig.at("destination.note")).load().unwrap()?;
        let absent: u64 = note.devices[0].record.absent.iter().map(|range| range.count).sum();
        (absent < SIZE as u64 / 4096 - 100).then_some(())
    };
    let deadline = Instant::now() + common::LIMIT;
    while some().is_none() {
        assert!(Instant::now() < deadline, "nothing is noted");
        thread::sleep(Duration::from_millis(10));
    }
    kill(destination);
    // As a restart of the host does it to what was in memory.
    fs::remove_file(rig.at("destination.raw")).unwrap();
    let config = rig.config("destination", "");
    let refused = silo(["connect", "--config", &config]).failed(1, "destination.raw is gone");
    assert!(refused.err.contains("remove the note"), "{refused:?}");
    assert!(!rig.at("destination.raw").exists(), "and none was made");
    fs::remove_file(rig.at("destination.note")).unwrap();
    let destination = rig.destination();
    destination.next();
    assert_eq!(destination.next()["complete"], true);
    source.wait().good();
    destination.stop().good();
    assert!(fs::read(rig.at("destination.raw")).unwrap() == rig.content);
}
