use super::*;
use crate::peer::{Arrival, Dial, Limits, Listener};
use identity::{HostName, Security};
use silo_block::{geometry::Geometry, io::BlockDevice};
use std::{
    fs,
    net::TcpListener,
    path::PathBuf,
    sync::{Barrier, mpsc},
    thread,
};

const WAIT: Duration = Duration::from_secs(20);
const BLOCK: usize = 4096;

/// A store: a folder of files named by hash.
struct Folder(PathBuf, &'static str);

impl Folder {
    fn put(&self, content: &[u8]) {
        fs::write(self.file(&Naming::Plain.name(content)), content).unwrap();
    }

    fn file(&self, hash: &BlockHash) -> PathBuf {
        let hex: String = hash.0.iter().map(|byte| format!("{byte:02x}")).collect();
        self.0.join(hex)
    }
}

impl Fetch for Folder {
    fn name(&self) -> &str {
        self.1
    }

    fn fetch(&self, wanted: &Wanted, buf: &mut [u8], _: &Cancel) -> Result<(), FetchError> {
        let content = match fs::read(self.file(&wanted.hash)) {
            Ok(content) => content,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(FetchError::Missing);
            }
            Err(error) => return Err(error.into()),
        };
        if content.len() != buf.len() {
            return Err(io::Error::other("an object of another length").into());
        }
        buf.copy_from_slice(&content);
        Ok(())
    }
}

/// Answers when it is told to, or when it is cancelled.
struct Stuck(Barrier, Mutex<Vec<BlockIndex>>, AtomicBool);

impl Fetch for Stuck {
    fn name(&self) -> &str {
        "stuck"
    }

    fn fetch(&self, wanted: &Wanted, _: &mut [u8], cancel: &Cancel) -> Result<(), FetchError> {
        self.1.lock().unwrap().push(wanted.block);
        self.0.wait();
        while !cancel.is_set() && !self.2.load(Ordering::Acquire) {
            thread::yield_now();
        }
        if cancel.is_set() { Err(FetchError::Cancelled) } else { Err(FetchError::Missing) }
    }
}

fn content(number: u64) -> Vec<u8> {
    (0..BLOCK as u64).map(|at| (((at ^ number) * 2_654_435_761) >> 13) as u8).collect()
}

fn wanted(number: u64) -> Wanted {
    Wanted {
        device: DeviceName::new("root").unwrap(),
        block: BlockIndex(number),
        offset: number * BLOCK as u64,
        hash: Naming::Plain.name(&content(number)),
        length: BLOCK,
    }
}

type Got = mpsc::Receiver<(Key, Option<Vec<u8>>)>;

fn assist(places: Vec<Arc<dyn Fetch>>, policy: Policy) -> (Assist, Got) {
    let (sender, receiver) = mpsc::channel();
    let assist = Assist::new(places, policy, Naming::Plain, move |key, _, answer| {
        let content = match answer {
            Answer::Content(content) => Some(content.to_vec()),
            Answer::Nowhere => None,
        };
        let _ = sender.send((key, content));
    });
    (assist.unwrap(), receiver)
}

fn key(number: u64) -> Key {
    (0, BlockIndex(number))
}

#[test]
fn check_15_a_wrong_missing_or_cut_object_is_detected_and_the_block_comes_from_elsewhere() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let first = Folder(one.path().to_owned(), "first");
    let second = Folder(two.path().to_owned(), "second");
    (0..5).for_each(|n| first.put(&content(n)));
    (0..4).for_each(|n| second.put(&content(n)));
    let at = |n: u64| first.file(&wanted(n).hash);
    fs::write(at(1), content(77)).unwrap();
    fs::write(at(2), &content(2)[..100]).unwrap();
    fs::remove_file(at(3)).unwrap();
    fs::write(at(4), vec![0; BLOCK]).unwrap();
    let (assist, got) = assist(vec![Arc::new(first), Arc::new(second)], Policy::default());
    (0..5).for_each(|n| assist.want(key(n), wanted(n), n % 2 == 0));
    let mut all: Vec<_> = (0..5).map(|_| got.recv_timeout(WAIT).unwrap()).collect();
    all.sort_by_key(|(key, _)| *key);
    for (n, (_, answer)) in all.iter().enumerate().take(4) {
        assert_eq!(answer.as_ref(), Some(&content(n as u64)), "block {n}");
    }
    // Wrong in one place and missing in the other: said so, and the source has to send it.
    assert_eq!(all[4], (key(4), None));
    let counts = assist.counts();
    assert_eq!((counts.fetched, counts.wrong, counts.given_up), (4, 2, 1), "{counts:?}");
    assert_eq!((counts.failed, counts.missing), (1, 2), "{counts:?}");
}

#[test]
fn check_12_a_demanded_block_goes_first_and_a_place_that_stalls_is_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let store = Folder(dir.path().to_owned(), "store");
    (0..20).for_each(|n| store.put(&content(n)));
    let stuck = Arc::new(Stuck(Barrier::new(2), Mutex::default(), AtomicBool::new(false)));
    let policy = Policy { threads: 1, hedge: Duration::from_secs(3600) };
    let (assist, got) = assist(vec![stuck.clone(), Arc::new(store)], policy);
    (0..20).for_each(|n| assist.want(key(n), wanted(n), false));
    // The first is being asked for; meanwhile somebody waits for number 15.
    stuck.0.wait();
    assert!(assist.urge(key(15)));
    assert!(!assist.urge(key(99)));
    stuck.2.store(true, Ordering::Release);
    let releaser = {
        let stuck = stuck.clone();
        thread::spawn(move || {
            for _ in 1..20 {
                stuck.0.wait();
            }
        })
    };
    for _ in 0..20 {
        assert!(got.recv_timeout(WAIT).unwrap().1.is_some());
    }
    releaser.join().unwrap();
    assert_eq!(stuck.1.lock().unwrap()[..2], [BlockIndex(0), BlockIndex(15)]);
}

#[test]
fn a_slow_place_is_hedged_by_the_next_and_the_loser_is_cancelled() {
    let dir = tempfile::tempdir().unwrap();
    let store = Folder(dir.path().to_owned(), "store");
    store.put(&content(1));
    let stuck = Arc::new(Stuck(Barrier::new(1), Mutex::default(), AtomicBool::new(false)));
    let policy = Policy { threads: 2, hedge: Duration::from_millis(20) };
    let (assist, got) = assist(vec![stuck, Arc::new(store)], policy);
    assist.want(key(1), wanted(1), true);
    assert_eq!(got.recv_timeout(WAIT).unwrap().1, Some(content(1)));
    let counts = assist.counts();
    assert_eq!((counts.hedged, counts.fetched), (1, 1));
    // Dropping joins the threads: the loser was told, or this would never end.
    drop(assist);
}

#[test]
fn a_block_that_comes_from_the_source_cancels_its_fetch() {
    let stuck = Arc::new(Stuck(Barrier::new(2), Mutex::default(), AtomicBool::new(false)));
    let (assist, got) = assist(vec![stuck.clone()], Policy::default());
    assist.want(key(1), wanted(1), false);
    stuck.0.wait();
    assert!(assist.arrived(key(1)));
    assert!(!assist.arrived(key(1)));
    assert_eq!(assist.counts().cancelled, 1);
    drop(assist);
    assert!(got.try_recv().is_err(), "a late answer is no answer");
}

/// A device in memory.
struct Memory(Mutex<Vec<u8>>);

impl BlockDevice for Memory {
    fn size(&self) -> u64 {
        self.0.lock().unwrap().len() as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.copy_from_slice(&self.0.lock().unwrap()[offset as usize..][..buf.len()]);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn trim(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn zero(&self, offset: u64, length: u64, _: bool) -> io::Result<()> {
        self.0.lock().unwrap()[offset as usize..][..length as usize].fill(0);
        Ok(())
    }
}

#[test]
fn blocks_come_from_several_peers_by_hash_over_real_connections() {
    let plain = || Security::Plaintext;
    let mut places: Vec<Arc<dyn Fetch>> = Vec::new();
    let mut listeners = Vec::new();
    let mut servers = Vec::new();
    // Each peer has every other block, at other places than they are wanted at.
    for peer in 0..2u64 {
        let mut bytes = Vec::new();
        (0..32).filter(|n| n % 2 == peer).for_each(|n| bytes.extend(content(31 - n)));
        let device = Arc::new(Memory(Mutex::new(bytes)));
        let index = Arc::new(HashIndex::default());
        let geometry = Geometry::new(device.size(), BLOCK as u32).unwrap();
        index.add(device.clone(), geometry).unwrap();
        if peer == 0 {
            // Written since it was indexed: missing, not wrong.
            device.write_at(0, &[1, 2, 3]).unwrap();
        }
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let listener = Listener::new(socket, plain(), Limits::default(), |_| true).unwrap();
        let name = HostName::new("peer").unwrap();
        let dial = Dial::new(listener.address(), name, plain(), Limits::default());
        places.push(Arc::new(PeerFetch::new(dial, WAIT)));
        let listener = Arc::new(listener);
        listeners.push(listener.clone());
        servers.push(thread::spawn(move || {
            let mut serving = Vec::new();
            while let Ok(arrival) = listener.accept(Duration::from_secs(2)) {
                let Arrival::Fetch(connection) = arrival else { panic!("a session") };
                let index = index.clone();
                serving.push(thread::spawn(move || serve_fetch(*connection, &*index, WAIT)));
            }
            serving.into_iter().for_each(|thread| thread.join().unwrap().unwrap());
        }));
    }
    let (assist, got) = assist(places, Policy::default());
    (0..32).for_each(|n| assist.want(key(n), wanted(n), false));
    let mut nowhere = Vec::new();
    for _ in 0..32 {
        match got.recv_timeout(WAIT).unwrap() {
            ((_, block), Some(bytes)) => assert_eq!(bytes, content(block.0)),
            ((_, block), None) => nowhere.push(block),
        }
    }
    assert_eq!(nowhere, [BlockIndex(31)]);
    assert_eq!(assist.counts().fetched, 31);
    assert_eq!(assist.counts().wrong, 0);
    drop(assist);
    servers.into_iter().for_each(|thread| thread.join().unwrap());
}
