//! Post-copy over connections that break again and again: both ends as they run, with real sockets,
//! disks and a lease file; only the machine is left out.

use super::{
    again::Greeter,
    destination::{self, Continuation, Demands, DestinationMachine, Door, Fate, Freezer},
    link::{Channel, new_session, session_hex},
    messages::{ResumeRequest, Standing},
    protocol::{DeviceNumber, Frame, Role, SessionId},
    source::{self, Kept, MachineError, Place, Recovered},
    switchover::{DestinationParts, Holding, SourceAuthority, Terms},
};
use crate::lease::{
    AttemptId, BootClock, BootTime, Clock, Epoch, FileStore, HandingTo, HostName, LeaseStore,
    MachineName, Nonce, Record,
};
use identity::{Control, Security, Stream};
use silo::{
    block::{BLOCK_SIZE, BlockIndex, BlockRange, BlockSet},
    device::{Device, DeviceName},
    disk::{Disk, DiskOptions},
    memory::FaultSummary,
};
use std::{
    collections::HashMap,
    net::{SocketAddr, TcpListener},
    path::Path,
    sync::{Arc, Mutex, atomic::AtomicBool},
    thread,
    time::{Duration, Instant},
};

const ATTEMPT: u64 = 7;
const BLOCKS: u64 = 4096;

/// Never called: the machine is in nobody's hands here.
struct Nobody;

impl DestinationMachine for Nobody {
    fn devices(&self) -> Vec<Arc<dyn Device>> {
        Vec::new()
    }
    fn expect(&mut self, _: Duration) {}
    fn load(&mut self, _: &[u8]) -> Result<(), MachineError> {
        Ok(())
    }
    fn run(&mut self) -> Result<(), MachineError> {
        Ok(())
    }
    fn own(&mut self, _: u64, _: u64) {}
    fn release_output(&mut self) -> Result<(), MachineError> {
        Ok(())
    }
    fn faults(&self) -> Box<dyn Fn() -> FaultSummary + Send + Sync> {
        Box::new(FaultSummary::default)
    }
    fn freezer(&self) -> Arc<dyn Freezer> {
        Arc::new(Self)
    }
}

impl Freezer for Nobody {
    fn freeze(&self) -> Result<(), String> {
        Ok(())
    }
    fn thaw(&self) -> Result<(), String> {
        Ok(())
    }
    fn run_until(&self, _: Option<BootTime>) -> Result<(), String> {
        Ok(())
    }
    fn lease_asked(&self) {}
}

fn host(name: &str) -> HostName {
    HostName::new(name).unwrap()
}

fn disk(folder: &Path) -> Arc<Disk> {
    let options = DiskOptions::new(DeviceName::new("root").unwrap());
    Arc::new(Disk::create(folder, None, BLOCKS * BLOCK_SIZE as u64, &options).unwrap())
}

fn content(block: u64) -> Vec<u8> {
    // Every seventh block is zero.
    let byte = if block.is_multiple_of(7) { 0 } else { (block % 251) as u8 + 1 };
    vec![byte; BLOCK_SIZE]
}

/// In which blocks the machine had changed since its last generation.
fn changed() -> BlockSet {
    let mut changed = BlockSet::new(BLOCKS);
    changed.insert_range(BlockRange::new(3000, 64));
    changed.insert_range(BlockRange::new(1, 1));
    changed
}

/// The destination's listener, as the runner has it, and a way to break what it accepted.
struct Peers {
    address: SocketAddr,
    open: Arc<Mutex<Vec<Control>>>,
}

impl Peers {
    fn listen(door: Arc<Door>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let open = Arc::<Mutex<Vec<Control>>>::default();
        let kept = Arc::clone(&open);
        thread::spawn(move || {
            let mut halves: HashMap<[u8; 16], (Role, Channel)> = HashMap::new();
            while let Ok((socket, _)) = listener.accept() {
                let plain = Security::Plaintext;
                let limit = Duration::from_secs(5);
                let Ok(stream) = Stream::server(socket, &plain, limit) else { continue };
                let Ok((channel, preamble)) = Channel::accept(stream, &plain) else { continue };
                kept.lock().unwrap().push(channel.control.clone());
                let Some((role, other)) = halves.remove(&preamble.session.0) else {
                    halves.insert(preamble.session.0, (preamble.role, channel));
                    continue;
                };
                let (mut main, fault) = match role {
                    Role::Main => (other, channel),
                    Role::Fault => (channel, other),
                };
                if let Ok(Frame::Resume(json)) = main.incoming.read() {
                    let request: ResumeRequest = serde_json::from_slice(&json).unwrap();
                    door.knock(&request, None, main, fault);
                }
            }
        });
        Self { address, open }
    }

    fn cut(&self) {
        self.open.lock().unwrap().drain(..).for_each(|control| control.shutdown());
    }
}

struct Ends {
    folder: tempfile::TempDir,
    store: Arc<dyn LeaseStore>,
    record: Record,
    session: SessionId,
}

impl Ends {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let machine = MachineName::new("m").unwrap();
        let first = Record::first(machine.clone(), host("a"), AttemptId(1), Nonce(1));
        let record = Record {
            epoch: Epoch(2),
            owner: host("b"),
            attempt: AttemptId(ATTEMPT),
            nonce: Nonce(2),
            ..first
        };
        let store = FileStore::open(&folder.path().join("leases"), Duration::from_secs(5)).unwrap();
        store.compare_and_set(&machine, None, &record).unwrap();
        Self { folder, store: Arc::new(store), record, session: new_session().unwrap() }
    }

    fn door(&self) -> Arc<Door> {
        Door::new(Greeter::new("m".into(), host("a"), ATTEMPT, session_hex(self.session)))
    }

    fn place(&self, to: SocketAddr) -> Place {
        Place {
            machine: "m".into(),
            host: "a".into(),
            attempt: ATTEMPT,
            session: self.session,
            to,
            peer: host("b"),
            security: Security::Plaintext,
            round_trip: Duration::ZERO,
            resumes: true,
        }
    }

    fn source(
        &self,
        to: SocketAddr,
        devices: Vec<Arc<dyn Device>>,
        cancel: &Arc<AtomicBool>,
    ) -> Kept {
        let history = || {
            let (said, told) = std::sync::mpsc::channel();
            said.send(Some((b"mark".to_vec(), vec![changed()]))).unwrap();
            Some(told)
        };
        let (authority, _) = SourceAuthority::recover(
            BootClock.now(),
            &host("a"),
            self.record.clone(),
            Terms::default(),
            Box::new(|| Nonce(9)),
        );
        source::keep(Recovered {
            place: self.place(to),
            authority,
            store: Arc::clone(&self.store),
            devices,
            flush: &mut || Ok(()),
            cancel: Arc::clone(cancel),
            outage: &|_| {},
            history: Some(&history),
        })
    }
}

#[test]
fn blocks_arrive_whole_over_lines_that_break_again_and_again_and_the_source_is_released() {
    let ends = Ends::new();
    let source = disk(&ends.folder.path().join("source"));
    source.begin().unwrap();
    for block in 0..BLOCKS {
        source.store(BlockIndex(block), &content(block)).unwrap();
    }
    let here = disk(&ends.folder.path().join("destination"));
    here.begin().unwrap();
    let devices: Vec<Arc<dyn Device>> = vec![here.clone()];
    let demands = Demands::new(&devices, None);
    here.arm(&BlockSet::full(BLOCKS), demands.of(DeviceNumber(0))).unwrap();

    let door = ends.door();
    let peers = Peers::listen(Arc::clone(&door));
    let noted = Arc::new(AtomicBool::new(false));
    let released = Arc::new(AtomicBool::new(false));
    let (hears, heard) = std::sync::mpsc::channel();
    let continuation = Continuation {
        devices,
        demands,
        door: Arc::clone(&door),
        holding: Holding::new(ends.record.clone()),
        parts: DestinationParts {
            machine: MachineName::new("m").unwrap(),
            here: host("b"),
            from: host("a"),
            attempt: AttemptId(ATTEMPT),
            beat: None,
            terms: Terms::default(),
            nonces: Box::new(|| Nonce(8)),
        },
        store: Arc::clone(&ends.store),
        freezer: Arc::new(Nobody),
        faults: Box::new(FaultSummary::default),
        on_history: {
            let here = Arc::clone(&here);
            Box::new(move |told| hears.send((told, here.missing_blocks())).unwrap())
        },
        on_release: {
            let released = Arc::clone(&released);
            Box::new(move || released.store(true, std::sync::atomic::Ordering::SeqCst))
        },
        on_complete: {
            let noted = Arc::clone(&noted);
            Box::new(move || noted.store(true, std::sync::atomic::Ordering::SeqCst))
        },
    };
    let cancel = Arc::new(AtomicBool::new(false));
    thread::scope(|scope| {
        let arriving = scope.spawn(|| destination::go_on::<Nobody>(continuation));
        let devices: Vec<Arc<dyn Device>> = vec![source.clone()];
        let kept = scope.spawn(|| ends.source(peers.address, devices, &cancel));
        // Each time some more has come; also while somebody waits for the very last block.
        let mut left = BLOCKS;
        let deadline = Instant::now() + Duration::from_secs(60);
        for cut in 0..6 {
            if cut == 3 {
                let waited = Arc::clone(&here);
                scope.spawn(move || {
                    let mut block = [0; BLOCK_SIZE];
                    let last = (BLOCKS - 1) * BLOCK_SIZE as u64;
                    silo::io::BlockDevice::read_at(&*waited, last, &mut block).unwrap();
                    assert_eq!(block[..], content(BLOCKS - 1));
                });
            }
            while here.missing_blocks() >= left && left > 0 && Instant::now() < deadline {
                thread::yield_now();
            }
            left = here.missing_blocks();
            peers.cut();
        }
        let kept = kept.join().unwrap();
        assert!(matches!(kept, Kept::Released { epoch: 2 }), "{kept:?}");
        let fate = arriving.join().unwrap();
        assert!(matches!(fate, Fate::Settled(_)), "{fate:?}");
    });
    assert!(here.is_complete() && here.missing_blocks() == 0);
    for block in 0..BLOCKS {
        let mut found = vec![0; BLOCK_SIZE];
        here.read(BlockIndex(block), &mut found).unwrap();
        assert_eq!(found, content(block), "block {block}");
    }
    assert!(noted.load(std::sync::atomic::Ordering::SeqCst));
    assert!(released.load(std::sync::atomic::Ordering::SeqCst));
    // It was told once, and while blocks were missing, which of them only the source had.
    let (told, missing) = heard.try_recv().unwrap();
    let told = told.unwrap();
    assert_eq!((&told.mark[..], &told.changed[..]), (&b"mark"[..], &[changed()][..]));
    assert!(missing > 0 && heard.try_recv().is_err(), "{missing}");

    // A source whose release got lost, or that was restarted, hears it when it asks.
    let devices: Vec<Arc<dyn Device>> = vec![source];
    let again = ends.source(peers.address, devices, &cancel);
    assert!(matches!(again, Kept::Released { epoch: 2 }), "{again:?}");
}

#[test]
fn a_source_that_nobody_knows_keeps_everything_until_a_person_gives_the_destination_up() {
    let ends = Ends::new();
    let stranger = Door::new(Greeter::new("m".into(), host("a"), ATTEMPT + 1, "other".into()));
    let peers = Peers::listen(stranger);
    let source: Arc<dyn Device> = disk(&ends.folder.path().join("source"));
    let cancel = Arc::new(AtomicBool::new(false));
    let (told, heard) = std::sync::mpsc::channel();
    thread::scope(|scope| {
        let kept = scope.spawn(|| {
            let (authority, _) = SourceAuthority::recover(
                BootClock.now(),
                &host("a"),
                ends.record.clone(),
                Terms::default(),
                Box::new(|| Nonce(9)),
            );
            source::keep(Recovered {
                place: ends.place(peers.address),
                authority,
                store: Arc::clone(&ends.store),
                devices: vec![source.clone()],
                flush: &mut || Ok(()),
                cancel: Arc::clone(&cancel),
                outage: &|outage| drop(told.send(outage)),
                history: None,
            })
        });
        let reason = loop {
            let outage = heard.recv_timeout(Duration::from_secs(30)).unwrap();
            match outage {
                Some(outage) if outage.reason.contains("does not take the move up") => {
                    break outage.reason;
                }
                _ => {}
            }
        };
        assert!(reason.contains("attempt 7"), "{reason}");
        cancel.store(true, std::sync::atomic::Ordering::Relaxed);
        let kept = kept.join().unwrap();
        let Kept::Paused(error) = kept else { panic!("{kept:?}") };
        assert!(error.to_string().contains("do not remove it"), "{error}");
    });
}

#[test]
fn a_source_that_comes_back_to_a_machine_that_never_left_takes_it_back_when_the_offer_is_over() {
    let mut ends = Ends::new();
    // The token is out, the destination is gone, and the lease still says "handing over".
    let machine = MachineName::new("m").unwrap();
    let handing = Record {
        owner: host("a"),
        handing_to: Some(HandingTo { attempt: AttemptId(ATTEMPT), to: host("b") }),
        nonce: Nonce(3),
        ..ends.record.clone()
    };
    ends.store.compare_and_set(&machine, Some(&ends.record), &handing).unwrap();
    ends.record = handing;
    let source: Arc<dyn Device> = disk(&ends.folder.path().join("source"));
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let offer = Duration::from_millis(300);
    let began = Instant::now();
    let mut terms = Terms::default();
    terms.longest_offer = offer;
    let (authority, _) = SourceAuthority::recover(
        BootClock.now(),
        &host("a"),
        ends.record.clone(),
        terms,
        Box::new(|| Nonce(9)),
    );
    let kept = source::keep(Recovered {
        place: ends.place(nobody),
        authority,
        store: Arc::clone(&ends.store),
        devices: vec![source],
        flush: &mut || Ok(()),
        cancel: Arc::default(),
        outage: &|_| {},
        history: None,
    });
    let Kept::GoOn { holding, .. } = kept else { panic!("{kept:?}") };
    assert!(began.elapsed() >= offer, "it did not wait for the end of the offer");
    assert_eq!((holding.record.epoch, holding.record.owner), (Epoch(3), host("a")));
    assert_eq!(ends.store.read(&machine).unwrap().unwrap().epoch, Epoch(3));
}

#[test]
fn hop_check_12_a_stranger_is_told_nothing_and_an_ended_move_tells_how_it_ended() {
    use super::messages::ResumeAnswer;
    let ends = Ends::new();
    let door = ends.door();
    let peers = Peers::listen(Arc::clone(&door));
    door.end(&ResumeAnswer::of(Standing::Refused, "by the test"));
    let ask = |host_name: &str| {
        let name = new_session().unwrap();
        let plain = Security::Plaintext;
        let limit = Duration::from_secs(5);
        let (mut main, _fault) =
            super::link::connect_both(peers.address, &host("b"), &plain, name, limit).unwrap();
        let request = ResumeRequest {
            machine: "m".into(),
            host: host_name.into(),
            attempt: ATTEMPT,
            session: session_hex(ends.session),
            life: 1,
            serial: 1,
        };
        let json = serde_json::to_vec(&request).unwrap();
        main.outgoing.write(&Frame::Resume(json)).unwrap();
        main.outgoing.flush().unwrap();
        let Frame::Resumed(json) = main.incoming.read().unwrap() else { panic!("no answer") };
        serde_json::from_slice::<ResumeAnswer>(&json).unwrap()
    };
    assert_eq!(ask("c").standing, Standing::Unknown);
    let answer = ask("a");
    assert_eq!((answer.standing, answer.reason.as_str()), (Standing::Refused, "by the test"));
    assert_eq!(ask("a").standing, Standing::Unknown, "the same greeting once more");
}
