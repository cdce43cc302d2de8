//! What a destination has noted durably is enough to go on after its death, with or without the
//! source: at no time does the source leave while the note still waits for it, and what was flushed
//! at the destination is what a restart finds.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use common::{Random, memory::Memory, rig::*};
use silo_block::{
    block::BlockRange,
    io::BlockDevice,
    session::{messages::SessionId, source::Config},
};
use silo_move::{
    Content, Inbound, Volume, destination,
    ledger::{FileLedger, Ledger, Note, Standing},
    peer::{Dial, Limits},
    report::Phase,
};
use std::{
    io,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};

// More than what leaves before a limit on bytes is felt.
const SIZE: u64 = 16 << 20;

fn noise(seed: u64) -> Arc<Memory> {
    let device = Arc::new(Memory::new(SIZE));
    let mut all = vec![0; SIZE as usize];
    Random(seed).fill(&mut all);
    device.write_at(0, &all).unwrap();
    device
}

fn options(ledger: Arc<dyn Ledger>) -> destination::Options {
    let mut options = destination::Options { ledger: Some(ledger), ..Default::default() };
    options.session.patience = patience(2_000);
    options
}

fn noted(folder: &Path) -> Note {
    FileLedger::new(folder.join("note")).load().unwrap().unwrap()
}

fn absent(note: &Note) -> &[BlockRange] {
    &note.devices[0].record.absent
}

/// Goes on from the note as a process does that was started again, without a source.
fn restart(folder: &Path, device: Arc<Memory>) -> (Arc<Volume>, Inbound) {
    let note = noted(folder);
    let Standing::Owner { session, attempt } = note.standing else { panic!("{note:?}") };
    let replica = note.devices[0].replica().unwrap();
    let volume = Arc::new(Volume::restored(name("disk"), device, Content::Zeros, replica));
    let ledger = Arc::new(FileLedger::new(folder.join("note")));
    let host = Arc::new(Host::default());
    let volumes = vec![volume.clone()];
    (volume, Inbound::running(session, attempt, volumes, host, options(ledger)).unwrap())
}

/// A ledger whose notes of an owner, after the first, fail so many times.
struct Failing {
    inner: FileLedger,
    owner: AtomicU64,
    failures: u64,
}

impl Ledger for Failing {
    fn save(&self, note: &Note) -> io::Result<()> {
        if matches!(note.standing, Standing::Owner { .. }) {
            let number = self.owner.fetch_add(1, Ordering::SeqCst);
            if (1..=self.failures).contains(&number) {
                return Err(io::ErrorKind::StorageFull.into());
            }
        }
        self.inner.save(note)
    }

    fn load(&self) -> io::Result<Option<Note>> {
        self.inner.load()
    }
}

#[test]
fn when_the_source_may_go_the_note_of_the_destination_says_that_all_is_here() {
    for seed in 0..3 {
        let dir = tempfile::tempdir().unwrap();
        let (device, landed) = (noise(seed), Arc::new(Memory::new(SIZE)));
        let volume = owned("disk", device.clone(), 4096);
        let there = empty("disk", landed.clone(), 4096);
        let ledger = Arc::new(FileLedger::new(dir.path().join("note")));
        let receiver = Receiver::new(vec![there.clone()], options(ledger));
        let server = serve(&receiver);
        let outbound = start(
            std::slice::from_ref(&volume),
            server.address(),
            &Arc::default(),
            source_options(Config::default()),
        );
        outbound.switch();
        receiver.host.wait_for(|seen| matches!(seen, Seen::Run(..)));
        // Flushes make notes too, and an older one must not replace a newer one.
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        there.flush().unwrap();
                    }
                });
            }
            outbound.wait().unwrap();
            let note = noted(dir.path());
            let session = receiver.session(1);
            session.wait().unwrap();
            stop.store(true, Ordering::Relaxed);
            assert!(matches!(note.standing, Standing::Owner { .. }));
            assert_eq!(absent(&note), [], "the source has gone");
        });
        assert_eq!(absent(&noted(dir.path())), []);
        // Nobody is there to ask any more.
        drop(server);
        let (again, inbound) = restart(dir.path(), landed);
        same(&*device, &*again);
        inbound.wait().unwrap();
        same(&*device, &*again);
        // Whoever gives it on notes what is true.
        let onward = Arc::new(FileLedger::new(dir.path().join("onward")));
        let mut away = source_options(Config::default());
        away.ledger = Some(onward.clone());
        drop(start(&[there], "127.0.0.1:1".parse().unwrap(), &Arc::default(), away));
        assert_eq!(absent(&onward.load().unwrap().unwrap()), []);
    }
}

#[test]
fn what_was_flushed_at_the_destination_before_its_block_came_survives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let (device, landed) = (noise(1), Arc::new(Memory::new(SIZE)));
    let there = empty("disk", landed.clone(), 4096);
    let ledger = Arc::new(FileLedger::new(dir.path().join("note")));
    let receiver = Receiver::new(vec![there.clone()], options(ledger));
    let server = serve(&receiver);
    // One byte a second: almost nothing comes by itself.
    let limits = Limits { bandwidth: Some(1), ..limits() };
    let peer = identity::HostName::new("b").unwrap();
    let slow = Dial::new(server.address(), peer, identity::Security::Plaintext, limits);
    let outbound = silo_move::Outbound::start(
        vec![owned("disk", device, 4096)],
        slow,
        Arc::new(Host::default()),
        source_options(Config::default()),
    )
    .unwrap();
    outbound.switch();
    receiver.host.wait_for(|seen| matches!(seen, Seen::Run(..)));
    let last = SIZE / 4096 - 1;
    let data = vec![7; 4096];
    there.write_at(last * 4096, &data).unwrap();
    // The note of a session is no other's for as long as that goes on.
    let mut away = source_options(Config::default());
    away.ledger = Some(Arc::new(FileLedger::new(dir.path().join("note"))));
    let to = dial("127.0.0.1:1".parse().unwrap());
    let onward =
        silo_move::Outbound::start(vec![there.clone()], to, Arc::new(Host::default()), away);
    let error = onward.err().expect("two sessions with one note").to_string();
    assert!(error.contains("a note of its own"), "{error}");
    assert!(matches!(noted(dir.path()).standing, Standing::Owner { .. }));
    let waits = |note: &Note| absent(note).iter().any(|range| range.end() > last);
    assert!(waits(&noted(dir.path())), "not flushed yet");
    there.flush().unwrap();
    let note = noted(dir.path());
    assert!(!waits(&note), "a flush was acknowledged, and the source's block would go over it");
    assert!(!absent(&note).is_empty(), "the rest has not come");
    let (again, _inbound) = restart(dir.path(), landed);
    let mut got = vec![0; 4096];
    again.read_at(last * 4096, &mut got).unwrap();
    assert_eq!(got, data);
}

#[test]
fn a_note_that_fails_is_made_again_and_the_source_stays_until_it_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = Arc::new(Failing {
        inner: FileLedger::new(dir.path().join("note")),
        owner: AtomicU64::new(0),
        failures: 2,
    });
    let device = noise(2);
    let there = empty("disk", Arc::new(Memory::new(SIZE)), 4096);
    let mut options = options(ledger.clone());
    options.session.patience = patience(30_000);
    let receiver = Receiver::new(vec![there.clone()], options);
    let server = serve(&receiver);
    let outbound = start(
        &[owned("disk", device.clone(), 4096)],
        server.address(),
        &Arc::default(),
        source_options(Config::default()),
    );
    outbound.wait().unwrap();
    assert!(ledger.owner.load(Ordering::SeqCst) >= 4, "released before the note was there");
    assert_eq!(absent(&noted(dir.path())), []);
    let trouble = receiver.host.wait_for(|seen| matches!(seen, Seen::Trouble(_)));
    assert!(matches!(trouble, Seen::Trouble(text) if text.contains("cannot be made durable")));
    receiver.session(1).wait().unwrap();
    same(&*device, &*there);
}

#[test]
fn a_note_that_fails_while_the_token_comes_costs_nothing_once_the_next_is_made() {
    /// Fails its first note, when the token has come.
    struct Late {
        inner: FileLedger,
        session: Mutex<Option<Arc<Inbound>>>,
        failed: AtomicBool,
    }
    impl Ledger for Late {
        fn save(&self, note: &Note) -> io::Result<()> {
            if self.failed.swap(true, Ordering::SeqCst) {
                return self.inner.save(note);
            }
            common::until("the token", || {
                let session = self.session.lock().unwrap();
                session.as_ref().is_some_and(|s| s.progress().phase >= Phase::Switching)
            });
            Err(io::ErrorKind::StorageFull.into())
        }
        fn load(&self) -> io::Result<Option<Note>> {
            self.inner.load()
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let inner = FileLedger::new(dir.path().join("note"));
    let late = Late { inner, session: Mutex::default(), failed: AtomicBool::new(false) };
    let ledger = Arc::new(late);
    let device = noise(4);
    let there = empty("disk", Arc::new(Memory::new(SIZE)), 4096);
    let mut options = options(ledger.clone());
    options.session.patience = patience(30_000);
    let receiver = Receiver::new(vec![there.clone()], options);
    let server = serve(&receiver);
    let config = Config { patience: patience(30_000), ..Config::default() };
    let volume = owned("disk", device.clone(), 4096);
    let outbound = start(&[volume], server.address(), &Arc::default(), source_options(config));
    outbound.switch();
    *ledger.session.lock().unwrap() = Some(receiver.session(1));
    common::until("everything", || outbound.is_over());
    outbound.wait().unwrap();
    receiver.session(1).wait().unwrap();
    same(&*device, &*there);
    let trouble = receiver.host.seen();
    assert!(!trouble.iter().any(|seen| matches!(seen, Seen::Trouble(_))), "{trouble:?}");
}

#[test]
fn a_note_owns_nothing_before_it_says_that_the_token_was_taken() {
    // Notes of every kind, as they are saved.
    struct Watching(Mutex<Vec<Note>>);
    impl Ledger for Watching {
        fn save(&self, note: &Note) -> io::Result<()> {
            self.0.lock().unwrap().push(note.clone());
            Ok(())
        }
        fn load(&self) -> io::Result<Option<Note>> {
            Ok(None)
        }
    }
    let ledger = Arc::new(Watching(Mutex::default()));
    let there = empty("disk", Arc::new(Memory::new(SIZE)), 4096);
    let receiver = Receiver::new(vec![there], options(ledger.clone()));
    *receiver.host.refuse.lock().unwrap() = Some("no room".to_owned());
    let server = serve(&receiver);
    let volume = owned("disk", noise(3), 4096);
    let outbound =
        start(&[volume], server.address(), &Arc::default(), source_options(Config::default()));
    let error = outbound.wait().unwrap_err();
    assert!(error.owned, "{error}");
    receiver.session(1).wait().unwrap_err();
    let notes = ledger.0.lock().unwrap();
    let session: SessionId = receiver.session(1).session();
    assert_eq!(notes.last().unwrap().standing, Standing::Receiving { session });
    for note in notes.iter() {
        let owner = matches!(note.standing, Standing::Owner { .. });
        let here = note.devices[0].record.owner == silo_block::model::Owner::Here;
        assert_eq!(owner, here, "{:?}", note.standing);
    }
}
