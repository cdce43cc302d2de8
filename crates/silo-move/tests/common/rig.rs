//! Two ends of a move in one process, over real connections.

use super::WAIT;
use identity::{HostName, Security};
use silo_block::{
    device::DeviceName,
    io::BlockDevice,
    session::{LinkId, Patience, messages::SessionId, source::Config},
};
use silo_move::{
    Content, Inbound, Outbound, Server, Volume,
    destination::{self, Accepted, DestinationHost, Offer, Reception},
    peer::{Dial, Limits, Listener},
    source::{self, Handover, SourceHost},
};
use std::{
    net::{SocketAddr, TcpListener},
    sync::{Arc, Condvar, Mutex},
    time::{Duration, Instant},
};

/// Something that happened at an end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Writers were asked to pause.
    Quiesce,
    /// Writers may go on.
    Resume,
    /// The destination runs.
    HandedOver,
    /// It runs here.
    Run(u32, Vec<u8>, Vec<Vec<u64>>),
    /// All is durable.
    Durable,
    /// A custom event.
    Custom(u32, Vec<u8>),
    /// Something is wrong while it runs.
    Trouble(String),
    /// Something takes long.
    Overdue(String),
}

/// A host that notes what it is asked, and can be told what to answer.
#[derive(Default)]
pub struct Host {
    seen: Mutex<Vec<Seen>>,
    changed: Condvar,
    /// What goes with the token.
    pub handover: Mutex<Handover>,
    /// Why it cannot pause, or run.
    pub refuse: Mutex<Option<String>>,
    /// The lease says that the other end will never own the devices.
    pub reclaim: Mutex<bool>,
    /// Called when writers are to pause.
    pub on_quiesce: Mutex<Option<Box<dyn FnMut() + Send>>>,
}

impl Host {
    fn note(&self, seen: Seen) {
        self.seen.lock().unwrap().push(seen);
        self.changed.notify_all();
    }

    /// All that was seen.
    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    /// Waits until something was seen.
    pub fn wait_for(&self, what: impl Fn(&Seen) -> bool) -> Seen {
        let begin = Instant::now();
        let mut seen = self.seen.lock().unwrap();
        loop {
            if let Some(found) = seen.iter().find(|seen| what(seen)) {
                return found.clone();
            }
            assert!(begin.elapsed() < WAIT, "not seen; only {seen:?}");
            seen = self.changed.wait_timeout(seen, Duration::from_millis(100)).unwrap().0;
        }
    }
}

impl SourceHost for Host {
    fn quiesce(&self, _: SessionId, _: u32) -> Result<Handover, String> {
        if let Some(call) = &mut *self.on_quiesce.lock().unwrap() {
            call();
        }
        self.note(Seen::Quiesce);
        match &*self.refuse.lock().unwrap() {
            Some(why) => Err(why.clone()),
            None => Ok(self.handover.lock().unwrap().clone()),
        }
    }

    fn resume(&self) {
        self.note(Seen::Resume);
    }

    fn handed_over(&self) {
        self.note(Seen::HandedOver);
    }

    fn reclaimed(&self) -> bool {
        *self.reclaim.lock().unwrap()
    }

    fn custom(&self, kind: u32, payload: &[u8]) {
        self.note(Seen::Custom(kind, payload.to_vec()));
    }

    fn overdue(&self, what: &str) {
        self.note(Seen::Overdue(what.to_owned()));
    }
}

impl DestinationHost for Host {
    fn run(&self, attempt: u32, state: Vec<u8>, flushes: Vec<Vec<u64>>) -> Result<(), String> {
        if let Some(why) = &*self.refuse.lock().unwrap() {
            return Err(why.clone());
        }
        self.note(Seen::Run(attempt, state, flushes));
        Ok(())
    }

    fn durable(&self) {
        self.note(Seen::Durable);
    }

    fn custom(&self, kind: u32, payload: &[u8]) {
        self.note(Seen::Custom(kind, payload.to_vec()));
    }

    fn trouble(&self, what: &str) {
        self.note(Seen::Trouble(what.to_owned()));
    }

    fn overdue(&self, what: &str) {
        self.note(Seen::Overdue(what.to_owned()));
    }
}

/// A host that takes what is offered into its own volumes of the same names.
pub struct Receiver {
    /// Who runs.
    pub host: Arc<Host>,
    /// Its volumes.
    pub volumes: Mutex<Vec<Arc<Volume>>>,
    /// How sessions behave.
    pub options: Mutex<destination::Options>,
    sessions: Mutex<Vec<Arc<Inbound>>>,
    changed: Condvar,
}

impl Receiver {
    /// With these volumes.
    pub fn new(volumes: Vec<Arc<Volume>>, options: destination::Options) -> Arc<Self> {
        Arc::new(Self {
            host: Arc::default(),
            volumes: Mutex::new(volumes),
            options: Mutex::new(options),
            sessions: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    /// The newest session, once there are so many.
    pub fn session(&self, number: usize) -> Arc<Inbound> {
        let sessions = self.sessions.lock().unwrap();
        let few = |sessions: &mut Vec<Arc<Inbound>>| sessions.len() < number;
        let (sessions, waited) = self.changed.wait_timeout_while(sessions, WAIT, few).unwrap();
        assert!(!waited.timed_out(), "no session {number}");
        sessions[number - 1].clone()
    }
}

impl Reception for Receiver {
    fn receive(&self, offer: &Offer<'_>) -> Result<Accepted, String> {
        let volumes = self.volumes.lock().unwrap();
        let find = |name: &DeviceName| volumes.iter().find(|volume| volume.name() == name).cloned();
        let found: Option<Vec<_>> = offer.devices.iter().map(|info| find(&info.name)).collect();
        Ok(Accepted {
            volumes: found.ok_or("no such device is prepared here")?,
            host: self.host.clone(),
            options: self.options.lock().unwrap().clone(),
            running: None,
        })
    }

    fn began(&self, session: &Arc<Inbound>) {
        self.sessions.lock().unwrap().push(session.clone());
        self.changed.notify_all();
    }
}

/// Limits of connections in tests.
pub fn limits() -> Limits {
    Limits { connect: Duration::from_secs(5), silence: Duration::from_secs(5), ..Limits::default() }
}

/// Short patience, so that tests of failures end soon.
pub fn patience(answer: u64) -> Patience {
    Patience { silence: Duration::from_secs(3), answer: Duration::from_millis(answer) }
}

/// Serves a receiver without TLS.
pub fn serve(receiver: &Arc<Receiver>) -> Server {
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let listener = Listener::new(socket, Security::Plaintext, limits(), |_| true).unwrap();
    Server::new(listener, receiver.clone(), None).unwrap()
}

/// Dials without TLS.
pub fn dial(address: SocketAddr) -> Dial {
    Dial::new(address, HostName::new("b").unwrap(), Security::Plaintext, limits())
}

/// A destination that fetches nothing in advance.
pub fn quick() -> destination::Options {
    let session = silo_block::session::destination::Config {
        prefetch: 0,
        ..silo_block::session::destination::Config::default()
    };
    destination::Options { session, ..destination::Options::default() }
}

/// Options of a source.
pub fn source_options(config: Config) -> source::Options {
    source::Options { session: config, ..source::Options::default() }
}

/// A device's name.
pub fn name(text: &str) -> DeviceName {
    DeviceName::new(text).unwrap()
}

/// A volume that is in use here.
pub fn owned(text: &str, device: Arc<dyn BlockDevice>, block: u32) -> Arc<Volume> {
    let id = source::new_session().unwrap();
    Arc::new(Volume::owned(name(text), device, block, Content::Unknown, id).unwrap())
}

/// A volume that only can arrive.
pub fn empty(text: &str, device: Arc<dyn BlockDevice>, block: u32) -> Arc<Volume> {
    Arc::new(Volume::untouched(name(text), device, block, Content::Zeros).unwrap())
}

/// Starts a move.
pub fn start(
    volumes: &[Arc<Volume>],
    address: SocketAddr,
    host: &Arc<Host>,
    options: source::Options,
) -> Outbound {
    Outbound::start(volumes.to_vec(), dial(address), host.clone(), options).unwrap()
}

/// All bytes of a device.
pub fn bytes(device: &dyn BlockDevice) -> Vec<u8> {
    let mut all = vec![0; device.size() as usize];
    for (at, chunk) in all.chunks_mut(1 << 20).enumerate() {
        device.read_at((at as u64) << 20, chunk).unwrap();
    }
    all
}

/// Fails unless two devices hold the same, and says where they differ first.
pub fn same(a: &dyn BlockDevice, b: &dyn BlockDevice) {
    let (a, b) = (bytes(a), bytes(b));
    assert_eq!(a.len(), b.len());
    let different = a.iter().zip(&b).position(|(a, b)| a != b);
    assert!(different.is_none(), "byte {different:?} differs");
}

/// Unused link numbers.
pub fn link(number: u64) -> LinkId {
    LinkId(number)
}
