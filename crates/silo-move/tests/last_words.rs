//! The last words of a session are heard, or said again to whoever comes back for them.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use common::{
    MIB,
    content::noise,
    memory::Memory,
    rig::*,
    tap::{
        Tap, Way,
        kind::{REFUSED, RELEASED, TOKEN},
    },
    until,
};
use silo_block::{
    block::BlockRange,
    geometry::Geometry,
    io::BlockDevice,
    order::Class,
    rounds::Epoch,
    session::{
        Finish, Policy,
        messages::{
            BlockHeader, DeviceIndex, DeviceInfo, LastRound, Reason, SessionId, Term,
            ToDestination, ToSource, VERSION,
        },
        source::Config,
    },
};
use silo_move::{
    Server, Volume, destination,
    ledger::{FileLedger, Ledger, Note, Standing},
    peer::Link,
    wire::{self, Blocks},
};
use std::{
    io::{self, Write},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

const SIZE: u64 = 4 * MIB;

/// Less than the patience of a session, which ends by itself after a minute.
const SOON: Duration = Duration::from_secs(30);

fn there(name: &str) -> Arc<Volume> {
    empty(name, Arc::new(Memory::new(SIZE)), 4096)
}

#[test]
fn a_source_that_comes_back_to_a_session_that_has_failed_is_told_why_at_once() {
    // While the session is known still, and when others have come since.
    for others in [0, 3] {
        let receiver = Receiver::new(vec![there("disk"), there("other")], quick());
        let server = serve(&receiver);
        let tap = Tap::new(Some(server.address()));
        let policy = Policy { hold: true, ..Policy::default() };
        let options = source_options(Config { policy, ..Config::default() });
        let volume = owned("disk", noise(SIZE, 1), 4096);
        let host = Arc::new(Host::default());
        let outbound = start(std::slice::from_ref(&volume), tap.address, &host, options);
        until("the first round", || outbound.progress().rounds > 0);
        tap.cut();
        let session = receiver.session(1);
        session.cancel("enough");
        assert!(!session.wait().unwrap_err().owned);
        for number in 0..others {
            let other = owned("other", noise(SIZE, 2), 4096);
            *receiver.volumes.lock().unwrap() = vec![there("disk"), there("other")];
            start(&[other], server.address(), &Arc::default(), source_options(Config::default()))
                .wait()
                .unwrap();
            receiver.session(2 + number).wait().unwrap();
        }
        let began = Instant::now();
        tap.mend();
        let error = outbound.wait().unwrap_err();
        assert!(error.owned && error.to_string().contains("enough"), "{error}");
        assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
        volume.write_at(0, b"goes on").unwrap();
    }
}

/// A ledger that cannot note that a token was taken.
struct Full(FileLedger);

impl Ledger for Full {
    fn save(&self, note: &Note) -> io::Result<()> {
        if matches!(note.standing, Standing::Owner { .. }) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.0.save(note)
    }

    fn load(&self) -> io::Result<Option<Note>> {
        self.0.load()
    }
}

fn with_ledger(ledger: impl Ledger + 'static) -> destination::Options {
    destination::Options { ledger: Some(Arc::new(ledger)), ..quick() }
}

fn note(dir: &Path) -> FileLedger {
    FileLedger::new(dir.join("note"))
}

#[test]
fn a_source_that_has_not_heard_that_its_token_was_refused_hears_it_when_it_comes_again() {
    // Every block is there when the token comes, so that nothing but the refusal says whose they are.
    for others in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let receiver =
            Receiver::new(vec![there("disk"), there("other")], with_ledger(Full(note(dir.path()))));
        let server = serve(&receiver);
        let tap = Tap::new(Some(server.address()));
        let refused = Arc::new(AtomicBool::new(false));
        let seen = refused.clone();
        tap.at_each_frame(move |_, way, frame| {
            way == Way::Out || frame[0] != REFUSED || seen.swap(true, Ordering::SeqCst)
        });
        let policy = Policy { finish: Finish::Whole, ..Policy::default() };
        let options = source_options(Config { policy, ..Config::default() });
        let volume = owned("disk", noise(SIZE, 3), 4096);
        let host = Arc::new(Host::default());
        let outbound = start(std::slice::from_ref(&volume), tap.address, &host, options);
        let error = receiver.session(1).wait().unwrap_err();
        assert!(!error.owned && refused.load(Ordering::SeqCst), "{error}");
        // It does not know, and may not go on.
        assert!(!outbound.is_over() && !host.seen().contains(&Seen::Resume));
        if others {
            *receiver.options.lock().unwrap() = quick();
            let other = owned("other", noise(SIZE, 4), 4096);
            start(&[other], server.address(), &Arc::default(), source_options(Config::default()))
                .wait()
                .unwrap();
        }
        let began = Instant::now();
        tap.mend();
        let error = outbound.wait().unwrap_err();
        assert!(error.owned && error.to_string().contains("cannot note"), "{error}");
        assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
        assert!(host.seen().contains(&Seen::Resume) && !host.seen().contains(&Seen::HandedOver));
        volume.write_at(0, b"goes on").unwrap();
    }
}

/// A ledger that fails when a token was taken, and forgets that only once it is told to.
struct Stubborn {
    inner: FileLedger,
    mended: Arc<AtomicBool>,
}

impl Ledger for Stubborn {
    fn save(&self, note: &Note) -> io::Result<()> {
        let owner = matches!(note.standing, Standing::Owner { .. });
        let taken = || {
            let noted = self.inner.load().unwrap();
            noted.is_some_and(|note| matches!(note.standing, Standing::Owner { .. }))
        };
        if !owner && taken() && !self.mended.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.inner.save(note)?;
        // It is there, and whoever saved it does not know.
        if owner { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    fn load(&self) -> io::Result<Option<Note>> {
        self.inner.load()
    }
}

#[test]
fn a_token_is_not_refused_while_a_restart_would_find_a_note_that_it_was_taken() {
    let dir = tempfile::tempdir().unwrap();
    let mended = Arc::new(AtomicBool::new(false));
    let ledger = Stubborn { inner: note(dir.path()), mended: mended.clone() };
    let receiver = Receiver::new(vec![there("disk")], with_ledger(ledger));
    let server = serve(&receiver);
    let volume = owned("disk", noise(SIZE, 5), 4096);
    let host = Arc::new(Host::default());
    let outbound = start(&[volume], server.address(), &host, source_options(Config::default()));
    receiver.host.wait_for(|seen| matches!(seen, Seen::Trouble(text) if text.contains("refused")));
    let standing = note(dir.path()).load().unwrap().unwrap().standing;
    assert!(matches!(standing, Standing::Owner { .. }), "{standing}");
    assert!(!outbound.is_over() && !host.seen().contains(&Seen::Resume));
    mended.store(true, Ordering::SeqCst);
    assert!(outbound.wait().unwrap_err().owned);
    receiver.session(1).wait().unwrap_err();
    let standing = note(dir.path()).load().unwrap().unwrap().standing;
    assert!(matches!(standing, Standing::Receiving { .. }), "{standing}");
}

#[test]
fn a_session_that_somebody_waits_for_is_found_by_its_source_though_others_have_come_since() {
    let (device, target) = (noise(16 * MIB, 6), Arc::new(Memory::new(16 * MIB)));
    let receiver =
        Receiver::new(vec![empty("disk", target.clone(), 4096), there("other")], quick());
    let server = serve(&receiver);
    let tap = Tap::new(Some(server.address()));
    let cut = Arc::new(AtomicBool::new(false));
    let once = cut.clone();
    // The token arrives, and what it leaves behind does not.
    let token = AtomicBool::new(false);
    tap.at_each_frame(move |_, way, frame| {
        if way == Way::Out && frame[0] == TOKEN {
            token.store(true, Ordering::SeqCst);
        } else if token.load(Ordering::SeqCst) {
            return once.swap(true, Ordering::SeqCst);
        }
        true
    });
    let volume = owned("disk", device.clone(), 4096);
    let options = source_options(Config::default());
    let outbound = start(&[volume], tap.address, &Arc::default(), options);
    outbound.switch();
    let session = receiver.session(1);
    let waiting = thread::spawn(move || session.wait());
    until("the cut", || cut.load(Ordering::SeqCst));
    let other = owned("other", noise(SIZE, 7), 4096);
    start(&[other], server.address(), &Arc::default(), source_options(Config::default()))
        .wait()
        .unwrap();
    receiver.session(2).wait().unwrap();
    tap.mend();
    outbound.wait().unwrap();
    waiting.join().unwrap().unwrap();
    same(&*device, &*target);
}

/// A source that is played by hand.
struct Played {
    link: Link,
}

impl Played {
    /// Both ends have said what they have.
    fn begin(server: &Server, session: SessionId) -> Self {
        let mut source = Self { link: dial(server.address()).link(session, 1).unwrap() };
        source.say(&ToDestination::Hello { version: VERSION, session });
        source.say(&ToDestination::Group(vec![DeviceInfo {
            name: name("disk"),
            geometry: Geometry::new(SIZE, 4096).unwrap(),
            base: None,
            history: vec![Term { id: SessionId([8; 16]), first: Epoch(1) }],
            clock: Epoch(1),
        }]));
        source.hear(|word| matches!(word, ToSource::Have { .. }).then_some(()));
        source
    }

    fn say(&mut self, message: &ToDestination) {
        let outgoing = &mut self.link.control.outgoing;
        wire::write_to_destination(outgoing, message).unwrap();
        outgoing.flush().unwrap();
    }

    /// What comes next that `wanted` gives something for.
    fn hear<T>(&mut self, wanted: impl Fn(ToSource) -> Option<T>) -> T {
        loop {
            let frame = self.link.control.incoming.read().unwrap();
            if let Some(found) = wire::read_to_source(&frame).unwrap().and_then(&wanted) {
                return found;
            }
        }
    }
}

/// A frame as it is on a plaintext line.
fn frame(message: &ToDestination) -> Vec<u8> {
    let mut writer = wire::FrameWriter::new(Vec::new(), true);
    wire::write_to_destination(&mut writer, message).unwrap();
    writer.flush().unwrap();
    std::mem::take(writer.inner())
}

#[test]
fn a_last_word_is_heard_though_the_end_of_another_connection_was_noticed_before() {
    let receiver = Receiver::new(vec![there("disk")], quick());
    let server = serve(&receiver);
    let session = SessionId([9; 16]);
    let mut source = Played::begin(&server, session);
    let epoch = Epoch(1);
    let devices = vec![LastRound { epoch, blocks: Vec::new(), flushes: Vec::new() }];
    source.say(&ToDestination::Token { attempt: 1, devices, state: Vec::new() });
    let all = BlockRange::new(0, SIZE / 4096);
    let header = BlockHeader { device: DeviceIndex(0), range: all, epoch, class: Class::Bulk };
    let data = &mut source.link.data[0].outgoing;
    Blocks::write_zeros(data, &header).unwrap();
    data.flush().unwrap();
    source.hear(|word| matches!(word, ToSource::Durable { .. }).then_some(()));
    // Half of the word is there when a connection for blocks ends, and the other half comes when
    // the destination has given the link up.
    let released = frame(&ToDestination::Released);
    let (one, two) = released.split_at(released.len() / 2);
    source.link.control.outgoing.inner().write_all(one).unwrap();
    source.link.data[0].outgoing.inner().finish().unwrap();
    while source.link.control.incoming.read().is_ok() {}
    source.link.control.outgoing.inner().write_all(two).unwrap();
    source.link.control.outgoing.inner().finish().unwrap();
    let began = Instant::now();
    receiver.session(1).wait().unwrap();
    assert!(began.elapsed() < SOON, "it did not hear that the source has gone");
}

#[test]
fn a_peer_that_speaks_on_over_a_link_that_was_given_up_is_not_listened_to_for_ever() {
    let receiver = Receiver::new(vec![there("disk")], quick());
    let server = serve(&receiver);
    let session = SessionId([7; 16]);
    let mut source = Played::begin(&server, session);
    source.link.data[0].outgoing.inner().finish().unwrap();
    let began = Instant::now();
    // It is heard out for a while, then the line is gone.
    let alive = frame(&ToDestination::Alive);
    while source.link.control.outgoing.inner().write_all(&alive).is_ok() {
        assert!(began.elapsed() < SOON, "it is listened to still");
        thread::park_timeout(Duration::from_millis(20));
    }
}

/// Kinds are what the line carries: a word that is renamed is found here.
#[test]
fn the_kinds_that_these_tests_wait_for_are_those_on_the_line() {
    let kind = |message: &ToDestination| frame(message)[0];
    assert_eq!(kind(&ToDestination::Released), RELEASED);
    let token = ToDestination::Token { attempt: 1, devices: Vec::new(), state: Vec::new() };
    assert_eq!(kind(&token), TOKEN);
    let mut writer = wire::FrameWriter::new(Vec::new(), true);
    let refused = ToSource::Refused { attempt: 1, reason: Reason::Cancelled("no".into()) };
    wire::write_to_source(&mut writer, &refused).unwrap();
    writer.flush().unwrap();
    assert_eq!(writer.inner()[0], REFUSED);
}
