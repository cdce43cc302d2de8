//! The kill matrix: real processes, cut at every message boundary of a move, and what was killed is
//! started again from what it had on disk. Afterwards exactly one side owns the device, and it has
//! every write that was ever flushed.
//!
//! The processes are the test binary itself, started with a role in the environment, which calls
//! [`child`]; the parent holds the line between them and so sees every boundary.

use super::{
    Random, WAIT,
    file::FileDevice,
    rig::name,
    tap::{Tap, Way, kind::RELEASED},
};
use identity::{HostName, Security};
use silo_block::{
    io::BlockDevice,
    session::{Patience, Policy, messages::SessionId, source::Config},
};
use silo_move::{
    Content, Outbound, Server, Volume,
    destination::{self, Accepted, DestinationHost, Inbound, Offer, Reception},
    ledger::{FileLedger, Ledger, Note, Standing},
    peer::{Dial, Limits, Listener},
    source::{self, Handover, SourceHost},
};
use std::{
    env, fs,
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

/// What a scene adds to the ends of a move, in the processes.
pub struct Extras {
    /// Bytes a second for bulk.
    pub bandwidth: Option<u64>,
    /// Changes the options of a source.
    pub source: fn(&mut source::Options),
    /// Changes the options of a destination.
    pub destination: fn(&mut destination::Options),
}

/// What is around the processes, in the parent.
pub trait Scene {
    /// A move is about to begin, of a device in this file.
    fn prepare(&mut self, device: &Path);
    /// What the processes are told by their environment.
    fn environment(&self) -> Vec<(String, String)>;
    /// The store goes away, or comes back.
    fn store(&self, there: bool);
}

/// Nothing around them.
pub struct Bare;

impl Scene for Bare {
    fn prepare(&mut self, _: &Path) {}

    fn environment(&self) -> Vec<(String, String)> {
        Vec::new()
    }

    fn store(&self, _: bool) {}
}

/// Bytes of the device.
pub const SIZE: u64 = 1 << 20;
/// Bytes of a block.
pub const BLOCK: u32 = 4096;
const ROLE: &str = "SILO_MOVE_KILL_ROLE";
const FOLDER: &str = "SILO_MOVE_KILL_FOLDER";
const PEER: &str = "SILO_MOVE_KILL_PEER";
/// How long a store stays away at most.
const AWAY: Duration = Duration::from_millis(800);

// ---- what a process is

/// Says something to the parent.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    // A parent that is gone has killed this process, or is about to.
    let _ = writeln!(out, "silo: {line}").and_then(|()| out.flush());
}

struct Host {
    /// Writers of this process.
    writing: Arc<AtomicBool>,
    done: Mutex<mpsc::Sender<()>>,
}

impl SourceHost for Host {
    fn quiesce(&self, _: SessionId, _: u32) -> Result<Handover, String> {
        Ok(Handover { state: b"state".to_vec(), flushes: Vec::new() })
    }

    fn resume(&self) {
        say("runs");
        self.writing.store(true, Ordering::SeqCst);
    }

    fn handed_over(&self) {
        say("gone");
    }
}

impl DestinationHost for Host {
    fn run(&self, _: u32, state: Vec<u8>, _: Vec<Vec<u64>>) -> Result<(), String> {
        assert_eq!(state, b"state");
        say("runs");
        Ok(())
    }

    fn complete(&self) {
        let _ = self.done.lock().unwrap().send(());
    }
}

/// Writes a counter to its place again and again, flushes, and says how far it is.
fn write(volume: &Volume, writing: &AtomicBool, from: u64) {
    let mut random = Random(from + 1);
    for count in from.. {
        if !writing.load(Ordering::SeqCst) {
            return;
        }
        let mut data = vec![0; 600];
        random.fill(&mut data);
        let place = random.below(SIZE / 2 / 4096) * 4096;
        // Content first, then the number that promises it.
        let written = volume
            .write_at(SIZE / 2 + place, &data)
            .and_then(|()| volume.write_at(0, &count.to_le_bytes()))
            .and_then(|()| volume.flush());
        if written.is_err() {
            return;
        }
        say(&format!("flushed {count}"));
        thread::sleep(Duration::from_millis(1));
    }
}

fn limits() -> Limits {
    Limits {
        connect: Duration::from_secs(5),
        silence: Duration::from_secs(2),
        data: 1,
        ..Limits::default()
    }
}

fn patience() -> Patience {
    Patience { silence: Duration::from_secs(2), answer: Duration::from_secs(20) }
}

struct Files {
    device: Arc<FileDevice>,
    ledger: Arc<FileLedger>,
    note: Option<Note>,
}

fn files(folder: &Path) -> Files {
    let device = Arc::new(FileDevice::open(&folder.join("device"), SIZE).unwrap());
    let ledger = Arc::new(FileLedger::new(folder.join("note")));
    let note = ledger.load().unwrap();
    Files { device, ledger, note }
}

fn counter(device: &dyn BlockDevice) -> u64 {
    let mut bytes = [0; 8];
    device.read_at(0, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

fn be_source(folder: &Path, peer: SocketAddr, extras: &Extras) {
    let Files { device, ledger, note } = files(folder);
    let (sender, _done) = mpsc::channel();
    let writing = Arc::new(AtomicBool::new(true));
    let host = Arc::new(Host { writing: writing.clone(), done: Mutex::new(sender) });
    let policy = Policy { max_rounds: 3, pause: Duration::from_millis(5), ..Policy::default() };
    let mut options = source::Options {
        session: Config { patience: patience(), policy, window: 128 << 10, ..Config::default() },
        ledger: Some(ledger),
        ..source::Options::default()
    };
    (extras.source)(&mut options);
    let limits = Limits { bandwidth: extras.bandwidth, ..limits() };
    let dial = Dial::new(peer, HostName::new("b").unwrap(), Security::Plaintext, limits);
    let (name, content) = (name("disk"), Content::Unknown);
    let restored = note.as_ref().map(|note| note.devices[0].replica().unwrap());
    let leaving = match note.map(|note| note.standing) {
        Some(Standing::Leaving { session, .. }) => Some(session),
        Some(Standing::Away { .. }) => return say("released"),
        _ => None,
    };
    let id = source::new_session().unwrap();
    let volume = Arc::new(match (restored, leaving) {
        (None, _) => Volume::owned(name, device.clone(), BLOCK, content, id).unwrap(),
        (Some(replica), Some(_)) => Volume::leaving(name, device.clone(), content, replica),
        (Some(mut replica), None) => {
            // Killed while it owned the device: what it had sent may be newer than what it has.
            // The file is written in place, and nobody noted where: any block may be.
            let shared = replica.rounds().clock();
            let blocks = silo_block::block::BlockSet::full(replica.geometry().blocks());
            replica.restarted(id, Some(shared), &blocks);
            Volume::restored(name, device.clone(), content, replica)
        }
    });
    if leaving.is_none() {
        say("runs");
    } else {
        writing.store(false, Ordering::SeqCst);
    }
    let writer = {
        let (volume, writing) = (volume.clone(), writing.clone());
        thread::spawn(move || {
            loop {
                let from = volume.read_at(0, &mut [0; 8]).map_or(0, |()| counter(&*volume) + 1);
                write(&volume, &writing, from);
                thread::sleep(Duration::from_millis(2));
            }
        })
    };
    let outbound = match leaving {
        Some(session) => Outbound::restored(session, vec![volume], dial, host, options),
        None => Outbound::start(vec![volume], dial, host, options),
    };
    match outbound.unwrap().wait() {
        Ok(_) => say("released"),
        Err(error) => say(&format!("failed, owned {}: {error}", error.owned)),
    }
    drop(writer);
    // Owned or not, it lives until it is killed.
    thread::sleep(WAIT);
}

struct Taker {
    folder: PathBuf,
    sessions: Mutex<mpsc::Sender<Arc<Inbound>>>,
    volume: Mutex<Option<Arc<Volume>>>,
    host: Arc<Host>,
    extras: fn(&mut destination::Options),
}

impl Taker {
    fn options(&self, ledger: Arc<FileLedger>) -> destination::Options {
        let session = silo_block::session::destination::Config {
            patience: patience(),
            ..silo_block::session::destination::Config::default()
        };
        let mut options = destination::Options {
            session,
            ledger: Some(ledger),
            ..destination::Options::default()
        };
        (self.extras)(&mut options);
        options
    }

    fn accept(&self) -> Accepted {
        let Files { device, ledger, note } = files(&self.folder);
        let (name, content) = (name("disk"), Content::Zeros);
        let running = match note.as_ref().map(|note| &note.standing) {
            Some(Standing::Owner { attempt, .. }) => Some(*attempt),
            _ => None,
        };
        let volume = Arc::new(match note {
            None => Volume::untouched(name, device, BLOCK, content).unwrap(),
            Some(note) => {
                let replica = note.devices[0].replica().unwrap();
                Volume::restored(name, device, content, replica)
            }
        });
        *self.volume.lock().unwrap() = Some(volume.clone());
        Accepted {
            volumes: vec![volume],
            host: self.host.clone(),
            options: self.options(ledger),
            running,
        }
    }
}

impl Reception for Taker {
    fn receive(&self, _: &Offer<'_>) -> Result<Accepted, String> {
        Ok(self.accept())
    }

    fn began(&self, session: &Arc<Inbound>) {
        let _ = self.sessions.lock().unwrap().send(session.clone());
    }
}

fn be_destination(folder: &Path, extras: &Extras) {
    let (sender, done) = mpsc::channel();
    let writing = Arc::new(AtomicBool::new(true));
    let host = Arc::new(Host { writing, done: Mutex::new(sender) });
    let (sessions, begun) = mpsc::channel();
    let taker = Arc::new(Taker {
        folder: folder.to_owned(),
        sessions: Mutex::new(sessions),
        volume: Mutex::new(None),
        host,
        extras: extras.destination,
    });
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let listener = Listener::new(socket, Security::Plaintext, limits(), |_| true).unwrap();
    let server = Server::new(listener, taker.clone(), None).unwrap();
    // A token that came before a crash was taken: it runs, whether the source is there or not.
    let note = FileLedger::new(folder.join("note")).load().unwrap();
    if let Some(Note { standing: Standing::Owner { session, attempt }, .. }) = note {
        let Accepted { volumes, host, options, .. } = taker.accept();
        let inbound = Inbound::running(session, attempt, volumes, host, options).unwrap();
        let inbound = Arc::new(inbound);
        server.adopt(inbound.clone(), None);
        say("runs");
        taker.began(&inbound);
    }
    say(&format!("listens {}", server.address()));
    drop(done);
    while let Ok(session) = begun.recv_timeout(WAIT) {
        let taker = taker.clone();
        thread::spawn(move || match session.wait() {
            Ok(report) => {
                say(&format!("store {}", report.counters.from_store));
                let volume = taker.volume.lock().unwrap().clone().unwrap();
                let mut bytes = vec![0; SIZE as usize];
                volume.read_at(0, &mut bytes).unwrap();
                say(&format!("complete {} {}", counter(&*volume), blake3::hash(&bytes).to_hex()));
            }
            Err(error) => say(&format!("failed, owned {}: {error}", error.owned)),
        });
    }
}

/// What a child process does: its role, if it has one.
pub fn child(extras: &Extras) {
    let Ok(role) = env::var(ROLE) else { return };
    let folder = PathBuf::from(env::var(FOLDER).unwrap());
    match role.as_str() {
        "source" => be_source(&folder, env::var(PEER).unwrap().parse().unwrap(), extras),
        _ => be_destination(&folder, extras),
    }
}

// ---- the parent

/// A process, and what it has said.
struct Process {
    child: Child,
    said: Arc<Mutex<Vec<String>>>,
}

impl Process {
    fn start(
        role: &str,
        folder: &Path,
        peer: Option<SocketAddr>,
        environment: &[(String, String)],
    ) -> Self {
        fs::create_dir_all(folder).unwrap();
        let mut command = Command::new(env::current_exe().unwrap());
        command
            .args(["--exact", "child", "--nocapture", "--test-threads", "1"])
            .env(ROLE, role)
            .env(FOLDER, folder)
            .env(PEER, peer.map(|peer| peer.to_string()).unwrap_or_default())
            .envs(environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit());
        let mut child = command.spawn().unwrap();
        let said = Arc::new(Mutex::new(Vec::new()));
        let (out, noted) = (child.stdout.take().unwrap(), said.clone());
        thread::spawn(move || {
            for line in BufReader::new(out).lines() {
                let Ok(line) = line else { return };
                // The harness' own words come before ours on one line.
                if let Some(at) = line.find("silo: ") {
                    noted.lock().unwrap().push(line[at + 6..].to_owned());
                }
            }
        });
        Self { child, said }
    }

    fn said(&self, what: &str) -> Option<String> {
        let said = self.said.lock().unwrap();
        said.iter().rev().find(|line| line.starts_with(what)).cloned()
    }

    fn wait_for(&self, what: &str) -> String {
        let begin = Instant::now();
        loop {
            if let Some(line) = self.said(what) {
                return line;
            }
            let said = self.said.lock().unwrap().clone();
            assert!(
                begin.elapsed() < WAIT,
                "no \"{what}\": {:?}",
                &said[said.len().saturating_sub(5)..]
            );
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// The newest count that it said was flushed.
    fn flushed(&self) -> u64 {
        let line = self.said("flushed ");
        line.and_then(|line| line[8..].parse().ok()).unwrap_or(0)
    }

    fn kill(&mut self) {
        // SIGKILL: nothing is ended in order.
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    /// A process.
    Source,
    /// A process.
    Destination,
    /// The connections.
    Line,
    /// What both ends read beside the move.
    Store,
}

/// Where a move is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Boundary {
    /// Before the frame of this number.
    Frame(u64),
    /// Before the first frame of this kind.
    Kind(u8),
}

/// One move with one cut at a boundary. False if the move was over before that.
fn cut_at(scene: &mut dyn Scene, victim: Victim, at: Boundary) -> (bool, u64) {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("a"), dir.path().join("b"));
    // The first half is never written again; the second is under way.
    fs::create_dir_all(&from).unwrap();
    let mut content = vec![0; SIZE as usize];
    let seed = match at {
        Boundary::Frame(number) => number,
        Boundary::Kind(_) => 0,
    };
    Random(seed).fill(&mut content[..SIZE as usize / 2]);
    content[..8].fill(0);
    fs::write(from.join("device"), &content).unwrap();
    scene.prepare(&from.join("device"));
    let environment = scene.environment();

    let mut destination = Process::start("destination", &to, None, &environment);
    let address = |process: &Process| -> SocketAddr {
        process.wait_for("listens ")["listens ".len()..].parse().unwrap()
    };
    let tap = Tap::new(Some(address(&destination)));
    let (reached, at_boundary) = mpsc::channel();
    let hit = AtomicU64::new(0);
    tap.at_each_frame(move |number, way, frame| {
        let there = match at {
            Boundary::Frame(wanted) => number >= wanted,
            Boundary::Kind(kind) => way == Way::Out && frame[0] == kind,
        };
        let now = there && hit.fetch_add(1, Ordering::SeqCst) == 0;
        if now {
            let _ = reached.send(());
        }
        // The line stands still from here until the parent has done what it wants.
        !now
    });
    let mut source = Process::start("source", &from, Some(tap.address), &environment);
    let begin = Instant::now();
    let mut cut = false;
    while !cut {
        cut = at_boundary.recv_timeout(Duration::from_millis(5)).is_ok();
        if !cut && source.said("released").is_some() && destination.said("complete").is_some() {
            break;
        }
        assert!(begin.elapsed() < WAIT, "neither done nor at the boundary");
    }
    let mut flushed = source.flushed();
    if cut {
        match victim {
            Victim::Source => {
                source.kill();
                flushed = flushed.max(source.flushed());
                source = Process::start("source", &from, Some(tap.address), &environment);
            }
            Victim::Destination => {
                destination.kill();
                destination = Process::start("destination", &to, None, &environment);
                tap.retarget(address(&destination));
            }
            Victim::Line => {}
            Victim::Store => scene.store(false),
        }
        tap.let_pass();
        tap.mend();
    }
    let lost = Instant::now();
    let mut away = cut && victim == Victim::Store;
    // Whatever happened, the move goes on or starts again, and ends at the destination.
    let line = loop {
        // It stays away until the source has gone, if that is soon.
        if away && (source.said("released").is_some() || lost.elapsed() > AWAY) {
            scene.store(true);
            away = false;
        }
        if let Some(line) = destination.said("complete ") {
            break line;
        }
        if source.said("failed, owned true").is_some() {
            // This session is over, the device is here: a new session, as an operator would.
            flushed = flushed.max(source.flushed());
            source.kill();
            source = Process::start("source", &from, Some(tap.address), &environment);
        }
        let said = |process: &Process| process.said.lock().unwrap().clone();
        assert!(
            begin.elapsed() < WAIT,
            "{victim:?} at {at:?}: {:?} / {:?}",
            said(&source).iter().rev().take(5).collect::<Vec<_>>(),
            said(&destination)
        );
        thread::sleep(Duration::from_millis(3));
    };
    if away {
        scene.store(true);
    }
    let released = Instant::now();
    while source.said("released").is_none() && source.said("gone").is_none() {
        assert!(released.elapsed() < WAIT, "{victim:?} at {at:?}: the source was not released");
        thread::sleep(Duration::from_millis(2));
    }
    flushed = flushed.max(source.flushed());
    source.kill();
    destination.kill();
    let note = |folder: &Path| FileLedger::new(folder.join("note")).load().unwrap().unwrap();
    let owns = |note: &Note| matches!(note.standing, Standing::Owner { .. } | Standing::Here);
    assert!(owns(&note(&to)) && !owns(&note(&from)), "{victim:?} at {at:?}: not one owner");
    let mut words = line.split(' ').skip(1);
    let counted: u64 = words.next().unwrap().parse().unwrap();
    assert!(counted >= flushed, "{victim:?} at {at:?}: {counted}, flushed {flushed}");
    let (a, b) = (fs::read(from.join("device")).unwrap(), fs::read(to.join("device")).unwrap());
    assert_eq!(words.next().unwrap(), blake3::hash(&b).to_hex().as_str());
    // The source's file is what it was when it left: the destination wrote nothing since.
    assert!(a == b, "{victim:?} at {at:?}: the devices differ");
    let stored = destination.said("store ").map_or(0, |line| line[6..].parse().unwrap());
    (cut, stored)
}

/// Loses something at every boundary of a move. Gives how many blocks came from the store.
pub fn matrix(scene: &mut dyn Scene, victim: Victim) -> u64 {
    let (mut boundary, mut stored) = (0, 0);
    let begin = Instant::now();
    loop {
        let (cut, blocks) = cut_at(scene, victim, Boundary::Frame(boundary));
        stored += blocks;
        if !cut {
            break;
        }
        boundary += 1;
        assert!(begin.elapsed() < WAIT * 8, "the matrix takes too long");
    }
    // The last words of all are said rarely before the last number of a move: for certain, once.
    let last = cut_at(scene, victim, Boundary::Kind(RELEASED));
    assert!(last.0, "the source left without a word");
    assert!(boundary >= 12, "a move has more boundaries than {boundary}");
    stored + last.1
}
