//! A line between two silos that is watched and can be cut: a relay of plaintext connections that
//! knows where frames begin. It counts what passes, independently of what either end says, and can
//! do something at any message boundary.

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

const GREETING: usize = 16;
const PREAMBLE: usize = 40;
const HEADER: usize = 32;

/// Kinds of frames, as they are on the wire.
pub mod kind {
    /// A run of blocks.
    pub const BLOCKS: u8 = 1;
    /// The token.
    pub const TOKEN: u8 = 37;
    /// The source has gone.
    pub const RELEASED: u8 = 40;
    /// The token is refused.
    pub const REFUSED: u8 = 72;
    /// Somebody waits.
    pub const NEED: u8 = 69;
}

/// Which way a frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// From the side that connects.
    Out,
    /// To it.
    Back,
}

type Deed = Box<dyn FnMut(u64, Way, &[u8]) -> bool + Send>;

#[derive(Default)]
struct State {
    target: Mutex<Option<SocketAddr>>,
    sockets: Mutex<Vec<TcpStream>>,
    down: AtomicBool,
    stop: AtomicBool,
    frames: AtomicU64,
    bytes: AtomicU64,
    kinds: Mutex<BTreeMap<(Way, u8), (u64, u64)>>,
    deed: Mutex<Option<Deed>>,
    /// Bytes a second, all connections together; 0 for no limit.
    rate: AtomicU64,
    /// Frames wait at random up to so many microseconds.
    jitter: AtomicU64,
}

/// See the module.
#[derive(Clone)]
pub struct Tap {
    /// Where to connect to.
    pub address: SocketAddr,
    state: Arc<State>,
}

impl Tap {
    /// A line to `target`, which may change later.
    pub fn new(target: Option<SocketAddr>) -> Self {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        let state = Arc::new(State { target: Mutex::new(target), ..State::default() });
        let for_thread = state.clone();
        thread::spawn(move || {
            for near in socket.incoming() {
                let Ok(near) = near else { break };
                if for_thread.stop.load(Ordering::SeqCst) {
                    break;
                }
                let target = *for_thread.target.lock().unwrap();
                let far = target.map(|to| TcpStream::connect_timeout(&to, Duration::from_secs(2)));
                // Refused, cut, or nobody there: the connection just ends.
                if let (Some(Ok(far)), false) = (far, for_thread.down.load(Ordering::SeqCst)) {
                    for_thread.relay(near, far);
                }
            }
        });
        Self { address, state }
    }

    /// New connections go there.
    pub fn retarget(&self, target: SocketAddr) {
        *self.state.target.lock().unwrap() = Some(target);
    }

    /// Called at every message boundary, with the number of frames before it, and the way
    /// of the frame that comes next, with its header and payload; what it returns says whether that frame may pass. If not, the
    /// line is cut there.
    pub fn at_each_frame(&self, deed: impl FnMut(u64, Way, &[u8]) -> bool + Send + 'static) {
        *self.state.deed.lock().unwrap() = Some(Box::new(deed));
    }

    /// Nothing is done at boundaries any more.
    pub fn let_pass(&self) {
        *self.state.deed.lock().unwrap() = None;
    }

    /// Ends all connections and takes no new ones until [`Tap::mend`].
    pub fn cut(&self) {
        self.state.cut();
    }

    /// Takes connections again.
    pub fn mend(&self) {
        self.state.down.store(false, Ordering::SeqCst);
    }

    /// At most so many bytes a second.
    pub fn limit(&self, rate: u64) {
        self.state.rate.store(rate, Ordering::SeqCst);
    }

    /// Each frame waits at random up to this, each connection for itself.
    pub fn jitter(&self, most: Duration) {
        self.state.jitter.store(most.as_micros() as u64, Ordering::SeqCst);
    }

    /// Frames that passed.
    pub fn frames(&self) -> u64 {
        self.state.frames.load(Ordering::SeqCst)
    }

    /// Bytes of frames that passed.
    pub fn bytes(&self) -> u64 {
        self.state.bytes.load(Ordering::SeqCst)
    }

    /// Frames and bytes by way and kind.
    pub fn kinds(&self) -> BTreeMap<(Way, u8), (u64, u64)> {
        self.state.kinds.lock().unwrap().clone()
    }
}

impl State {
    fn cut(&self) {
        self.down.store(true, Ordering::SeqCst);
        for socket in self.sockets.lock().unwrap().drain(..) {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    fn relay(self: &Arc<Self>, near: TcpStream, far: TcpStream) {
        let _ = (near.set_nodelay(true), far.set_nodelay(true));
        let clone = |socket: &TcpStream| socket.try_clone().unwrap();
        self.sockets.lock().unwrap().extend([clone(&near), clone(&far)]);
        let ways = [(Way::Out, clone(&near), clone(&far)), (Way::Back, far, near)];
        for (way, from, to) in ways {
            let state = self.clone();
            thread::spawn(move || {
                // Its end, whatever the reason, ends both ways.
                let _ = state.pump(way, &from, &to);
                let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
            });
        }
    }

    fn pump(&self, way: Way, mut from: &TcpStream, mut to: &TcpStream) -> io::Result<()> {
        let head = GREETING + if way == Way::Out { PREAMBLE } else { 0 };
        let mut random = super::Random(self.frames.load(Ordering::SeqCst) + way as u64);
        let mut frame = vec![0; head];
        from.read_exact(&mut frame)?;
        to.write_all(&frame)?;
        loop {
            frame.resize(HEADER, 0);
            from.read_exact(&mut frame)?;
            let length = u32::from_le_bytes(frame[4..8].try_into().unwrap());
            frame.resize(HEADER + length as usize, 0);
            from.read_exact(&mut frame[HEADER..])?;
            {
                // One boundary at a time, so that the numbers mean something; and whoever takes the
                // deed away finds the line as it left it.
                let mut deed = self.deed.lock().unwrap();
                let number = self.frames.load(Ordering::SeqCst);
                if !deed.as_mut().is_none_or(|deed| deed(number, way, &frame)) {
                    self.cut();
                } else if !self.down.load(Ordering::SeqCst) {
                    self.frames.fetch_add(1, Ordering::SeqCst);
                }
            }
            if self.down.load(Ordering::SeqCst) {
                return Ok(());
            }
            let jitter = self.jitter.load(Ordering::SeqCst);
            if jitter > 0 {
                thread::sleep(Duration::from_micros(random.below(jitter)));
            }
            let rate = self.rate.load(Ordering::SeqCst);
            if rate > 0 {
                thread::sleep(Duration::from_secs_f64(frame.len() as f64 / rate as f64));
            }
            self.bytes.fetch_add(frame.len() as u64, Ordering::SeqCst);
            let mut kinds = self.kinds.lock().unwrap();
            let entry = kinds.entry((way, frame[0])).or_default();
            entry.0 += 1;
            entry.1 += frame.len() as u64;
            drop(kinds);
            to.write_all(&frame)?;
        }
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        // The last handle wakes the listener, which then ends.
        if Arc::strong_count(&self.state) <= 2 {
            self.state.stop.store(true, Ordering::SeqCst);
            let _ = TcpStream::connect(self.address);
        }
    }
}
