//! The desk with its threads, a real lease file and a real connection; only the machine is a stand-in
//! that writes down what it is told.

use super::*;
use crate::{
    lease::{
        AttemptId, Beat, BeatName, BootTime, Epoch, FileStore, HostName, Key, MachineName, Nonce,
        OfferSerial, Outcome, Record, StoreError,
    },
    migrate::{
        destination::machine::Freezer,
        link::{Channel, Incoming, preamble},
        protocol::{Role, SessionId},
        source::MachineError,
        switchover::{DestinationParts, Terms, Token},
    },
};
use identity::{Security, Stream};
use silo::device::Device;
use std::{net::TcpListener, sync::atomic::AtomicU32};

const SOON: Duration = Duration::from_secs(10);
const ATTEMPT: AttemptId = AttemptId(7);

type Told = Arc<Mutex<Vec<String>>>;

/// A machine that only takes notes.
#[derive(Clone)]
struct Notes {
    told: Told,
    /// Somebody would stop it at the end of its offer.
    guarded: bool,
}

impl Notes {
    fn note(&self, what: &str) {
        lock(&self.told).push(what.to_owned());
    }
}

impl DestinationMachine for Notes {
    fn devices(&self) -> Vec<Arc<dyn Device>> {
        Vec::new()
    }
    fn expect(&mut self, _blackout: Duration) {}
    fn load(&mut self, _state: &[u8]) -> Result<(), MachineError> {
        Ok(())
    }
    fn run(&mut self) -> Result<(), MachineError> {
        Ok(())
    }
    fn own(&mut self, epoch: u64, _flip: u64) {
        self.note(&format!("own {epoch}"));
    }
    fn release_output(&mut self) -> Result<(), MachineError> {
        self.note("release output");
        Ok(())
    }
    fn faults(&self) -> Box<dyn Fn() -> FaultSummary + Send + Sync> {
        Box::new(FaultSummary::default)
    }
    fn freezer(&self) -> Arc<dyn Freezer> {
        Arc::new(self.clone())
    }
}

impl Freezer for Notes {
    fn freeze(&self) -> Result<(), String> {
        self.note("freeze");
        Ok(())
    }
    fn thaw(&self) -> Result<(), String> {
        self.note("thaw");
        Ok(())
    }
    fn run_until(&self, end: Option<BootTime>) -> Result<(), String> {
        match end {
            Some(end) => {
                let left = end.since(BootClock.now());
                assert!(left <= Terms::default().good_for, "{left:?} is longer than its offer");
                self.note("ends with its offer");
                if self.guarded { Ok(()) } else { Err("nobody guards it".to_owned()) }
            }
            None => {
                self.note("ends no more");
                Ok(())
            }
        }
    }
    fn lease_asked(&self) {
        self.note("asked");
    }
}

/// What becomes of the first write to the lease.
#[derive(Clone, Copy, PartialEq, Eq)]
enum First {
    /// It is done, and its answer gets lost.
    DoneUnheard,
    /// It never gets there, and the source takes the machine back before the next.
    LostToTheSource,
}

/// The lease file behind a line that loses the first answer.
struct Forgetful {
    store: FileStore,
    first: First,
    calls: AtomicU32,
}

impl LeaseStore for Forgetful {
    fn read(&self, machine: &MachineName) -> Result<Option<Record>, StoreError> {
        self.store.read(machine)
    }

    fn compare_and_set(
        &self,
        machine: &MachineName,
        expected: Option<&Record>,
        new: &Record,
    ) -> Result<Outcome, StoreError> {
        if self.calls.fetch_add(1, Ordering::SeqCst) > 0 {
            return self.store.compare_and_set(machine, expected, new);
        }
        let (new, outcome) = match self.first {
            First::DoneUnheard => (new.clone(), Outcome::Won),
            First::LostToTheSource => {
                let seen = expected.expect("a destination replaces a record");
                (seen.taken(host("a"), ATTEMPT, Nonce(3)), Outcome::Won)
            }
        };
        assert_eq!(self.store.compare_and_set(machine, expected, &new).unwrap(), outcome);
        Err(StoreError::Unavailable {
            of: Key::Lease(machine.clone()),
            operation: "write the lease".into(),
            detail: "the answer got lost".into(),
        })
    }

    fn read_beat(&self, name: &BeatName) -> Result<Option<Beat>, StoreError> {
        self.store.read_beat(name)
    }

    fn compare_and_set_beat(
        &self,
        name: &BeatName,
        expected: Option<&Beat>,
        new: &Beat,
    ) -> Result<Outcome<Beat>, StoreError> {
        self.store.compare_and_set_beat(name, expected, new)
    }
}

fn host(name: &str) -> HostName {
    HostName::new(name).unwrap()
}

fn machine() -> MachineName {
    MachineName::new("redis-1").unwrap()
}

/// Two ends of a connection between runners: ours for writing, the source's for reading.
fn connection() -> (Arc<Mutex<Outgoing>>, Incoming) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let session = preamble(Role::Main, SessionId([1; 16]));
    let source = std::thread::spawn(move || {
        Channel::connect(address, &host("b"), &Security::Plaintext, session).unwrap()
    });
    let (socket, _) = listener.accept().unwrap();
    let stream = Stream::server(socket, &Security::Plaintext, SOON).unwrap();
    let (ours, _) = Channel::accept(stream, &Security::Plaintext).unwrap();
    let source = source.join().unwrap();
    source.control.set_read_timeout(Some(SOON));
    (Arc::new(Mutex::new(ours.outgoing)), source.incoming)
}

/// A machine that is offered for, and what it takes to run it.
struct Scene {
    desk: Arc<Desk<Notes>>,
    token: Token,
    told: Told,
    heard: Incoming,
    store: Arc<Forgetful>,
    _folder: tempfile::TempDir,
}

fn offered(first: First, guarded: bool) -> Scene {
    let folder = tempfile::tempdir().unwrap();
    let store = FileStore::open(folder.path(), SOON).unwrap();
    let owned = Record::first(machine(), host("a"), AttemptId(1), Nonce(1));
    let handed = owned.handing(ATTEMPT, host("b"), Nonce(2));
    store.compare_and_set(&machine(), None, &owned).unwrap();
    store.compare_and_set(&machine(), Some(&owned), &handed).unwrap();
    let store = Arc::new(Forgetful { store, first, calls: AtomicU32::new(0) });

    let mut number = 100;
    let authority = DestinationAuthority::new(DestinationParts {
        machine: machine(),
        here: host("b"),
        from: host("a"),
        attempt: ATTEMPT,
        beat: None,
        terms: Terms::default(),
        nonces: Box::new(move || {
            number += 1;
            Nonce(number)
        }),
    });
    let (outgoing, mut heard) = connection();
    let told = Told::default();
    let notes = Box::new(Notes { told: Arc::clone(&told), guarded });
    let lease: Arc<dyn LeaseStore> = store.clone();
    let desk = Desk::open(authority, outgoing, notes, lease, Box::new(|_| {})).unwrap();
    desk.event(DestinationEvent::Prepared);
    let Frame::Offer { serial, .. } = heard.read().unwrap() else { panic!("no offer") };
    let token = Token { attempt: ATTEMPT, serial: OfferSerial(serial), handed, flush_owed: false };
    Scene { desk, token, told, heard, store, _folder: folder }
}

/// Runs a machine on an offer and asks for its lease, whose first answer does not come. Gives the
/// final state, what the machine was told, the lease, and the number of writes asked for.
fn ask(first: First) -> (DestinationState, Vec<String>, Record, u32) {
    let scene = offered(first, true);
    let desk = &scene.desk;
    assert!(desk.event(DestinationEvent::Token(scene.token)), "it shall load and run");
    desk.event(DestinationEvent::Running);
    let undecided = |state| {
        matches!(state, DestinationState::Unconfirmed | DestinationState::FrozenUnconfirmed)
    };
    let state = desk.wait(Instant::now() + SOON, |state| !undecided(state));
    desk.close();
    let told = lock(&scene.told).clone();
    let record = scene.store.read(&machine()).unwrap().unwrap();
    (state, told, record, scene.store.calls.load(Ordering::SeqCst))
}

#[test]
fn a_lease_that_was_won_and_whose_answer_got_lost_is_known_by_its_nonce_and_taken_once() {
    let (state, told, record, calls) = ask(First::DoneUnheard);
    assert_eq!(state, DestinationState::Owner(Epoch(2)));
    assert_eq!(told, ["ends with its offer", "asked", "ends no more", "own 2", "release output"]);
    assert_eq!((record.owner, record.epoch), (host("b"), Epoch(2)));
    assert!(calls >= 2, "it asked again");
}

#[test]
fn a_lease_that_went_back_to_the_source_while_no_answer_came_stops_the_copy_unheard() {
    let (state, told, record, _) = ask(First::LostToTheSource);
    assert!(!matches!(state, DestinationState::Owner(_)), "{state:?}");
    assert_eq!(told, ["ends with its offer", "asked", "freeze"], "nothing it sent was let out");
    assert_eq!((record.owner, record.epoch), (host("a"), Epoch(2)));
}

#[test]
fn a_machine_that_nobody_would_stop_at_the_end_of_its_offer_is_refused_before_it_runs() {
    let mut scene = offered(First::DoneUnheard, false);
    let token = scene.token.clone();
    assert!(!scene.desk.event(DestinationEvent::Token(token)), "it shall not run");
    assert_eq!(scene.desk.state(), DestinationState::Refused);
    let why = loop {
        match scene.heard.read().unwrap() {
            Frame::Refused { reason, .. } => break reason,
            Frame::Offer { .. } => {}
            other => panic!("{other:?}"),
        }
    };
    assert!(why.contains("nobody guards it"), "{why}");
    scene.desk.close();
    assert_eq!(*lock(&scene.told), ["ends with its offer"]);
    assert_eq!(scene.store.calls.load(Ordering::SeqCst), 0, "its lease was not asked for");
}
