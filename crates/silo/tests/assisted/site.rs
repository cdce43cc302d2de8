//! A device with a generation of it in a store, and a move of it to a host that reads the store too.

use crate::common::{content::noise, memory::Memory, rig::*, tap::Tap};
use identity::{HostName, Security};
use silo::{
    assist::{InStore, StorePlace},
    io::BlockDevice,
    moving::{
        Outbound, Server, Volume,
        codec::Naming,
        destination,
        ledger::{FileLedger, Ledger, Note},
        peer::{Dial, Limits},
        source::Stored,
    },
    store::{
        Access, CopyGroup, Environment, Generation, KeyRing, Limits as StoreLimits, LineName,
        LineWriter, ScratchOptions, Store, StoreError, StoreUrl, Which, WriterOptions,
        capture::{Capture, Want},
    },
};
use silo_block::{
    block::BlockIndex,
    device::DeviceName,
    session::{Policy, source::Config},
};
use silo_testing::{Fault, Rule, S3Server};
use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

/// Which store.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    S3,
    Folder,
}

/// The store as an end of the move is told of it.
#[derive(Clone)]
pub(crate) struct Shelf {
    url: StoreUrl,
    environment: Environment,
}

impl Shelf {
    pub(crate) fn of_server(server: &S3Server) -> Self {
        let url = server.url("folder").parse().unwrap();
        Self { url, environment: Environment::given(server.credentials()) }
    }

    /// At an address, with the credentials of the environment.
    pub(crate) fn at(url: &str) -> Self {
        Self { url: url.parse().unwrap(), environment: Environment::of_process() }
    }

    fn store(&self, access: Access) -> Result<Arc<Store>, StoreError> {
        // Not longer than a busy computer needs: some of these stores never answer.
        let limits = StoreLimits {
            request: Duration::from_secs(1),
            slowest: 1 << 20,
            attempts: 2,
            pause: Duration::from_millis(5),
        };
        Store::open(&self.url, access, &self.environment, limits)
    }

    /// Opens the newest generation.
    pub(crate) fn newest(&self) -> Result<Arc<Generation>, StoreError> {
        Generation::open(&self.store(Access::Read)?, &ring(), &line(), Which::Newest, 32 << 20)
    }

    /// Makes a generation of a device.
    pub(crate) fn keep(&self, device: Arc<dyn BlockDevice>) {
        let scratch = ScratchOptions::in_folder(&std::env::temp_dir());
        let group = CopyGroup::new(vec![("disk".to_owned(), 4096, device)], scratch).unwrap();
        let store = self.store(Access::Write).unwrap();
        let mut writer =
            LineWriter::open(store, &ring(), &line(), WriterOptions::default()).unwrap();
        let frozen = group.freeze(Want::Everything).unwrap();
        let halt = AtomicBool::new(false);
        writer.store(&group.devices(), &*frozen, true, "", &halt).unwrap();
        frozen.release();
    }
}

fn ring() -> KeyRing {
    KeyRing::from_keys([("key-1", [1; 32])]).unwrap()
}

fn line() -> LineName {
    LineName::new("acme", "vm").unwrap()
}

/// The note in a file.
pub(crate) fn load(path: &Path) -> Note {
    FileLedger::new(path.to_owned()).load().unwrap().unwrap()
}

/// See the module.
pub(crate) struct Site {
    pub(crate) device: Arc<Memory>,
    pub(crate) volume: Arc<Volume>,
    pub(crate) target: Arc<Memory>,
    pub(crate) server: Option<S3Server>,
    pub(crate) shelf: Shelf,
    promises: Arc<AtomicU64>,
    /// Alive as long as this, whatever a test keeps of a move.
    ends: Mutex<Vec<(Server, Tap)>>,
    _folder: tempfile::TempDir,
}

/// How a move goes.
pub(crate) struct Plan {
    /// Bytes a second for bulk.
    pub(crate) rate: u64,
    pub(crate) policy: Policy,
    /// Hand over at once.
    pub(crate) switch: bool,
    /// The source may go when the store has the rest.
    pub(crate) early: bool,
    /// Milliseconds.
    pub(crate) patience: u64,
    pub(crate) note: Option<PathBuf>,
    /// What says what the store has, in place of the store.
    pub(crate) stored: Option<Arc<dyn Stored>>,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            rate: 1_000_000,
            policy: Policy::default(),
            switch: false,
            early: false,
            patience: 20_000,
            note: None,
            stored: None,
        }
    }
}

/// A move under way.
pub(crate) struct Move {
    pub(crate) outbound: Outbound,
    pub(crate) receiver: Arc<Receiver>,
    pub(crate) there: Arc<Volume>,
    pub(crate) tap: Tap,
}

/// Counts what the source asked a store about, and was told that it is there.
struct Counted(Arc<dyn Stored>, Arc<AtomicU64>);

impl Stored for Counted {
    fn look(&self) -> io::Result<()> {
        self.0.look()
    }

    fn has(&self, device: &DeviceName, block: BlockIndex, content: &[u8]) -> io::Result<bool> {
        let has = self.0.has(device, block, content)?;
        self.1.fetch_add(u64::from(has), Ordering::SeqCst);
        Ok(has)
    }
}

impl Site {
    /// A device of noise, all of it in the store.
    pub(crate) fn new(kind: Kind, size: u64, seed: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (server, shelf) = match kind {
            Kind::S3 => {
                let server = S3Server::start(folder.path()).unwrap();
                let shelf = Shelf::of_server(&server);
                (Some(server), shelf)
            }
            Kind::Folder => {
                let at = folder.path().join("store");
                std::fs::create_dir(&at).unwrap();
                let url = format!("file://{}", at.display()).parse().unwrap();
                (None, Shelf { url, environment: Environment::given([]) })
            }
        };
        let device = noise(size, seed + 100);
        shelf.keep(device.clone());
        Self {
            volume: owned("disk", device.clone(), 4096),
            device,
            target: Arc::new(Memory::new(size)),
            server,
            shelf,
            promises: Arc::default(),
            ends: Mutex::default(),
            _folder: folder,
        }
    }

    /// Every answer of the store comes so much later.
    pub(crate) fn slow(&self, by: Duration) {
        self.server.as_ref().unwrap().faults().add(Rule::all("GET", "packs", Fault::Slow(by)));
    }

    /// Blocks of which the source has found that the store has them.
    pub(crate) fn promises(&self) -> u64 {
        self.promises.load(Ordering::SeqCst)
    }

    /// Options of a destination that reads the store.
    pub(crate) fn options(&self, plan: &Plan) -> destination::Options {
        let shelf = self.shelf.clone();
        let open = Box::new(move || shelf.newest());
        let mut options = quick();
        options.places = vec![Arc::new(StorePlace::new("store", Naming::Plain, open))];
        options.session.early_release = plan.early;
        options.session.patience = patience(plan.patience);
        let note = plan.note.clone();
        options.ledger = note.map(|path| Arc::new(FileLedger::new(path)) as Arc<dyn Ledger>);
        options
    }

    /// Starts it.
    pub(crate) fn start(&self, plan: Plan) -> Move {
        let options = self.options(&plan);
        self.start_with(plan, options)
    }

    /// The same, with a destination that behaves otherwise.
    pub(crate) fn start_with(&self, plan: Plan, options: destination::Options) -> Move {
        let there = empty("disk", self.target.clone(), 4096);
        let receiver = Receiver::new(vec![there.clone()], options);
        let server = serve(&receiver);
        let tap = Tap::new(Some(server.address()));
        let limits = Limits { bandwidth: Some(plan.rate), data: 1, ..limits() };
        let name = HostName::new("b").unwrap();
        let dial = Dial::new(tap.address, name, Security::Plaintext, limits);
        // Little is on its way at a time, or all of it would be before the store is asked.
        let config = Config {
            window: 512 << 10,
            policy: plan.policy,
            patience: patience(plan.patience),
            ..Config::default()
        };
        let mut options = source_options(config);
        let shelf = self.shelf.clone();
        let stored =
            plan.stored.unwrap_or_else(|| Arc::new(InStore::new(Box::new(move || shelf.newest()))));
        options.stored = Some(Arc::new(Counted(stored, self.promises.clone())));
        let volumes = vec![self.volume.clone()];
        let outbound = Outbound::start(volumes, dial, Arc::new(Host::default()), options).unwrap();
        if plan.switch {
            outbound.switch();
        }
        self.ends.lock().unwrap().push((server, tap.clone()));
        Move { outbound, receiver, there, tap }
    }
}
